"""The dry run: an experiment's real program, compiled for hardware that is not there.

    python -m deepseek_jax.dry_run --config=experiments/deepseek_v3_671b.py --topology=v5p:8x8x16

programs     the jitted functions with abstract arguments
topologies   devices that are not there, by name
compiled     memory, FLOPs, traffic and roofline of a compiled program
hlo, branches, collectives, hbm, program_flops, roofline   how those are counted
"""

"""Learning rate × batch size on the smallest rung of the V3-style ladder, at equal tokens, with paired seeds.

    python -m deepseek_jax.launch --sweep=experiments/sweeps/v3_lr_batch.py --slots=2

27 runs of 0.41M tokens on 188,396 parameters. Hardware: two CPU cores, one for each slot; 29 minutes while other work
took most of both (a run 81 to 156 s, compilation included), jax 0.10.2.

Measured before the balance loss was summed over layers, held-out bits per byte, mean of the seeds 0, 1, 2:

    batch (sequences)     8      16      32
    peak 0.003        3.648   3.853   4.135
    peak 0.01         3.553   3.685   3.873
    peak 0.03         3.628   3.759   3.898

Seeds differ by more than the settings do (seed 1 is worse at every point, by 0.05 to 0.43), but by much the same at
every setting. With every seed 0.01 beats 0.003 at every batch, and 8 sequences beat 16 at 0.01, by 0.139, 0.121 and
0.137. At 32 sequences 0.03 is better with two seeds of three.
"""

from deepseek_jax.launch import Run, Sweep, cross, grid, paired_seeds

SEQ_LEN = 128
TOKENS = 400 * 8 * SEQ_LEN
HELD_OUT_ROWS = 512  # the same sequences for every batch

PEAK = "pretrain.train.optimizer.learning_rate.peak"


def batch(size: int) -> Run:
    """A larger batch takes fewer steps; the schedule keeps its shape."""
    steps = TOKENS // (size * SEQ_LEN)
    return Run(
        f"batch_{size}",
        {
            "pretrain.batch_size": size,
            "pretrain.train.steps": steps,
            "pretrain.train.optimizer.learning_rate.warmup_steps": steps // 10,
            "pretrain.train.eval_batches": HELD_OUT_ROWS // size,
        },
    )


def get_sweep() -> Sweep:
    variants = cross(grid({PEAK: (3e-3, 1e-2, 3e-2)}), map(batch, (8, 16, 32)))
    return Sweep("experiments/v3_style_tiny.py", paired_seeds(variants, (0, 1, 2)), x=PEAK, by="pretrain.batch_size")

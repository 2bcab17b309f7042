"""Learning rate × batch size on the smallest rung of the V3-style ladder, at equal tokens, with paired seeds.

    python -m deepseek_jax.launch --sweep=experiments/sweeps/v3_lr_batch.py --slots=2

Hardware: two CPU cores.
"""

from deepseek_jax.launch import Run, Sweep, cross, grid, paired_seeds

SEQ_LEN = 128
TOKENS = 400 * 8 * SEQ_LEN
HELD_OUT_ROWS = 512  # the same rows whatever the batch

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

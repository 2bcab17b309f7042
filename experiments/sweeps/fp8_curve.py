"""V3's comparison of training in FP8 and in bfloat16 (Appendix B.1), small, beside what the recipe's choices are there to prevent.

    python -m deepseek_jax.launch --sweep=experiments/sweeps/fp8_curve.py --slots=2

Same data and seed in every run. Those called outliers start from weights with four channels 64 times as large, which computes the same function.
"""

from deepseek_jax.launch import Run, Sweep

HALF = {"precision.name": "bfloat16"}
OUTLIERS = {"stages": ("outliers", "pretrain")}
PER_TENSOR = {f"precision.format.{operand}.scope": "tensor" for operand in ("input", "weight", "gradient")}

RUNS = {
    "float32": {"precision.name": "float32"},
    "bfloat16": HALF,
    "fp8": {},
    "fp8-e5m2-gradients": {"precision.format.gradient.format": "float8_e5m2"},
    "fp8-no-promotion": {"precision.format.accumulation.promote_every": None, "precision.format.accumulation.accumulator": "fp22_register"},
    "outliers-bfloat16": OUTLIERS | HALF,
    "outliers-fp8": OUTLIERS,
    "outliers-fp8-per-tensor": OUTLIERS | PER_TENSOR,
}


def get_sweep() -> Sweep:
    return Sweep("experiments/fp8_curve.py", [Run(name, overrides) for name, overrides in RUNS.items()])

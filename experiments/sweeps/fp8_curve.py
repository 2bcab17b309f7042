"""V3's comparison of training in FP8 and in bfloat16 (Appendix B.1), small, beside what the recipe's choices are there to prevent.

    python -m deepseek_jax.launch --sweep=experiments/sweeps/fp8_curve.py --slots=2

Same data and seed in every run. Those called outliers start from weights with four channels 64 times as large, which computes the same function.

Hardware: two CPU cores, one for each slot; 8 minutes (a run 51 to 176 s, compilation included), jax 0.10.2.
Measured, training loss smoothed (EMA 0.9) against the bfloat16 run, after the 20 steps of warm-up, mean and largest difference in percent
(notebooks/fp8.ipynb draws the curves):

    float32                   -0.047   0.126
    fp8                        0.156   0.279     V3 reports less than 0.25
    fp8-e5m2-gradients         0.130   0.199
    fp8-no-promotion          -0.036   0.183
    outliers-fp8               0.039   0.398     against outliers-bfloat16, like the next
    outliers-fp8-per-tensor    0.096   0.371

With batches twice as large float32 comes within 0.034, FP8 lies 0.317 above on average and 0.528 at most, with E5M2 gradients 0.147 and 0.356: one
seed and 120 steps measure the sign of the difference, not its size. In 360 steps (--config.pretrain.train.steps=360) it grows: 0.474 on average over
the last 120, 0.762 at most.

The controls do not stand out at this size and length. Without promotion means `fp22_register` here: `hopper_fp22`
takes a CPU some three times as long and was not trained with. The learning rate is small on purpose: at ten times it any two runs that round
differently drift apart by 1%.
"""

from deepseek_jax.launch import Run, Sweep

LINEARS = ("precision.format", "precision.attention_output")

HALF = {"precision.name": "bfloat16"}
E5M2_GRADIENTS = {f"{linear}.gradient.format": "float8_e5m2" for linear in LINEARS}
NO_PROMOTION = {f"{linear}.accumulation.{field}": value for linear in LINEARS for field, value in (("promote_every", None), ("accumulator", "hopper_fp22"))}
OUTLIERS = {"stages": ("outliers", "pretrain")}
PER_TENSOR = {f"{linear}.{operand}.scope": "tensor" for linear in LINEARS for operand in ("input", "weight", "gradient")}

RUNS = {
    "fp8-no-promotion": NO_PROMOTION,
    "bfloat16": HALF,
    "fp8": {},
    "float32": {"precision.name": "float32"},
    "fp8-e5m2-gradients": E5M2_GRADIENTS,
    "outliers-bfloat16": OUTLIERS | HALF,
    "outliers-fp8": OUTLIERS,
    "outliers-fp8-per-tensor": OUTLIERS | PER_TENSOR,
} | {f"{name}-seed-{seed}": fields | {"seed": seed} for seed in (1, 2) for name, fields in (("bfloat16", HALF), ("fp8", {}), ("float32", {"precision.name": "float32"}))}


def get_sweep() -> Sweep:
    return Sweep("experiments/fp8_curve.py", [Run(name, overrides) for name, overrides in RUNS.items()])

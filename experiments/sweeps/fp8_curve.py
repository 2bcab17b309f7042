"""V3's comparison of training in FP8 and in bfloat16 (Appendix B.1) at small size, and the same with each choice of the
recipe taken away.

    python -m deepseek_jax.launch --sweep=experiments/sweeps/fp8_curve.py --slots=2

Same data and seed in the runs that are compared. Those called outliers start from weights with four channels 64 times
as large, which computes the same function. The run without promotion sums as a Hopper tensor core does, emulated, and
takes 49 minutes; the others 3 to 9.

Hardware: two CPU cores, one for each slot; a little over an hour, jax 0.10.2. Measured, training loss smoothed (EMA
0.9) against the bfloat16 run of the same seed, after the 20 steps of warm-up, in percent: mean, largest difference,
largest in the last 110 steps (notebooks/fp8.ipynb draws the curves):

    float32                    0.038   0.143   0.143
    fp8                       -0.029   0.272   0.239     V3 reports less than 0.25
    seeds 1 and 2, float32     0.021   0.094   0.094
                              -0.192   0.378   0.327
    seeds 1 and 2, fp8         0.032   0.432   0.292     FP8 is the lower one where the difference is largest
                              -0.228   0.795   0.370
    mean of 3 seeds, float32  -0.044   0.132   0.077
    mean of 3 seeds, fp8      -0.075   0.259   0.109
    fp8-e5m2-gradients        -0.073   0.221   0.221
    fp8-no-promotion           0.048   0.251   0.085
    outliers-fp8              -0.293   0.974   0.354     against outliers-bfloat16, like the next
    outliers-fp8-per-tensor    0.284   1.013   1.013     0.91 at the end, where tiles and blocks are at 0.22
    narrow-heads-fp8           0.439   0.697   0.697     against narrow-heads-bfloat16

Runs that differ in rounding alone drift apart as far as float32 and bfloat16 do in seed 2.

Heads are as wide as V3's, 128 + 64 numbers. Their width, the batch and the steps were chosen after a first network with
heads of 32 + 16 (narrow-heads, one seed) had failed: FP8 costs it 0.4 almost from the start. The learning rate is small
on purpose: at ten times it any two runs that round differently drift apart by 1%.
"""

from deepseek_jax.launch import Run, Sweep

LINEARS = ("precision.quantization", "precision.attention_output")

HALF, FULL = {"precision.name": "bfloat16"}, {"precision.name": "float32"}
E5M2_GRADIENTS = {f"{linear}.gradient.dtype": "float8_e5m2" for linear in LINEARS}
NO_PROMOTION = {
    f"{linear}.accumulation.{field}": value
    for linear in LINEARS
    for field, value in (("promote_every", None), ("accumulator", "hopper_fp22"))
}
NARROW_HEADS = {
    f"model.attention.{field}": n
    for field, n in (("num_heads", 4), ("qk_nope_head_dim", 32), ("qk_rope_head_dim", 16), ("v_head_dim", 32))
}
OUTLIERS = {"stages": ("outliers", "pretrain")}
PER_TENSOR = {
    f"{linear}.{operand}.scope": "tensor" for linear in LINEARS for operand in ("input", "weight", "gradient")
}

RUNS = {
    "fp8-no-promotion": NO_PROMOTION,
    "bfloat16": HALF,
    "fp8": {},
    "float32": FULL,
    "fp8-e5m2-gradients": E5M2_GRADIENTS,
    "outliers-bfloat16": OUTLIERS | HALF,
    "outliers-fp8": OUTLIERS,
    "outliers-fp8-per-tensor": OUTLIERS | PER_TENSOR,
    "narrow-heads-bfloat16": NARROW_HEADS | HALF,
    "narrow-heads-fp8": NARROW_HEADS,
}
OTHER_SEEDS = {
    f"{name}-seed-{seed}": RUNS[name] | {"seed": seed} for seed in (1, 2) for name in ("bfloat16", "fp8", "float32")
}


def get_sweep() -> Sweep:
    return Sweep("experiments/fp8_curve.py", [Run(name, overrides) for name, overrides in (RUNS | OTHER_SEEDS).items()])

"""Distance between a kernel's result and the reference, and the bounds of what is accepted."""

from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.qtensor import QTensor, dequantize, tiles

PIECE = (128, 128)
# Bounds of `difference`, against the float32 product of the very operands that were multiplied: against operands that
# were not quantized, DeepGEMM's 1e-3, 6.6e-4 would be due to quantizing and a wrong tile among thousands would pass.
# Rounding to bfloat16 moves a number by 2^-8 of it at most: 2^-17 = 7.6e-6. Hopper's accumulator, emulated and promoted
# every 128, adds 8.5e-9 on normal numbers, not promoted 2.6e-6 at K = 4096: the bound for float32 lies between.
ROUNDED, SUMMED = 1e-5, 5e-7
# A GPU's division is off by up to 2 units in the last place: one number in many thousands becomes its neighbor in E4M3.
QUANTIZED = 1e-5
ATTENDED = 1e-4  # scores, their gradients and the residuals are rounded to bfloat16 one after another


@jax.jit
def difference(x: jax.Array, y: jax.Array) -> jax.Array:
    """The largest distance between x and y, [..., M, N], in any 128 × 128 of their numbers: half the relative squared
    error.

    The distance is DeepGEMM's calc_diff, 1 - 2⟨x, y⟩ / (⟨x, x⟩ + ⟨y, y⟩), written as |x - y|² / (⟨x, x⟩ + ⟨y, y⟩),
    which float32 holds where it is small. It is infinite where a number is NaN, and 0 where both are zero.
    """
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    squares = lambda z: jnp.sum(tiles(jnp.square(z), PIECE), axis=(-3, -1))
    off, size = squares(x - y), squares(x) + squares(y)
    pieces = jnp.where(off == 0, 0.0, off / size)
    return jnp.max(jnp.where(jnp.isnan(pieces), jnp.inf, pieces))


def allowed(result: jax.Array | QTensor) -> float:
    """The bound of `difference` for the result of a product, by its dtype, or of a quantization."""
    return QUANTIZED if isinstance(result, QTensor) else SUMMED if result.dtype == jnp.float32 else ROUNDED


def disagreement(got: Any, wanted: Any, bound: float | None = None) -> str | None:
    """Says where two trees of results differ by more than `bound`, by default `allowed`; None if they agree."""
    is_result = lambda leaf: isinstance(leaf, QTensor)
    for index, (x, y) in enumerate(
        zip(*(jax.tree.leaves(tree, is_leaf=is_result) for tree in (got, wanted)), strict=True)
    ):
        if x.shape != y.shape:
            return f"result {index} has the shape {x.shape} instead of {y.shape}"
        numbers = (dequantize(z) if isinstance(z, QTensor) else z for z in (x, y))
        off, most = float(difference(*numbers)), allowed(x) if bound is None else bound
        if not off <= most:
            where = f"result {index} of {x.shape} is off by {off:.1e} in its worst {PIECE[0]} × {PIECE[1]} numbers"
            return f"{where}, where {most:.0e} is allowed"
    return None

"""Whether what was computed is right, which comes before how fast it was."""

import jax
import jax.numpy as jnp

from kernels_pallas.bench.shapes import Shape
from kernels_pallas.quantize.reference import tiles

PIECE = (128, 128)
# Bounds of `difference`, against the float32 product of the very operands that were multiplied: against operands that were not quantised, DeepGEMM's 1e-3,
# 6.6e-4 would be due to quantising and a wrong tile among thousands would pass. Rounding to bfloat16 moves a number by 2^-8 of it at most: 2^-17 = 7.6e-6.
# Hopper's accumulator, emulated and promoted every 128, adds 8.5e-9 on normal numbers, not promoted 2.6e-6 at K = 4096: the bound for float32 lies between.
ROUNDED, SUMMED = 1e-5, 5e-7
QUANTIZED = 1e-5  # a GPU's division is off by up to 2 units in the last place: one number in many thousands becomes its neighbour in E4M3
ATTENDED = 1e-4  # scores, their gradients and what is saved are rounded to bfloat16 one after another


@jax.jit
def difference(x: jax.Array, y: jax.Array) -> jax.Array:
    """DeepGEMM's calc_diff, 1 - 2⟨x, y⟩ / (⟨x, x⟩ + ⟨y, y⟩), of those 128 × 128 of [..., M, N] where it is largest: half the relative squared error.

    Written as |x - y|² over the same, of which float32 keeps the small ones; infinite where something is not a number, 0 where both are zero.
    """
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    squares = lambda z: jnp.sum(tiles(jnp.square(z), PIECE), axis=(-3, -1))
    off, size = squares(x - y), squares(x) + squares(y)
    pieces = jnp.where(off == 0, 0.0, off / size)
    return jnp.max(jnp.where(jnp.isnan(pieces), jnp.inf, pieces))


def product(shape: Shape, a: jax.Array, b: jax.Array) -> jax.Array:
    """a bᵀ of each group in float32, [m, n], [groups · m, n] or, for a grouped weight gradient, [groups, m, n], by one product of XLA's for each group:
    a [groups · m, k] and b [groups, n, k] for "grouped", else [m, groups · k] and [n, groups · k]."""
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    if shape.operation == "grouped":
        y_GMN = _products(a.reshape(shape.groups, shape.m, shape.k), b)
        return y_GMN.reshape(-1, shape.n)
    y_GMN = _products(*(x.reshape(x.shape[0], shape.groups, shape.k).swapaxes(0, 1) for x in (a, b)))
    return y_GMN if "grouped" in shape.operation else y_GMN[0]


def _products(a_GMK: jax.Array, b_GNK: jax.Array) -> jax.Array:
    return jnp.einsum("GMK,GNK->GMN", a_GMK, b_GNK, precision=jax.lax.Precision.HIGHEST)

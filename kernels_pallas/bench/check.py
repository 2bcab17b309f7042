"""The float32 product with which a benchmarked product is compared."""

import jax
import jax.numpy as jnp

from kernels_pallas.bench.shapes import Shape


def product(shape: Shape, a: jax.Array, b: jax.Array) -> jax.Array:
    """a bᵀ of each group in float32, by one product of XLA's for each group.

    For "grouped" a is [groups · m, k] and b [groups, n, k], and the result [groups · m, n]. Else a is [m, groups · k]
    and b [n, groups · k]; the result is [m, n], or [groups, m, n] for a grouped weight gradient.
    """
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    if shape.operation == "grouped":
        y_GMN = _products(a.reshape(shape.groups, shape.m, shape.k), b)
        return y_GMN.reshape(-1, shape.n)
    y_GMN = _products(*(x.reshape(x.shape[0], shape.groups, shape.k).swapaxes(0, 1) for x in (a, b)))
    return y_GMN if "grouped" in shape.operation else y_GMN[0]


def _products(a_GMK: jax.Array, b_GNK: jax.Array) -> jax.Array:
    return jnp.einsum("GMK,GNK->GMN", a_GMK, b_GNK, precision=jax.lax.Precision.HIGHEST)

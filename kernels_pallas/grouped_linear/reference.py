"""Products of contiguous groups of rows by their definition, `lax.ragged_dot`. Devices without a kernel run it too.

XLA has a kernel for it on TPUs. Elsewhere XLA computes it as one masked product for each group, over all rows.
"""

import jax

_OVER_ROWS = jax.lax.RaggedDotDimensionNumbers(
    (((0,), (0,)), ((), ())), lhs_ragged_dimensions=(0,), rhs_group_dimensions=()
)


def grouped_product(x_RK: jax.Array, w: jax.Array, sizes_G: jax.Array, alignment: int, transposed: bool) -> jax.Array:
    """Rows of group g times w[g], w [G, K, N], or times w[g] transposed, w [G, N, K]: [R, N]; zero past the last
    group."""
    del alignment
    return jax.lax.ragged_dot(x_RK, w.mT if transposed else w, sizes_G)


def grouped_weight_gradient(x_RD: jax.Array, dy_RF: jax.Array, sizes_G: jax.Array, alignment: int) -> jax.Array:
    """x[group g] transposed times dy[group g]: [G, D, F]; zero for an empty group."""
    del alignment
    return jax.lax.ragged_dot_general(x_RD, dy_RF, sizes_G, _OVER_ROWS)

"""The product of two quantized matrices by its definition, in plain jnp. Devices without a kernel run it too."""

import math

import jax
import jax.numpy as jnp

from kernels_pallas._compat import zeros
from kernels_pallas.matmul.accumulation import Accumulation, partial_product
from kernels_pallas.qtensor import QTensor, spread


def matmul(a_MK: QTensor, b_NK: QTensor, accumulation: Accumulation, out_dtype: jnp.dtype) -> jax.Array:
    """a bᵀ [M, N] = Σ over stretches of K of (values of a · values of b) · scale of a · scale of b. The stretches are
    added in float32, in order.

    A stretch ends where a scale changes, and after `promote_every` numbers at the latest. If scales change more often
    than sums are promoted, they multiply the numbers that the narrow accumulator adds instead.
    """
    rows, columns, depth = a_MK.shape[0], b_NK.shape[0], a_MK.shape[1]
    interval = min(accumulation.promote_every or depth, depth)
    changes = [size for size in (a_MK.tile[1], b_NK.tile[1]) if size < depth]
    scale_after = not changes or math.gcd(*changes) >= interval
    stretch = math.gcd(interval, *changes) if scale_after else interval

    def operand(q: QTensor) -> tuple[jax.Array, jax.Array]:
        """The numbers to multiply, [P, R, stretch], and the factor of each stretch's sum, [P, R]."""
        values, count = q.values.astype(jnp.float32), -(-depth // stretch)
        scales = spread(q.scales, q.tile, q.shape)
        multiplied, after = (
            (values, scales[:, ::stretch]) if scale_after else (values * scales, jnp.ones((values.shape[0], count)))
        )
        multiplied = jnp.pad(multiplied, ((0, 0), (0, count * stretch - depth)))
        return multiplied.reshape(-1, count, stretch).swapaxes(0, 1), after.T

    def add(total_MN, operands):
        (a_Mk, a_M), (b_Nk, b_N) = operands
        sum_MN = partial_product(a_Mk, b_Nk, accumulation.accumulator)
        return total_MN + sum_MN * a_M[:, None] * b_N[None, :], None  # FP8: promotion

    operands = (operand(a_MK), operand(b_NK))
    total_MN = zeros((rows, columns), a_MK, b_NK)
    if depth <= stretch:
        total_MN = add(total_MN, jax.tree.map(lambda x: x[0], operands))[0]
    else:
        total_MN = jax.lax.scan(add, total_MN, operands)[0]
    return total_MN.astype(out_dtype)

"""The product of two quantized matrices by its definition, in plain jnp; also what runs where there is no kernel."""

import math

import jax
import jax.numpy as jnp

from kernels_pallas._compat import zeros
from kernels_pallas.matmul.accumulation import Accumulation, partial_product
from kernels_pallas.qtensor import QTensor, spread


def matmul(a_MK: QTensor, b_NK: QTensor, accumulation: Accumulation, out_dtype: jnp.dtype) -> jax.Array:
    """a bᵀ [M, N] = Σ over parts of K of (values of a · values of b) · scale of a · scale of b, the parts added in
    float32 in order.

    A part ends where a scale changes and after `promote_every` numbers at the latest. With scales finer than
    `promote_every` there is no promotion at which to apply them: then they multiply the numbers that the narrow
    accumulator adds.
    """
    rows, columns, depth = a_MK.shape[0], b_NK.shape[0], a_MK.shape[1]
    interval = min(accumulation.promote_every or depth, depth)
    changes = [size for size in (a_MK.tile[1], b_NK.tile[1]) if size < depth]
    scale_after = not changes or math.gcd(*changes) >= interval
    part = math.gcd(interval, *changes) if scale_after else interval

    def operand(q: QTensor) -> tuple[jax.Array, jax.Array]:
        """-> what is multiplied, [P, R, part], and what each part's sum is multiplied with, [P, R]."""
        values, parts = q.values.astype(jnp.float32), -(-depth // part)
        scales = spread(q.scales, q.tile, q.shape)
        multiplied, after = (
            (values, scales[:, ::part]) if scale_after else (values * scales, jnp.ones((values.shape[0], parts)))
        )
        multiplied = jnp.pad(multiplied, ((0, 0), (0, parts * part - depth)))
        return multiplied.reshape(-1, parts, part).swapaxes(0, 1), after.T

    def add(total_MN, operands):
        (a_Mk, a_M), (b_Nk, b_N) = operands
        return total_MN + partial_product(a_Mk, b_Nk, accumulation.accumulator) * a_M[:, None] * b_N[None, :], None

    operands = (operand(a_MK), operand(b_NK))
    total_MN = zeros((rows, columns), a_MK, b_NK)
    if depth <= part:
        total_MN = add(total_MN, jax.tree.map(lambda x: x[0], operands))[0]
    else:
        total_MN = jax.lax.scan(add, total_MN, operands)[0]
    return total_MN.astype(out_dtype)

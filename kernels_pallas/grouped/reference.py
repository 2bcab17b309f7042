"""Products of contiguous groups of rows, each with a matrix of its own, by their definition. They also run on
devices without a kernel."""

import functools

import jax
import jax.numpy as jnp

from kernels_pallas._compat import zeros
from kernels_pallas.grouped.layout import choose_block, group_of, pad_groups, take_quantized, take_rows
from kernels_pallas.matmul.accumulation import Accumulation
from kernels_pallas.matmul.reference import matmul
from kernels_pallas.qtensor import QTensor, retile


def grouped_matmul(
    a_RK: QTensor, b_GNK: QTensor, sizes_G: jax.Array, alignment: int, accumulation: Accumulation, out_dtype: jnp.dtype
) -> jax.Array:
    """Rows of group g times b[g] transposed: [R, N]; zero past the last group."""
    num_rows, num_groups = a_RK.shape[0], b_GNK.shape[0]
    block = alignment if alignment > 1 else choose_block(num_rows, num_groups)
    a_RK = retile(a_RK, a_RK.tile[1])
    padding = None if alignment == block else pad_groups(sizes_G, num_rows, block)
    a_PK = a_RK if padding is None else take_quantized(a_RK, padding.source_P)
    padded_G = sizes_G if padding is None else padding.sizes_G
    group_J = group_of(jnp.arange(0, a_PK.shape[0], block), padded_G)
    chosen_J = jnp.minimum(group_J, num_groups - 1)
    a_JbK, b_JNK = (
        jax.tree.map(lambda x: x.reshape(-1, block, x.shape[-1]), a_PK),
        jax.tree.map(lambda x: x[chosen_J], b_GNK),
    )
    y_JbN = jax.vmap(functools.partial(matmul, accumulation=accumulation, out_dtype=out_dtype))(a_JbK, b_JNK)
    y_JbN = jnp.where((group_J < num_groups)[:, None, None], y_JbN, 0)
    y_PN = y_JbN.reshape(-1, y_JbN.shape[-1])
    return y_PN if padding is None else take_rows(y_PN, padding.target_R)


def grouped_weight_gradient(
    x_DP: QTensor, dy_FP: QTensor, sizes_G: jax.Array, alignment: int, accumulation: Accumulation, out_dtype: jnp.dtype
) -> jax.Array:
    """x[:, group g] times dy[:, group g] transposed: [G, D, F]; zero for an empty group. Sizes are multiples of
    `alignment`."""
    num_groups = sizes_G.shape[0]
    x_DP, dy_FP = (retile(q, min(q.tile[1], alignment)) for q in (x_DP, dy_FP))
    group_J = group_of(jnp.arange(0, x_DP.shape[1], alignment), sizes_G)
    # A narrow sum that runs across blocks is made over all of P, with zeros, which it adds exactly, outside the group.
    if accumulation.promote_every is None or accumulation.promote_every > alignment:
        return jax.vmap(
            lambda g: matmul(_masked(x_DP, group_J == g), _masked(dy_FP, group_J == g), accumulation, out_dtype)
        )(jnp.arange(num_groups))

    def add(total_GDF, operands):
        x_Dp, dy_Fp, group = operands
        return total_GDF.at[group].add(matmul(x_Dp, dy_Fp, accumulation, jnp.float32), mode="drop"), None

    blocks = jax.tree.map(lambda x: x.reshape(x.shape[0], group_J.size, -1).swapaxes(0, 1), (x_DP, dy_FP))
    total_GDF = zeros((num_groups, x_DP.shape[0], dy_FP.shape[0]), x_DP, dy_FP, sizes_G)
    return jax.lax.scan(add, total_GDF, (*blocks, group_J))[0].astype(out_dtype)


def _masked(q_RP: QTensor, inside_J: jax.Array) -> QTensor:
    """Values and scales with zeros outside the blocks of columns inside a group, so that a NaN stays in its group."""
    return jax.tree.map(lambda x: jnp.where(jnp.repeat(inside_J, x.shape[1] // inside_J.size), x, 0), q_RP)

"""Grouped matrix product: contiguous groups of rows, each with its own weight matrix; no row is ever dropped.

On TPU this is `lax.ragged_dot`, on NVIDIA Hopper in bfloat16 a kernel. Elsewhere XLA computes the former as a masked
product over every group, so there the groups are padded to blocks and multiplied block by block as one batched product.
"""

import functools

import jax
import jax.numpy as jnp

from kernels_pallas import grouped_linear
from kernels_pallas.grouped.layout import choose_block, group_of
from kernels_pallas.grouped_linear.api import kernel_alignment
from kernels_pallas.implementations import preferred


def alignment(rows: int, num_groups: int, device: str, dtype: jnp.dtype) -> int:
    """The number that group sizes are padded to a multiple of, for `rows` rows in `num_groups` groups; 1 means no
    padding.

    Where blocks are multiplied as one batch, it is about half a mean group on a CPU and a quarter on a GPU: a smaller
    block wastes fewer padded rows, a larger one reads each weight matrix less often, which costs a GPU more.
    """
    if device == "tpu":
        return 1
    if of_kernel := kernel_alignment(device, dtype):
        return of_kernel
    share, largest = (2, 128) if device == "cpu" else (4, 1024)
    return choose_block(rows, num_groups, share=share, largest=largest)


def grouped_matmul(
    x_RD: jax.Array,
    w_EDF: jax.Array,
    group_sizes_E: jax.Array,
    alignment: int,
    precision: jax.lax.Precision | None = None,
    device: str = "cpu",
) -> jax.Array:
    """Rows of group e times w[e]: [R, D] x [E, D, F] -> [R, F], both of one dtype, on the kind of `device` that it is
    compiled for.

    Groups lie one after another from row 0. Every group size, and R, is a multiple of `alignment`. Rows past the last
    group give zero with alignment 1 and are undefined otherwise.
    """
    if alignment == 1:
        return jax.lax.ragged_dot(x_RD, w_EDF, group_sizes_E, precision=precision)
    if kernel_alignment(device, x_RD.dtype):
        return grouped_linear(x_RD, w_EDF, group_sizes_E, alignment=alignment, implementation=preferred(device))
    expert_J = group_of(jnp.arange(0, x_RD.shape[0], alignment), group_sizes_E)
    expert_J = jnp.minimum(expert_J, w_EDF.shape[0] - 1)  # trailing blocks hold no rows; any weights will do
    return _blocked_matmul(x_RD, w_EDF, expert_J, precision)


def _blocks(x_RD: jax.Array, expert_J: jax.Array) -> jax.Array:
    return x_RD.reshape(expert_J.size, -1, x_RD.shape[1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _blocked_matmul(x_RD: jax.Array, w_EDF: jax.Array, expert_J: jax.Array, precision) -> jax.Array:
    y_JbF = jnp.einsum("jbd,jdf->jbf", _blocks(x_RD, expert_J), w_EDF[expert_J], precision=precision)
    return y_JbF.reshape(x_RD.shape[0], w_EDF.shape[2])


def _blocked_matmul_fwd(x_RD, w_EDF, expert_J, precision):
    """Keeps x as it came: what two products share is kept once."""
    return _blocked_matmul(x_RD, w_EDF, expert_J, precision), (x_RD, w_EDF, expert_J)


def _blocked_matmul_bwd(precision, residuals, dy_RF):
    x_RD, w_EDF, expert_J = residuals
    dy_JbF = _blocks(dy_RF, expert_J)
    dx_JbD = jnp.einsum("jbf,jdf->jbd", dy_JbF, w_EDF[expert_J], precision=precision)
    dw_JDF = jnp.einsum("jbd,jbf->jdf", _blocks(x_RD, expert_J), dy_JbF, precision=precision)
    # Blocks of one expert are summed by a product with a one-hot matrix: far faster than a scatter on CPU.
    owner_EJ = (expert_J[None, :] == jnp.arange(w_EDF.shape[0])[:, None]).astype(dw_JDF.dtype)
    dw_EDF = jnp.einsum("ej,jdf->edf", owner_EJ, dw_JDF, precision=precision)
    return dx_JbD.reshape(x_RD.shape), dw_EDF.astype(w_EDF.dtype), None


_blocked_matmul.defvjp(_blocked_matmul_fwd, _blocked_matmul_bwd)

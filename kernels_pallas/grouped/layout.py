"""Groups of rows that lie one after another, moved apart so that each starts at a multiple of a block."""

import flax.struct
import jax
import jax.numpy as jnp

from kernels_pallas.qtensor import QTensor, retile


@flax.struct.dataclass
class Padding:
    """R rows in G groups, and the P rows of the padded layout."""

    source_P: jax.Array  # int32: which row lies here; R for none
    target_R: jax.Array  # int32: where a row went; P for a row past the last group
    sizes_G: jax.Array  # int32, multiples of the block


def pad_groups(sizes_G: jax.Array, num_rows: int, block: int) -> Padding:
    """The layout in which each group is a multiple of `block` rows long; P suits any distribution over the groups, of
    which no more than there are rows have any."""
    padded_rows = -(-(num_rows + min(sizes_G.shape[0], num_rows) * (block - 1)) // block) * block
    padded_G = -(-sizes_G // block) * block
    ends_G, padded_ends_G = jnp.cumsum(sizes_G), jnp.cumsum(padded_G)
    row_R = jnp.arange(num_rows, dtype=jnp.int32)
    group_R = jnp.minimum(group_of(row_R, sizes_G), sizes_G.shape[0] - 1)
    shift_G = (padded_ends_G - padded_G) - (ends_G - sizes_G)
    target_R = jnp.where(row_R < ends_G[-1], row_R + shift_G[group_R], padded_rows).astype(jnp.int32)
    source_P = jnp.full(padded_rows, num_rows, jnp.int32).at[target_R].set(row_R, mode="drop")
    return Padding(source_P, target_R, padded_G)


def group_of(row_R: jax.Array, sizes_G: jax.Array) -> jax.Array:
    """Which group each row belongs to, int32; G for rows past the last."""
    return jnp.sum(row_R[:, None] >= jnp.cumsum(sizes_G)[None, :], axis=1, dtype=jnp.int32)


def take_rows(x_RD: jax.Array, rows: jax.Array) -> jax.Array:
    """x[rows], zero where the index is R or more."""
    return jnp.take(x_RD, rows, axis=0, mode="fill", fill_value=0)


def take_quantized(q_RD: QTensor, rows: jax.Array) -> QTensor:
    """The rows of a QTensor, with a scale for each row and tile of columns."""
    q_RD = retile(q_RD, q_RD.tile[1])
    return QTensor(take_rows(q_RD.values, rows), take_rows(q_RD.scales, rows), q_RD.tile)

"""Padding of groups: rows that lie one group after another are moved apart, so that each group starts at a multiple of
a block.

Group g's rows follow those of group g - 1, from row 0 on; rows past the last group belong to none. Every move is a
gather with indices that may be out of range, which stand for a row of zeros.
"""

import flax.struct
import jax
import jax.numpy as jnp

from kernels_pallas.qtensor import QTensor, retile, round_up


@flax.struct.dataclass
class Padding:
    """R rows in G groups, and the P rows of the padded layout."""

    source_P: jax.Array  # int32: the row that lies here; R for none
    target_R: jax.Array  # int32: the place where a row went; P for a row past the last group
    sizes_G: jax.Array  # int32, multiples of the block


def padded_rows(num_rows: int, num_groups: int, block: int) -> int:
    """The rows that suffice once every group is padded to a multiple of `block`, for any distribution of `num_rows`
    rows over the groups: at most min(G, R) groups have rows, and each needs up to block - 1 more."""
    return round_up(num_rows + min(num_groups, num_rows) * (block - 1), block)


def choose_block(num_rows: int, num_groups: int, *, share: int = 2, smallest: int = 8, largest: int = 128) -> int:
    """The power of two at or below 1/`share` of a mean group, in rows, between `smallest` and `largest`.

    A smaller block wastes fewer padded rows; a larger one reads each group's matrix less often.
    """
    wanted = max(num_rows // (share * num_groups), 1)
    return min(largest, max(smallest, 1 << (wanted.bit_length() - 1)))


def pad_groups(sizes_G: jax.Array, num_rows: int, block: int) -> Padding:
    """The layout in which each group of `sizes_G`, int32 [G], is a multiple of `block` rows long."""
    num_padded = padded_rows(num_rows, sizes_G.shape[0], block)
    padded_G = round_up(sizes_G, block)
    ends_G, padded_ends_G = jnp.cumsum(sizes_G), jnp.cumsum(padded_G)
    row_R = jnp.arange(num_rows, dtype=jnp.int32)
    group_R = jnp.minimum(group_of(row_R, sizes_G), sizes_G.shape[0] - 1)
    shift_G = (padded_ends_G - padded_G) - (ends_G - sizes_G)
    target_R = jnp.where(row_R < ends_G[-1], row_R + shift_G[group_R], num_padded).astype(jnp.int32)
    source_P = jnp.full(num_padded, num_rows, jnp.int32).at[target_R].set(row_R, mode="drop")
    return Padding(source_P, target_R, padded_G)


def group_of(row_R: jax.Array, sizes_G: jax.Array) -> jax.Array:
    """The group of each row, int32; G for rows past the last group."""
    return jnp.sum(row_R[:, None] >= jnp.cumsum(sizes_G)[None, :], axis=1, dtype=jnp.int32)


def take_rows(x_RD: jax.Array, rows: jax.Array) -> jax.Array:
    """x[rows] along the first axis, for `rows` of any shape; zero where the index is R or more."""
    return x_RD.at[rows].get(mode="fill", fill_value=0)


def take_quantized(q_RD: QTensor, rows: jax.Array) -> QTensor:
    """The rows of a QTensor, with a scale for each row and tile of columns; zero where the index is R or more."""
    q_RD = retile(q_RD, q_RD.tile[1])
    return QTensor(take_rows(q_RD.values, rows), take_rows(q_RD.scales, rows), q_RD.tile)

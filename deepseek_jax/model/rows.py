"""Token vectors as rows sorted by expert, and back. Both moves are gathers, forward and backward: every row has one
source and every token's k-th choice at most one row, so that no scatter is needed."""

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class Layout:
    """N·K (token, choice) pairs in R rows. A pair may have no row and a row no pair: then its index is out of range."""

    rows_NK: jax.Array  # int32, the row of a token's k-th choice; R for none
    pairs_R: jax.Array  # int32, the pair n·K + k in a row; N·K for none


def invert(rows_NK: jax.Array, num_rows: int) -> Layout:
    """The layout in which pair (n, k) lies in row `rows_NK`; R or more means nowhere."""
    pair_J = jnp.arange(rows_NK.size, dtype=jnp.int32)
    rows_J = rows_NK.reshape(-1)
    rows_J = jnp.where(rows_J < num_rows, rows_J, num_rows + pair_J)  # nowhere is a different place for each
    pairs_R = jnp.full(num_rows, rows_NK.size, jnp.int32).at[rows_J].set(pair_J, mode="drop", unique_indices=True)
    return Layout(rows_NK, pairs_R)


def rank_in_group(groups_NK: jax.Array, num_groups: int) -> tuple[jax.Array, jax.Array]:
    """How many pairs before (n, k) are in its group, int32 [N, K], and the groups' sizes, int32 [G].

    Groups are numbered from 0; pairs of group G or more are counted nowhere.
    """
    groups_J = groups_NK.reshape(-1)
    order_J = jnp.argsort(groups_J, stable=True).astype(jnp.int32)
    sizes_G = jnp.sum(groups_J[:, None] == jnp.arange(num_groups), axis=0, dtype=jnp.int32)
    starts_G = jnp.concatenate([jnp.cumsum(sizes_G) - sizes_G, jnp.sum(sizes_G)[None]])  # the last: pairs of no group
    sorted_J = jnp.minimum(groups_J[order_J], num_groups)
    rank_of_sorted_J = jnp.arange(groups_J.size, dtype=jnp.int32) - starts_G[sorted_J]
    rank_J = jnp.zeros_like(rank_of_sorted_J).at[order_J].set(rank_of_sorted_J, unique_indices=True)
    return rank_J.reshape(groups_NK.shape), sizes_G


def lay_out(expert_ids_NK: jax.Array, num_experts: int, block: int) -> tuple[Layout, jax.Array]:
    """Rows sorted by expert, each expert's group padded to a multiple of `block`, and the padded group sizes, int32
    [E].

    R is N·K rounded up so that any distribution over experts fits: nothing is dropped. A pair of expert E or more has
    no row.
    """
    pairs = expert_ids_NK.size
    num_rows = pairs if block == 1 else -(-(pairs + min(num_experts, pairs) * (block - 1)) // block) * block
    rank_NK, counts_E = rank_in_group(expert_ids_NK, num_experts)
    sizes_E = -(-counts_E // block) * block
    starts_E = jnp.cumsum(sizes_E) - sizes_E
    chosen_NK = jnp.minimum(expert_ids_NK, num_experts - 1)
    rows_NK = jnp.where(expert_ids_NK < num_experts, starts_E[chosen_NK] + rank_NK, num_rows)
    return invert(rows_NK, num_rows), sizes_E


def _take(x: jax.Array, index: jax.Array) -> jax.Array:
    """x[index], zero where the index is out of range."""
    return x.at[index].get(mode="fill", fill_value=0)


@jax.custom_vjp
def to_rows(x_ND: jax.Array, layout: Layout) -> jax.Array:
    """Token vectors [N, D] -> rows [R, D]; a row without a pair is zero."""
    return _take(x_ND, layout.pairs_R // layout.rows_NK.shape[1])


def _to_rows_bwd(layout, dx_RD):
    return jnp.sum(_take(dx_RD, layout.rows_NK), axis=1), None


to_rows.defvjp(lambda x_ND, layout: (to_rows(x_ND, layout), layout), _to_rows_bwd)


@jax.custom_vjp
def from_rows(y_RD: jax.Array, layout: Layout) -> jax.Array:
    """Rows [R, D] -> each token's K results [N, K, D]; zero for a pair without a row."""
    return _take(y_RD, layout.rows_NK)


def _from_rows_bwd(layout, dy_NKD):
    return _take(dy_NKD.reshape(-1, dy_NKD.shape[-1]), layout.pairs_R), None


from_rows.defvjp(lambda y_RD, layout: (from_rows(y_RD, layout), layout), _from_rows_bwd)

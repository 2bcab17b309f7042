"""Tokens permuted so that each expert's lie together, and back.

Both moves are gathers, forward and backward: every permuted token has one source, and every token's k-th choice at most
one place among the permuted, so that no scatter is needed.
"""

import flax.struct
import jax
import jax.numpy as jnp

from kernels_pallas.grouped.layout import padded_rows, take_rows
from kernels_pallas.qtensor import round_up


@flax.struct.dataclass
class Permutation:
    """N·K (token, choice) pairs in R slots. A pair may have no slot and a slot no pair: then its index is out of
    range."""

    slots_NK: jax.Array  # int32, the slot of a token's k-th choice; R for none
    pairs_R: jax.Array  # int32, the pair n·K + k in a slot; N·K for none


def invert(slots_NK: jax.Array, num_slots: int) -> Permutation:
    """The permutation that puts pair (n, k) into slot `slots_NK`; `num_slots` or more means nowhere."""
    pair_J = jnp.arange(slots_NK.size, dtype=jnp.int32)
    slots_J = slots_NK.reshape(-1)
    slots_J = jnp.where(slots_J < num_slots, slots_J, num_slots + pair_J)  # nowhere is a different place for each
    pairs_R = jnp.full(num_slots, slots_NK.size, jnp.int32).at[slots_J].set(pair_J, mode="drop", unique_indices=True)
    return Permutation(slots_NK, pairs_R)


def rank_in_group(groups_NK: jax.Array, num_groups: int) -> tuple[jax.Array, jax.Array]:
    """The number of pairs before (n, k) in its group, int32 [N, K], and the groups' sizes, int32 [G].

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


def sort_by_expert(expert_ids_NK: jax.Array, num_experts: int, alignment: int) -> tuple[Permutation, jax.Array]:
    """The permutation that sorts tokens by expert, each expert's group padded to a multiple of `alignment`, and the
    padded group sizes, int32 [E].

    R is N·K rounded up so that any distribution over experts has room: nothing is dropped. A pair of expert E or more
    has no slot.
    """
    pairs = expert_ids_NK.size
    num_slots = padded_rows(pairs, num_experts, alignment)
    rank_NK, counts_E = rank_in_group(expert_ids_NK, num_experts)
    sizes_E = round_up(counts_E, alignment)
    starts_E = jnp.cumsum(sizes_E) - sizes_E
    chosen_NK = jnp.minimum(expert_ids_NK, num_experts - 1)
    slots_NK = jnp.where(expert_ids_NK < num_experts, starts_E[chosen_NK] + rank_NK, num_slots)
    return invert(slots_NK, num_slots), sizes_E


@jax.custom_vjp
def permute(x_ND: jax.Array, permutation: Permutation) -> jax.Array:
    """Tokens [N, D] -> permuted tokens [R, D], a copy for each choice; a slot without a pair is zero."""
    return take_rows(x_ND, permutation.pairs_R // permutation.slots_NK.shape[1])


def _permute_bwd(permutation, dx_RD):
    return jnp.sum(take_rows(dx_RD, permutation.slots_NK), axis=1), None


permute.defvjp(lambda x_ND, permutation: (permute(x_ND, permutation), permutation), _permute_bwd)


@jax.custom_vjp
def unpermute(y_RD: jax.Array, permutation: Permutation) -> jax.Array:
    """Permuted tokens [R, D] -> each token's K results [N, K, D]; zero for a pair without a slot."""
    return take_rows(y_RD, permutation.slots_NK)


def _unpermute_bwd(permutation, dy_NKD):
    return take_rows(dy_NKD.reshape(-1, dy_NKD.shape[-1]), permutation.pairs_R), None


unpermute.defvjp(lambda y_RD, permutation: (unpermute(y_RD, permutation), permutation), _unpermute_bwd)

"""Expert routing (V3 eqs. 13-16): scores, group-limited top-k, gates, and the sums that balancing needs.

Everything here is float32 in every compute dtype. The correction bias chooses experts and never enters a gate.
"""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from deepseek_jax.model.config import ModelConfig, MoEConfig
from deepseek_jax.model.scores import group_scores, scores


@flax.struct.dataclass
class RoutingStats:
    """Choices of the routers of L layers, and sums over the tokens of each sequence. One layer's have no axis L.

    The sums leave out padding, and in MTP module k positions whose token k places on is not in their document (V3 eq.
    22 ends at T-k).
    """

    expert_ids_LBTK: jax.Array  # int32, best first; feeding them back replays the routing
    counts_LBE: jax.Array  # float32, how often each sequence chose each expert
    probs_LBE: jax.Array  # float32, sum over the sequence's tokens of the scores normalized over all experts
    tokens_LB: jax.Array  # float32, tokens in the sequence
    # int32, devices whose expert buffers were too small and that took the slower way (see `Ops.experts`)
    overflows_L: jax.Array | None = None


def choose_experts(biased_E: jax.Array, config: MoEConfig) -> jax.Array:
    """The top_k experts by biased score [..., E], within the best groups: int32 [..., K], best first.

    Experts of other groups are masked with -inf: a mask of 0 would let them win against negative biased scores.
    """
    if config.topk_groups < config.num_groups:
        by_group = biased_E.reshape(*biased_E.shape[:-1], config.num_groups, -1)
        group_score_G = group_scores(by_group, config.group_score)
        _, kept = jax.lax.top_k(group_score_G, config.topk_groups)
        kept_G = jnp.any(kept[..., None] == jnp.arange(config.num_groups), axis=-2)
        biased_E = jnp.where(kept_G[..., None], by_group, -jnp.inf).reshape(biased_E.shape)
    return jax.lax.top_k(biased_E, config.top_k)[1].astype(jnp.int32)  # eq. 16


def normalized(scores: jax.Array) -> jax.Array:
    """Scores divided by their sum over the last axis; 0 where all of them are 0, as float32 makes a sigmoid below -104.

    Released code adds 1e-20 to the sum, whose square float32 does not hold: the gradient would be 0 · ∞ there.
    """
    return scores / jnp.maximum(jnp.sum(scores, axis=-1, keepdims=True), 1e-18)


def gate_values(scores_E: jax.Array, expert_ids_K: jax.Array, config: MoEConfig) -> jax.Array:
    """Weights of the chosen experts [..., K] from unbiased scores (V3 eq. 13, V2 eq. 21)."""
    gates_K = jnp.take_along_axis(scores_E, expert_ids_K, axis=-1)  # eq. 14
    if config.norm_topk_prob:
        gates_K = normalized(gates_K)  # eq. 13
    return gates_K * config.routed_scaling_factor


class Router(nn.Module):
    """Scores every token against every expert and chooses.

    Call: x [B, T, D], valid [B, T] (False on padding), expert_ids [B, T, K] to replay or None
    -> gates [B, T, K] float32, RoutingStats of one layer without overflows.

    `config.moe.router` names a subclass of one's own; `route` is what most of them change.
    """

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, valid_BT: jax.Array, expert_ids_BTK: jax.Array | None
    ) -> tuple[jax.Array, RoutingStats]:
        init = nn.with_logical_partitioning(nn.initializers.normal(self.config.init_std), ("embed", "router_experts"))
        kernel_DE = self.param("kernel", init, (x_BTD.shape[-1], self.config.moe.num_experts), jnp.float32)
        logits_BTE = jnp.matmul(x_BTD.astype(jnp.float32), kernel_DE, precision=jax.lax.Precision.HIGHEST)
        return self.route(logits_BTE, valid_BT, expert_ids_BTK)

    def route(
        self, logits_BTE: jax.Array, valid_BT: jax.Array, expert_ids_BTK: jax.Array | None
    ) -> tuple[jax.Array, RoutingStats]:
        """Gates and choices from float32 logits [B, T, E]."""
        config = self.config.moe
        scores_BTE = scores(logits_BTE, config.scoring)
        biased_BTE = scores_BTE
        if config.correction_bias:
            zeros = nn.with_logical_partitioning(nn.initializers.zeros, ("router_experts",))
            bias_E = self.variable("router_bias", "bias", lambda: zeros(None, (config.num_experts,), jnp.float32)).value
            biased_BTE = scores_BTE + bias_E
        if expert_ids_BTK is None:
            expert_ids_BTK = choose_experts(jax.lax.stop_gradient(biased_BTE), config)
        # A NaN wins every top-k, and one in the bias would not show in a gate: then nothing this token's experts say is
        # a number.
        is_number_BT1 = jnp.isfinite(jnp.sum(biased_BTE, axis=-1, keepdims=True))
        gates_BTK = jnp.where(is_number_BT1, gate_values(scores_BTE, expert_ids_BTK, config), jnp.nan)
        return gates_BTK, routing_stats(scores_BTE, expert_ids_BTK, valid_BT)


ROUTERS = {"top_k": Router}


def routing_stats(scores_BTE: jax.Array, expert_ids_BTK: jax.Array, valid_BT: jax.Array) -> RoutingStats:
    """The choices of one layer, and the sums that balance losses and the bias update are made of."""
    valid_BT1 = valid_BT[..., None].astype(jnp.float32)
    num_experts = scores_BTE.shape[-1]
    chosen_BTE = jnp.sum(jax.nn.one_hot(expert_ids_BTK, num_experts, dtype=jnp.float32), axis=-2)
    probs_BTE = normalized(scores_BTE)  # eq. 19
    return RoutingStats(
        expert_ids_BTK,
        counts_LBE=jnp.sum(chosen_BTE * valid_BT1, axis=1),
        probs_LBE=jnp.sum(probs_BTE * valid_BT1, axis=1),
        tokens_LB=jnp.sum(valid_BT1, axis=(1, 2)),
    )

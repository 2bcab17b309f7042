"""Load balance over experts: auxiliary losses (V3 eqs. 17-20), the bias update without a loss, and MaxVio.

Everything works on sums per sequence that the routers return (`RoutingStats`), in float32.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.model.router import RoutingStats


def _balance(counts_E: jax.Array, probs_E: jax.Array, tokens: jax.Array, top_k: int) -> jax.Array:
    """Σ_i f_i P_i over the experts of [..., E]; 1 where the load or the probability is uniform."""
    tokens = jnp.maximum(tokens, 1.0)[..., None]
    num_experts = counts_E.shape[-1]
    f_E = counts_E * num_experts / (top_k * tokens)  # eq. 18
    return jnp.sum(f_E * probs_E / tokens, axis=-1)  # eqs. 17, 20


def sequence_balance_loss(stats: RoutingStats, top_k: int) -> jax.Array:
    """V3's complementary sequence-wise loss without α: float32 [L], the mean over the sequences that hold tokens.

    V2's expert-level loss (V2 eqs. 23-25) is the same on softmax scores, whose sum over the experts is already 1.
    """
    loss_LB = _balance(stats.counts_LBE, stats.probs_LBE, stats.tokens_LB, top_k)
    real_LB = stats.tokens_LB > 0
    return jnp.sum(loss_LB * real_LB, axis=1) / jnp.maximum(jnp.sum(real_LB, axis=1), 1)


def batch_balance_loss(stats: RoutingStats, top_k: int) -> jax.Array:
    """The same loss over the batch as one sequence (V3 §4.5.3's batch-wise auxiliary loss), without α: float32 [L]."""
    counts_LE, probs_LE = jnp.sum(stats.counts_LBE, axis=1), jnp.sum(stats.probs_LBE, axis=1)
    return _balance(counts_LE, probs_LE, jnp.sum(stats.tokens_LB, axis=1), top_k)


# A balance loss takes RoutingStats of L routers and top_k to float32 [L], for each router the mean over the sequences.
# "expert" is V2's name for the loss that V3 calls sequence-wise.
BALANCE_LOSSES = {
    "none": None,
    "sequence": sequence_balance_loss,
    "expert": sequence_balance_loss,
    "batch": batch_balance_loss,
}


def update_bias(
    bias_LE: jax.Array, counts_LE: jax.Array, bias_update_speed: jax.Array | float, zero_sum: bool = False
) -> jax.Array:
    """Auxiliary-loss-free balancing (V3 §2.1.2, Loss-Free Balancing Alg. 1): b += γ · sign(mean load - load).

    `counts` are selections summed over the whole global batch, `bias_update_speed` is γ. `zero_sum` subtracts the mean
    of the signs, as Moonlight does, so that the biases' sum stays constant. float32 in, float32 out; a layer without
    tokens keeps its bias.
    """
    step_LE = jnp.sign(jnp.mean(counts_LE, axis=-1, keepdims=True) - counts_LE)
    if zero_sum:
        step_LE = step_LE - jnp.mean(step_LE, axis=-1, keepdims=True)
    return bias_LE + bias_update_speed * step_LE


def update_router_bias(
    router_bias: Mapping[str, Any],
    loads: Mapping[str, jax.Array],
    bias_update_speed: jax.Array | float,
    zero_sum: bool = False,
) -> dict[str, Any]:
    """`update_bias` on every router that ran; `loads` has the selections of the whole global batch.

    `loads` and `router_bias` share their top-level names, one per stack of routers.
    """

    def updated(stack: str) -> Any:
        return jax.tree.map(lambda b: update_bias(b, loads[stack], bias_update_speed, zero_sum), router_bias[stack])

    return {stack: updated(stack) if stack in loads else biases for stack, biases in router_bias.items()}


def max_violation(counts_LE: jax.Array) -> jax.Array:
    """MaxVio of each layer (Loss-Free Balancing eq. 4): (max load - mean load) / mean load; 0 without tokens."""
    mean_L = jnp.mean(counts_LE, axis=-1)
    return jnp.where(mean_L > 0, jnp.max(counts_LE, axis=-1) / jnp.maximum(mean_L, 1e-9) - 1.0, 0.0)


def load_metrics(loads: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """MaxVio of each router, main layers first, with its mean and maximum over the routers.

    And the relative load behind it, `expert_load` [routers, experts] (V3's figure 9): 1 is an expert's share where all
    have the same.
    """
    loads_LE = jnp.concatenate([jnp.atleast_2d(loads[stack]) for stack in sorted(loads)])
    violation_L = max_violation(loads_LE)
    return {
        "max_violation_per_layer": violation_L,
        "max_violation_mean": jnp.mean(violation_L),
        "max_violation_max": jnp.max(violation_L),
        "expert_load": loads_LE / jnp.maximum(jnp.mean(loads_LE, axis=-1, keepdims=True), 1e-9),
    }

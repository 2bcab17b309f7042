"""The training loss: next-token cross-entropy + λ/D · Σ multi-token prediction + α · balance (V3 §2.1.2, §2.2), and
the auxiliary losses that modules return.

Every term is a sum over a microbatch divided by a number that belongs to the whole global batch, so that losses and
gradients of microbatches add up to those of one big batch.
"""

import dataclasses
from collections.abc import Mapping

import flax.struct
import jax
import jax.numpy as jnp

from deepseek_jax.errors import ConfigError
from deepseek_jax.identity import free
from deepseek_jax.model.auxiliary import Sum
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.ranges import at_least, check, everywhere, one_of
from deepseek_jax.registry import resolve
from deepseek_jax.training.auxiliary import COLLECTIONS, add_names, auxiliary_losses, auxiliary_metrics, weighted
from deepseek_jax.training.balance import BALANCE_LOSSES
from deepseek_jax.training.log_probs import token_log_probs
from deepseek_jax.training.schedules import Schedule
from deepseek_jax.training.targets import Denominators, denominators, targets

BALANCE_REDUCTIONS = {"sum": jnp.sum, "mean": jnp.mean}


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """Weights of the terms. `balance` is "sequence" (V3), "expert" (V2), "batch" or "none", times `balance_alpha`; or
    `package.module:function` of one's own, called with RoutingStats and top_k like those of `training/balance.py`.

    `balance_reduction` is "sum" or "mean" over the routers. The reports give α for one layer and do not say how layers
    are added up. DeepSeek's released code adds α times the loss inside every MoE layer (`AddAuxiliaryLoss` in V2's
    modeling_deepseek.py), which is the sum: 58 times the mean for V3's 58 MoE layers. The router of each MTP module
    that runs counts like a layer's, over the positions that the module has (see `RoutingStats`), and λ does not weight
    it.

    `mtp_weight` is λ over steps; a schedule that is 0 throughout does not run the MTP modules at all. `loss_chunk` is
    how many tokens' logits exist at once. The "batch" loss is not linear in sequences: under gradient accumulation it
    balances each microbatch. `auxiliary` has the weights of losses that modules return, {name: weight} (see
    `model/auxiliary.py`).
    """

    mtp_weight: Schedule = Schedule(0.3)
    balance: str = "sequence"
    balance_alpha: float = 1e-4
    balance_reduction: str = "sum"
    auxiliary: tuple[tuple[str, float], ...] = ()
    loss_chunk: int = free(4096)

    def __post_init__(self):
        resolve(BALANCE_LOSSES, self.balance, "objective.balance")
        check(
            self,
            "objective.",
            balance_reduction=one_of(BALANCE_REDUCTIONS),
            mtp_weight=everywhere(at_least(0)),
            balance_alpha=at_least(0),
            loss_chunk=at_least(1),
        )


@flax.struct.dataclass
class LossAux:
    """A microbatch's share of the global batch's numbers; shares of all microbatches add up (see module docstring)."""

    # before their weights: "cross_entropy", "mtp_1", …, "balance" (reduced over routers), and auxiliary losses
    losses: dict[str, jax.Array]
    metrics: dict[str, Sum]  # what modules reported
    # selections per expert: "moe_layers" [L, E], "mtp_0" [E], …; a key per stack of routers
    loads: dict[str, jax.Array]
    tokens: jax.Array  # float32, tokens that are not padding
    overflows: jax.Array  # int32, over all layers (see `RoutingStats`)


def uses_mtp(model: Transformer, objective: ObjectiveConfig) -> bool:
    return model.config.mtp_depth > 0 and not objective.mtp_weight.always(0.0)


def loss_fn(
    model: Transformer,
    objective: ObjectiveConfig,
    params,
    router_bias,
    batch: Mapping[str, jax.Array],
    step: jax.Array,
    denominator: Denominators | None = None,
) -> tuple[jax.Array, LossAux]:
    """The loss of a batch (int32 [B, T]: tokens, segment_ids, positions, loss_mask), float32, differentiable in
    `params`.

    `denominator` belongs to the global batch that this batch is a microbatch of; by default it is the whole batch.
    MTP: λ/D · Σ_k CE_k (V3 eqs. 24-25), each CE_k over its own targets.
    """
    mtp = uses_mtp(model, objective)
    if denominator is None:
        denominator = denominators(batch, model.config.mtp_depth if mtp else 0)
    variables = {"params": params, "router_bias": router_bias}
    output, returned = model.apply(
        variables,
        batch["tokens"],
        segment_ids_BT=batch["segment_ids"],
        positions_BT=batch["positions"],
        mtp=mtp,
        mutable=COLLECTIONS,
    )

    def cross_entropy(hidden_BTD, ahead):
        targets_BT, mask_BT = targets(batch, ahead)
        logp_BT, _ = token_log_probs(model, variables, hidden_BTD, targets_BT, objective.loss_chunk)
        return -jnp.sum(logp_BT * mask_BT) / denominator.targets_K[ahead - 1]  # eq. 24

    losses = {"cross_entropy": cross_entropy(output.hidden_BTD, 1)}
    loss = losses["cross_entropy"]
    if mtp:
        ahead = [cross_entropy(hidden_BTD, k + 1) for k, hidden_BTD in enumerate(output.mtp_hidden, start=1)]
        losses |= {f"mtp_{k}": value for k, value in enumerate(ahead, start=1)}
        loss += objective.mtp_weight(step) * sum(ahead) / len(ahead)  # eq. 25

    routings = [routing for routing in (output.routing, output.mtp_routing) if routing is not None]
    loads = {}
    if output.routing is not None:
        loads["moe_layers"] = jnp.sum(output.routing.counts_LBE, axis=1)
    if output.mtp_routing is not None:
        loads |= {f"mtp_{k}": jnp.sum(counts_BE, axis=0) for k, counts_BE in enumerate(output.mtp_routing.counts_LBE)}
    balance_loss = resolve(BALANCE_LOSSES, objective.balance, "objective.balance")
    if routings and balance_loss is not None and objective.balance_alpha > 0:
        ahead_L = jnp.array([0] * model.config.num_moe_layers + list(range(1, len(output.mtp_hidden) + 1)))
        all_routers = jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *routings)
        share_L = jnp.sum(all_routers.tokens_LB > 0, axis=1) / denominator.sequences_K[ahead_L]
        loss_L = balance_loss(all_routers, model.config.moe.top_k)
        if loss_L.shape != share_L.shape:
            raise ConfigError(
                f"objective.balance={objective.balance!r} returned an array of shape {loss_L.shape} for "
                f"{len(share_L)} routers: a balance loss is a function of (RoutingStats, top_k) to one number a router"
            )
        losses["balance"] = BALANCE_REDUCTIONS[objective.balance_reduction](share_L * loss_L)
        loss += objective.balance_alpha * losses["balance"]
    auxiliary = auxiliary_losses(returned, denominator.tokens_K, denominator.sequences_K)
    loss += weighted(auxiliary, objective.auxiliary, "objective.auxiliary")
    losses = add_names(losses, auxiliary)
    tokens = jnp.sum(batch["segment_ids"] > 0).astype(jnp.float32)
    overflows = sum((jnp.sum(routing.overflows_L) for routing in routings), jnp.zeros((), jnp.int32))
    return loss, LossAux(losses, auxiliary_metrics(returned), jax.lax.stop_gradient(loads), tokens, overflows)

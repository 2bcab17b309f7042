"""Auxiliary losses and metrics, which any module of a block returns by name while it runs.

    auxiliary_loss(self, "router_z", z_BT, valid_BT)        # in any module's __call__
    auxiliary_metric(self, "router_logit", mean_BT, valid_BT)

Nothing between the module and the objective has to know them: they travel in two variable collections of their own,
through the scan over layers, rematerialization and both halves of a dual batch. Where nobody collects them, as in
decoding or in evaluation, they cost nothing. `training/auxiliary.py` collects them:

- A loss is a sum over the valid tokens (values [B, T]) or sequences ([B]) of a microbatch, divided by the number of
  these in the global batch, so that microbatches add up to the whole. Layers are summed, and MTP modules with them.
- Its weight is in the config, `objective.auxiliary` or `grpo.auxiliary` = {name: weight}. A loss without a weight is
  logged and adds nothing; a weight whose name no module returns is refused.
- A metric is the mean over all valid tokens or sequences of all layers, MTP modules and microbatches that report it.
"""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

LOSSES, METRICS = "auxiliary_losses", "auxiliary_metrics"


@flax.struct.dataclass
class Sum:
    """The sum of a number over `count` tokens or sequences, float32 each; [L] where layers are stacked."""

    total: jax.Array
    count: jax.Array
    per: str = flax.struct.field(pytree_node=False)  # "token" or "sequence"


def auxiliary_loss(module: nn.Module, name: str, values: jax.Array, valid: jax.Array) -> None:
    """Returns a loss from inside a module: a number per token [B, T] or per sequence [B], counted where `valid` is.

    A module that calls it twice with one name, and two modules of a layer that use the same name, return the sum.
    """
    _report(module, LOSSES, name, values, valid)


def auxiliary_metric(module: nn.Module, name: str, values: jax.Array, valid: jax.Array) -> None:
    """Returns a metric from inside a module: a number per token [B, T] or per sequence [B], counted where `valid` is.
    It has no gradient."""
    _report(module, METRICS, name, jax.lax.stop_gradient(values), valid)


def _report(module: nn.Module, collection: str, name: str, values: jax.Array, valid: jax.Array) -> None:
    if values.shape != valid.shape or values.ndim not in (1, 2):
        raise ValueError(
            f"{type(module).__name__} returns {name!r} of shape {values.shape} with valid of shape {valid.shape}: give "
            "one number per token, [B, T], or per sequence, [B], and a mask of the same shape"
        )
    total = jnp.sum(jnp.where(valid, values.astype(jnp.float32), 0.0))
    value = Sum(total, jnp.sum(valid, dtype=jnp.float32), "token" if values.ndim == 2 else "sequence")
    module.sow(collection, name, value, reduce_fn=add_sums, init_fn=lambda: None)


def add_sums(a: Sum | None, b: Sum) -> Sum:
    """The sum over the tokens or sequences of both."""
    return b if a is None else jax.tree.map(jnp.add, a, b)

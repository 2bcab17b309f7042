"""Collects the auxiliary losses and metrics that modules returned by name (see `model/auxiliary.py`)."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.errors import ConfigError, nearest
from deepseek_jax.model.auxiliary import LOSSES, METRICS, Sum, add_sums

COLLECTIONS = (LOSSES, METRICS)  # what `model.apply(…, mutable=COLLECTIONS)` returns besides its output


def auxiliary_losses(returned: Mapping[str, Any], tokens_K: jax.Array, sequences_K: jax.Array) -> dict[str, jax.Array]:
    """Every auxiliary loss by name, float32 [], summed over the layers and MTP modules that returned it, before its
    weight.

    `tokens_K` and `sequences_K` count the global batch's tokens and sequences: those of the layers first, then those of
    MTP module 0, 1, …, which has fewer tokens.
    """
    losses: dict[str, jax.Array] = {}
    for stack, name, value in _named(returned.get(LOSSES, {})):
        k = int(stack.removeprefix("mtp_")) + 1 if stack.startswith("mtp_") else 0
        count = (tokens_K if value.per == "token" else sequences_K)[k]
        losses[name] = losses.get(name, 0.0) + jnp.sum(value.total) / count
    return losses


def auxiliary_metrics(returned: Mapping[str, Any]) -> dict[str, Sum]:
    """Every metric by name, summed over the layers and MTP modules that returned it: sums of microbatches add up."""
    metrics: dict[str, Sum] = {}
    for _, name, value in _named(returned.get(METRICS, {})):
        metrics[name] = add_sums(metrics.get(name), jax.tree.map(jnp.sum, value))
    return metrics


def mean_metrics(metrics: Mapping[str, Sum]) -> dict[str, jax.Array]:
    """The mean of each metric, float32 []; 0 where nothing was valid."""
    return {name: value.total / jnp.maximum(value.count, 1.0) for name, value in metrics.items()}


def weighted(losses: Mapping[str, jax.Array], weights: Sequence[tuple[str, float]], field: str) -> jax.Array | float:
    """Σ weight · loss over the config's weights; 0.0 without any. `field` is the field that holds them.

    Raises ConfigError for a weight whose name no module returns: a loss that is misspelled would train nothing.
    """
    for name, weight in weights:
        if name not in losses:
            known = nearest(name, losses) if losses else "no module of this model returns an auxiliary loss"
            raise ConfigError(f"{field} has a weight of {weight:g} for {name!r}: {known}")
    return sum((weight * losses[name] for name, weight in weights), 0.0)


def add_names(metrics: Mapping[str, Any], added: Mapping[str, Any]) -> dict[str, Any]:
    """Both in one dictionary of what is logged. Raises ConfigError for a name that the log has already."""
    taken = sorted(set(metrics) & set(added))
    if taken:
        raise ConfigError(
            f"a module returns an auxiliary loss or metric called {taken[0]!r}, which the log has already: rename it"
        )
    return {**metrics, **added}


def _named(collection: Mapping[str, Any]) -> Iterator[tuple[str, str, Sum]]:
    """(stack of layers or MTP module, name, value) of everything in a collection."""
    for path, value in jax.tree_util.tree_leaves_with_path(collection, is_leaf=lambda leaf: isinstance(leaf, Sum)):
        yield path[0].key, path[-1].key, value

"""Outlier channels, as large networks grow them, put into a small one without changing what it computes."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import traverse_util

# Which weights read what a norm gives: their input axis is the last but one.
READERS = {
    "attn_norm": ("attn/q/kernel", "attn/q_a/kernel", "attn/kv_a/kernel", "attn/k/kernel", "attn/v/kernel"),
    "ffn_norm": tuple(f"ffn/{name}" for name in (
        "gate/kernel", "up/kernel", "router/kernel", "experts/gate", "experts/up", "shared/gate/kernel", "shared/up/kernel",
    )),
}  # fmt: skip


def add_outliers(params: Mapping[str, Any], channels: int, factor: float) -> dict[str, Any]:
    """Every norm before an attention or a feed-forward gives `channels` evenly spaced channels `factor` times as large,
    and the rows of the weights that read them are as much smaller. For a power of two the network computes the same,
    bit for bit, but where something rounds numbers of one size together."""
    flat = traverse_util.flatten_dict(params, sep="/")
    for path in list(flat):
        block, _, norm = path.removesuffix("/scale").rpartition("/")
        if norm in READERS:
            large = np.arange(channels) * (flat[path].shape[-1] // channels)
            flat[path] = _scaled(flat[path], (..., large), factor)
            for reader in READERS[norm]:
                if (name := f"{block}/{reader}") in flat:
                    flat[name] = _scaled(flat[name], (..., large, slice(None)), 1 / factor)
    return traverse_util.unflatten_dict(flat, sep="/")


def _scaled(x: jax.Array, where: tuple, factor: float) -> jax.Array:
    return x.at[where].multiply(factor)

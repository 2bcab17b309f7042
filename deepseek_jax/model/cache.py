"""The decoding cache: what attention keeps of the tokens it has seen, with a fixed number of slots."""

import flax.struct
import jax
import jax.numpy as jnp

from deepseek_jax.model.config import ModelConfig


@flax.struct.dataclass
class Cache:
    """The cache of all layers. `entries` maps a stack of layers to its arrays [L, B, S, ·], those of the attention's
    `cache_dims` in order: MLA's latent and rotary key (576 numbers a token and layer in V3), or keys and values. A slot
    holds the token at `positions_BS`; -1 marks it empty."""

    entries: dict[str, tuple[jax.Array, ...]]
    positions_BS: jax.Array


def init_cache(config: ModelConfig, batch: int, size: int, dtype: jnp.dtype) -> Cache:
    """An empty cache of `size` slots for `batch` sequences."""
    layers = {"dense_layers": config.num_dense_layers, "moe_layers": config.num_moe_layers}
    entries = {
        name: tuple(jnp.zeros((count, batch, size, dim), dtype) for dim in config.attention.cache_dims.values())
        for name, count in layers.items()
        if count
    }
    return Cache(entries, jnp.full((batch, size), -1, jnp.int32))


def write(
    cache: Cache, latents: dict[str, tuple[jax.Array, ...]], positions_BT: jax.Array, start: jax.Array | int
) -> Cache:
    """Puts what a forward call returned for T tokens into slots start … start+T-1 of every row.

    `positions_BT` is the tokens' positions, -1 for padding: such a slot stays empty to every query.
    """

    def put(slots, new):
        return jax.lax.dynamic_update_slice_in_dim(slots, new.astype(slots.dtype), start, axis=2)

    entries = {name: jax.tree.map(put, cache.entries[name], latents[name]) for name in cache.entries}
    return Cache(
        entries, jax.lax.dynamic_update_slice_in_dim(cache.positions_BS, positions_BT.astype(jnp.int32), start, axis=1)
    )

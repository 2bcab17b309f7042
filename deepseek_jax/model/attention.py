"""Multi-head latent attention in its expanded and its absorbed form; grouped-query attention behind the same interface.

Both modules are called as `(x_BTD, tokens, cache_entry)` and return `(y_BTD, new_entry)`: the two arrays a cache keeps
for the T new tokens. Without a cache entry the T tokens attend among themselves (training, prefill). With one they also
attend to the cached tokens; the module only reads the cache, so that the caller writes it once, in place.
"""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from deepseek_jax.model.config import GQAConfig, MLAConfig, RopeConfig
from deepseek_jax.model.layers import Linear, RMSNorm
from deepseek_jax.model.rope import apply_rotary, rotary_angles, softmax_scale
from deepseek_jax.precision import Recipe

MASKED = -1e30  # finite, so that a row with nothing to attend to (padding) stays finite


@flax.struct.dataclass
class Tokens:
    """Where the T new tokens of a call stand, and what the cache holds: all that masks and angles are made of."""

    positions_BT: jax.Array  # int32, for rotary angles and against cached positions
    segment_ids_BT: jax.Array  # int32, 0 = padding; attention stays inside a segment
    cached_positions_BS: jax.Array | None = None  # int32, -1 = empty slot

    def new_mask(self, query: slice = slice(None)) -> jax.Array:
        """[B, T, T] bool: among the new tokens, earlier slots of the same segment."""
        slots = jnp.arange(self.segment_ids_BT.shape[1])
        causal = slots[query, None] >= slots[None, :]
        return causal & (self.segment_ids_BT[:, query, None] == self.segment_ids_BT[:, None, :])

    def cache_mask(self) -> jax.Array:
        """[B, T, S] bool: cached tokens at or before the query's position."""
        cached = self.cached_positions_BS[:, None, :]
        return (cached >= 0) & (cached <= self.positions_BT[:, :, None])


def masked_softmax(scores_BHTS: jax.Array, mask_BTS: jax.Array) -> jax.Array:
    """float32 softmax over the last axis where the mask allows."""
    return jax.nn.softmax(jnp.where(mask_BTS[:, None], scores_BHTS, MASKED), axis=-1)


def over_query_chunks(attend, chunk: int, tokens: Tokens, *queries: jax.Array) -> jax.Array:
    """attend(mask_BtS, *queries_Bt…) for `chunk` queries at a time (0: all at once), recomputed in the backward pass.

    Keeps the score matrix at [chunk, T] instead of [T, T].
    """
    length = queries[0].shape[1]
    if chunk == 0 or length <= chunk:
        return attend(tokens.new_mask(), *queries)
    outputs = [
        jax.checkpoint(attend)(tokens.new_mask(slice(start, start + chunk)), *(q[:, start : start + chunk] for q in queries))
        for start in range(0, length, chunk)
    ]
    return jnp.concatenate(outputs, axis=1)


class LatentAttention(nn.Module):
    """Multi-head latent attention (V2 §2.1, V3 eqs. 1-11).

    Keys and values of all heads are up-projections of one latent c_kv of `kv_lora_rank` numbers; a rotary key of
    `qk_rope_head_dim` numbers is shared by all heads. The expanded form computes the keys and values; the absorbed form
    folds the up-projections into query and output, and attends to the latents themselves. They are the same function.
    """

    config: MLAConfig
    rope: RopeConfig
    init_std: float
    latent_norm_eps: float
    chunk: int
    precision: Recipe

    @nn.compact
    def __call__(self, x_BTD: jax.Array, tokens: Tokens, cache_entry: tuple[jax.Array, jax.Array] | None = None):
        config, einsum = self.config, self.precision.einsum
        heads, nope, value = config.num_heads, config.qk_nope_head_dim, config.v_head_dim

        def linear(name, features, axes):
            return Linear(features, axes, self.init_std, self.precision, name=name)

        def norm(name):
            return RMSNorm(self.latent_norm_eps, name=name)

        query_features = heads * config.qk_head_dim
        if config.q_lora_rank is None:
            q_BTHk = linear("q", query_features, ("embed", "heads"))(x_BTD)
        else:
            latent_q = norm("q_a_norm")(linear("q_a", config.q_lora_rank, ("embed", "q_lora"))(x_BTD))
            q_BTHk = linear("q_b", query_features, ("q_lora", "heads"))(latent_q)
        q_BTHk = q_BTHk.reshape(*x_BTD.shape[:2], heads, config.qk_head_dim)
        q_nope_BTHn, q_rope_BTHr = q_BTHk[..., :nope], q_BTHk[..., nope:]

        kv_a = linear("kv_a", config.kv_lora_rank + config.qk_rope_head_dim, ("embed", "kv_lora"))(x_BTD)
        c_kv_BTc = norm("kv_a_norm")(kv_a[..., : config.kv_lora_rank])

        cos_BTr, sin_BTr = rotary_angles(self.rope, config.qk_rope_head_dim, tokens.positions_BT)
        k_rope_BTr = apply_rotary(kv_a[..., config.kv_lora_rank :], cos_BTr, sin_BTr, self.rope.interleaved)
        q_rope_BTHr = apply_rotary(q_rope_BTHr, cos_BTr[:, :, None], sin_BTr[:, :, None], self.rope.interleaved)

        kv_b = linear("kv_b", heads * (nope + value), ("kv_lora_rank", "heads"))
        scale = softmax_scale(self.rope, config.qk_head_dim)

        if cache_entry is None:  # expanded
            kv_BTHk = kv_b(c_kv_BTc).reshape(*x_BTD.shape[:2], heads, nope + value)
            k_nope_BSHn, v_BSHv = kv_BTHk[..., :nope], kv_BTHk[..., nope:]

            def attend(mask_BTS, q_nope_BTHn, q_rope_BTHr):
                scores_BHTS = einsum("BTHn,BSHn->BHTS", q_nope_BTHn, k_nope_BSHn)
                scores_BHTS += einsum("BTHr,BSr->BHTS", q_rope_BTHr, k_rope_BTr)
                return einsum("BHTS,BSHv->BTHv", masked_softmax(scores_BHTS * scale, mask_BTS), v_BSHv)

            out_BTHv = over_query_chunks(attend, self.chunk, tokens, q_nope_BTHn, q_rope_BTHr)
        else:  # absorbed
            kv_b_cHk = kv_b.weight(config.kv_lora_rank).reshape(config.kv_lora_rank, heads, nope + value)
            key_cHn, value_cHv = kv_b_cHk[..., :nope], kv_b_cHk[..., nope:]
            q_latent_BTHc = einsum("BTHn,cHn->BTHc", q_nope_BTHn, key_cHn)

            def scores(c_kv_BSc, k_rope_BSr):
                scores_BHTS = einsum("BTHc,BSc->BHTS", q_latent_BTHc, c_kv_BSc)
                return (scores_BHTS + einsum("BTHr,BSr->BHTS", q_rope_BTHr, k_rope_BSr)) * scale

            old_latent_BSc, old_rope_BSr = cache_entry
            all_scores = jnp.concatenate([scores(old_latent_BSc, old_rope_BSr), scores(c_kv_BTc, k_rope_BTr)], axis=-1)
            mask = jnp.concatenate([tokens.cache_mask(), tokens.new_mask()], axis=-1)
            probs_old, probs_new = jnp.split(masked_softmax(all_scores, mask), [old_latent_BSc.shape[1]], axis=-1)
            out_BTHc = einsum("BHTS,BSc->BTHc", probs_old, old_latent_BSc) + einsum("BHTS,BSc->BTHc", probs_new, c_kv_BTc)
            out_BTHv = einsum("BTHc,cHv->BTHv", out_BTHc, value_cHv)

        out_BTF = out_BTHv.reshape(*x_BTD.shape[:2], heads * value).astype(x_BTD.dtype)
        y_BTD = linear("o", x_BTD.shape[-1], ("heads", "embed"))(out_BTF)
        return y_BTD, (c_kv_BTc, k_rope_BTr)


class GroupedQueryAttention(nn.Module):
    """Multi-head (num_kv_heads = num_heads), grouped-query or multi-query (num_kv_heads = 1) attention, for ablations."""

    config: GQAConfig
    rope: RopeConfig
    init_std: float
    chunk: int
    precision: Recipe

    @nn.compact
    def __call__(self, x_BTD: jax.Array, tokens: Tokens, cache_entry: tuple[jax.Array, jax.Array] | None = None):
        config, einsum = self.config, self.precision.einsum
        kv_heads, dim = config.num_kv_heads, config.head_dim
        queries_per_kv = config.num_heads // kv_heads

        def heads(name, *shape):
            features = dim
            for size in shape:
                features *= size
            y = Linear(features, ("embed", "heads"), self.init_std, self.precision, name=name)(x_BTD)
            return y.reshape(*x_BTD.shape[:2], *shape, dim)

        q_BTGgk, k_BTGk, v_BTGk = heads("q", kv_heads, queries_per_kv), heads("k", kv_heads), heads("v", kv_heads)
        cos_BTr, sin_BTr = rotary_angles(self.rope, dim, tokens.positions_BT)
        cos_BTr, sin_BTr = cos_BTr[:, :, None], sin_BTr[:, :, None]
        q_BTGgk = apply_rotary(q_BTGgk, cos_BTr[:, :, None], sin_BTr[:, :, None], self.rope.interleaved)
        k_BTGk = apply_rotary(k_BTGk, cos_BTr, sin_BTr, self.rope.interleaved)
        scale = softmax_scale(self.rope, dim)

        def attend(mask_BTS, q_BTGgk, k_BSGk, v_BSGk):
            scores = einsum("BTGgk,BSGk->BGgTS", q_BTGgk, k_BSGk) * scale
            probs = jax.nn.softmax(jnp.where(mask_BTS[:, None, None], scores, MASKED), axis=-1)
            return einsum("BGgTS,BSGk->BTGgk", probs, v_BSGk)

        if cache_entry is None:
            out = over_query_chunks(lambda mask, q: attend(mask, q, k_BTGk, v_BTGk), self.chunk, tokens, q_BTGgk)
        else:
            old_k, old_v = (entry.reshape(*entry.shape[:2], kv_heads, dim) for entry in cache_entry)
            mask = jnp.concatenate([tokens.cache_mask(), tokens.new_mask()], axis=-1)
            out = attend(mask, q_BTGgk, jnp.concatenate([old_k, k_BTGk], axis=1), jnp.concatenate([old_v, v_BTGk], axis=1))

        out_BTF = out.reshape(*x_BTD.shape[:2], config.num_heads * dim).astype(x_BTD.dtype)
        y_BTD = Linear(x_BTD.shape[-1], ("heads", "embed"), self.init_std, self.precision, name="o")(out_BTF)
        return y_BTD, (k_BTGk.reshape(*x_BTD.shape[:2], -1), v_BTGk.reshape(*x_BTD.shape[:2], -1))

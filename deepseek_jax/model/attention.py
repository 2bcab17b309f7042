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

    def new_mask(self, start: int, stop: int) -> jax.Array:
        """[B, stop-start, stop] bool: new tokens start … stop-1 see earlier slots of the same segment."""
        causal = jnp.arange(start, stop)[:, None] >= jnp.arange(stop)
        return causal & (self.segment_ids_BT[:, start:stop, None] == self.segment_ids_BT[:, None, :stop])

    def cache_mask(self) -> jax.Array:
        """[B, T, S] bool: cached tokens at or before the query's position."""
        cached = self.cached_positions_BS[:, None, :]
        return (cached >= 0) & (cached <= self.positions_BT[:, :, None])

    def cached_and_new_mask(self) -> jax.Array:
        """[B, T, S+T] bool: the cache's slots, then the new tokens."""
        return jnp.concatenate([self.cache_mask(), self.new_mask(0, self.segment_ids_BT.shape[1])], axis=-1)


def masked_softmax(scores: jax.Array, mask: jax.Array) -> jax.Array:
    """float32 softmax over the last axis where the mask, broadcast against the scores, allows."""
    return jax.nn.softmax(jnp.where(mask, scores, MASKED), axis=-1)


def attend(einsum, q_BGgTk: jax.Array, k_BGSk: jax.Array, v_BGSv: jax.Array, mask_BTS: jax.Array, scale: float) -> jax.Array:
    """softmax(q k^T scale) v where the mask allows, g query heads to each of G key-value heads: [B, G, g, T, v] float32.

    The g heads' queries are R = g·T rows of one product, and the sum of weights divides the result rather than the weights: on CPU
    both together take a third off forward and backward.
    """
    B, G, g, T, _ = q_BGgTk.shape
    bias_BTS = jnp.where(mask_BTS, 0.0, MASKED)
    bias_B1RS = jnp.tile(bias_BTS, (1, g, 1))[:, None]
    scores_BGRS = einsum("BGRk,BGSk->BGRS", q_BGgTk.reshape(B, G, g * T, -1), k_BGSk) * scale + bias_B1RS
    weights_BGRS = jnp.exp(scores_BGRS - jax.lax.stop_gradient(jnp.max(scores_BGRS, axis=-1, keepdims=True)))
    out_BGRv = einsum("BGRS,BGSv->BGRv", weights_BGRS, v_BGSv) / jnp.sum(weights_BGRS, axis=-1, keepdims=True)
    return out_BGRv.reshape(B, G, g, T, -1)


def self_attention(
    einsum, q_BTGgk: jax.Array, k_BTGk: jax.Array, v_BTGv: jax.Array, tokens: Tokens, scale: float, chunk: int
) -> jax.Array:
    """Attention of the new tokens among themselves: [B, T, G, g, v] float32.

    With a `chunk`, that many queries at a time against the keys up to the last of them, recomputed in the backward pass:
    the score matrix is never larger than chunk x T. Heads go before positions, so that every product is a batch of
    plain matrix products; on CPU this is three times as fast forward.
    """
    length = q_BTGgk.shape[1]
    q_BGgTk, k_BGTk, v_BGTv = q_BTGgk.transpose(0, 2, 3, 1, 4), k_BTGk.transpose(0, 2, 1, 3), v_BTGv.transpose(0, 2, 1, 3)

    def queries(start: int, stop: int) -> jax.Array:
        mask_BtS = tokens.new_mask(start, stop)
        return attend(einsum, q_BGgTk[..., start:stop, :], k_BGTk[:, :, :stop], v_BGTv[:, :, :stop], mask_BtS, scale)

    if chunk == 0 or length <= chunk:
        out_BGgTv = queries(0, length)
    else:
        recomputed = jax.checkpoint(queries, static_argnums=(0, 1))
        chunks = [recomputed(start, min(start + chunk, length)) for start in range(0, length, chunk)]
        out_BGgTv = jnp.concatenate(chunks, axis=3)
    return out_BGgTv.transpose(0, 3, 1, 2, 4)


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
            k_rope_BTHr = jnp.broadcast_to(k_rope_BTr[:, :, None], q_rope_BTHr.shape)
            k_BTHk = jnp.concatenate([kv_BTHk[..., :nope], k_rope_BTHr], axis=-1)
            q_BTH1k = jnp.concatenate([q_nope_BTHn, q_rope_BTHr], axis=-1)[:, :, :, None]
            out_BTHv = self_attention(einsum, q_BTH1k, k_BTHk, kv_BTHk[..., nope:], tokens, scale, self.chunk)[:, :, :, 0]
        else:  # absorbed
            kv_b_cHk = kv_b.weight(config.kv_lora_rank).reshape(config.kv_lora_rank, heads, nope + value)
            key_cHn, value_cHv = kv_b_cHk[..., :nope], kv_b_cHk[..., nope:]
            q_latent_BTHc = einsum("BTHn,cHn->BTHc", q_nope_BTHn, key_cHn)

            def scores(c_kv_BSc, k_rope_BSr):
                scores_BHTS = einsum("BTHc,BSc->BHTS", q_latent_BTHc, c_kv_BSc)
                return (scores_BHTS + einsum("BTHr,BSr->BHTS", q_rope_BTHr, k_rope_BSr)) * scale

            old_latent_BSc, old_rope_BSr = cache_entry
            all_scores = jnp.concatenate([scores(old_latent_BSc, old_rope_BSr), scores(c_kv_BTc, k_rope_BTr)], axis=-1)
            probs_BHTS = masked_softmax(all_scores, tokens.cached_and_new_mask()[:, None])
            probs_old, probs_new = jnp.split(probs_BHTS, [old_latent_BSc.shape[1]], axis=-1)
            out_BHTc = einsum("BHTS,BSc->BHTc", probs_old, old_latent_BSc) + einsum("BHTS,BSc->BHTc", probs_new, c_kv_BTc)
            out_BTHv = einsum("BHTc,cHv->BTHv", out_BHTc, value_cHv)

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

        if cache_entry is None:
            out_BTGgk = self_attention(einsum, q_BTGgk, k_BTGk, v_BTGk, tokens, scale, self.chunk)
        else:
            old_k, old_v = (entry.reshape(*entry.shape[:2], kv_heads, dim) for entry in cache_entry)
            k_BGSk, v_BGSk = (jnp.concatenate(kv, axis=1).transpose(0, 2, 1, 3) for kv in ((old_k, k_BTGk), (old_v, v_BTGk)))
            q_BGgTk = q_BTGgk.transpose(0, 2, 3, 1, 4)
            out_BGgTk = attend(einsum, q_BGgTk, k_BGSk, v_BGSk, tokens.cached_and_new_mask(), scale)
            out_BTGgk = out_BGgTk.transpose(0, 3, 1, 2, 4)

        out_BTF = out_BTGgk.reshape(*x_BTD.shape[:2], config.num_heads * dim).astype(x_BTD.dtype)
        y_BTD = Linear(x_BTD.shape[-1], ("heads", "embed"), self.init_std, self.precision, name="o")(out_BTF)
        return y_BTD, (k_BTGk.reshape(*x_BTD.shape[:2], -1), v_BTGk.reshape(*x_BTD.shape[:2], -1))

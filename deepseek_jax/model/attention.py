"""Multi-head latent attention in its expanded and its absorbed form; grouped-query attention behind the same interface.

Both modules are called as `(x_BTD, tokens, cache_entry)` and return `(y_BTD, new_entry)`: the two arrays a cache keeps
for the T new tokens. Without a cache entry the T tokens attend among themselves (training, prefill). With one they also
attend to the cached tokens; the module only reads the cache, so that the caller writes it once, in place.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from deepseek_jax.model.attention_core import Tokens, attend, masked_softmax, self_attention
from deepseek_jax.model.config import ModelConfig
from deepseek_jax.model.layers import Linear, RMSNorm
from deepseek_jax.model.ops import Ops
from deepseek_jax.model.rope import apply_rotary, rotary_angles, softmax_scale


class LatentAttention(nn.Module):
    """Multi-head latent attention (V2 §2.1, V3 eqs. 1-11).

    Keys and values of all heads are up-projections of one latent c_kv of `kv_lora_rank` numbers; a rotary key of
    `qk_rope_head_dim` numbers is shared by all heads. The expanded form computes the keys and values; the absorbed form
    folds the up-projections into query and output, and attends to the latents themselves. They are the same function.
    """

    config: ModelConfig
    ops: Ops

    @nn.compact
    def __call__(self, x_BTD: jax.Array, tokens: Tokens, cache_entry: tuple[jax.Array, jax.Array] | None = None):
        model, config, ops, rope = self.config, self.config.attention, self.ops, self.config.rope
        heads, nope, value = config.num_heads, config.qk_nope_head_dim, config.v_head_dim
        scale = softmax_scale(rope, config.qk_head_dim)

        def linear(name, features, axes, role="linear"):
            return Linear(model, ops, features, axes, role, name=name)

        def norm(name):
            return RMSNorm(model.latent_norm_eps, name=name)

        kv_a = linear("kv_a", config.kv_lora_rank + config.qk_rope_head_dim, ("embed", "kv_lora"))(x_BTD)
        c_kv_BTc = norm("kv_a_norm")(kv_a[..., : config.kv_lora_rank])  # eq. 1
        cos_BTr, sin_BTr = rotary_angles(rope, config.qk_rope_head_dim, tokens.positions_BT)
        k_rope_BTr = apply_rotary(kv_a[..., config.kv_lora_rank :], cos_BTr, sin_BTr, rope.interleaved)  # eq. 3

        query_features = heads * config.qk_head_dim
        if config.q_lora_rank is None:
            q_BTF = linear("q", query_features, ("embed", "heads"))(x_BTD)
        else:
            c_q_BTc = norm("q_a_norm")(linear("q_a", config.q_lora_rank, ("embed", "q_lora"))(x_BTD))  # eq. 6
            q_BTF = linear("q_b", query_features, ("q_lora", "heads"))(c_q_BTc)  # eq. 7
        q_BTHk = q_BTF.reshape(*x_BTD.shape[:2], heads, config.qk_head_dim)
        q_BTHk = ops.shard(q_BTHk, "batch", "length", "heads", None)
        q_nope_BTHn, q_rope_BTHr = q_BTHk[..., :nope], q_BTHk[..., nope:]
        q_rope_BTHr = apply_rotary(q_rope_BTHr, cos_BTr[:, :, None], sin_BTr[:, :, None], rope.interleaved)  # eq. 8

        kv_b_axes = ("kv_lora_rank", "heads")
        kv_b_cF = linear("kv_b", heads * (nope + value), kv_b_axes).weight(config.kv_lora_rank)
        # What the cache and the absorbed form read: the latents as the expanded form's product rounds them (FP8).
        latent_BTc = ops.rounded_input(c_kv_BTc)

        if cache_entry is None:  # expanded

            def expand(c_kv_BSc, k_rope_BSr, kv_b_chm):
                """Keys [B, S, h, n+r] and values [B, S, h, v] of some heads."""
                kv_b_cf = jax.tree.map(lambda leaf: leaf.reshape(leaf.shape[0], -1), kv_b_chm)
                kv_BSf = ops.linear(c_kv_BSc, kv_b_cf, kv_b_axes)  # eqs. 2, 5
                kv_BShm = kv_BSf.reshape(*c_kv_BSc.shape[:2], -1, nope + value)
                k_rope_BShr = jnp.broadcast_to(k_rope_BSr[:, :, None], (*kv_BShm.shape[:3], k_rope_BSr.shape[-1]))
                return jnp.concatenate([kv_BShm[..., :nope], k_rope_BShr], axis=-1), kv_BShm[..., nope:]  # eq. 4

            q_BTHk = jnp.concatenate([q_nope_BTHn, q_rope_BTHr], axis=-1)  # eq. 9
            kv_b_cHm = ops.precision.by_heads(kv_b_cF, heads)
            out_BTHv = self_attention(  # eq. 10
                ops,
                scale,
                q_BTHk[:, :, :, None],
                tokens.segment_ids_BT,
                (c_kv_BTc, k_rope_BTr),
                kv_b_cHm,
                expand,
                config.attends_to,
            )[:, :, :, 0]
        else:  # absorbed: q · (W c) = (Wᵀ q) · c
            kv_b_cHm = ops.rounded_weight(kv_b_cF, kv_b_axes).reshape(config.kv_lora_rank, heads, nope + value)
            key_cHn, value_cHv = kv_b_cHm[..., :nope], kv_b_cHm[..., nope:]
            q_latent_BTHc = ops.einsum("BTHn,cHn->BTHc", q_nope_BTHn, key_cHn)

            def scores(c_kv_BSc, k_rope_BSr):
                scores_BHTS = ops.einsum("BTHc,BSc->BHTS", q_latent_BTHc, c_kv_BSc)
                return (scores_BHTS + ops.einsum("BTHr,BSr->BHTS", q_rope_BTHr, k_rope_BSr)) * scale

            old_latent_BSc, old_rope_BSr = cache_entry
            all_scores = jnp.concatenate(
                [scores(old_latent_BSc, old_rope_BSr), scores(latent_BTc, k_rope_BTr)], axis=-1
            )
            probs_BHTS = masked_softmax(all_scores, tokens.cached_and_new_mask(config.attends_to)[:, None])
            probs_old, probs_new = jnp.split(probs_BHTS, [old_latent_BSc.shape[1]], axis=-1)
            out_BHTc = ops.einsum("BHTS,BSc->BHTc", probs_old, old_latent_BSc)
            out_BHTc += ops.einsum("BHTS,BSc->BHTc", probs_new, latent_BTc)
            out_BTHv = ops.einsum("BHTc,cHv->BTHv", out_BHTc, value_cHv)  # eq. 10

        out_BTF = out_BTHv.reshape(*x_BTD.shape[:2], heads * value).astype(x_BTD.dtype)
        y_BTD = linear("o", x_BTD.shape[-1], ("heads", "embed"), "attention_output")(out_BTF)  # eq. 11
        return y_BTD, (latent_BTc, k_rope_BTr)


class GroupedQueryAttention(nn.Module):
    """Multi-head (num_kv_heads = num_heads), grouped-query or multi-query (num_kv_heads = 1) attention, for
    ablations."""

    config: ModelConfig
    ops: Ops

    @nn.compact
    def __call__(self, x_BTD: jax.Array, tokens: Tokens, cache_entry: tuple[jax.Array, jax.Array] | None = None):
        config, ops, rope = self.config.attention, self.ops, self.config.rope
        kv_heads, dim = config.num_kv_heads, config.head_dim
        queries_per_kv = config.num_heads // kv_heads

        def heads(name, *shape):
            features = dim
            for size in shape:
                features *= size
            y = Linear(self.config, ops, features, ("embed", "heads"), name=name)(x_BTD)
            return ops.shard(
                y.reshape(*x_BTD.shape[:2], *shape, dim), "batch", "length", "heads", *(None,) * len(shape)
            )

        q_BTGgk, k_BTGk, v_BTGk = heads("q", kv_heads, queries_per_kv), heads("k", kv_heads), heads("v", kv_heads)
        cos_BTr, sin_BTr = rotary_angles(rope, dim, tokens.positions_BT)
        cos_BTr, sin_BTr = cos_BTr[:, :, None], sin_BTr[:, :, None]
        q_BTGgk = apply_rotary(q_BTGgk, cos_BTr[:, :, None], sin_BTr[:, :, None], rope.interleaved)
        k_BTGk = apply_rotary(k_BTGk, cos_BTr, sin_BTr, rope.interleaved)
        scale = softmax_scale(rope, dim)

        if cache_entry is None:
            out_BTGgk = self_attention(
                ops, scale, q_BTGgk, tokens.segment_ids_BT, (k_BTGk, v_BTGk), attends_to=config.attends_to
            )
        else:
            old_k, old_v = (entry.reshape(*entry.shape[:2], kv_heads, dim) for entry in cache_entry)
            k_BGSk, v_BGSk = (
                jnp.concatenate(kv, axis=1).transpose(0, 2, 1, 3) for kv in ((old_k, k_BTGk), (old_v, v_BTGk))
            )
            q_BGgTk = q_BTGgk.transpose(0, 2, 3, 1, 4)
            out_BGgTk = attend(
                ops.einsum, q_BGgTk, k_BGSk, v_BGSk, tokens.cached_and_new_mask(config.attends_to), scale
            )
            out_BTGgk = out_BGgTk.transpose(0, 3, 1, 2, 4)

        out_BTF = out_BTGgk.reshape(*x_BTD.shape[:2], config.num_heads * dim).astype(x_BTD.dtype)
        output = Linear(self.config, ops, x_BTD.shape[-1], ("heads", "embed"), "attention_output", name="o")
        return output(out_BTF), (k_BTGk.reshape(*x_BTD.shape[:2], -1), v_BTGk.reshape(*x_BTD.shape[:2], -1))

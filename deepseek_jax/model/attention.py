"""Multi-head latent attention in its expanded and its absorbed form; grouped-query attention behind the same interface.

Both modules are called as `(x_BTD, tokens, cache_entry)` and return `(y_BTD, new_entry)`: the two arrays a cache keeps
for the T new tokens. Without a cache entry the T tokens attend among themselves (training, prefill). With one they also
attend to the cached tokens; the module only reads the cache, so that the caller writes it once, in place.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from deepseek_jax.model.config import GQAConfig, MLAConfig, ModelConfig
from deepseek_jax.model.layers import Linear, RMSNorm, place
from deepseek_jax.model.placement import Placement
from deepseek_jax.model.rope import apply_rotary, rotary_angles, softmax_scale
from deepseek_jax.precision import Precision
from kernels_pallas import attention
from kernels_pallas.attention.api import has_kernel
from kernels_pallas.implementations import preferred

MASKED = -1e30  # finite, so that a row with nothing to attend to (padding) stays finite


@flax.struct.dataclass
class Tokens:
    """Where the T new tokens of a call stand, and what the cache holds: all that masks and angles are made of."""

    positions_BT: jax.Array  # int32, for rotary angles and against cached positions
    segment_ids_BT: jax.Array  # int32, 0 = padding; attention stays inside a segment
    cached_positions_BS: jax.Array | None = None  # int32, -1 = empty slot

    def cache_mask(self) -> jax.Array:
        """[B, T, S] bool: cached tokens at or before the query's position."""
        cached = self.cached_positions_BS[:, None, :]
        return (cached >= 0) & (cached <= self.positions_BT[:, :, None])

    def cached_and_new_mask(self) -> jax.Array:
        """[B, T, S+T] bool: the cache's slots, then the new tokens."""
        return jnp.concatenate([self.cache_mask(), causal_mask(self.segment_ids_BT, self.segment_ids_BT, 0)], axis=-1)


def causal_mask(query_segments_BT: jax.Array, segments_BS: jax.Array, first: jax.Array | int) -> jax.Array:
    """[B, T, S] bool: queries at slots first … first+T-1 see earlier slots of the same segment."""
    slots_T = first + jnp.arange(query_segments_BT.shape[1])
    earlier_TS = slots_T[:, None] >= jnp.arange(segments_BS.shape[1])
    return earlier_TS & (query_segments_BT[:, :, None] == segments_BS[:, None, :])


def masked_softmax(scores: jax.Array, mask: jax.Array) -> jax.Array:
    """float32 softmax over the last axis where the mask, broadcast against the scores, allows."""
    return jax.nn.softmax(jnp.where(mask, scores, MASKED), axis=-1)


def attend(
    einsum, q_BGgTk: jax.Array, k_BGSk: jax.Array, v_BGSv: jax.Array, mask_BTS: jax.Array, scale: float
) -> jax.Array:
    """softmax(q k^T scale) v where the mask allows, g query heads to each of G key-value heads: [B, G, g, T, v]
    float32.

    The g heads' queries are R = g·T rows of one product, and the sum of weights divides the result rather than the
    weights: on CPU both together take a third off forward and backward.
    """
    B, G, g, T, _ = q_BGgTk.shape
    bias_BTS = jnp.where(mask_BTS, 0.0, MASKED)
    bias_B1RS = jnp.tile(bias_BTS, (1, g, 1))[:, None]
    scores_BGRS = einsum("BGRk,BGSk->BGRS", q_BGgTk.reshape(B, G, g * T, -1), k_BGSk) * scale + bias_B1RS
    weights_BGRS = jnp.exp(scores_BGRS - jax.lax.stop_gradient(jnp.max(scores_BGRS, axis=-1, keepdims=True)))
    out_BGRv = einsum("BGRS,BGSv->BGRv", weights_BGRS, v_BGSv) / jnp.sum(weights_BGRS, axis=-1, keepdims=True)
    return out_BGRv.reshape(B, G, g, T, -1)


@dataclasses.dataclass(frozen=True)
class SelfAttention:
    """Attention of a sequence's queries to its keys, in pieces that are recomputed in the backward pass.

    `chunk` queries (0: all) of `heads_at_once` heads (0: all) at a time: no array of T x S x heads exists. Where there
    is a kernel (NVIDIA Hopper and TPUs, bfloat16) no scores exist at all, and `chunk` says nothing.
    """

    precision: Precision
    placement: Placement
    scale: float
    chunk: int
    heads_at_once: int

    def expanded_latents(self, queries, keys, weights, first: jax.Array | int) -> jax.Array:
        """MLA as `Placement.attend` calls it -> [B, T, H, v], in float32 or, from a kernel, the compute dtype.

        queries: q [B, T, H, k], segment ids [B, T]; keys: latents [B, S, c], rotary keys [B, S, r], segment ids [B, S];
        weights: their up-projection [c, H, n+v], as `Precision.by_heads` divides it. The keys and values exist for
        `heads_at_once` heads at a time.
        """
        (q_BTHk, query_segments_BT), (c_kv_BSc, k_rope_BSr, segments_BS), kv_b_cHm = queries, keys, weights
        nope = q_BTHk.shape[-1] - k_rope_BSr.shape[-1]

        def some_heads(q_BThk, kv_b_chm):
            heads = kv_b_chm.shape[1]
            latent_Nc = c_kv_BSc.reshape(-1, c_kv_BSc.shape[-1])
            kv_b_cf = jax.tree.map(lambda leaf: leaf.reshape(leaf.shape[0], -1), kv_b_chm)
            multiply = functools.partial(self.precision.linear, kind=self.placement.device_kind)
            kv_NF = place(
                self.placement, self.precision, multiply, kv_b_cf, "linear", ("kv_lora_rank", "heads"), latent_Nc
            )
            kv_BShm = kv_NF.reshape(*c_kv_BSc.shape[:2], heads, -1)
            k_rope_BShr = jnp.broadcast_to(k_rope_BSr[:, :, None], (*k_rope_BSr.shape[:2], heads, k_rope_BSr.shape[-1]))
            k_BShk = jnp.concatenate([kv_BShm[..., :nope], k_rope_BShr], axis=-1)
            return self(q_BThk[:, :, :, None], k_BShk, kv_BShm[..., nope:], query_segments_BT, segments_BS, first)[
                :, :, :, 0
            ]

        heads = q_BTHk.shape[2]
        group = math.gcd(heads, self.heads_at_once) if self.heads_at_once else heads
        if group == heads:
            return some_heads(q_BTHk, kv_b_cHm)

        def split(x, axis):
            return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, group, *x.shape[axis + 1 :]), axis, 0)

        out_JBThv = jax.lax.map(
            jax.checkpoint(lambda part: some_heads(*part)),
            (split(q_BTHk, 2), jax.tree.map(lambda leaf: split(leaf, 1), kv_b_cHm)),
        )
        return jnp.moveaxis(out_JBThv, 0, 2).reshape(*q_BTHk.shape[:3], -1)

    def keys_and_values(self, queries, keys, weights, first: jax.Array | int) -> jax.Array:
        """The same for keys [B, S, G, k] and values [B, S, G, v] as they are; queries [B, T, G, g, k] -> [B, T, G, g,
        v]."""
        (q_BTGgk, query_segments_BT), (k_BSGk, v_BSGv, segments_BS) = queries, keys
        del weights
        return self(q_BTGgk, k_BSGk, v_BSGv, query_segments_BT, segments_BS, first)

    def __call__(
        self,
        q_BTGgk: jax.Array,
        k_BSGk: jax.Array,
        v_BSGv: jax.Array,
        query_segments_BT: jax.Array,
        segments_BS: jax.Array,
        first: jax.Array | int,
    ) -> jax.Array:
        """[B, T, G, g, v]: g query heads to each of G key-value heads; queries stand at slots first … of the S.

        Heads go before positions, so that every product is a batch of plain matrix products; on CPU this is three times
        as fast forward. Where `first` is known before compiling, a chunk reads no keys behind it.
        """
        kind, grouped = self.placement.device_kind, q_BTGgk.shape[3]
        why_not = None if grouped == 1 else f"takes one query head to each key head, not {grouped}"
        operands = [x.astype(self.precision.compute_dtype) for x in (q_BTGgk[:, :, :, 0], k_BSGk, v_BSGv)]
        if has_kernel(kind, *operands, why_not=why_not):
            kernel = functools.partial(attention, scale=self.scale, first=first, implementation=preferred(kind))
            names = 3 * (("batch", None, "heads", None),) + 2 * (("batch", None),)
            return self.placement.on_each_device(kernel, names, *operands, query_segments_BT, segments_BS)[
                :, :, :, None
            ]

        length, chunk = q_BTGgk.shape[1], self.chunk
        q_BGgTk, k_BGSk, v_BGSv = (
            q_BTGgk.transpose(0, 2, 3, 1, 4),
            k_BSGk.transpose(0, 2, 1, 3),
            v_BSGv.transpose(0, 2, 1, 3),
        )

        def queries(q_BGgtk, segments_Bt, first, seen):
            mask_BtS = causal_mask(segments_Bt, segments_BS[:, :seen], first)
            return attend(
                self.precision.einsum, q_BGgtk, k_BGSk[:, :, :seen], v_BGSv[:, :, :seen], mask_BtS, self.scale
            )

        recomputed = jax.checkpoint(queries, static_argnums=3)
        if chunk == 0 or length <= chunk:
            out_BGgTv = queries(q_BGgTk, query_segments_BT, first, k_BSGk.shape[1])
        elif isinstance(first, int):
            spans = [(start, min(start + chunk, length)) for start in range(0, length, chunk)]
            chunks = [
                recomputed(q_BGgTk[..., a:b, :], query_segments_BT[:, a:b], first + a, first + b) for a, b in spans
            ]
            out_BGgTv = jnp.concatenate(chunks, axis=3)
        else:
            out_BGgTv = self._in_equal_chunks(recomputed, q_BGgTk, query_segments_BT, first, k_BSGk.shape[1])
        return out_BGgTv.transpose(0, 3, 1, 2, 4)

    def _in_equal_chunks(self, queries: Callable, q_BGgTk, query_segments_BT, first, seen: int) -> jax.Array:
        """One loop over chunks of equal size, the last one padded: its length does not grow the program."""
        length, count = q_BGgTk.shape[3], -(-q_BGgTk.shape[3] // self.chunk)
        padding = count * self.chunk - length

        def split(x, axis):
            x = jnp.pad(x, [(0, padding if i == axis else 0) for i in range(x.ndim)])
            return jnp.moveaxis(x.reshape(*x.shape[:axis], count, self.chunk, *x.shape[axis + 1 :]), axis, 0)

        parts = (split(q_BGgTk, 3), split(query_segments_BT, 1), first + self.chunk * jnp.arange(count))
        out_JBGgtv = jax.lax.map(lambda part: queries(*part, seen), parts)
        out_BGgTv = jnp.moveaxis(out_JBGgtv, 0, 3).reshape(*q_BGgTk.shape[:3], count * self.chunk, -1)
        return out_BGgTv[:, :, :, :length]


class LatentAttention(nn.Module):
    """Multi-head latent attention (V2 §2.1, V3 eqs. 1-11).

    Keys and values of all heads are up-projections of one latent c_kv of `kv_lora_rank` numbers; a rotary key of
    `qk_rope_head_dim` numbers is shared by all heads. The expanded form computes the keys and values; the absorbed form
    folds the up-projections into query and output, and attends to the latents themselves. They are the same function.
    """

    config: MLAConfig
    model: ModelConfig
    precision: Precision
    placement: Placement

    @nn.compact
    def __call__(self, x_BTD: jax.Array, tokens: Tokens, cache_entry: tuple[jax.Array, jax.Array] | None = None):
        config, rope, placement, einsum = self.config, self.model.rope, self.placement, self.precision.einsum
        heads, nope, value = config.num_heads, config.qk_nope_head_dim, config.v_head_dim

        def linear(name, features, axes, role="linear"):
            return Linear(features, axes, self.model.init_std, self.precision, placement, role, name=name)

        def norm(name):
            return RMSNorm(self.model.latent_norm_eps, name=name)

        query_features = heads * config.qk_head_dim
        if config.q_lora_rank is None:
            q_BTHk = linear("q", query_features, ("embed", "heads"))(x_BTD)
        else:
            latent_q = norm("q_a_norm")(linear("q_a", config.q_lora_rank, ("embed", "q_lora"))(x_BTD))
            q_BTHk = linear("q_b", query_features, ("q_lora", "heads"))(latent_q)
        q_BTHk = placement.constrain(
            q_BTHk.reshape(*x_BTD.shape[:2], heads, config.qk_head_dim), "batch", "length", "heads", None
        )
        q_nope_BTHn, q_rope_BTHr = q_BTHk[..., :nope], q_BTHk[..., nope:]

        kv_a = linear("kv_a", config.kv_lora_rank + config.qk_rope_head_dim, ("embed", "kv_lora"))(x_BTD)
        c_kv_BTc = norm("kv_a_norm")(kv_a[..., : config.kv_lora_rank])

        cos_BTr, sin_BTr = rotary_angles(rope, config.qk_rope_head_dim, tokens.positions_BT)
        k_rope_BTr = apply_rotary(kv_a[..., config.kv_lora_rank :], cos_BTr, sin_BTr, rope.interleaved)
        q_rope_BTHr = apply_rotary(q_rope_BTHr, cos_BTr[:, :, None], sin_BTr[:, :, None], rope.interleaved)

        kv_b_axes = ("kv_lora_rank", "heads")
        kv_b_cF = linear("kv_b", heads * (nope + value), kv_b_axes).weight(config.kv_lora_rank)
        # The cache and the absorbed form have the latents and the up-projection as the expanded form's product rounds
        # them (FP8).
        latent_BTc = self.precision.rounded_input(c_kv_BTc)
        scale = softmax_scale(rope, config.qk_head_dim)

        if cache_entry is None:  # expanded
            core = SelfAttention(
                self.precision, placement, scale, self.model.attention_chunk, self.model.attention_heads_at_once
            )
            queries = (jnp.concatenate([q_nope_BTHn, q_rope_BTHr], axis=-1), tokens.segment_ids_BT)
            keys = (c_kv_BTc, k_rope_BTr, tokens.segment_ids_BT)
            out_BTHv = placement.attend(core.expanded_latents, queries, keys, self.precision.by_heads(kv_b_cF, heads))
        else:  # absorbed
            kv_b_cF = self.precision.rounded_weight(kv_b_cF, "linear", placement.part(kv_b_cF.shape, kv_b_axes))
            kv_b_cHm = kv_b_cF.reshape(config.kv_lora_rank, heads, nope + value)
            key_cHn, value_cHv = kv_b_cHm[..., :nope], kv_b_cHm[..., nope:]
            q_latent_BTHc = einsum("BTHn,cHn->BTHc", q_nope_BTHn, key_cHn)

            def scores(c_kv_BSc, k_rope_BSr):
                scores_BHTS = einsum("BTHc,BSc->BHTS", q_latent_BTHc, c_kv_BSc)
                return (scores_BHTS + einsum("BTHr,BSr->BHTS", q_rope_BTHr, k_rope_BSr)) * scale

            old_latent_BSc, old_rope_BSr = cache_entry
            all_scores = jnp.concatenate(
                [scores(old_latent_BSc, old_rope_BSr), scores(latent_BTc, k_rope_BTr)], axis=-1
            )
            probs_BHTS = masked_softmax(all_scores, tokens.cached_and_new_mask()[:, None])
            probs_old, probs_new = jnp.split(probs_BHTS, [old_latent_BSc.shape[1]], axis=-1)
            out_BHTc = einsum("BHTS,BSc->BHTc", probs_old, old_latent_BSc) + einsum(
                "BHTS,BSc->BHTc", probs_new, latent_BTc
            )
            out_BTHv = einsum("BHTc,cHv->BTHv", out_BHTc, value_cHv)

        out_BTF = out_BTHv.reshape(*x_BTD.shape[:2], heads * value).astype(x_BTD.dtype)
        y_BTD = linear("o", x_BTD.shape[-1], ("heads", "embed"), "attention_output")(out_BTF)
        return y_BTD, (latent_BTc, k_rope_BTr)


class GroupedQueryAttention(nn.Module):
    """Multi-head (num_kv_heads = num_heads), grouped-query or multi-query (num_kv_heads = 1) attention, for
    ablations."""

    config: GQAConfig
    model: ModelConfig
    precision: Precision
    placement: Placement

    @nn.compact
    def __call__(self, x_BTD: jax.Array, tokens: Tokens, cache_entry: tuple[jax.Array, jax.Array] | None = None):
        config, rope, placement, einsum = self.config, self.model.rope, self.placement, self.precision.einsum
        kv_heads, dim = config.num_kv_heads, config.head_dim
        queries_per_kv = config.num_heads // kv_heads

        def heads(name, *shape):
            features = dim
            for size in shape:
                features *= size
            y = Linear(features, ("embed", "heads"), self.model.init_std, self.precision, placement, name=name)(x_BTD)
            y = y.reshape(*x_BTD.shape[:2], *shape, dim)
            return placement.constrain(y, "batch", "length", "heads", *(None,) * len(shape))

        q_BTGgk, k_BTGk, v_BTGk = heads("q", kv_heads, queries_per_kv), heads("k", kv_heads), heads("v", kv_heads)
        cos_BTr, sin_BTr = rotary_angles(rope, dim, tokens.positions_BT)
        cos_BTr, sin_BTr = cos_BTr[:, :, None], sin_BTr[:, :, None]
        q_BTGgk = apply_rotary(q_BTGgk, cos_BTr[:, :, None], sin_BTr[:, :, None], rope.interleaved)
        k_BTGk = apply_rotary(k_BTGk, cos_BTr, sin_BTr, rope.interleaved)
        scale = softmax_scale(rope, dim)

        if cache_entry is None:
            core = SelfAttention(
                self.precision, placement, scale, self.model.attention_chunk, self.model.attention_heads_at_once
            )
            queries, keys = (q_BTGgk, tokens.segment_ids_BT), (k_BTGk, v_BTGk, tokens.segment_ids_BT)
            out_BTGgk = placement.attend(core.keys_and_values, queries, keys, ())
        else:
            old_k, old_v = (entry.reshape(*entry.shape[:2], kv_heads, dim) for entry in cache_entry)
            k_BGSk, v_BGSk = (
                jnp.concatenate(kv, axis=1).transpose(0, 2, 1, 3) for kv in ((old_k, k_BTGk), (old_v, v_BTGk))
            )
            q_BGgTk = q_BTGgk.transpose(0, 2, 3, 1, 4)
            out_BGgTk = attend(einsum, q_BGgTk, k_BGSk, v_BGSk, tokens.cached_and_new_mask(), scale)
            out_BTGgk = out_BGgTk.transpose(0, 3, 1, 2, 4)

        out_BTF = out_BTGgk.reshape(*x_BTD.shape[:2], config.num_heads * dim).astype(x_BTD.dtype)
        y_BTD = Linear(
            x_BTD.shape[-1],
            ("heads", "embed"),
            self.model.init_std,
            self.precision,
            placement,
            "attention_output",
            name="o",
        )(out_BTF)
        return y_BTD, (k_BTGk.reshape(*x_BTD.shape[:2], -1), v_BTGk.reshape(*x_BTD.shape[:2], -1))

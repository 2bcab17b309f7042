"""Softmax attention (V3 eq. 10): masks, chunks of queries, groups of heads, and the kernel where there is one."""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from deepseek_jax.model.ops import Ops
from kernels_pallas import attention
from kernels_pallas.attention.api import has_kernel
from kernels_pallas.attention.reference import MASKED, attend, causal_mask
from kernels_pallas.implementations import preferred

AttendsTo = Callable[[jax.Array], jax.Array]  # int32 distances, query position - key position >= 0 -> bool, seen or not


@flax.struct.dataclass
class Tokens:
    """The T new tokens of a call and the tokens that the cache holds: all that masks and rotary angles are made of."""

    positions_BT: jax.Array  # int32, for rotary angles and against cached positions
    segment_ids_BT: jax.Array  # int32, 0 = padding; attention stays inside a segment
    cached_positions_BS: jax.Array | None = None  # int32, -1 = empty slot

    def cache_mask(self) -> jax.Array:
        """[B, T, S] bool: cached tokens at or before the query's position."""
        cached = self.cached_positions_BS[:, None, :]
        return (cached >= 0) & (cached <= self.positions_BT[:, :, None])

    def cached_and_new_mask(self, attends_to: AttendsTo | None = None) -> jax.Array:
        """[B, T, S+T] bool: the cache's slots, then the new tokens; of them those it `attends_to` (None: all)."""
        cached, new = self.cache_mask(), causal_mask(self.segment_ids_BT, self.segment_ids_BT, 0)
        if attends_to is not None:
            cached &= attends_to(self.positions_BT[:, :, None] - self.cached_positions_BS[:, None])
            new &= attends_to(_distances(0, *new.shape[1:]))
        return jnp.concatenate([cached, new], axis=-1)


def _distances(first: jax.Array | int, queries: int, keys: int) -> jax.Array:
    """[T, S] int32: how far before queries at positions first … first+T-1 keys 0 … S-1 stand."""
    return first + jnp.arange(queries)[:, None] - jnp.arange(keys)


def masked_softmax(scores: jax.Array, mask: jax.Array) -> jax.Array:
    """float32 softmax over the last axis where the mask, broadcast against the scores, allows."""
    return jax.nn.softmax(jnp.where(mask, scores, MASKED), axis=-1)


def self_attention(
    ops: Ops,
    scale: float,
    q_BTGgk: jax.Array,
    segment_ids_BT: jax.Array,
    kv_inputs: tuple[jax.Array, ...],
    weights: Any = (),
    expand: Callable[..., tuple[jax.Array, jax.Array]] = lambda k, v, weights: (k, v),
    attends_to: AttendsTo | None = None,
) -> jax.Array:
    """Causal attention inside each segment, g query heads to each of G key-value heads: [B, T, G, g, v], in float32 or,
    from a kernel, the compute dtype.

    expand(*kv_inputs, weights) -> keys [B, S, G, k] and values [B, S, G, v]. `kv_inputs` are arrays [B, S, ·] or
    [B, S, G, ·], which travel where the sequence is divided; `weights` a tree of arrays [·, G, ·] or (), of which some
    heads may be given. With weights, keys and values exist for `attention_heads_at_once` heads at a time.
    `attends_to` says which of the earlier tokens a query attends to (None: all).
    """

    def core(q_inputs, kv_inputs, weights, first):
        (q_BTGgk, query_segments_BT), (*inputs, segments_BS) = q_inputs, kv_inputs

        def some_heads(q_BThgk, weights):
            k_BShk, v_BShv = expand(*inputs, weights)
            return _attend(ops, scale, q_BThgk, k_BShk, v_BShv, query_segments_BT, segments_BS, first, attends_to)

        heads, at_once = q_BTGgk.shape[2], ops.runtime.attention_heads_at_once
        group = math.gcd(heads, at_once) if at_once and jax.tree.leaves(weights) else heads
        if group == heads:
            return some_heads(q_BTGgk, weights)

        def split(x, axis):
            return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, group, *x.shape[axis + 1 :]), axis, 0)

        groups = split(q_BTGgk, 2), jax.tree.map(lambda leaf: split(leaf, 1), weights)
        out_JBThgv = jax.lax.map(jax.checkpoint(lambda group: some_heads(*group)), groups)
        return jnp.moveaxis(out_JBThgv, 0, 2).reshape(*q_BTGgk.shape[:4], -1)

    return ops.attention(core, (q_BTGgk, segment_ids_BT), (*kv_inputs, segment_ids_BT), weights)


def _attend(
    ops: Ops,
    scale: float,
    q_BTGgk: jax.Array,
    k_BSGk: jax.Array,
    v_BSGv: jax.Array,
    query_segments_BT: jax.Array,
    segments_BS: jax.Array,
    first: jax.Array | int,
    attends_to: AttendsTo | None,
) -> jax.Array:
    """[B, T, G, g, v] of queries at positions first … first+T-1 of the S keys.

    A kernel (NVIDIA Hopper and TPUs, bfloat16) holds no scores. Elsewhere `attention_chunk` queries (0: all) are
    computed at a time and recomputed in the backward pass, so that no array of T x S x heads exists. Where `first` is
    known before compiling, a chunk reads no keys behind it. Heads go before positions, so that every product is a batch
    of plain matrix products: three times as fast on a CPU, forward.
    """
    device, grouped = ops.device, q_BTGgk.shape[3]
    why_not = None if grouped == 1 else f"takes one query head to each key head, not {grouped}"
    why_not = why_not if attends_to is None else "attends to all earlier tokens, and this attention does not"
    operands = [x.astype(ops.precision.compute_dtype) for x in (q_BTGgk[:, :, :, 0], k_BSGk, v_BSGv)]
    if has_kernel(device, *operands, why_not=why_not):
        kernel = functools.partial(attention, scale=scale, first=first, implementation=preferred(device))
        axes = 3 * (("batch", None, "heads", None),) + 2 * (("batch", None),)
        return ops.shard_mapped(kernel, axes, *operands, query_segments_BT, segments_BS)[:, :, :, None]

    length, chunk, keys = q_BTGgk.shape[1], ops.runtime.attention_chunk, k_BSGk.shape[1]
    q_BGgTk, k_BGSk, v_BGSv = (
        q_BTGgk.transpose(0, 2, 3, 1, 4),
        k_BSGk.transpose(0, 2, 1, 3),
        v_BSGv.transpose(0, 2, 1, 3),
    )

    def attend_chunk(q_BGgtk, segments_Bt, first, seen):
        mask_BtS = causal_mask(segments_Bt, segments_BS[:, :seen], first)
        if attends_to is not None:
            mask_BtS &= attends_to(_distances(first, segments_Bt.shape[1], seen))
        return attend(ops.precision.einsum, q_BGgtk, k_BGSk[:, :, :seen], v_BGSv[:, :, :seen], mask_BtS, scale)

    recomputed = jax.checkpoint(attend_chunk, static_argnums=3)
    if chunk == 0 or length <= chunk:
        out_BGgTv = attend_chunk(q_BGgTk, query_segments_BT, first, keys)
    elif isinstance(first, int):
        spans = [(start, min(start + chunk, length)) for start in range(0, length, chunk)]
        chunks = [recomputed(q_BGgTk[..., a:b, :], query_segments_BT[:, a:b], first + a, first + b) for a, b in spans]
        out_BGgTv = jnp.concatenate(chunks, axis=3)
    else:
        out_BGgTv = _in_equal_chunks(recomputed, q_BGgTk, query_segments_BT, first, keys, chunk)
    return out_BGgTv.transpose(0, 3, 1, 2, 4)


def _in_equal_chunks(attend_chunk: Callable, q_BGgTk, query_segments_BT, first, keys: int, chunk: int) -> jax.Array:
    """One loop over chunks of equal size, the last one padded: its length does not grow the program."""
    length, count = q_BGgTk.shape[3], -(-q_BGgTk.shape[3] // chunk)
    padding = count * chunk - length

    def split(x, axis):
        x = jnp.pad(x, [(0, padding if i == axis else 0) for i in range(x.ndim)])
        return jnp.moveaxis(x.reshape(*x.shape[:axis], count, chunk, *x.shape[axis + 1 :]), axis, 0)

    chunks = (split(q_BGgTk, 3), split(query_segments_BT, 1), first + chunk * jnp.arange(count))
    out_JBGgtv = jax.lax.map(lambda chunk: attend_chunk(*chunk, keys), chunks)
    out_BGgTv = jnp.moveaxis(out_JBGgtv, 0, 3).reshape(*q_BGgTk.shape[:3], count * chunk, -1)
    return out_BGgTv[:, :, :, :length]

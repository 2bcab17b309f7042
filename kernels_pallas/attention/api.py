"""Attention of a sequence to itself, with gradients: what a user calls."""

import jax
import jax.numpy as jnp

from kernels_pallas._compat import vary_alike
from kernels_pallas.attention import mosaic_gpu_sm90, mosaic_tpu, reference
from kernels_pallas.attention.vjp import differentiable
from kernels_pallas.implementations import PREFERRED, choose

IMPLEMENTATIONS = {
    "xla": (reference.attention, lambda *_: None),
    "mosaic_gpu_sm90": (differentiable(mosaic_gpu_sm90), mosaic_gpu_sm90.reason),
    "mosaic_tpu": (differentiable(mosaic_tpu), mosaic_tpu.reason),
}


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    query_segments: jax.Array,
    segments: jax.Array,
    *,
    scale: float,
    first: jax.Array | int = 0,
    implementation: str | tuple[str, ...] | None = None,
) -> jax.Array:
    """softmax(q kᵀ scale) v for each head: q [B, T, H, k], k [B, S, H, k], v [B, S, H, v] of one dtype -> [B, T, H, v] in it.

    The first query stands at place `first` of the S. A query sees the keys at or before its own place whose `segments` [B, S] equal its own,
    `query_segments` [B, T], both int32; what one gets that sees nothing is not defined. Scores, softmax and sums are float32, what is multiplied
    with the values is rounded to their dtype. A kernel keeps no scores: the backward pass computes them again. Raises ValueError for shapes
    or dtypes that do not match.
    """
    (B, T, H, width), S = q.shape, k.shape[1]
    expected = (k.shape, (B, S, H, width)), (v.shape[:3], (B, S, H)), (query_segments.shape, (B, T)), (segments.shape, (B, S))
    if any(got != wanted for got, wanted in expected) or not q.dtype == k.dtype == v.dtype:
        given = {"q": q, "k": k, "v": v, "query_segments": query_segments, "segments": segments}
        got = ", ".join(f"{name} {x.dtype}{list(x.shape)}" for name, x in given.items())
        raise ValueError(f"attention: {got} must be [B, T, H, k], [B, S, H, k], [B, S, H, v], [B, T], [B, S], the first three of one dtype")
    chosen = choose("attention", IMPLEMENTATIONS, implementation, q, k, v)
    return chosen(*vary_alike(q, k, v, query_segments, segments, jnp.asarray(first, jnp.int32)), scale)


def has_kernel(kind: str, q: jax.Array, k: jax.Array, v: jax.Array) -> bool:
    """Whether there is one for such operands on that kind of device."""
    return PREFERRED.get(kind) in IMPLEMENTATIONS and IMPLEMENTATIONS[PREFERRED[kind]][1](q, k, v) is None

"""Attention of a sequence to itself, with gradients, and the table of its implementations."""

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas._compat import vary_alike
from kernels_pallas.accuracy import ATTENDED
from kernels_pallas.attention import mosaic_gpu_sm90, mosaic_tpu, reference
from kernels_pallas.attention.vjp import differentiable
from kernels_pallas.examples import few, normal
from kernels_pallas.implementations import PREFERRED, Operation, anything, choose


def _small(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple:
    """A small call: one sequence of two documents and two heads, queries at the end of the keys, and a gradient of the
    result."""
    heads, queries, keys = min(q.shape[2], 2), few(q.shape[1], 256), few(max(q.shape[1], k.shape[1]), 256)
    given = ((q, queries), (k, keys), (v, keys), (v, queries))
    arrays = [normal(i, (1, length, heads, x.shape[-1]), x.dtype, uneven=False) for i, (x, length) in enumerate(given)]
    segments = (1 + (np.arange(keys) >= keys // 3)).astype(np.int32)[None]
    return *arrays, segments[:, keys - queries :], segments


def _results(function, q, k, v, do, query_segments, segments) -> tuple:
    """The result and its gradients, with heads before positions."""
    scale, first = q.shape[-1] ** -0.5, jnp.asarray(k.shape[1] - q.shape[1], jnp.int32)
    o, pull_back = jax.vjp(lambda q, k, v: function(q, k, v, query_segments, segments, first, scale), q, k, v)
    return tuple(x.swapaxes(1, 2) for x in (o, *pull_back(do)))


ATTENTION = Operation(
    "attention",
    {
        "xla": (reference.attention, anything),
        "mosaic_gpu_sm90": (differentiable(mosaic_gpu_sm90), mosaic_gpu_sm90.reason),
        "mosaic_tpu": (differentiable(mosaic_tpu), mosaic_tpu.reason),
    },
    _small,
    _results,
    ATTENDED,
    "The scores lie in memory instead; bfloat16, one query head to each key head, and widths and lengths that the "
    "kernel takes avoid it",
)


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
    """softmax(q kᵀ scale) v for each head: q [B, T, H, k], k [B, S, H, k], v [B, S, H, v] of one dtype -> [B, T, H, v]
    in it.

    The first query stands at position `first` of the S. A query sees the keys at or before its own position whose
    `segments` [B, S] equal its own of `query_segments` [B, T], both int32; the result of a query that sees nothing is
    undefined. Scores, softmax and sums are float32; the weights are rounded to the dtype of the values before they
    multiply them. A kernel holds no scores: the backward pass computes them again. Raises ValueError for shapes or
    dtypes that do not match.
    """
    (B, T, H, width), S = q.shape, k.shape[1]
    expected = (
        (k.shape, (B, S, H, width)),
        (v.shape[:3], (B, S, H)),
        (query_segments.shape, (B, T)),
        (segments.shape, (B, S)),
    )
    if any(got != wanted for got, wanted in expected) or not q.dtype == k.dtype == v.dtype:
        given = {"q": q, "k": k, "v": v, "query_segments": query_segments, "segments": segments}
        got = ", ".join(f"{name} {x.dtype}{list(x.shape)}" for name, x in given.items())
        raise ValueError(
            f"attention: {got} must be [B, T, H, k], [B, S, H, k], [B, S, H, v], [B, T], [B, S], the first three of "
            "one dtype"
        )
    chosen = choose(ATTENTION, implementation, q, k, v)
    return chosen(*vary_alike(q, k, v, query_segments, segments, jnp.asarray(first, jnp.int32)), scale)


def has_kernel(device: str, q: jax.Array, k: jax.Array, v: jax.Array, why_not: str | None = None) -> bool:
    """True if a kernel runs such operands on that kind of device. Warns once if the device has a kernel that does not
    take them; `why_not` is a reason of the caller's."""
    name = PREFERRED.get(device)
    if name not in ATTENTION.implementations:
        return False
    missing = why_not or ATTENTION.missing(name, q, k, v)
    if missing:
        ATTENTION.pass_over([f"{name} {missing}"])
    return missing is None

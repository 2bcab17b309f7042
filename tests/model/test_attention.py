"""Attention against a float64 loop written from the paper's equations; the absorbed form against the expanded one."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import GQA, MHA, MQA, YARN, jit, random_like, tiny_config, tiny_mla

from deepseek_jax.model.attention import GroupedQueryAttention, LatentAttention
from deepseek_jax.model.attention_core import Tokens, self_attention
from deepseek_jax.model.config import GQAConfig, MLAConfig, RopeConfig
from deepseek_jax.model.ops import Ops
from deepseek_jax.model.rope import inverse_frequencies, softmax_scale
from deepseek_jax.model.runtime import RuntimeConfig

B, T, D = 2, 7, 12


@dataclasses.dataclass(frozen=True)
class WindowedGQA(GQAConfig):
    """A query sees itself and the two tokens before it."""

    def attends_to(self, distance):
        return distance < 3


PLAIN = RopeConfig()
HALF_SPLIT = RopeConfig(interleaved=False)
CASES = {
    "mla": (tiny_mla(), YARN),
    "mla without q-lora": (tiny_mla(q_lora_rank=None), PLAIN),
    "mha": (MHA, HALF_SPLIT),
    "gqa": (GQA, YARN),
    "mqa": (MQA, PLAIN),
    "gqa in a window": (WindowedGQA(4, 2, 8), PLAIN),
}
SEGMENTS = np.array([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 2, 2, 2, 0]], np.int32)
POSITIONS = np.array([[0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 0, 1, 2, -1]], np.int32)


def make(case):
    config, rope = CASES[case]
    module = LatentAttention if isinstance(config, MLAConfig) else GroupedQueryAttention
    return module(tiny_config(attention=config, rope=rope), Ops())


@functools.cache
def setup(case):
    """(module, variables, x, compiled expanded call)."""
    module = make(case)
    x = jnp.float32(np.random.default_rng(0).normal(size=(B, T, D)))
    tokens = Tokens(jnp.zeros((B, T), jnp.int32), jnp.ones((B, T), jnp.int32))
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), x, tokens))
    expanded = jit(lambda v, x, positions, segments: module.apply(v, x, Tokens(jnp.maximum(positions, 0), segments)))
    return module, random_like(shapes), x, expanded


def numpy_rotary(x, positions, rope):
    """x [..., T, dim] turned as complex numbers."""
    half = x.shape[-1] // 2
    first, second = (x[..., 0::2], x[..., 1::2]) if rope.interleaved else (x[..., :half], x[..., half:])
    turned = (first + 1j * second) * np.exp(1j * positions[:, None] * inverse_frequencies(rope, x.shape[-1]))
    out = np.empty_like(x)
    out[..., 0::2], out[..., 1::2] = turned.real, turned.imag
    return out if rope.interleaved else np.concatenate([turned.real, turned.imag], axis=-1)


def numpy_keys(case, weights, x, positions):
    """Queries, keys and values [H, T, ·] of one row, from the equations (V2 §2.1; plain GQA)."""
    config, rope = CASES[case]
    w = jax.tree.map(lambda a: np.asarray(a, np.float64), weights)

    def norm(y, scale):
        return y / np.sqrt(np.mean(y**2, -1, keepdims=True) + 1e-6) * scale

    def heads(y, count):
        return y.reshape(len(y), count, -1).transpose(1, 0, 2)

    if not isinstance(config, MLAConfig):
        repeat = config.num_heads // config.num_kv_heads
        q = numpy_rotary(heads(x @ w["q"]["kernel"], config.num_heads), positions, rope)
        k = numpy_rotary(heads(x @ w["k"]["kernel"], config.num_kv_heads), positions, rope)
        return q, np.repeat(k, repeat, 0), np.repeat(heads(x @ w["v"]["kernel"], config.num_kv_heads), repeat, 0)
    n, c = config.qk_nope_head_dim, config.kv_lora_rank
    if config.q_lora_rank is None:
        q = x @ w["q"]["kernel"]
    else:
        q = norm(x @ w["q_a"]["kernel"], w["q_a_norm"]["scale"]) @ w["q_b"]["kernel"]
    q = heads(q, config.num_heads)
    kv_a = x @ w["kv_a"]["kernel"]
    kv = heads(norm(kv_a[:, :c], w["kv_a_norm"]["scale"]) @ w["kv_b"]["kernel"], config.num_heads)
    k_rope = numpy_rotary(kv_a[:, c:], positions, rope)
    q = np.concatenate([q[..., :n], numpy_rotary(q[..., n:], positions, rope)], -1)
    k = np.concatenate([kv[..., :n], np.repeat(k_rope[None], config.num_heads, 0)], -1)
    return q, k, kv[..., n:]


@pytest.mark.parametrize("case", CASES)
def test_expanded_equals_the_equations(case):
    module, variables, x, expanded = setup(case)
    y, _ = expanded(variables, x, POSITIONS, SEGMENTS)
    head_dim = CASES[case][0].qk_head_dim if "mla" in case else CASES[case][0].head_dim
    scale = softmax_scale(CASES[case][1], head_dim)
    for b in range(B):
        q, k, v = numpy_keys(case, variables["params"], np.asarray(x[b], np.float64), np.maximum(POSITIONS[b], 0))
        for t in range(T):
            earliest = max(0, t - 2) if "window" in case else 0
            seen = [s for s in range(earliest, t + 1) if SEGMENTS[b, s] == SEGMENTS[b, t]]
            scores = np.einsum("hk,hsk->hs", q[:, t], k[:, seen]) * scale
            probs = np.exp(scores - scores.max(-1, keepdims=True))
            out = np.einsum("hs,hsv->hv", probs / probs.sum(-1, keepdims=True), v[:, seen])
            expected = out.reshape(-1) @ np.asarray(variables["params"]["o"]["kernel"], np.float64)
            np.testing.assert_allclose(y[b, t], expected, atol=2e-5)


@pytest.mark.parametrize("case", CASES)
def test_cached_equals_expanded_at_every_position(case):
    """One token at a time over a cache that is longer than what it holds, its free slots full of rubbish."""
    module, variables, x, expanded = setup(case)
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    y, latents = expanded(variables, x, positions, np.ones((B, T), np.int32))
    dims = tuple(CASES[case][0].cache_dims.values())
    assert [entry.shape for entry in latents] == [(B, T, dims[0]), (B, T, dims[1])]

    def step(variables, x, entry, positions, cached_positions):
        return module.apply(variables, x, Tokens(positions, jnp.ones_like(positions), cached_positions), entry)

    step, slots = jit(step), T + 2
    entries = tuple(np.full((B, slots, dim), 100.0, np.float32) for dim in dims)
    cached = np.full((B, slots), -1, np.int32)
    for t in range(T):
        out, new = step(variables, x[:, t : t + 1], entries, positions[:, t : t + 1], cached)
        np.testing.assert_allclose(out[:, 0], y[:, t], atol=1e-5)
        slot = (t + 3) % slots  # the order of slots does not matter, positions do
        for entry, value, full in zip(entries, new, latents, strict=True):
            np.testing.assert_allclose(value[:, 0], full[:, t], atol=1e-5)
            entry[:, slot] = value[:, 0]
        cached[:, slot] = t
    several, _ = step(variables, x[:, 4:], entries, positions[:, 4:], np.where(cached < 4, cached, -1))
    np.testing.assert_allclose(several, y[:, 4:], atol=1e-5)


@pytest.mark.parametrize("known", [True, False], ids=["first known", "first traced"])
def test_query_chunks_change_nothing(known):
    """Seven queries in chunks of three, two and two of them in another segment or in padding; five when they are a
    later part of the sequence."""
    rng = np.random.default_rng(1)
    q, k, v = (jnp.float32(rng.normal(size=shape)) for shape in ((B, T, 2, 2, 4), (B, T, 2, 4), (B, T, 2, 3)))
    weight = jnp.float32(rng.normal(size=(B, T, 2, 2, 3)))
    first = 0 if known else 2

    def loss(chunk, known, q, k, v, start):
        class LaterQueries(Ops):
            def attention(self, core, q_inputs, kv_inputs, weights):
                later = jax.tree.map(lambda x: x[:, first:], q_inputs)
                return core(later, kv_inputs, weights, first if known else start)

        ops = LaterQueries(runtime=RuntimeConfig(attention_chunk=chunk))
        out = self_attention(ops, 0.5, q, jnp.asarray(SEGMENTS), (k, v))
        return jnp.sum(out * weight[:, first:]), out

    def run(chunk, known):
        return jit(jax.value_and_grad(functools.partial(loss, chunk, known), argnums=(0, 1, 2), has_aux=True))(
            q, k, v, jnp.int32(first)
        )

    ((_, whole), whole_gradients), ((_, out), gradients) = run(0, True), run(3, known)
    np.testing.assert_allclose(out, whole, atol=1e-6)
    for got, want in zip(gradients, whole_gradients, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)
        assert np.abs(want).max() > 0.01


def test_heads_at_once_change_nothing():
    """Four heads, two at a time: 6 and 4 have that in common."""
    rng = np.random.default_rng(2)
    shapes = ((B, T, 4, 6), (B, T, 5), (B, T, 2), (5, 4, 7))
    arguments = [jnp.float32(rng.normal(size=shape)) for shape in shapes]

    def expand(latents_BSc, k_rope_BSr, kv_b_chm):
        kv_BShm = jnp.einsum("bsc,chm->bshm", latents_BSc, kv_b_chm)
        k_rope_BShr = jnp.broadcast_to(k_rope_BSr[:, :, None], (*kv_BShm.shape[:3], 2))
        return jnp.concatenate([kv_BShm[..., :4], k_rope_BShr], axis=-1), kv_BShm[..., 4:]

    def loss(heads_at_once, q, latents, k_rope, kv_b):
        runtime = RuntimeConfig(attention_chunk=3, attention_heads_at_once=heads_at_once)
        out = self_attention(
            Ops(runtime=runtime), 0.5, q[:, :, :, None], jnp.asarray(SEGMENTS), (latents, k_rope), kv_b, expand
        )[:, :, :, 0]
        return jnp.sum(jnp.sin(out)), out

    def run(heads_at_once):
        return jit(jax.value_and_grad(functools.partial(loss, heads_at_once), argnums=(0, 1, 2, 3), has_aux=True))(
            *arguments
        )

    ((_, whole), whole_gradients), ((_, out), gradients) = run(0), run(6)
    assert out.shape == (B, T, 4, 3)
    np.testing.assert_allclose(out, whole, atol=1e-6)
    for got, want in zip(gradients, whole_gradients, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_a_row_without_anything_to_see_stays_finite():
    module, variables, x, expanded = setup("mla")
    y, _ = expanded(variables, x, np.full((B, T), -1, np.int32), np.zeros((B, T), np.int32))
    assert np.isfinite(y).all()

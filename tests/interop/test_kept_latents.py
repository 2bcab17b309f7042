"""Keys and values from an up-projection that is stored in FP8: its numbers are used as they are, in prefill and in
decoding."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from tiny_checkpoints import TINY

from deepseek_jax.model.attention import LatentAttention
from deepseek_jax.model.attention_core import Tokens, self_attention
from deepseek_jax.model.config import MLAConfig
from deepseek_jax.model.ops import Ops
from deepseek_jax.model.runtime import RuntimeConfig
from deepseek_jax.precision import get_precision
from kernels_pallas import LinearQuantization, QTensor, Quantizer, dequantize, quantize_block

B, T, D = 2, 6, 32
# Two blocks of latents, and a block of columns that ends inside the last head (3 · 40 < 128 < 4 · 40).
ATTENTION = MLAConfig(
    num_heads=4, q_lora_rank=20, kv_lora_rank=144, qk_nope_head_dim=24, qk_rope_head_dim=8, v_head_dim=16
)
MODEL = TINY.replace(attention=ATTENTION, hidden_size=D)
# Float32 between the products and after attention, so that nothing but the latents' product rounds behind them.
FP8 = dataclasses.replace(
    get_precision("fp8_deepseek"), compute_dtype=jnp.dtype(jnp.float32), high_precision=("attention_output",)
)
ROWS = np.random.default_rng(0)
KV_B = ROWS.standard_normal((144, 160)).astype(np.float32) * np.exp(ROWS.standard_normal((144, 160))).astype(np.float32)
QUERIES = jnp.float32(ROWS.standard_normal((B, T, 4, 32)))
LATENTS, ROPE_KEYS = jnp.float32(3 * ROWS.standard_normal((B, T, 144))), jnp.float32(ROWS.standard_normal((B, T, 8)))
SEGMENTS = jnp.ones((B, T), jnp.int32)
compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def rounded(x, power_of_two):
    """Tiles of 1 × 128 in E4M3 by their definition."""
    x = np.asarray(x).copy()
    for row in x.reshape(-1, x.shape[-1]):
        for start in range(0, len(row), 128):
            tile = row[start : start + 128]
            scale = np.float32(max(np.abs(tile).max(), 1e-4)) / np.float32(448)
            scale = np.float32(2.0 ** np.ceil(np.log2(scale))) if power_of_two else scale
            tile[:] = (tile / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale
    return x


def attend(ops, w):
    """The expanded form of `LatentAttention`, from latents on."""

    def expand(c_kv_BSc, k_rope_BSr, w_chm):
        kv = ops.linear(c_kv_BSc, jax.tree.map(lambda x: x.reshape(x.shape[0], -1), w_chm), ("kv_lora_rank", "heads"))
        kv_BShm = kv.reshape(B, T, -1, 40)
        k_rope_BShr = jnp.broadcast_to(k_rope_BSr[:, :, None], (*kv_BShm.shape[:3], 8))
        return jnp.concatenate([kv_BShm[..., :24], k_rope_BShr], axis=-1), kv_BShm[..., 24:]

    w_cHm, inputs = ops.precision.by_heads(w, 4), (LATENTS, ROPE_KEYS)
    return self_attention(ops, 0.1, QUERIES[:, :, :, None], SEGMENTS, inputs, w_cHm, expand)[:, :, :, 0]


@pytest.mark.parametrize("heads_at_once", [0, 2, 1])
@pytest.mark.parametrize("power_of_two", [False, True])
def test_keys_and_values_are_products_with_the_stored_numbers(heads_at_once, power_of_two):
    kept = quantize_block(jnp.asarray(KV_B), power_of_two=power_of_two)
    precision = dataclasses.replace(FP8, quantization=LinearQuantization(input=Quantizer(power_of_two=power_of_two)))
    found = compiled(lambda w: attend(Ops(precision, RuntimeConfig(attention_heads_at_once=heads_at_once)), w))(kept)
    kv = (rounded(LATENTS, power_of_two).astype(np.float64) @ np.asarray(dequantize(kept), np.float64)).reshape(
        B, T, 4, 40
    )
    keys = np.concatenate([kv[..., :24], np.broadcast_to(np.asarray(ROPE_KEYS)[:, :, None], (B, T, 4, 8))], axis=-1)
    scores = np.einsum("bthk,bshk->bhts", np.asarray(QUERIES, np.float64), keys) * 0.1
    scores = np.where(np.tril(np.ones((T, T), bool)), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = np.einsum("bhts,bshv->bthv", weights / weights.sum(-1, keepdims=True), kv[..., 24:])
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


@functools.cache
def attention(kind):
    """The module's expanded and absorbed calls, and variables with a kv_b that is stored in FP8 or quantized in the
    product."""
    changes = {
        "kept, powers of two": {"quantization": LinearQuantization(input=Quantizer(power_of_two=True))},
        "forward not in FP8": {"quantization": LinearQuantization(products=("input_gradient", "weight_gradient"))},
        "not in FP8": {"high_precision": ("attention_output", "linear")},
    }
    precision = dataclasses.replace(FP8, **changes.get(kind, {}))
    module = LatentAttention(MODEL, Ops(precision))
    x, tokens = jnp.float32(ROWS.standard_normal((B, T, D))), Tokens(jnp.zeros((B, T), jnp.int32), SEGMENTS)
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), x, tokens))
    rng = np.random.default_rng(1)
    variables = jax.tree.map(
        lambda leaf: jnp.float32(rng.standard_normal(leaf.shape) / max(leaf.shape[0] ** 0.5, 1)), shapes
    )
    if kind.startswith("kept"):
        variables["params"]["kv_b"]["kernel"] = quantize_block(
            jnp.asarray(KV_B) / 12, power_of_two=kind == "kept, powers of two"
        )
    expanded = compiled(lambda v, x, positions: module.apply(v, x, Tokens(positions, jnp.ones_like(positions))))
    absorbed = compiled(
        lambda v, x, positions, cached, entry: module.apply(
            v, x, Tokens(positions, jnp.ones_like(positions), cached), entry
        )
    )
    return variables, x, expanded, absorbed


@pytest.mark.parametrize(
    "kind", ["kept", "kept, powers of two", "quantized in the product", "forward not in FP8", "not in FP8"]
)
def test_decoding_agrees_with_prefill(kind):
    variables, x, expanded, absorbed = attention(kind)
    assert isinstance(variables["params"]["kv_b"]["kernel"], QTensor) == kind.startswith("kept")
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    y, latents = expanded(variables, x, positions)
    cached = np.where(np.arange(T) < 3, positions, -1)
    found, new = absorbed(variables, x[:, 3:], positions[:, 3:], cached, latents)
    np.testing.assert_allclose(found, y[:, 3:], rtol=0, atol=1e-5 * float(jnp.abs(y).max()))
    for entry, whole in zip(new, latents, strict=True):
        np.testing.assert_allclose(entry, whole[:, 3:], rtol=1e-6)


def test_the_cache_holds_latents_as_the_product_rounds_them():
    variables, x, expanded, _ = attention("kept, powers of two")
    latents = expanded(variables, x, np.broadcast_to(np.arange(T, dtype=np.int32), (B, T)))[1][0]
    np.testing.assert_array_equal(latents, rounded(latents, power_of_two=True))

"""FLOPs, cache sizes, training state, YaRN constants and costs against the figures the reports print."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from deepseek_jax.accounting import cost, count_parameters, flops, memory
from deepseek_jax.accounting.report import muon_parameters
from deepseek_jax.model.config import GQAConfig, MLAConfig, ModelConfig, RopeConfig, YarnConfig
from deepseek_jax.model.presets import preset
from deepseek_jax.model.rope import rotary_angles, softmax_scale, yarn_correction_range, yarn_mscale


@pytest.mark.parametrize(
    "name, gigaflops", [("v3_671b", 250.46), ("v2_236b", 155.31), ("v2_lite_16b", 16.41), ("kimi_k2_1t", 205.5)]
)
def test_training_flops(name, gigaflops):
    digits = 1 if name == "kimi_k2_1t" else 2
    assert round(flops.training_flops_per_token(preset(name), 4096) / 1e9, digits) == gigaflops


def test_training_flops_parts_of_v3():
    config = preset("v3_671b")
    weights = 6 * count_parameters(config).activated()
    assert round(weights / 1e9, 2) == 219.75
    assert round((flops.training_flops_per_token(config, 4096) - weights) / 1e9, 2) == 30.70
    assert flops.training_flops_per_token(config) == 3 * flops.forward_flops_per_token(config)


def test_mtp_adds_its_block_and_another_head():
    config = preset("v3_671b")
    counts = count_parameters(config)
    extra = flops.training_flops_per_token(config, 4096, mtp=True) - flops.training_flops_per_token(config, 4096)
    per_layer = 3 * 128 * 4096 * (128 + 64 + 128)
    assert extra == 6 * (counts.mtp_activated + 129_280 * 7168) + per_layer
    plain = config.replace(mtp_depth=0)
    assert flops.training_flops_per_token(plain, mtp=True) == flops.training_flops_per_token(plain)


def test_pair_flops_are_those_of_the_products():
    """Counted on the einsums themselves by XLA."""
    mla = MLAConfig(num_heads=3, kv_lora_rank=24, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=16)
    gqa = GQAConfig(num_heads=4, num_kv_heads=2, head_dim=8)
    queries, keys = 16, 32

    def xla_flops(spec, *shapes):
        return (
            jax.jit(lambda *a: jnp.einsum(spec, *a)).lower(*map(jnp.zeros, shapes)).compile().cost_analysis()["flops"]
        )

    def scores_and_sum(heads, qk, v):
        scores = xla_flops("htk,hsk->hts", (heads, queries, qk), (heads, keys, qk))
        return scores + xla_flops("hts,hsv->htv", (heads, queries, keys), (heads, keys, v))

    pairs = queries * keys
    assert mla.pair_flops * pairs == scores_and_sum(3, 12, 16)
    assert gqa.pair_flops * pairs == scores_and_sum(4, 8, 8)
    assert mla.cached_pair_flops * pairs == scores_and_sum(3, 24 + 4, 24)
    assert gqa.cached_pair_flops == gqa.pair_flops


def test_decoding_flops_of_v3():
    config = preset("v3_671b")
    assert flops.decode_flops_per_token(config, 0) == 2 * 36_625_618_432
    assert flops.decode_flops_per_token(config, 1000) - flops.decode_flops_per_token(
        config, 0
    ) == 61 * 1000 * 2 * 128 * (512 + 64 + 512)


@dataclasses.dataclass(frozen=True)
class Windowed(GQAConfig):
    """A decoded token sees at most the last 5,000 tokens."""

    def cached_keys(self, context):
        return min(context, 5_000)


GQA = dict(num_heads=2, num_kv_heads=1, head_dim=4)


@pytest.mark.parametrize("attention, closeness", [(GQAConfig(**GQA), 0), (Windowed(**GQA), 1e-6)])
def test_the_flops_of_a_rollout_are_those_of_its_tokens(attention, closeness):
    config = ModelConfig(vocab_size=50, hidden_size=8, num_layers=2, intermediate_size=12, attention=attention)
    prompt, drawn = 100, 20_000
    one = sum(flops.decode_flops_per_token(config, context) for context in range(prompt, prompt + drawn))
    read = prompt * flops.forward_flops_per_token(config, prompt)
    sizes = dict(completions=8, group_size=4, prompt_length=prompt, completion_length=drawn)
    found = flops.rollout_flops(config, passes=0, oversampling=2, **sizes)
    assert found == pytest.approx(16 * one + 4 * read, rel=closeness, abs=0)
    trained = 4 * 8 * 20_100 * flops.forward_flops_per_token(config, 20_100)
    assert flops.rollout_flops(config, passes=4, oversampling=0, **sizes) == trained


def test_the_flops_of_a_long_rollout_need_no_loop_over_its_tokens():
    config = ModelConfig(vocab_size=50, hidden_size=8, num_layers=2, intermediate_size=12, attention=GQAConfig(**GQA))
    sizes = dict(completions=2, group_size=2, prompt_length=1, completion_length=10**12)
    weights = 2 * count_parameters(config).activated()
    pairs = 2 * config.attention.pair_flops * 10**12 * (10**12 + 1) // 2  # two layers, each token all before it
    read = flops.forward_flops_per_token(config, 1)
    assert flops.rollout_flops(config, passes=0, **sizes) == float(2 * (10**12 * weights + pairs) + read)


@pytest.mark.parametrize(
    "name, elements", [("v3_671b", 35_136), ("v2_236b", 34_560), ("v2_lite_16b", 15_552), ("kimi_k2_1t", 35_136)]
)
def test_cache_elements(name, elements):
    config = preset(name)
    assert memory.cache_elements_per_token(config.num_layers, config.attention) == elements


def test_cache_bytes_against_other_models():
    assert memory.cache_bytes_per_token(preset("v3_671b")) == 70_272
    theirs = {name: 2 * memory.cache_elements_per_token(*shape) for name, shape in memory.COMPARED_MODELS.items()}
    assert theirs == {"Qwen2.5-72B (GQA)": 327_680, "LLaMA-3.1-405B (GQA)": 516_096}
    assert [round(n / 70_272, 2) for n in theirs.values()] == [4.66, 7.34]
    assert memory.cache_bytes_per_token(preset("v3_671b"), "float32") == 2 * 70_272


def test_mla_cache_is_that_of_two_and_a_quarter_groups():
    """V2, Table 1: with d_c = 4·d_h and a rotary key of d_h / 2."""
    mla = preset("v2_236b").attention
    one_group = GQAConfig(num_heads=128, num_kv_heads=1, head_dim=128)
    assert memory.cache_elements_per_token(1, mla) == 2.25 * memory.cache_elements_per_token(1, one_group)


def test_training_state():
    config = ModelConfig(
        vocab_size=32, hidden_size=8, num_layers=1, intermediate_size=16, attention=GQAConfig(2, 2, 4), mtp_depth=1
    )
    counts = count_parameters(config)
    n = counts.total + counts.mtp_total
    assert memory.training_state_bytes(counts) == {"weights": 4 * n, "gradients": 4 * n, "moments": 8 * n}
    assert memory.training_state_bytes(counts, "bfloat16")["moments"] == 4 * n
    others = 2 * 32 * 8 + (3 + 4 + 1) * 8  # embedding, head; norms of layer, MTP module (block and its own) and the end
    assert muon_parameters(config) == n - others
    assert memory.training_state_bytes(counts, single_moment=n - others)["moments"] == 4 * (n + others)


def test_cost_of_v3():
    hours = sum(cost.V3_GPU_HOURS.values())
    assert hours == 2_788_000
    assert cost.dollars(hours) == 5_576_000
    assert [cost.dollars(h) for h in cost.V3_GPU_HOURS.values()] == [5_328_000, 238_000, 10_000]
    assert cost.V3_GPU_HOURS["pre-training"] == pytest.approx(180_000 * cost.V3_TOKENS / 1e12)


def test_gpu_hours_from_flops():
    """250 GFLOPs per token at 385.8 TFLOP/s are V3's 180K GPU-hours per trillion tokens."""
    assert cost.gpu_hours(250e9 * 1e12, 385.8) == pytest.approx(180_000, rel=1e-4)
    estimate = cost.gpu_hours(flops.training_flops_per_token(preset("v3_671b")) * cost.V3_TOKENS)
    assert estimate == pytest.approx(cost.V3_GPU_HOURS["pre-training"], rel=0.005)


@pytest.mark.parametrize(
    "name, mscale, scale",
    [("v3_671b", 1.368888, 0.1352338), ("v2_236b", 1.260804, 0.1147214), ("v2_lite_16b", 1.260804, 0.1147214)],
)
def test_yarn_golden_values(name, mscale, scale):
    config = preset(name)
    yarn = config.rope.yarn
    assert yarn_mscale(yarn.factor, yarn.mscale_all_dim) == pytest.approx(mscale, abs=5e-7)
    assert softmax_scale(config.rope, config.attention.qk_head_dim) == pytest.approx(scale, abs=5e-8)
    assert yarn_correction_range(yarn, config.attention.qk_rope_head_dim, config.rope.theta) == (10, 23)


def test_yarn_leaves_the_rotation_a_rotation():
    """With mscale = mscale_all_dim the factor on cos and sin is 1: cos² + sin² = 1."""
    config = preset("v2_lite_16b")
    cos, sin = rotary_angles(config.rope, config.attention.qk_rope_head_dim, jnp.arange(5))
    assert jnp.allclose(cos**2 + sin**2, 1.0, atol=1e-6)
    uneven = RopeConfig(yarn=YarnConfig(mscale=1.0, mscale_all_dim=0.0))
    cos, sin = rotary_angles(uneven, 64, jnp.arange(5))
    assert jnp.allclose(cos**2 + sin**2, 1.368888**2, atol=1e-5)


def test_softmax_scale_without_yarn():
    assert softmax_scale(preset("moonlight_16b").rope, 192) == pytest.approx(0.0721688, abs=5e-8)

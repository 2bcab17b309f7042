"""Bytes under each number format, against what was published."""

import pytest

from deepseek_jax.accounting.formats import activation_bytes, weight_bytes
from deepseek_jax.model.config import MLAConfig, ModelConfig, MoEConfig
from deepseek_jax.model.presets import preset
from deepseek_jax.precision import get_precision

V3 = preset("v3_671b")
CONFIG = ModelConfig(
    vocab_size=64,
    hidden_size=256,
    num_layers=2,
    intermediate_size=384,
    attention=MLAConfig(
        num_heads=4, q_lora_rank=128, kv_lora_rank=128, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32
    ),
    moe=MoEConfig(num_experts=4, top_k=2, intermediate_size=128, num_shared_experts=1),
    first_k_dense=1,
)


@pytest.mark.parametrize(("config", "published"), [(V3, 688_574_839_360), (V3.replace(mtp_depth=0), 673_150_611_808)])
def test_the_released_checkpoint_to_the_byte(config, published):
    assert weight_bytes(config, get_precision("fp8_deepseek"), with_duplicates=True) == published


def test_bfloat16_halves_float32():
    matrices = weight_bytes(V3, get_precision("float32")) - 2 * weight_bytes(V3, get_precision("bfloat16"))
    assert matrices == -4 * 256 * (58 + 1)  # the routers' biases are float32 in both


def test_kept_activations():
    """The inputs of products take half as much, and of SwiGLU's three arrays two are left; norms keep theirs in
    float32."""
    half, eight = (activation_bytes(CONFIG, get_precision(name), 2, 120) for name in ("bfloat16", "fp8_deepseek"))
    assert eight["float8_e4m3fn"] > 0 and "float8_e4m3fn" not in half
    assert eight["float8_e4m3fn"] + eight["bfloat16"] < 0.6 * half["bfloat16"] and sum(eight.values()) < sum(
        half.values()
    )
    twice = activation_bytes(CONFIG, get_precision("bfloat16"), 4, 120)
    assert twice["bfloat16"] == pytest.approx(2 * half["bfloat16"], rel=0.15)


def test_nothing_is_counted_that_is_a_weight():
    """One layer's own count: what stays for a Linear's weight gradient is its input."""
    config = CONFIG.replace(num_layers=1, moe=None)
    kept = activation_bytes(config, get_precision("fp8_deepseek"), 1, 120)
    # q_a, q_b, kv_a and kv_b read the residual twice and the two latents; o keeps E5M6
    attention = 256 + 128 + 256 + 128
    # gate and up read 256 each; down keeps both of them
    assert kept["float8_e4m3fn"] == 120 * (attention + 2 * 256 + 2 * 384)

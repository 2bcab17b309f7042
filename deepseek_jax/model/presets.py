"""The published models as `ModelConfig`s.

Sources: the released config.json files; the reports give the layers and widths too. `init_std` is the value that the
reports trained with (0.006), not the config.json's initializer_range.
"""

from collections.abc import Callable

from deepseek_jax.errors import ConfigError, nearest
from deepseek_jax.model.config import GQAConfig, MLAConfig, ModelConfig, MoEConfig, RopeConfig, YarnConfig


def v3_671b() -> ModelConfig:
    """DeepSeek-V3, V3-0324, R1 and R1-Zero (V3 report §4.2)."""
    return ModelConfig(
        vocab_size=129_280,
        hidden_size=7168,
        num_layers=61,
        intermediate_size=18_432,
        attention=MLAConfig(
            num_heads=128, q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128
        ),
        moe=MoEConfig(
            num_experts=256,
            top_k=8,
            intermediate_size=2048,
            num_shared_experts=1,
            num_groups=8,
            topk_groups=4,
            routed_scaling_factor=2.5,
        ),
        first_k_dense=3,
        rope=RopeConfig(yarn=YarnConfig(mscale_all_dim=1.0)),
        mtp_depth=1,
    )


def v2_236b() -> ModelConfig:
    """DeepSeek-V2 (V2 report §3.1.2)."""
    return ModelConfig(
        vocab_size=102_400,
        hidden_size=5120,
        num_layers=60,
        intermediate_size=12_288,
        attention=MLAConfig(
            num_heads=128, q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128
        ),
        moe=MoEConfig(
            num_experts=160,
            top_k=6,
            intermediate_size=1536,
            num_shared_experts=2,
            scoring="softmax",
            num_groups=8,
            topk_groups=3,
            group_score="max",
            norm_topk_prob=False,
            routed_scaling_factor=16.0,
            correction_bias=False,
        ),
        first_k_dense=1,
        rope=RopeConfig(yarn=YarnConfig(mscale=0.707, mscale_all_dim=0.707)),
    )


def v2_lite_16b() -> ModelConfig:
    """DeepSeek-V2-Lite (V2 report, appendix B)."""
    return ModelConfig(
        vocab_size=102_400,
        hidden_size=2048,
        num_layers=27,
        intermediate_size=10_944,
        attention=MLAConfig(num_heads=16, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128),
        moe=MoEConfig(
            num_experts=64,
            top_k=6,
            intermediate_size=1408,
            num_shared_experts=2,
            scoring="softmax",
            norm_topk_prob=False,
            correction_bias=False,
        ),
        first_k_dense=1,
        rope=RopeConfig(yarn=YarnConfig(mscale=0.707, mscale_all_dim=0.707)),
    )


def deepseek_moe_16b() -> ModelConfig:
    """DeepSeekMoE-16B (DeepSeekMoE §5.1): the same experts under plain multi-head attention."""
    return ModelConfig(
        vocab_size=102_400,
        hidden_size=2048,
        num_layers=28,
        intermediate_size=10_944,
        attention=GQAConfig(num_heads=16, num_kv_heads=16, head_dim=128),
        moe=MoEConfig(
            num_experts=64,
            top_k=6,
            intermediate_size=1408,
            num_shared_experts=2,
            scoring="softmax",
            norm_topk_prob=False,
            correction_bias=False,
        ),
        first_k_dense=1,
        rope=RopeConfig(interleaved=False),
    )


def moonlight_16b() -> ModelConfig:
    """Moonlight-16B-A3B: V3's layer at V2-Lite's size, without groups or MTP."""
    return ModelConfig(
        vocab_size=163_840,
        hidden_size=2048,
        num_layers=27,
        intermediate_size=11_264,
        attention=MLAConfig(num_heads=16, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128),
        moe=MoEConfig(
            num_experts=64, top_k=6, intermediate_size=1408, num_shared_experts=2, routed_scaling_factor=2.446
        ),
        first_k_dense=1,
        rope=RopeConfig(theta=50_000.0),
        rms_norm_eps=1e-5,
    )


def kimi_k2_1t() -> ModelConfig:
    """Kimi K2 (Instruct, first release): V3's code with more experts and fewer heads."""
    return ModelConfig(
        vocab_size=163_840,
        hidden_size=7168,
        num_layers=61,
        intermediate_size=18_432,
        attention=MLAConfig(
            num_heads=64, q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128
        ),
        moe=MoEConfig(
            num_experts=384, top_k=8, intermediate_size=2048, num_shared_experts=1, routed_scaling_factor=2.827
        ),
        first_k_dense=1,
        rope=RopeConfig(theta=50_000.0, yarn=YarnConfig(factor=32.0, beta_fast=1.0, beta_slow=1.0, mscale_all_dim=1.0)),
    )


PRESETS: dict[str, Callable[[], ModelConfig]] = {
    f.__name__: f for f in (v3_671b, v2_236b, v2_lite_16b, deepseek_moe_16b, moonlight_16b, kimi_k2_1t)
}


def preset(name: str) -> ModelConfig:
    """The published model called `name`; raises ConfigError with the nearest name."""
    if name not in PRESETS:
        raise ConfigError(f"preset={name!r}: {nearest(str(name), PRESETS)}")
    return PRESETS[name]()

"""The published models as `ModelConfig`s.

Sources: the released config.json files; the reports give the layers and widths too. `init_std` is the value that the
reports trained with (0.006), not the config.json's initializer_range.
"""

import dataclasses
from collections.abc import Callable

from deepseek_jax.errors import ConfigError, nearest
from deepseek_jax.model.config import GQAConfig, MLAConfig, ModelConfig, MoEConfig, RopeConfig, YarnConfig

# The layer of V3 and V2, of V2-Lite and Moonlight, and V2's way of routing.
LARGE_MLA = MLAConfig(
    num_heads=128, q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128
)
SMALL_MLA = MLAConfig(num_heads=16, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)
V2_ROUTING = {"scoring": "softmax", "norm_topk_prob": False, "correction_bias": False}
V2_ROPE = RopeConfig(yarn=YarnConfig(mscale=0.707, mscale_all_dim=0.707))


def v3_671b() -> ModelConfig:
    """DeepSeek-V3, V3-0324, R1 and R1-Zero (V3 report §4.2)."""
    groups = {"num_groups": 8, "topk_groups": 4, "routed_scaling_factor": 2.5}
    moe = MoEConfig(num_experts=256, top_k=8, intermediate_size=2048, num_shared_experts=1, **groups)
    sizes = {"vocab_size": 129_280, "hidden_size": 7168, "num_layers": 61, "intermediate_size": 18_432}
    rope = RopeConfig(yarn=YarnConfig(mscale_all_dim=1.0))
    return ModelConfig(**sizes, attention=LARGE_MLA, moe=moe, first_k_dense=3, rope=rope, mtp_depth=1)


def v2_236b() -> ModelConfig:
    """DeepSeek-V2 (V2 report §3.1.2)."""
    groups = {"num_groups": 8, "topk_groups": 3, "routed_scaling_factor": 16.0}
    moe = MoEConfig(
        num_experts=160,
        top_k=6,
        intermediate_size=1536,
        num_shared_experts=2,
        group_score="max",
        **groups,
        **V2_ROUTING,
    )
    sizes = {"vocab_size": 102_400, "hidden_size": 5120, "num_layers": 60, "intermediate_size": 12_288}
    return ModelConfig(**sizes, attention=LARGE_MLA, moe=moe, first_k_dense=1, rope=V2_ROPE)


def v2_lite_16b() -> ModelConfig:
    """DeepSeek-V2-Lite (V2 report, appendix B)."""
    moe = MoEConfig(num_experts=64, top_k=6, intermediate_size=1408, num_shared_experts=2, **V2_ROUTING)
    sizes = {"vocab_size": 102_400, "hidden_size": 2048, "num_layers": 27, "intermediate_size": 10_944}
    return ModelConfig(**sizes, attention=SMALL_MLA, moe=moe, first_k_dense=1, rope=V2_ROPE)


def deepseek_moe_16b() -> ModelConfig:
    """DeepSeekMoE-16B (DeepSeekMoE §5.1): V2-Lite's experts under plain multi-head attention."""
    attention = GQAConfig(num_heads=16, num_kv_heads=16, head_dim=128)
    return v2_lite_16b().replace(num_layers=28, attention=attention, rope=RopeConfig(interleaved=False))


def moonlight_16b() -> ModelConfig:
    """Moonlight-16B-A3B: V3's layer at V2-Lite's size, without groups or MTP."""
    moe = MoEConfig(num_experts=64, top_k=6, intermediate_size=1408, num_shared_experts=2, routed_scaling_factor=2.446)
    sizes = {"vocab_size": 163_840, "hidden_size": 2048, "num_layers": 27, "intermediate_size": 11_264}
    rope = RopeConfig(theta=50_000.0)
    return ModelConfig(**sizes, attention=SMALL_MLA, moe=moe, first_k_dense=1, rope=rope, rms_norm_eps=1e-5)


def kimi_k2_1t() -> ModelConfig:
    """Kimi K2 (Instruct, first release): V3's code with more experts and fewer heads."""
    moe = MoEConfig(num_experts=384, top_k=8, intermediate_size=2048, num_shared_experts=1, routed_scaling_factor=2.827)
    sizes = {"vocab_size": 163_840, "hidden_size": 7168, "num_layers": 61, "intermediate_size": 18_432}
    rope = RopeConfig(theta=50_000.0, yarn=YarnConfig(factor=32.0, beta_fast=1.0, beta_slow=1.0, mscale_all_dim=1.0))
    attention = dataclasses.replace(LARGE_MLA, num_heads=64)
    return ModelConfig(**sizes, attention=attention, moe=moe, first_k_dense=1, rope=rope)


PRESETS: dict[str, Callable[[], ModelConfig]] = {
    f.__name__: f for f in (v3_671b, v2_236b, v2_lite_16b, deepseek_moe_16b, moonlight_16b, kimi_k2_1t)
}


def preset(name: str) -> ModelConfig:
    """The published model called `name`; raises ConfigError with the nearest name."""
    if name not in PRESETS:
        raise ConfigError(f"preset={name!r}: {nearest(str(name), PRESETS)}")
    return PRESETS[name]()

"""Memory: bytes of the cache while decoding, of weights and optimizer state while training."""

import jax.numpy as jnp

from deepseek_jax.accounting.counts import ParameterCounts
from deepseek_jax.model.config import AttentionConfig, GQAConfig, ModelConfig

# Dense models the papers compare with ("Insights into DeepSeek-V3", Table 1): layers and attention.
COMPARED_MODELS: dict[str, tuple[int, GQAConfig]] = {
    "Qwen2.5-72B (GQA)": (80, GQAConfig(num_heads=64, num_kv_heads=8, head_dim=128)),
    "LLaMA-3.1-405B (GQA)": (126, GQAConfig(num_heads=128, num_kv_heads=8, head_dim=128)),
}


def cache_elements_per_token(num_layers: int, attention: AttentionConfig) -> int:
    """Numbers kept per token (V2, Table 1): (d_c + d_h^R)·l for MLA, 2·n_g·d_h·l for GQA, MHA and MQA."""
    return num_layers * sum(attention.cache_dims.values())


def cache_bytes_per_token(config: ModelConfig, dtype: str = "bfloat16") -> int:
    return cache_elements_per_token(config.num_layers, config.attention) * jnp.dtype(dtype).itemsize


def training_state_bytes(
    counts: ParameterCounts, moment_dtype: str = "float32", single_moment: int = 0
) -> dict[str, int]:
    """Bytes of master weights and gradients (float32) and of the optimizer's moments, MTP included, before sharding.

    AdamW has two moments of each parameter; Muon has one of the `single_moment` parameters that it updates. V3 keeps
    its moments in bfloat16. Activations come on top.
    """
    parameters = counts.total + counts.mtp_total
    return {
        "weights": 4 * parameters,
        "gradients": 4 * parameters,
        "moments": jnp.dtype(moment_dtype).itemsize * (2 * parameters - single_moment),
    }

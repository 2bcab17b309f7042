"""Outlier channels change what is in the network and not what it computes."""

import jax
import numpy as np
import pytest
from fp8_curve import add_outliers

from deepseek_jax.model.config import GQAConfig, MLAConfig, ModelConfig, MoEConfig
from deepseek_jax.model.transformer import Transformer, init_variables

CONFIG = ModelConfig(
    vocab_size=40,
    hidden_size=16,
    num_layers=2,
    intermediate_size=24,
    attention=MLAConfig(
        num_heads=2, kv_lora_rank=8, qk_nope_head_dim=6, qk_rope_head_dim=8, v_head_dim=5, q_lora_rank=12
    ),
    moe=MoEConfig(num_experts=4, top_k=2, intermediate_size=6, num_shared_experts=1),
    first_k_dense=1,
    mtp_depth=1,
    init_std=0.3,
)


@pytest.mark.parametrize(
    "config",
    [CONFIG, CONFIG.replace(attention=GQAConfig(num_heads=2, num_kv_heads=1, head_dim=8), moe=None, mtp_depth=0)],
)
def test_the_function_stays_to_the_bit(config):
    model = Transformer(config)
    variables = init_variables(model, jax.random.key(0))
    large = variables | {"params": add_outliers(model, variables["params"], 3, 64.0)}
    tokens = jax.random.randint(jax.random.key(1), (2, 6), 0, config.vocab_size)

    @jax.jit
    def call(variables):
        output = model.apply(variables, tokens, mtp=config.mtp_depth > 0)
        return output.hidden_BTD, output.mtp_hidden

    jax.tree.map(np.testing.assert_array_equal, call(large), call(variables))
    for name in ("attn_norm", "ffn_norm"):
        scale = large["params"]["dense_layers"][name]["scale"]
        np.testing.assert_array_equal(np.flatnonzero(scale[0] == 64), [0, 5, 10])

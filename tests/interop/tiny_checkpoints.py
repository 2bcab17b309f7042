"""Tiny checkpoints without torch: random numbers in the shapes of the tensor table."""

import numpy as np
from flax import traverse_util

from deepseek_jax.interop.tensors import tensor_table
from deepseek_jax.model.config import MLAConfig, ModelConfig, MoEConfig, RopeConfig, YarnConfig

# Sizes that differ from one another, and blocks of 128 that don't fit evenly.
TINY = ModelConfig(
    vocab_size=50,
    hidden_size=160,
    num_layers=3,
    intermediate_size=144,
    attention=MLAConfig(
        num_heads=3, q_lora_rank=20, kv_lora_rank=24, qk_nope_head_dim=10, qk_rope_head_dim=6, v_head_dim=8
    ),
    moe=MoEConfig(
        num_experts=4, top_k=2, intermediate_size=32, num_shared_experts=2, num_groups=2, routed_scaling_factor=2.5
    ),
    first_k_dense=1,
    rope=RopeConfig(yarn=YarnConfig(mscale_all_dim=1.0)),
    mtp_depth=1,
)


def random_variables(config: ModelConfig, seed: int = 0):
    rng = np.random.default_rng(seed)
    shapes = {spec.path: spec.leaf_shape for spec in tensor_table(config)}
    return traverse_util.unflatten_dict(
        {path: rng.standard_normal(shape, np.float32) for path, shape in shapes.items()}
    )


def assert_same(left, right):
    """Equal trees of arrays, to the bit, dtypes included."""
    left, right = traverse_util.flatten_dict(left), traverse_util.flatten_dict(right)
    assert left.keys() == right.keys()
    for path, value in left.items():
        assert value.dtype == right[path].dtype, path
        np.testing.assert_array_equal(value, right[path], err_msg="/".join(path))

"""The table of tensors against the published counts and against the network."""

import math

import pytest
from flax import traverse_util
from tiny_checkpoints import TINY

from deepseek_jax.interop.tensors import tensor_table
from deepseek_jax.model.config import GQAConfig
from deepseek_jax.model.presets import preset
from deepseek_jax.model.transformer import Transformer, abstract_variables


@pytest.fixture(scope="module")
def v3():
    return tensor_table(preset("v3_671b"))


def stored_bytes(table):
    """In the released layout: FP8 with float32 scales, float32 biases, bfloat16 for the rest."""
    total = 0
    for spec in table:
        item = 1 if spec.quantized else 4 if spec.is_router_bias else 2
        total += item * math.prod(spec.shape) + (4 * math.prod(spec.scale_shape) if spec.quantized else 0)
    return total


def test_v3_has_the_published_tensors(v3):
    scales = sum(spec.quantized for spec in v3)
    assert (len(v3) + scales, scales) == (91_991, 45_808)
    assert len({spec.name for spec in v3}) == len(v3)
    assert sum(math.prod(spec.shape) for spec in v3) == 684_489_845_504
    assert stored_bytes(v3) == 688_574_839_360


def test_v3_main_model_without_mtp(v3):
    main = [spec for spec in v3 if not spec.name.startswith("model.layers.61.")]
    assert len(main) + sum(spec.quantized for spec in main) == 90_427
    assert sum(math.prod(spec.shape) for spec in main) == 671_026_419_200
    assert stored_bytes(main) == 673_150_611_808


@pytest.mark.parametrize(
    "name, shape, path, index, quantized",
    [
        (
            "model.layers.0.self_attn.kv_a_proj_with_mqa.weight",
            (576, 7168),
            "params/dense_layers/attn/kv_a/kernel",
            (0,),
            True,
        ),
        ("model.layers.60.self_attn.q_b_proj.weight", (24576, 1536), "params/moe_layers/attn/q_b/kernel", (57,), True),
        (
            "model.layers.3.mlp.gate.e_score_correction_bias",
            (256,),
            "router_bias/moe_layers/ffn/router/bias",
            (0,),
            False,
        ),
        ("model.layers.3.mlp.gate.weight", (256, 7168), "params/moe_layers/ffn/router/kernel", (0,), False),
        (
            "model.layers.4.mlp.experts.255.down_proj.weight",
            (7168, 2048),
            "params/moe_layers/ffn/experts/down",
            (1, 255),
            True,
        ),
        ("model.layers.61.mlp.experts.7.up_proj.weight", (2048, 7168), "params/mtp_0/block/ffn/experts/up", (7,), True),
        ("model.layers.61.eh_proj.weight", (7168, 14336), "params/mtp_0/proj/kernel", (), False),
        ("model.layers.61.shared_head.norm.weight", (7168,), "params/mtp_0/final_norm/scale", (), False),
        ("model.layers.61.shared_head.head.weight", (129280, 7168), "params/head/kernel", (), False),
    ],
)
def test_v3_tensor(v3, name, shape, path, index, quantized):
    spec = next(spec for spec in v3 if spec.name == name)
    assert (spec.shape, "/".join(spec.path), spec.index, spec.quantized) == (shape, path, index, quantized)


@pytest.mark.parametrize(
    "config",
    [
        preset("v3_671b"),
        preset("v2_lite_16b"),
        preset("deepseek_moe_16b"),
        TINY.replace(mtp_depth=2, tie_embeddings=True),
        TINY.replace(moe=None, attention=GQAConfig(4, 2, 8)),
    ],
    ids=["v3", "v2_lite", "moe_16b", "mtp_2_tied", "dense_gqa"],
)
def test_table_fills_the_network_exactly(config):
    network = traverse_util.flatten_dict(abstract_variables(Transformer(config)))
    table = tensor_table(config)
    assert {path: leaf.shape for path, leaf in network.items()} == {spec.path: spec.leaf_shape for spec in table}
    places = [(spec.path, spec.index) for spec in table if not spec.duplicate]
    assert len(set(places)) == len(places)
    filled = sum(math.prod(spec.shape) for spec in table if not spec.duplicate)
    assert filled == sum(math.prod(leaf.shape) for leaf in network.values())

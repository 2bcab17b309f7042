"""Every refusal of a config in words a person can act on; dictionaries in and out."""

import dataclasses
import json

import ml_collections
import pytest
from tiny_models import GQA, tiny_config, tiny_mla, tiny_moe

from deepseek_jax.errors import ConfigError
from deepseek_jax.model.config import GQAConfig, ModelConfig, RopeConfig, YarnConfig
from deepseek_jax.model.presets import PRESETS, preset
from deepseek_jax.model.runtime import RuntimeConfig

REFUSED = [
    (lambda: YarnConfig(factor=0.5), "YarnConfig.factor=0.5: must be at least 1"),
    (
        lambda: YarnConfig(original_max_position_embeddings=0),
        "YarnConfig.original_max_position_embeddings=0: must be an integer",
    ),
    (lambda: tiny_mla(num_heads=0), "MLAConfig.num_heads=0: must be an integer, at least 1"),
    (lambda: tiny_mla(v_head_dim=2.5), "MLAConfig.v_head_dim=2.5: must be an integer, at least 1"),
    (lambda: tiny_mla(qk_rope_head_dim=7), "MLAConfig.qk_rope_head_dim=7: must be a multiple of 2"),
    (lambda: tiny_mla(q_lora_rank=0), "MLAConfig.q_lora_rank=0: must be an integer, at least 1, or None"),
    (lambda: GQAConfig(4, 3, 8), "num_kv_heads=3 must divide num_heads=4"),
    (lambda: GQAConfig(4, 2, 7), "GQAConfig.head_dim=7: must be a multiple of 2"),
    (lambda: GQAConfig(4, 0, 8), "GQAConfig.num_kv_heads=0: must be an integer, at least 1"),
    (lambda: tiny_moe(scoring="sigmoidd"), "MoEConfig.scoring='sigmoidd': did you mean 'sigmoid'"),
    (lambda: tiny_moe(group_score="top2"), "MoEConfig.group_score='top2': .*allowed: max, top2_sum"),
    (lambda: tiny_moe(num_shared_experts=-1), "MoEConfig.num_shared_experts=-1: must be an integer, at least 0"),
    (lambda: tiny_moe(top_k=9), "top_k=9 exceeds num_experts=8"),
    (lambda: tiny_moe(num_groups=3), "num_groups=3 must divide num_experts=8"),
    (lambda: tiny_moe(topk_groups=5), "topk_groups=5 exceeds num_groups=4"),
    (lambda: tiny_moe(top_k=5), "top_k=5 exceeds the 4 experts in 2 of 4 groups; raise topk_groups or lower top_k"),
    (lambda: tiny_moe(num_groups=8, topk_groups=8), "group_score='top2_sum' needs two experts a group"),
    (lambda: tiny_moe(top_k=0), "MoEConfig.top_k=0: must be an integer, at least 1"),
    (lambda: tiny_config(vocab_size=0), "ModelConfig.vocab_size=0: must be an integer, at least 1"),
    (lambda: tiny_config(hidden_size="16"), "ModelConfig.hidden_size='16': must be an integer, at least 1"),
    (lambda: RuntimeConfig(scan_unroll=0), "runtime.scan_unroll=0: must be an integer, at least 1"),
    (lambda: RuntimeConfig(remat="ful"), "runtime.remat='ful': did you mean 'full'"),
    (lambda: RuntimeConfig(experts="ragged"), "runtime.experts='ragged': .*allowed: dense, grouped"),
    (lambda: tiny_config(first_k_dense=4), "first_k_dense=4: must be from 0 to 3; num_layers"),
    (lambda: tiny_config(mtp_depth=-1), "ModelConfig.mtp_depth=-1: must be an integer, at least 0"),
    (lambda: RuntimeConfig(attention_chunk=-1), "runtime.attention_chunk=-1: must be an integer, at least 0"),
    (lambda: RuntimeConfig.from_dict({"scan_unrol": 2}), "runtime.scan_unrol: did you mean 'scan_unroll'"),
    (lambda: tiny_config(attention=None), "ModelConfig.attention=None: must be AttentionConfig"),
    (lambda: tiny_config(moe=8), "ModelConfig.moe=8: must be MoEConfig or None"),
    (lambda: tiny_config(rope=None), "ModelConfig.rope=None: must be RopeConfig"),
    (lambda: preset("v3_671"), "preset='v3_671': did you mean 'v3_671b'"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_what_does_not_fit_is_refused_in_words(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize(
    ("field", "moved"),
    [(("remat",), "remat"), (("scan_unroll",), "scan_unroll"), (("moe", "implementation"), "experts")],
)
def test_a_field_that_moved_to_runtime_says_so_and_is_dropped_from_what_was_saved(field, moved):
    fields = tiny_config().to_dict()
    (fields["moe"] if len(field) > 1 else fields)[field[-1]] = "dense"
    with pytest.raises(
        ConfigError, match=f"model.{'.'.join(field)} is now runtime.{moved}.*Write config.runtime.{moved}"
    ):
        ModelConfig.from_dict(fields)
    assert ModelConfig.from_saved(fields) == tiny_config() and field[-1] in (
        fields["moe"] if len(field) > 1 else fields
    )


CONFIGS = {name: make() for name, make in PRESETS.items()} | {
    "gqa": tiny_config(attention=GQA, moe=None, rope=RopeConfig())
}


@pytest.mark.parametrize("name", CONFIGS)
def test_dictionaries_round_trip(name):
    fields = CONFIGS[name].to_dict()
    assert ModelConfig.from_dict(fields) == CONFIGS[name]
    assert ModelConfig.from_dict(json.loads(json.dumps(fields))) == CONFIGS[name]
    assert ModelConfig.from_dict(ml_collections.ConfigDict(fields)) == CONFIGS[name]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (("num_layer",), "unknown field model.num_layer: did you mean 'num_layers'"),
        (("moe", "num_expert"), "unknown field model.moe.num_expert: did you mean 'num_experts'"),
        (("attention", "kv_lora_rnk"), "unknown field model.attention.kv_lora_rnk: did you mean 'kv_lora_rank'"),
        (("rope", "theeta"), "unknown field model.rope.theeta: did you mean 'theta'"),
        (("rope", "yarn", "factr"), "unknown field model.rope.yarn.factr: did you mean 'factor'"),
    ],
)
def test_unknown_fields_name_the_nearest(path, message):
    fields = tiny_config().to_dict()
    place = fields
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = 1
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_dict(fields)


@pytest.mark.parametrize(("part", "name"), [(None, "hidden_size"), ("moe", "top_k"), ("attention", "kv_lora_rank")])
def test_missing_fields_are_named(part, name):
    fields = tiny_config().to_dict()
    del (fields if part is None else fields[part])[name]
    with pytest.raises(ConfigError, match=f"missing field model.{part + '.' if part else ''}{name}"):
        ModelConfig.from_dict(fields)


def test_a_misspelt_gqa_field_is_compared_with_gqas():
    fields = tiny_config(attention=GQA).to_dict()
    fields["attention"]["num_kv_head"] = fields["attention"].pop("num_kv_heads")
    with pytest.raises(ConfigError, match="unknown field model.attention.num_kv_head: did you mean 'num_kv_heads'"):
        ModelConfig.from_dict(fields)


def test_layer_counts():
    v3 = preset("v3_671b")
    assert (v3.num_dense_layers, v3.num_moe_layers) == (3, 58)
    dense = v3.replace(moe=None)
    assert (dense.num_dense_layers, dense.num_moe_layers) == (61, 0)
    assert v3.attention.cache_dims == {"c_kv": 512, "k_rope": 64} and v3.attention.qk_head_dim == 192
    assert GQA.cache_dims == {"k": 16, "v": 16}
    with pytest.raises(dataclasses.FrozenInstanceError):
        v3.vocab_size = 1

"""config.json <-> ModelConfig."""

import dataclasses

import pytest

from deepseek_jax.errors import CheckpointError, ConfigError
from deepseek_jax.interop import config_from_hf, config_to_hf
from deepseek_jax.model.config import GQAConfig, ModelConfig, YarnConfig
from deepseek_jax.model.presets import PRESETS, preset

YARN = {"type": "yarn", "original_max_position_embeddings": 4096, "factor": 40, "beta_fast": 32, "beta_slow": 1}
COMMON = dict(
    attention_bias=False, attention_dropout=0.0, hidden_act="silu", moe_layer_freq=1, rms_norm_eps=1e-6,
    rope_theta=10000, tie_word_embeddings=False, use_cache=True, initializer_range=0.02, torch_dtype="bfloat16",
    transformers_version="4.33.1", pretraining_tp=1, seq_aux=True, aux_loss_alpha=0.001, num_experts_per_tok=6,
    n_routed_experts=64, n_shared_experts=2, moe_intermediate_size=1408, first_k_dense_replace=1, vocab_size=102400,
)  # fmt: skip
MLA = dict(kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)
# The released files' fields.
RELEASED = {
    "v3_671b": COMMON | MLA | dict(
        model_type="deepseek_v3", architectures=["DeepseekV3ForCausalLM"], auto_map={"AutoConfig": "x"}, bos_token_id=0,
        eos_token_id=1, num_hidden_layers=61, hidden_size=7168, intermediate_size=18432, moe_intermediate_size=2048,
        num_attention_heads=128, num_key_value_heads=128, q_lora_rank=1536, n_routed_experts=256, n_shared_experts=1,
        num_experts_per_tok=8, first_k_dense_replace=3, n_group=8, topk_group=4, scoring_func="sigmoid",
        topk_method="noaux_tc", norm_topk_prob=True, routed_scaling_factor=2.5, num_nextn_predict_layers=1,
        vocab_size=129280, ep_size=1, max_position_embeddings=163840,
        rope_scaling=YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
        quantization_config={
            "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128],
            "scale_fmt": "ue8m0"
        },
    ),
    "v2_236b": COMMON | MLA | dict(
        model_type="deepseek_v2", num_hidden_layers=60, hidden_size=5120, intermediate_size=12288,
        moe_intermediate_size=1536, num_attention_heads=128, num_key_value_heads=128, q_lora_rank=1536,
        n_routed_experts=160, n_group=8, topk_group=3, scoring_func="softmax", topk_method="group_limited_greedy",
        norm_topk_prob=False, routed_scaling_factor=16.0,
        rope_scaling=YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
    ),
    "v2_lite_16b": COMMON | MLA | dict(
        model_type="deepseek_v2", num_hidden_layers=27, hidden_size=2048, intermediate_size=10944,
        num_attention_heads=16, num_key_value_heads=16, q_lora_rank=None, n_group=1, topk_group=1,
        scoring_func="softmax", topk_method="greedy", norm_topk_prob=False, routed_scaling_factor=1.0,
        rope_scaling=YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
    ),
    "moonlight_16b": COMMON | MLA | dict(
        model_type="deepseek_v3", num_hidden_layers=27, hidden_size=2048, intermediate_size=11264,
        num_attention_heads=16, num_key_value_heads=16, q_lora_rank=None, n_group=1, topk_group=1,
        scoring_func="sigmoid", topk_method="noaux_tc", norm_topk_prob=True, routed_scaling_factor=2.446,
        rope_scaling=None, rope_theta=50000.0, rms_norm_eps=1e-5, vocab_size=163840, num_nextn_predict_layers=0,
    ),
    "kimi_k2_1t": COMMON | MLA | dict(
        model_type="kimi_k2", num_hidden_layers=61, hidden_size=7168, intermediate_size=18432,
        moe_intermediate_size=2048, num_attention_heads=64, num_key_value_heads=64, q_lora_rank=1536,
        n_routed_experts=384, n_shared_experts=1, num_experts_per_tok=8, n_group=1, topk_group=1,
        scoring_func="sigmoid", topk_method="noaux_tc", norm_topk_prob=True, routed_scaling_factor=2.827,
        rope_theta=50000.0, vocab_size=163840, num_nextn_predict_layers=0,
        rope_scaling=YARN | {"factor": 32.0, "beta_fast": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0},
    ),
    "deepseek_moe_16b": COMMON | dict(
        model_type="deepseek", num_hidden_layers=28, hidden_size=2048, intermediate_size=10944, num_attention_heads=16,
        num_key_value_heads=16, scoring_func="softmax", norm_topk_prob=False, rope_scaling=None,
    ),
}  # fmt: skip
V3, V2 = RELEASED["v3_671b"], RELEASED["v2_236b"]


@pytest.mark.parametrize("name", PRESETS)
def test_released_config_is_the_preset(name):
    assert config_from_hf(RELEASED[name]) == preset(name)


@pytest.mark.parametrize("name", PRESETS)
def test_written_config_reads_back(name):
    assert config_from_hf(config_to_hf(preset(name))) == preset(name)


def test_token_ids_and_context_length_are_carried():
    hf = config_to_hf(preset("v3_671b"), carried=V3 | {"eos_token_id": 7})
    assert (hf["bos_token_id"], hf["eos_token_id"], hf["max_position_embeddings"]) == (0, 7, 163840)


def test_a_null_that_is_carried_leaves_the_id_to_the_tokenizer():
    assert "pad_token_id" not in config_to_hf(preset("v3_671b"), carried=V3 | {"pad_token_id": None})


def test_both_spellings_of_rope():
    old = {name: value for name, value in V3.items() if name not in ("rope_scaling", "rope_theta")}
    yarn = {name: value for name, value in V3["rope_scaling"].items() if name != "type"}
    new = old | {
        "rope_parameters": yarn | {"rope_type": "yarn", "type": "yarn", "rope_theta": 10000.0, "attention_factor": None}
    }
    assert config_from_hf(new) == config_from_hf(V3)
    plain = config_from_hf(old | {"rope_parameters": {"rope_type": "default", "rope_theta": 123.0}})
    assert plain.rope.yarn is None and plain.rope.theta == 123.0


def test_latent_norms_keep_their_own_epsilon():
    config = config_from_hf(RELEASED["moonlight_16b"])
    assert (config.rms_norm_eps, config.latent_norm_eps) == (1e-5, 1e-6)


def test_greedy_selection_ignores_groups():
    config = config_from_hf(V2 | {"topk_method": "greedy"})
    assert config.moe.num_groups == 1


@pytest.mark.parametrize(
    "base, field, value, message",
    [
        (V3, "model_type", "llama", "model_type='llama' is not supported: .*deepseek_v3"),
        (V3, "attention_bias", True, "attention_bias=True is not supported; supported: False"),
        (V3, "attention_dropout", 0.1, "attention_dropout=0.1 is not supported; supported: 0.0"),
        (V3, "hidden_act", "gelu", "hidden_act='gelu' is not supported; supported: 'silu'"),
        (V3, "moe_layer_freq", 2, "moe_layer_freq=2 is not supported; supported: 1"),
        (V3, "scoring_func", "softmax", "scoring_func='softmax' is not supported; supported: 'sigmoid'"),
        (V3, "topk_method", "greedy", "topk_method='greedy' is not supported; supported: 'noaux_tc'"),
        (V3, "index_topk", 2048, "field index_topk=2048 is not supported for model_type='deepseek_v3'"),
        (V3, "num_key_value_heads", 8, "num_key_value_heads=8 is not supported; supported: 128"),
        (V3, "hidden_size", "7168", "hidden_size='7168': expected a whole number"),
        (V3, "quantization_config", {"quant_method": "awq"}, "quant_method='awq' is not supported; supported: 'fp8'"),
        (
            V3,
            "quantization_config",
            {"weight_block_size": [64, 64]},
            r"=\[64, 64\] is not supported; supported: \[128, 128\]",
        ),
        (
            V3,
            "rope_scaling",
            {"type": "linear", "factor": 2.0},
            "type='linear' is not supported; supported: 'default', 'yarn'",
        ),
        (V3, "rope_scaling", {"factor": 2.0}, "rope type 'default' takes rope_theta alone, found factor"),
        (V3, "rope_scaling", {"type": "yarn", "factor": 2.0}, "lacks the field 'original_max_position_embeddings'"),
        (V3, "rope_scaling", YARN | {"mscale": 0.7}, "mscale=0.7 with mscale_all_dim=None .* both or neither"),
        (V3, "rope_scaling", YARN | {"mscale_all_dim": 1.0}, "mscale=None with mscale_all_dim=1.0 .* both or neither"),
        (V3, "rope_scaling", YARN | {"truncate": False}, "truncate=False is not supported: .*beta_fast"),
        (V2, "norm_topk_prob", True, "norm_topk_prob=True is not supported; supported: False"),
        (V2, "num_nextn_predict_layers", 1, "num_nextn_predict_layers=1 is not supported; supported: 0"),
        (V2, "mlp_bias", True, "mlp_bias=True is not supported; supported: False"),
    ],
)
def test_unsupported_value_is_refused_by_name(base, field, value, message):
    with pytest.raises(CheckpointError, match=message):
        config_from_hf(base | {field: value})


@pytest.mark.parametrize("field", ["hidden_size", "kv_lora_rank", "q_lora_rank", "rms_norm_eps", "num_experts_per_tok"])
def test_missing_field_is_named(field):
    with pytest.raises(CheckpointError, match=f"lacks the field '{field}'"):
        config_from_hf({name: value for name, value in V3.items() if name != field})


ROUTING = (
    "n_group",
    "topk_group",
    "routed_scaling_factor",
    "norm_topk_prob",
    "scoring_func",
    "topk_method",
    "n_shared_experts",
    "first_k_dense_replace",
)


def test_a_missing_field_is_what_the_family_takes():
    """DeepSeek-V3's own class; one that was written for V2 has other defaults."""
    left = {name: value for name, value in V3.items() if name not in (*ROUTING, "num_nextn_predict_layers")}
    assert config_from_hf(left) == config_from_hf(V3)
    left = {name: value for name, value in RELEASED["v2_lite_16b"].items() if name not in ROUTING}
    assert config_from_hf(left | {"n_shared_experts": 2}).replace(first_k_dense=1) == config_from_hf(
        RELEASED["v2_lite_16b"]
    )
    # transformers takes 2, the released class none
    with pytest.raises(CheckpointError, match="lacks the field 'n_shared_experts'"):
        config_from_hf(left)
    with pytest.raises(CheckpointError, match="n_group=None: expected a whole number"):
        config_from_hf(left | {"n_shared_experts": 2, "topk_method": "group_limited_greedy"})


@pytest.mark.parametrize("family", ["V3", "V2"])
def test_every_field_of_transformers_class(family):
    """Without the field, what we read is what transformers takes for it, or we refuse."""
    transformers = pytest.importorskip("transformers")
    cls = getattr(transformers, f"Deepseek{family}Config")
    routing = {"V3": {}, "V2": dict(num_experts_per_tok=6, n_group=8, topk_group=3)}[family]
    whole = (
        cls(**routing).to_dict()
        | {"rope_theta": 10_000.0}
        | ({"num_nextn_predict_layers": 1} if family == "V3" else {})
    )
    del whole["rope_parameters"]
    defaults = (
        cls().to_dict()
        | {"rope_theta": 10_000.0}
        | ({"num_nextn_predict_layers": cls().num_mtp_layers} if family == "V3" else {})
    )
    outcomes = {}
    for name in sorted(set(whole) - {"model_type"}):
        without = {field: value for field, value in whole.items() if field != name}
        try:
            outcomes[name] = config_from_hf(without) == config_from_hf(whole | {name: defaults[name]})
        except (CheckpointError, ConfigError):
            outcomes[name] = "refused"
    assert False not in outcomes.values(), outcomes
    behavior = set(ROUTING) & set(whole) | (
        {"rope_interleave", "num_nextn_predict_layers", "n_shared_experts"} if family == "V3" else set()
    )
    required = {"n_shared_experts"} if family == "V2" else set()
    assert {name for name in behavior if outcomes[name] == "refused"} <= required


def test_other_names_of_a_field():
    renamed = {
        name: value for name, value in V3.items() if name not in ("n_routed_experts", "num_nextn_predict_layers")
    }
    assert config_from_hf(renamed | {"num_local_experts": 256, "num_mtp_layers": 1}) == config_from_hf(V3)
    with pytest.raises(CheckpointError, match="num_mtp_layers=0 and num_nextn_predict_layers=1 are one field"):
        config_from_hf(V3 | {"num_mtp_layers": 0})


def test_fields_of_other_software_change_nothing():
    foreign = {
        "_attn_implementation_autoset": True, "unsloth_version": "1", "tokenizer_class": "X", "_name_or_path": "x",
        "temperature": 0.6, "transformers.js_config": {"a": 1},
    }  # fmt: skip
    assert config_from_hf(V3 | foreign) == config_from_hf(V3)


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("rms_norm_eps", float("nan"), "expected a number"),
        ("rms_norm_eps", -1e-6, "expected a number of at least 0"),
        ("routed_scaling_factor", 10**400, "expected a number"),
        ("rope_theta", 0.0, "expected a number of at least 1"),
        ("hidden_size", 2**40, "expected a size"),
        ("first_k_dense_replace", None, "expected a whole number"),
        ("rope_scaling", [1], "expected an object or null"),
        ("rope_scaling", YARN | {"original_max_position_embeddings": 4096.5}, "expected a whole number"),
        ("quantization_config", "fp8", "expected an object or null"),
        (
            "quantization_config",
            {"quant_method": "fp8", "weight_block_size": None},
            "weight_block_size=None is not supported",
        ),
        (
            "quantization_config",
            {"quant_method": "fp8", "scale_fmt": "e5"},
            "scale_fmt='e5' is not supported; supported: 'float', 'ue8m0'",
        ),
        (
            "quantization_config",
            {"quant_method": "fp8", "activation_scheme": "static"},
            "activation_scheme='static' is not supported",
        ),
    ],
)
def test_values_no_network_has_are_refused(field, value, message):
    with pytest.raises(CheckpointError, match=f"{field}.*{message}"):
        config_from_hf(V3 | {field: value})


def test_of_two_spellings_of_rope_the_old_one_counts():
    """As in transformers 5."""
    both = V3 | {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}
    assert config_from_hf(both) == config_from_hf(V3)


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="top_k=999"):
        config_from_hf(V3 | {"num_experts_per_tok": 999})


def test_unknown_field_that_is_off_changes_nothing():
    assert config_from_hf(V3 | {"sliding_window": None, "some_feature": False}) == config_from_hf(V3)


def _moe(**changes):
    return preset("v3_671b").replace(moe=dataclasses.replace(preset("v3_671b").moe, **changes))


@pytest.mark.parametrize(
    "config, field",
    [
        (preset("v3_671b").replace(latent_norm_eps=1e-5), "latent_norm_eps"),
        (_moe(correction_bias=False), "moe.correction_bias"),
        (_moe(group_score="max"), "moe.group_score"),
        (_moe(scoring="softmax", correction_bias=False, group_score="max"), "norm_topk_prob=True is not supported"),
        (
            preset("deepseek_moe_16b").replace(
                moe=dataclasses.replace(preset("v3_671b").moe, num_groups=1, topk_groups=1)
            ),
            "scoring_func='sigmoid'",
        ),
        (
            preset("deepseek_moe_16b").replace(
                moe=dataclasses.replace(preset("deepseek_moe_16b").moe, routed_scaling_factor=2.0)
            ),
            "routed_scaling_factor=2.0",
        ),
        (preset("v2_236b").replace(mtp_depth=1), "num_nextn_predict_layers"),
        (
            preset("v3_671b").replace(rope=dataclasses.replace(preset("v3_671b").rope, yarn=YarnConfig(mscale=0.7))),
            "mscale=0.7",
        ),
    ],
)
def test_network_no_config_json_can_say_is_not_exported(config, field):
    with pytest.raises(CheckpointError, match=field):
        config_to_hf(config)


def test_a_score_function_of_ones_own_is_the_reason():
    config = _moe()
    object.__setattr__(config.moe, "scoring", "sqrt_softplus")  # as one of the user's own would be
    with pytest.raises(CheckpointError, match="scoring_func='sqrt_softplus' is not supported; supported: 'sigmoid'"):
        config_to_hf(config)


def test_dense_networks_read_back():
    mla = preset("v2_lite_16b").replace(moe=None, first_k_dense=0)
    assert config_from_hf(config_to_hf(mla)).replace(first_k_dense=0) == mla
    gqa = ModelConfig(
        vocab_size=9, hidden_size=8, num_layers=2, intermediate_size=7, attention=GQAConfig(4, 2, 2), moe=None,
        tie_embeddings=True, rope=dataclasses.replace(mla.rope, interleaved=False, yarn=None),
    )  # fmt: skip
    assert config_from_hf(config_to_hf(gqa)).replace(first_k_dense=0) == gqa

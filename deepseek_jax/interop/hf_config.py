"""config.json of the DeepSeek families <-> ModelConfig, field by field.

Every field is mapped, checked or known not to change the network. Anything else that is switched on is refused by name:
a field we don't know (V3.2's index_*, say) means a network we don't have.

Where implementations of the same config.json disagree, this holds here:
- The norms inside latent attention always have epsilon 1e-6, not rms_norm_eps, as in transformers and the released
  code.
- The softmax scale gets mscale² whenever mscale_all_dim is set, as in transformers; the stand-alone inference code does
  so only beyond the original context length.
- DeepSeek-V2 with norm_topk_prob=true is refused: transformers ignores the field, the released code drops the scaling
  factor.
- The groups a token may not use are masked with -inf, as in the released code and transformers from version 5;
  transformers 4 masked with 0.0, which differs where a biased score is negative.
- initializer_range is ignored: the models were trained from a standard deviation of 0.006.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepseek_jax.errors import CheckpointError, UserError, nearest
from deepseek_jax.interop.attention import AttentionNames, attention_names, names_of_model_type
from deepseek_jax.interop.fp8_blocks import BLOCK
from deepseek_jax.interop.hf_fields import CARRIED, CONFIG_NAME, FAMILIES, Fields, mapping, number, refuse
from deepseek_jax.json_io import read_json
from deepseek_jax.model.config import ModelConfig, MoEConfig, RopeConfig, YarnConfig

LATENT_NORM_EPS = 1e-6
QUANTISATION = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [BLOCK, BLOCK],
}


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a Hugging Face folder. Raises CheckpointError if there is none, it isn't a JSON object, or is
    one of ours."""
    file = folder / CONFIG_NAME
    if (folder / "checkpoints").is_dir() and not file.is_file():
        raise CheckpointError(f"{folder} is a checkpoint of ours, not a Hugging Face folder: export it first")
    if not file.is_file():
        raise CheckpointError(
            f"{folder} has no {CONFIG_NAME}; give a Hugging Face folder with {CONFIG_NAME} and *.safetensors"
        )
    fields = read_json(file, "download it again", CheckpointError)
    if "model_type" not in fields and "stages" in fields:
        raise CheckpointError(
            f"{folder} is the folder of a run here, not a Hugging Face folder: export one of its stages "
            f"({_stages(folder, fields)}) first"
        )
    return fields


def _stages(folder: Path, fields: Mapping[str, Any]) -> str:
    stages = fields["stages"] if isinstance(fields["stages"], list) else []
    return ", ".join(str(folder / str(stage)) for stage in stages) or "none yet"


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """The ModelConfig of a config.json's fields.

    Raises CheckpointError naming the field that is missing or unsupported, ConfigError for sizes that don't fit.
    """
    model_type = hf.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise CheckpointError(
            f"{CONFIG_NAME}: model_type={model_type!r} is not supported: {nearest(str(model_type), FAMILIES)}"
        )
    v3 = FAMILIES[model_type] is FAMILIES["deepseek_v3"]
    fields = Fields(hf)
    fields.expect("hidden_act", "silu")
    fields.expect("moe_layer_freq", 1)
    fields.expect("attention_bias", False, None)
    fields.expect("mlp_bias", False, None)
    fields.expect("attention_dropout", 0.0, None)
    fields.expect("pretraining_tp", 1, None)
    scale_format(fields.take("quantization_config", None))
    interleaved = fields.expect("rope_interleave", *((True, False) if v3 else (True,)))
    config = ModelConfig(
        vocab_size=fields.size("vocab_size"),
        hidden_size=fields.size("hidden_size"),
        num_layers=fields.size("num_hidden_layers"),
        intermediate_size=fields.size("intermediate_size"),
        attention=names_of_model_type(model_type).read(fields),
        moe=_moe(fields, model_type),
        first_k_dense=fields.size("first_k_dense_replace"),
        rope=_rope(hf, interleaved and model_type != "deepseek"),
        mtp_depth=fields.size("num_nextn_predict_layers", null=0)
        if v3
        else fields.expect("num_nextn_predict_layers", 0, None) or 0,
        rms_norm_eps=fields.number("rms_norm_eps", lowest=0.0),
        latent_norm_eps=LATENT_NORM_EPS,
        tie_embeddings=fields.expect("tie_word_embeddings", False, True),
    )
    fields.finish()
    return config


def _moe(fields: Fields, model_type: str) -> MoEConfig | None:
    v3 = FAMILIES[model_type] is FAMILIES["deepseek_v3"]
    methods = {"deepseek_v2": ("greedy", "group_limited_greedy"), "deepseek": ("greedy",)}
    normalized = {"deepseek_v2": (False,), "deepseek": (False, True)}
    num_experts = fields.size("n_routed_experts", null=0)
    method = fields.expect("topk_method", *methods.get(model_type, ("noaux_tc",)))
    routing = dict(
        num_shared_experts=fields.size("n_shared_experts", null=0),
        scoring=fields.expect("scoring_func", "sigmoid" if v3 else "softmax"),
        norm_topk_prob=fields.expect("norm_topk_prob", *normalized.get(model_type, (True, False))),
        routed_scaling_factor=fields.expect("routed_scaling_factor", 1.0)
        if model_type == "deepseek"
        else fields.number("routed_scaling_factor"),
        correction_bias=v3,
    )
    for name in ("num_experts_per_tok", "moe_intermediate_size", "n_group", "topk_group"):
        fields.take(name, None)
    if not num_experts:
        return None
    sizes = dict(top_k=fields.size("num_experts_per_tok"), intermediate_size=fields.size("moe_intermediate_size"))
    groups = {}
    if method != "greedy":  # of a greedy selection n_group only places experts on devices
        groups = dict(num_groups=fields.size("n_group"), topk_groups=fields.size("topk_group"))
    if method == "group_limited_greedy":
        groups["group_score"] = "max"
    return MoEConfig(num_experts=num_experts, **sizes, **routing, **groups)


def _rope(hf: Mapping[str, Any], interleaved: bool) -> RopeConfig:
    """Reads both spellings: rope_theta with rope_scaling, and transformers 5's rope_parameters, which holds everything.
    Where both are there, rope_scaling counts, as in transformers."""
    parameters = mapping("rope_scaling", hf.get("rope_scaling")) or mapping(
        "rope_parameters", hf.get("rope_parameters")
    )
    theta = number("rope_theta", parameters.pop("rope_theta", hf.get("rope_theta", 10_000.0)), lowest=1.0)
    old_name = parameters.pop("type", "default")
    rope_type = parameters.pop("rope_type", old_name)
    if rope_type not in ("default", "yarn"):
        refuse("rope_scaling type", rope_type, ("default", "yarn"))
    if rope_type == "default" and parameters:
        raise CheckpointError(
            f"{CONFIG_NAME}: rope type 'default' takes rope_theta alone, found {', '.join(sorted(parameters))}"
        )
    return RopeConfig(theta=theta, interleaved=interleaved, yarn=_yarn(parameters) if rope_type == "yarn" else None)


def _yarn(parameters: Mapping[str, Any]) -> YarnConfig:
    known = {field.name: field.default for field in dataclasses.fields(YarnConfig)}
    for name in parameters:
        if name not in known:
            raise CheckpointError(
                f"{CONFIG_NAME}: rope_scaling field {name}={parameters[name]!r} is not supported: "
                f"{nearest(name, known)}"
            )
    for name in ("factor", "original_max_position_embeddings"):
        if name not in parameters:
            raise CheckpointError(f"{CONFIG_NAME}: rope_scaling of type 'yarn' lacks the field {name!r}")
    values = {name: number(name, parameters.get(name, default)) for name, default in known.items()}
    original = values["original_max_position_embeddings"]
    if not original.is_integer():
        raise CheckpointError(
            f"{CONFIG_NAME}: rope_scaling original_max_position_embeddings={original!r}: expected a whole number"
        )
    # Either field without the other means another cos/sin magnitude to each implementation; mscale=1 alone is the same
    # to all.
    alone = not parameters.get("mscale") if values["mscale_all_dim"] else values["mscale"] != 1.0
    if alone:
        raise CheckpointError(
            f"{CONFIG_NAME}: rope_scaling mscale={parameters.get('mscale')!r} with "
            f"mscale_all_dim={parameters.get('mscale_all_dim')!r} "
            "means different things to different implementations; supported: both or neither"
        )
    return YarnConfig(**{**values, "original_max_position_embeddings": int(original)})


def scale_format(quantization: Mapping[str, Any] | None) -> str | None:
    """`scale_fmt` of a quantization_config: "ue8m0" if all scales are powers of two, those of activations too (V3.1),
    or None.

    Raises CheckpointError for a quantization that is not that of the released FP8 weights.
    """
    mapping("quantization_config", quantization)
    found = quantization or {}
    for name in QUANTISATION if found else ():
        if found.get(name, QUANTISATION[name]) != QUANTISATION[name]:
            refuse(f"quantization_config.{name}", found[name], (QUANTISATION[name],))
    if found.get("scale_fmt") not in (None, "float", "ue8m0"):
        refuse("quantization_config.scale_fmt", found["scale_fmt"], ("float", "ue8m0"))
    return "ue8m0" if found.get("scale_fmt") == "ue8m0" else None


def config_to_hf(config: ModelConfig, carried: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The config.json fields of `config`, readable by transformers and by `config_from_hf`.

    `carried` may hold an imported config.json, whose token ids and context length are kept. Raises CheckpointError
    naming the field if no DeepSeek config.json can express the network, and for an attention variant without
    Hugging Face names.
    """
    carried = carried or {}
    names, yarn = attention_names(config.attention), config.rope.yarn
    family = _family(config, names)
    context = yarn.original_max_position_embeddings * yarn.factor if yarn else 4096
    hf = {
        **family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "intermediate_size": config.intermediate_size,
        "first_k_dense_replace": config.num_dense_layers,
        **names.write(config.attention),
        **_moe_fields(config, family["model_type"]),
        "rope_theta": config.rope.theta,
        "rope_scaling": {"type": "yarn", **dataclasses.asdict(yarn)} if yarn else None,
        "rms_norm_eps": config.rms_norm_eps,
        "num_nextn_predict_layers": config.mtp_depth,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": False,
        "hidden_act": "silu",
        "max_position_embeddings": int(context),
        **{name: carried[name] for name in CARRIED if carried.get(name) is not None},
    }
    if not config.mtp_depth and hf["model_type"] != "deepseek_v3":
        del hf["num_nextn_predict_layers"]
    _check_expressible(config, hf)
    return hf


def _family(config: ModelConfig, names: type[AttentionNames]) -> dict[str, Any]:
    if "deepseek" in names.model_types:
        return {"model_type": "deepseek", "architectures": ["DeepseekForCausalLM"]}
    if config.moe is not None and config.moe.scoring == "softmax":
        return {"model_type": "deepseek_v2", "architectures": ["DeepseekV2ForCausalLM"]}
    return {
        "model_type": "deepseek_v3",
        "architectures": ["DeepseekV3ForCausalLM"],
        "rope_interleave": config.rope.interleaved,
    }


def _moe_fields(config: ModelConfig, model_type: str) -> dict[str, Any]:
    moe = config.moe
    if moe is None:
        return {"n_routed_experts": 0, "num_experts_per_tok": 1, "moe_intermediate_size": 1, "n_shared_experts": 0}
    v2_method = "greedy" if moe.num_groups == 1 else "group_limited_greedy"
    return {
        "n_routed_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.intermediate_size,
        "n_shared_experts": moe.num_shared_experts,
        "scoring_func": moe.scoring,
        "topk_method": {"deepseek_v3": "noaux_tc", "deepseek_v2": v2_method, "deepseek": "greedy"}[model_type],
        "n_group": moe.num_groups,
        "topk_group": moe.topk_groups,
        "norm_topk_prob": moe.norm_topk_prob,
        "routed_scaling_factor": moe.routed_scaling_factor,
        "moe_layer_freq": 1,
    }


def _check_expressible(config: ModelConfig, hf: Mapping[str, Any]) -> None:
    """Raises CheckpointError if reading `hf` back gives another network than `config`."""
    try:
        wanted, read = _function(config), _function(config_from_hf(hf))
    except UserError as error:
        raise CheckpointError(
            f"no config.json of model_type={hf['model_type']!r} can say what this network is: {error}"
        ) from error
    for name, value in wanted.items():
        if read[name] != value:
            raise CheckpointError(
                f"a config.json of model_type={hf['model_type']!r} cannot say {name}={value!r}: it would be read as "
                f"{read[name]!r}, so the exported model would be another network"
            )


def _function(config: ModelConfig) -> dict[str, Any]:
    """The fields, flattened to dotted names, that decide which function the network computes."""
    moe, attention = config.moe, config.attention
    if moe is not None:
        group_score = moe.group_score if moe.num_groups > 1 else "none"
        moe = dataclasses.asdict(moe) | {"group_score": group_score}
    fields = {
        **{f"attention.{name}": value for name, value in dataclasses.asdict(attention).items()},
        **{f"moe.{name}": value for name, value in (moe or {}).items()},
        "rope": config.rope,
        "latent_norm_eps": config.latent_norm_eps if attention_names(attention).latent_norms else None,
        "num_dense_layers": config.num_dense_layers,
    }
    for name in (
        "vocab_size",
        "hidden_size",
        "num_layers",
        "intermediate_size",
        "mtp_depth",
        "rms_norm_eps",
        "tie_embeddings",
    ):
        fields[name] = getattr(config, name)
    return fields

"""config.json of the DeepSeek families <-> ModelConfig, field by field.

Every field is mapped, checked or known not to change the network. Anything else that is switched on is refused by name:
a field we don't know (V3.2's index_*, say) means a network we don't have.

Where implementations of the same config.json disagree, this holds here:
- The norms inside latent attention have epsilon 1e-6 whatever rms_norm_eps says, as in transformers and the released code.
- The softmax scale gets mscale² whenever mscale_all_dim is set, as in transformers; the stand-alone inference code does
  so only beyond the original context length.
- DeepSeek-V2 with norm_topk_prob=true is refused: transformers ignores the field, the released code drops the scaling factor.
- The groups a token may not use are masked with -inf, as in the released code and transformers from version 5; transformers 4
  masked with 0.0, which differs where a biased score is negative.
- initializer_range is ignored: the models were trained from a standard deviation of 0.006.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepseek_jax.errors import CheckpointError, nearest
from deepseek_jax.interop.fp8_blocks import BLOCK
from deepseek_jax.model.config import GQAConfig, MLAConfig, ModelConfig, MoEConfig, RopeConfig, YarnConfig

CONFIG_NAME = "config.json"
LATENT_NORM_EPS = 1e-6
QUANTISATION = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
_V3_TYPES = ("deepseek_v3", "kimi_k2")
_MODEL_TYPES = (*_V3_TYPES, "deepseek_v2", "deepseek")
_REQUIRED = object()

# Fields about tokens, files, training or other software, not about the function the network computes. An export keeps
# the values an import found for the first group.
_CARRIED = ("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings")
_IGNORED = _CARRIED + (
    "architectures", "auto_map", "model_type", "torch_dtype", "dtype", "transformers_version", "use_cache", "initializer_range",
    "aux_loss_alpha", "seq_aux", "ep_size", "qk_head_dim", "rope_theta", "rope_scaling", "rope_parameters", "_name_or_path", "return_dict",
    "chunk_size_feed_forward", "id2label", "label2id",
)  # fmt: skip


class _Fields:
    """The fields of a config.json, and which of them are not accounted for yet."""

    def __init__(self, fields: Mapping[str, Any]):
        self._all = fields
        self._rest = {name: value for name, value in fields.items() if name not in _IGNORED}

    def take(self, name: str, default: Any = _REQUIRED) -> Any:
        self._rest.pop(name, None)
        if name not in self._all and default is _REQUIRED:
            raise CheckpointError(f"{CONFIG_NAME} lacks the field {name!r}")
        return self._all.get(name, default)

    def size(self, name: str, default: Any = _REQUIRED) -> int:
        """A whole number; null counts as the default."""
        value = self.take(name, default)
        value = default if value is None and default is not _REQUIRED else value
        if not isinstance(value, int) or isinstance(value, bool):
            raise CheckpointError(f"{CONFIG_NAME}: {name}={value!r}: expected a whole number")
        return value

    def number(self, name: str, default: Any = _REQUIRED) -> float:
        return _number(name, self.take(name, default))

    def expect(self, name: str, *supported: Any) -> Any:
        """A field that, if present, must have one of the `supported` values; the first one is the default."""
        value = self.take(name, supported[0])
        if value not in supported:
            _refuse(name, value, supported)
        return value

    def finish(self) -> None:
        """Raises CheckpointError for a field nobody took, unless it is switched off (null, false, empty)."""
        for name, value in self._rest.items():
            if value is not None and value is not False and value not in ("", [], {}):
                raise CheckpointError(
                    f"{CONFIG_NAME}: field {name}={value!r} is not supported for model_type={self._all['model_type']!r}: the network "
                    "would not be the one implemented here; delete the field only if you know that it changes nothing"
                )


def _refuse(name: str, value: Any, supported: tuple) -> None:
    raise CheckpointError(f"{CONFIG_NAME}: {name}={value!r} is not supported; supported: {', '.join(repr(s) for s in supported)}")


def _number(name: str, value: Any) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise CheckpointError(f"{CONFIG_NAME}: {name}={value!r}: expected a number")
    return float(value)


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a Hugging Face folder. Raises CheckpointError if there is none or it isn't a JSON object."""
    file = folder / CONFIG_NAME
    if not file.is_file():
        raise CheckpointError(f"{folder} has no {CONFIG_NAME}; give a Hugging Face folder with {CONFIG_NAME} and *.safetensors")
    try:
        fields = json.loads(file.read_text())
    except ValueError as error:
        raise CheckpointError(f"{file} is not JSON ({error}); download it again") from error
    if not isinstance(fields, dict):
        raise CheckpointError(f"{file} holds a {type(fields).__name__}, expected an object of fields")
    return fields


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """The ModelConfig of a config.json's fields.

    Raises CheckpointError naming the field that is missing or unsupported, ConfigError for sizes that don't fit.
    """
    model_type = hf.get("model_type")
    if model_type not in _MODEL_TYPES:
        raise CheckpointError(f"{CONFIG_NAME}: model_type={model_type!r} is not supported: {nearest(str(model_type), _MODEL_TYPES)}")
    v3 = model_type in _V3_TYPES
    fields = _Fields(hf)
    fields.expect("hidden_act", "silu")
    fields.expect("moe_layer_freq", 1)
    fields.expect("attention_bias", False, None)
    fields.expect("mlp_bias", False, None)
    fields.expect("attention_dropout", 0.0, None)
    fields.expect("pretraining_tp", 1, None)
    _check_quantisation(fields.take("quantization_config", None))
    if model_type == "deepseek":
        attention, interleaved = _gqa(fields), False
    else:
        attention, interleaved = _mla(fields), fields.expect("rope_interleave", *((True, False) if v3 else (True,)))
    config = ModelConfig(
        vocab_size=fields.size("vocab_size"),
        hidden_size=fields.size("hidden_size"),
        num_layers=fields.size("num_hidden_layers"),
        intermediate_size=fields.size("intermediate_size"),
        attention=attention,
        moe=_moe(fields, model_type),
        first_k_dense=fields.size("first_k_dense_replace", 0),
        rope=_rope(hf, interleaved),
        mtp_depth=fields.size("num_nextn_predict_layers", 0) if v3 else fields.expect("num_nextn_predict_layers", 0, None) or 0,
        rms_norm_eps=fields.number("rms_norm_eps"),
        latent_norm_eps=LATENT_NORM_EPS,
        tie_embeddings=fields.expect("tie_word_embeddings", False, True),
    )
    fields.finish()
    return config


def _mla(fields: _Fields) -> MLAConfig:
    num_heads = fields.size("num_attention_heads")
    fields.expect("num_key_value_heads", num_heads, None)
    fields.take("head_dim", None)  # transformers stores the rotary width here; the widths below say it all
    widths = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    q_lora_rank = None if fields.take("q_lora_rank") is None else fields.size("q_lora_rank")
    return MLAConfig(num_heads=num_heads, q_lora_rank=q_lora_rank, **{width: fields.size(width) for width in widths})


def _gqa(fields: _Fields) -> GQAConfig:
    num_heads, hidden_size = fields.size("num_attention_heads"), fields.size("hidden_size")
    head_dim = fields.size("head_dim", hidden_size // max(num_heads, 1))
    return GQAConfig(num_heads=num_heads, num_kv_heads=fields.size("num_key_value_heads", num_heads), head_dim=head_dim)


def _moe(fields: _Fields, model_type: str) -> MoEConfig | None:
    v3 = model_type in _V3_TYPES
    methods = {"deepseek_v2": ("greedy", "group_limited_greedy"), "deepseek": ("greedy",)}
    normalised = {"deepseek_v2": (False,), "deepseek": (False, True)}
    method = fields.expect("topk_method", *methods.get(model_type, ("noaux_tc",)))
    routing = dict(
        num_experts=fields.size("n_routed_experts", 0),
        top_k=fields.size("num_experts_per_tok"),
        intermediate_size=fields.size("moe_intermediate_size"),
        num_shared_experts=fields.size("n_shared_experts", 0),
        scoring=fields.expect("scoring_func", "sigmoid" if v3 else "softmax"),
        norm_topk_prob=fields.expect("norm_topk_prob", *normalised.get(model_type, (True, False))),
        routed_scaling_factor=fields.number("routed_scaling_factor", 1.0),
        correction_bias=v3,
    )
    groups = dict(num_groups=fields.size("n_group", 1), topk_groups=fields.size("topk_group", 1))
    if method == "greedy":  # n_group then only places experts on devices
        groups = {}
    elif method == "group_limited_greedy":
        groups["group_score"] = "max"
    return MoEConfig(**routing, **groups) if routing["num_experts"] else None


def _rope(hf: Mapping[str, Any], interleaved: bool) -> RopeConfig:
    """Both spellings: rope_theta beside rope_scaling, and transformers 5's rope_parameters, which holds everything."""
    parameters = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    parameters = {name: value for name, value in parameters.items() if value is not None}
    theta = _number("rope_theta", parameters.pop("rope_theta", hf.get("rope_theta", 10_000.0)))
    old_name = parameters.pop("type", "default")
    rope_type = parameters.pop("rope_type", old_name)
    if rope_type not in ("default", "yarn"):
        _refuse("rope_scaling type", rope_type, ("default", "yarn"))
    if rope_type == "default" and parameters:
        raise CheckpointError(f"{CONFIG_NAME}: rope type 'default' takes rope_theta alone, found {', '.join(sorted(parameters))}")
    return RopeConfig(theta=theta, interleaved=interleaved, yarn=_yarn(parameters) if rope_type == "yarn" else None)


def _yarn(parameters: Mapping[str, Any]) -> YarnConfig:
    known = {field.name: field.default for field in dataclasses.fields(YarnConfig)}
    for name in parameters:
        if name not in known:
            raise CheckpointError(f"{CONFIG_NAME}: rope_scaling field {name}={parameters[name]!r} is not supported: {nearest(name, known)}")
    for name in ("factor", "original_max_position_embeddings"):
        if name not in parameters:
            raise CheckpointError(f"{CONFIG_NAME}: rope_scaling of type 'yarn' lacks the field {name!r}")
    values = {name: _number(name, parameters.get(name, default)) for name, default in known.items()}
    # Either field without the other means another cos/sin magnitude to each implementation; mscale=1 alone is the same to all.
    alone = not parameters.get("mscale") if values["mscale_all_dim"] else values["mscale"] != 1.0
    if alone:
        raise CheckpointError(
            f"{CONFIG_NAME}: rope_scaling mscale={parameters.get('mscale')!r} with mscale_all_dim={parameters.get('mscale_all_dim')!r} "
            "means different things to different implementations; supported: both or neither"
        )
    return YarnConfig(**{**values, "original_max_position_embeddings": int(values["original_max_position_embeddings"])})


def _check_quantisation(found: Mapping[str, Any] | None) -> None:
    for name in ("quant_method", "fmt", "weight_block_size") if found else ():
        if found.get(name, QUANTISATION[name]) != QUANTISATION[name]:
            _refuse(f"quantization_config.{name}", found[name], (QUANTISATION[name],))


def config_to_hf(config: ModelConfig, carried: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The config.json fields of `config`, readable by transformers and by `config_from_hf`.

    `carried` may hold an imported config.json, whose token ids and context length are kept. Raises CheckpointError
    naming the field if no DeepSeek config.json can express the network.
    """
    carried = carried or {}
    yarn = config.rope.yarn
    context = yarn.original_max_position_embeddings * yarn.factor if yarn else 4096
    hf = {
        **_family(config),
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "intermediate_size": config.intermediate_size,
        "first_k_dense_replace": config.num_dense_layers,
        **_attention_fields(config),
        **_moe_fields(config),
        "rope_theta": config.rope.theta,
        "rope_scaling": {"type": "yarn", **dataclasses.asdict(yarn)} if yarn else None,
        "rms_norm_eps": config.rms_norm_eps,
        "num_nextn_predict_layers": config.mtp_depth,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": False,
        "hidden_act": "silu",
        "max_position_embeddings": int(context),
        **{name: carried[name] for name in _CARRIED if name in carried},
    }
    if not config.mtp_depth and hf["model_type"] != "deepseek_v3":
        del hf["num_nextn_predict_layers"]
    _check_expressible(config, hf)
    return hf


def _family(config: ModelConfig) -> dict[str, Any]:
    if isinstance(config.attention, GQAConfig):
        return {"model_type": "deepseek", "architectures": ["DeepseekForCausalLM"]}
    if config.moe is not None and config.moe.scoring == "softmax":
        return {"model_type": "deepseek_v2", "architectures": ["DeepseekV2ForCausalLM"]}
    return {"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"], "rope_interleave": config.rope.interleaved}


def _attention_fields(config: ModelConfig) -> dict[str, Any]:
    a = config.attention
    if isinstance(a, GQAConfig):
        return {"num_attention_heads": a.num_heads, "num_key_value_heads": a.num_kv_heads, "head_dim": a.head_dim}
    widths = {name: value for name, value in dataclasses.asdict(a).items() if name != "num_heads"}
    return {"num_attention_heads": a.num_heads, "num_key_value_heads": a.num_heads, **widths}


def _moe_fields(config: ModelConfig) -> dict[str, Any]:
    moe = config.moe
    if moe is None:
        return {"n_routed_experts": 0, "num_experts_per_tok": 1, "moe_intermediate_size": 1, "n_shared_experts": 0}
    greedy = "greedy" if moe.num_groups == 1 else "group_limited_greedy"
    return {
        "n_routed_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.intermediate_size,
        "n_shared_experts": moe.num_shared_experts,
        "scoring_func": moe.scoring,
        "topk_method": "noaux_tc" if moe.scoring == "sigmoid" else greedy,
        "n_group": moe.num_groups,
        "topk_group": moe.topk_groups,
        "norm_topk_prob": moe.norm_topk_prob,
        "routed_scaling_factor": moe.routed_scaling_factor,
        "moe_layer_freq": 1,
    }


def _check_expressible(config: ModelConfig, hf: Mapping[str, Any]) -> None:
    """Raises CheckpointError if reading `hf` back gives another network than `config`."""
    wanted, read = _function(config), _function(config_from_hf(hf))
    for name, value in wanted.items():
        if read[name] != value:
            raise CheckpointError(
                f"a config.json of model_type={hf['model_type']!r} cannot say {name}={value!r}: it would be read as {read[name]!r}, so the "
                "exported model would be another network"
            )


def _function(config: ModelConfig) -> dict[str, Any]:
    """The fields, flattened to dotted names, that decide which function the network computes."""
    moe, attention = config.moe, config.attention
    if moe is not None:
        group_score = moe.group_score if moe.num_groups > 1 else "none"
        moe = dataclasses.asdict(moe) | {"implementation": None, "group_score": group_score}
    fields = {
        **{f"attention.{name}": value for name, value in dataclasses.asdict(attention).items()},
        **{f"moe.{name}": value for name, value in (moe or {}).items()},
        "rope": config.rope,
        "latent_norm_eps": config.latent_norm_eps if isinstance(attention, MLAConfig) else None,
        "num_dense_layers": config.num_dense_layers,
    }
    for name in ("vocab_size", "hidden_size", "num_layers", "intermediate_size", "mtp_depth", "rms_norm_eps", "tie_embeddings"):
        fields[name] = getattr(config, name)
    return fields

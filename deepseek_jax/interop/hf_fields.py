"""The fields of a config.json, taken and checked one by one: known names, types and defaults."""

import math
from collections.abc import Mapping
from typing import Any

from deepseek_jax.errors import CheckpointError

CONFIG_NAME = "config.json"
REQUIRED = object()

# Defaults of each family's configuration class for fields about behavior; sizes must be there. Where the released class
# and transformers' disagree (the shared experts of V2, say) the field is required.
_V3_DEFAULTS = {
    "first_k_dense_replace": 3, "n_shared_experts": 1, "n_group": 8, "topk_group": 4, "scoring_func": "sigmoid",
    "topk_method": "noaux_tc", "norm_topk_prob": True, "routed_scaling_factor": 2.5, "num_nextn_predict_layers": 1,
    "rope_interleave": True,
}  # fmt: skip
_V2_DEFAULTS = {
    "first_k_dense_replace": 0, "n_group": None, "topk_group": None, "scoring_func": "softmax", "topk_method": "greedy",
    "norm_topk_prob": False, "routed_scaling_factor": 1.0, "num_nextn_predict_layers": 0, "rope_interleave": True,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "deepseek_v3": _V3_DEFAULTS,
    "kimi_k2": _V3_DEFAULTS,
    "deepseek_v2": _V2_DEFAULTS,
    "deepseek": _V2_DEFAULTS | {"n_routed_experts": None, "n_shared_experts": None, "num_experts_per_tok": None},
}
# transformers reads these names as if they were the others.
_ALIASES = {
    "num_local_experts": "n_routed_experts",
    "num_mtp_layers": "num_nextn_predict_layers",
    "num_experts": "n_routed_experts",
}

# Fields about tokens, files, training or other software, not about the function the network computes. An export keeps
# the values an import found for the first group.
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
CARRIED = (*TOKEN_IDS, "max_position_embeddings")
_IGNORED = CARRIED + (
    "architectures", "auto_map", "model_type", "torch_dtype", "dtype", "transformers_version", "use_cache",
    "initializer_range", "aux_loss_alpha", "seq_aux", "ep_size", "qk_head_dim", "rope_theta", "rope_scaling",
    "rope_parameters", "return_dict", "chunk_size_feed_forward", "id2label", "label2id", "tokenizer_class",
    "output_router_logits", "router_aux_loss_coef", "attn_implementation", "output_hidden_states", "output_attentions",
    "problem_type", "is_encoder_decoder", "is_decoder", "task_specific_params", "use_bfloat16",
)  # fmt: skip
# Text generation's settings, which transformers kept here before there was a generation_config.json, and their old
# defaults.
_GENERATION = (
    "max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty",
    "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size", "num_return_sequences",
)  # fmt: skip
_SOFTWARE = (
    "unsloth",
    "vllm",
    "sglang",
    "lmdeploy",
    "axolotl",
    "swift",
    "transformers.js",
    "trl",
    "peft",
    "llamafactory",
    "megatron",
)


def foreign(name: str) -> bool:
    """True for a field of other software: its private state, its version, or its own name."""
    return name.startswith("_") or name.endswith("_version") or any(name.startswith(software) for software in _SOFTWARE)


class Fields:
    """The fields of a config.json, and those that nothing has taken yet. Raises CheckpointError as its methods do."""

    def __init__(self, fields: Mapping[str, Any]):
        self.family = FAMILIES[fields["model_type"]]
        self._all = dict(fields)
        for alias, name in _ALIASES.items():
            value = self._all.pop(alias, None)
            if value is not None and self._all.setdefault(name, value) != value:
                raise CheckpointError(
                    f"{CONFIG_NAME}: {alias}={value!r} and {name}={self._all[name]!r} are one field: remove the wrong "
                    "one"
                )
        self._rest = {name for name in self._all if name not in (*_IGNORED, *_GENERATION) and not foreign(name)}

    def take(self, name: str, default: Any = REQUIRED) -> Any:
        """A field as it is. A missing one is `default`, or else the default of the family's own class, or else
        refused."""
        self._rest.discard(name)
        default = self.family.get(name, REQUIRED) if default is REQUIRED else default
        if name not in self._all and default is REQUIRED:
            raise CheckpointError(f"{CONFIG_NAME} lacks the field {name!r}")
        return self._all.get(name, default)

    def size(self, name: str, default: Any = REQUIRED, null: Any = REQUIRED) -> int:
        """A whole number; null counts as `null` where that is given."""
        value = self.take(name, default)
        if value is None and null is not REQUIRED:
            return null
        if not isinstance(value, int) or isinstance(value, bool):
            raise CheckpointError(f"{CONFIG_NAME}: {name}={value!r}: expected a whole number")
        if not 0 <= value < 2**31:
            raise CheckpointError(f"{CONFIG_NAME}: {name}={value!r}: expected a size, from 0 to {2**31 - 1}")
        return value

    def number(self, name: str, lowest: float = -math.inf) -> float:
        return number(name, self.take(name), lowest)

    def expect(self, name: str, *supported: Any) -> Any:
        """A field that must have one of the `supported` values; a missing one is the family's default, or else the
        first of them."""
        value = self.take(name, self.family.get(name, supported[0]))
        if value not in supported:
            refuse(name, value, supported)
        return value

    def finish(self) -> None:
        """Raises CheckpointError for a field that nothing took, unless it is switched off (null, false, empty)."""
        for name in sorted(self._rest):
            value = self._all[name]
            if value is not None and value is not False and value not in ("", [], {}):
                raise CheckpointError(
                    f"{CONFIG_NAME}: field {name}={value!r} is not supported for "
                    f"model_type={self._all['model_type']!r}: the network "
                    "would not be the one implemented here; delete the field only if you know that it changes nothing"
                )


def refuse(name: str, value: Any, supported: tuple) -> None:
    raise CheckpointError(
        f"{CONFIG_NAME}: {name}={value!r} is not supported; supported: {', '.join(repr(s) for s in supported)}"
    )


def number(name: str, value: Any, lowest: float = -math.inf) -> float:
    """A finite number, at least `lowest`. Raises CheckpointError for anything else."""
    try:
        finite = not isinstance(value, bool) and math.isfinite(value)
    except (TypeError, OverflowError):
        finite = False
    if not finite or value < lowest:
        raise CheckpointError(
            f"{CONFIG_NAME}: {name}={value!r}: expected a "
            f"number{f' of at least {lowest}' if lowest > -math.inf else ''}"
        )
    return float(value)


def mapping(name: str, value: Any) -> dict[str, Any]:
    """An object's fields that are not null; null counts as an empty object. Raises CheckpointError for anything
    else."""
    if value is not None and not isinstance(value, Mapping):
        raise CheckpointError(f"{CONFIG_NAME}: {name}={value!r}: expected an object or null")
    return {field: entry for field, entry in (value or {}).items() if entry is not None}

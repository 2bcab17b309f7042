"""Hugging Face names of attention variants: their fields in config.json and their tensors.

An attention config says in `hugging_face` which row of `ATTENTION` is its own. A subclass inherits the row, and with it
the names of its tensors; `config_to_hf` refuses to export it nevertheless, since its config.json would be read as that
of the class it extends.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

from deepseek_jax.errors import CheckpointError
from deepseek_jax.interop.hf_fields import Fields
from deepseek_jax.model.config import AttentionConfig, GQAConfig, MLAConfig

Tensor = tuple[str, str, tuple[int, ...]]  # name below self_attn, path of our parameter below attn, stored shape


class AttentionNames(ABC):
    """One variant's names. `model_types` are those of the config.json files that have it; `latent_norms` is true if it
    has norms of its own, which take `latent_norm_eps`."""

    model_types: tuple[str, ...] = ()
    latent_norms: bool = False

    @staticmethod
    @abstractmethod
    def read(fields: Fields) -> AttentionConfig:
        """The config from a config.json's fields. Raises CheckpointError for what is missing or unsupported."""

    @staticmethod
    @abstractmethod
    def write(attention: AttentionConfig) -> dict[str, Any]:
        """The fields of config.json: the inverse of `read`."""

    @staticmethod
    @abstractmethod
    def tensors(attention: AttentionConfig, hidden_size: int) -> Iterator[Tensor]:
        """The tensors of one layer in the order of the network; matrices [out, in], as they are stored."""


class MLANames(AttentionNames):
    """Multi-head latent attention, as DeepSeek-V2, V3 and Kimi K2 store it."""

    model_types = ("deepseek_v2", "deepseek_v3", "kimi_k2")
    latent_norms = True

    @staticmethod
    def read(fields: Fields) -> MLAConfig:
        num_heads = fields.size("num_attention_heads")
        fields.expect("num_key_value_heads", num_heads, None)
        fields.take("head_dim", None)  # transformers stores the rotary width here; the widths below say it all
        widths = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        return MLAConfig(
            num_heads=num_heads,
            q_lora_rank=fields.size("q_lora_rank", null=None),
            **{width: fields.size(width) for width in widths},
        )

    @staticmethod
    def write(attention: MLAConfig) -> dict[str, Any]:
        names = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "q_lora_rank")
        return {
            "num_attention_heads": attention.num_heads,
            "num_key_value_heads": attention.num_heads,
            **{name: getattr(attention, name) for name in names},
        }

    @staticmethod
    def tensors(attention: MLAConfig, hidden_size: int) -> Iterator[Tensor]:
        a, d = attention, hidden_size
        if a.q_lora_rank is None:
            yield "q_proj.weight", "q/kernel", (a.num_heads * a.qk_head_dim, d)
        else:
            yield "q_a_proj.weight", "q_a/kernel", (a.q_lora_rank, d)
            yield "q_a_layernorm.weight", "q_a_norm/scale", (a.q_lora_rank,)
            yield "q_b_proj.weight", "q_b/kernel", (a.num_heads * a.qk_head_dim, a.q_lora_rank)
        yield "kv_a_proj_with_mqa.weight", "kv_a/kernel", (a.kv_lora_rank + a.qk_rope_head_dim, d)
        yield "kv_a_layernorm.weight", "kv_a_norm/scale", (a.kv_lora_rank,)
        kv_b = a.num_heads * (a.qk_nope_head_dim + a.v_head_dim)
        yield "kv_b_proj.weight", "kv_b/kernel", (kv_b, a.kv_lora_rank)
        yield "o_proj.weight", "o/kernel", (d, a.num_heads * a.v_head_dim)


class GQANames(AttentionNames):
    """Grouped-query and multi-head attention, as DeepSeekMoE-16B stores it."""

    model_types = ("deepseek",)

    @staticmethod
    def read(fields: Fields) -> GQAConfig:
        num_heads, hidden_size = fields.size("num_attention_heads"), fields.size("hidden_size")
        kv_heads, head_dim = fields.size("num_key_value_heads", null=num_heads), hidden_size // max(num_heads, 1)
        return GQAConfig(
            num_heads=num_heads, num_kv_heads=kv_heads, head_dim=fields.size("head_dim", head_dim, null=head_dim)
        )

    @staticmethod
    def write(attention: GQAConfig) -> dict[str, Any]:
        return {
            "num_attention_heads": attention.num_heads,
            "num_key_value_heads": attention.num_kv_heads,
            "head_dim": attention.head_dim,
        }

    @staticmethod
    def tensors(attention: GQAConfig, hidden_size: int) -> Iterator[Tensor]:
        a, d = attention, hidden_size
        yield "q_proj.weight", "q/kernel", (a.num_heads * a.head_dim, d)
        yield "k_proj.weight", "k/kernel", (a.num_kv_heads * a.head_dim, d)
        yield "v_proj.weight", "v/kernel", (a.num_kv_heads * a.head_dim, d)
        yield "o_proj.weight", "o/kernel", (d, a.num_heads * a.head_dim)


ATTENTION: dict[str, type[AttentionNames]] = {"mla": MLANames, "gqa": GQANames}


def attention_names(attention: AttentionConfig) -> type[AttentionNames]:
    """The names of a network's attention. Raises CheckpointError for a variant that has none."""
    if attention.hugging_face is None:
        raise CheckpointError(
            f"attention of kind {attention.kind!r} has no Hugging Face names: no config.json can say what it computes, "
            f"so it cannot be exported; kinds that can: {', '.join(ATTENTION)}"
        )
    return ATTENTION[attention.hugging_face]


def names_of_model_type(model_type: str) -> type[AttentionNames]:
    """The names of the attention that a config.json of this `model_type`, one of `hf_fields.FAMILIES`, describes."""
    return next(names for names in ATTENTION.values() if model_type in names.model_types)

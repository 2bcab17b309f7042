"""`config.model.attention.kind`: ours by name, one's own as package.module:Class, all else refused in words."""

import dataclasses
import json

import pytest
from tiny_models import GQA, MHA, tiny_config, tiny_mla

from deepseek_jax.accounting.counts import count_parameters
from deepseek_jax.errors import CheckpointError, ConfigError
from deepseek_jax.identity import decisive
from deepseek_jax.interop import config_to_hf
from deepseek_jax.interop.tensors import tensor_table
from deepseek_jax.model.config import AttentionConfig, GQAConfig, MLAConfig, ModelConfig


@dataclasses.dataclass(frozen=True)
class SameFields(MLAConfig):
    """A variant that no field tells from MLA."""


@dataclasses.dataclass(frozen=True)
class WithoutNames(MLAConfig):
    """A variant with a field more and without Hugging Face names."""

    hugging_face = None
    window: int = 4


@dataclasses.dataclass(frozen=True)
class Unfinished(AttentionConfig):
    """A variant that says nothing of what the program asks."""


NOT_A_CLASS = MHA


def read(**attention) -> AttentionConfig:
    return ModelConfig.from_dict(tiny_config().to_dict() | {"attention": attention}).attention


def fields_of(config: AttentionConfig) -> dict:
    return {name: value for name, value in dataclasses.asdict(config).items() if name != "kind"}


@pytest.mark.parametrize("kind", ["mla", "gqa", f"{__name__}:SameFields", f"{__name__}:WithoutNames"])
def test_a_kind_is_read_and_written_by_its_name(kind):
    cls = {"mla": MLAConfig, "gqa": GQAConfig, f"{__name__}:SameFields": SameFields}.get(kind, WithoutNames)
    config = GQA if cls is GQAConfig else cls(**fields_of(tiny_mla()))
    assert config.kind == kind and cls.kind == kind
    model = tiny_config(attention=config)
    again = ModelConfig.from_dict(json.loads(json.dumps(model.to_dict())))
    assert type(again.attention) is cls and again == model
    assert model.to_dict()["attention"]["kind"] == kind


def test_fields_alone_decide_between_ours():
    assert type(read(**fields_of(GQA))) is GQAConfig and type(read(**fields_of(tiny_mla()))) is MLAConfig


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        ({"kind": "mlaa"}, "kind='mlaa': did you mean 'mla'.*, or your own as package.module:attribute"),
        ({"kind": 3}, "model.attention.kind=3"),
        ({"kind": "gqa", "head_dims": 8}, "unknown field model.attention.head_dims: did you mean 'head_dim'"),
        ({"kind": "gqa", "num_heads": 4}, "missing field model.attention.num_kv_heads"),
        ({"kind": "no_such_file:Window"}, "model.attention.kind='no_such_file:Window'.*No module named.*PYTHONPATH"),
        ({"kind": f"{__name__}:SameField"}, "no 'SameField': did you mean 'SameFields'"),
        ({"kind": f"{__name__}:NOT_A_CLASS"}, "not a subclass of AttentionConfig; allowed: gqa, mla, or your own"),
        ({"kind": "json:JSONDecoder"}, "not a subclass of AttentionConfig"),
        ({"kind": f"{__name__}:Unfinished"}, "the class does not define cache_dims, module, num_key_heads, pair_flops"),
        ({"kind": f"{__name__}:WithoutNames", "windw": 3}, "unknown field model.attention.windw.*'window'"),
    ],
)  # fmt: skip
def test_what_is_no_variant_is_refused_in_words(attention, message):
    with pytest.raises(ConfigError, match=message):
        read(**attention)


def test_attention_that_is_no_mapping_is_refused():
    with pytest.raises(
        ConfigError, match=r"model.attention='mla': must be a mapping of 'kind' \(gqa, mla, or your own"
    ):
        ModelConfig.from_dict(tiny_config().to_dict() | {"attention": "mla"})


def test_a_class_inside_a_function_is_refused():
    with pytest.raises(ConfigError, match="Hidden is defined inside a function: move it to the top of its file"):

        class Hidden(MLAConfig):
            pass


def test_a_variant_is_another_model_even_with_the_same_fields():
    same, mla = (tiny_config(attention=cls(**fields_of(tiny_mla()))) for cls in (SameFields, MLAConfig))
    differs = {name for name, value in decisive(same).items() if decisive(mla)[name] != value}
    assert differs == {"attention.kind"} and same != mla


def test_a_variant_is_never_exported_as_another():
    same, without = (tiny_config(attention=cls(**fields_of(tiny_mla()))) for cls in (SameFields, WithoutNames))
    with pytest.raises(CheckpointError, match="cannot say attention.kind='.*:SameFields': it would be read as 'mla'"):
        config_to_hf(same)
    for refused in (config_to_hf, tensor_table):
        with pytest.raises(
            CheckpointError,
            match="kind '.*:WithoutNames' has no Hugging Face names.*cannot be exported; kinds that can: mla, gqa",
        ):
            refused(without)


def test_a_variant_is_counted_like_any_other():
    assert (
        count_parameters(tiny_config(attention=WithoutNames(**fields_of(tiny_mla())))).main
        == count_parameters(tiny_config()).main
    )

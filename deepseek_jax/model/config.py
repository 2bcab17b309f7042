"""The network's configuration as frozen dataclasses. `presets.py` has the published models.

Every module takes its own section and nothing else. Names follow the papers and the released `config.json` files;
`interop` maps the latter onto these field by field. Nothing here depends on a model's name.
"""

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from deepseek_jax.errors import ConfigError
from deepseek_jax.fields import build, is_mapping
from deepseek_jax.model.scores import GROUP_SCORES, SCORES
from deepseek_jax.ranges import above, at_least, check, integer, or_none
from deepseek_jax.registry import Variant, resolve

COUNT = integer(1)
EVEN = integer(2, multiple_of=2, why="rotary dimensions come in pairs")


@dataclasses.dataclass(frozen=True)
class YarnConfig:
    """YaRN context extension (V2 §3.1.4, V3 §4.3): `factor` times `original_max_position_embeddings` tokens."""

    factor: float = 40.0
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0

    def __post_init__(self):
        factor = at_least(1, why="1 extends nothing")
        check(self, "YarnConfig.", factor=factor, original_max_position_embeddings=COUNT)
        check(self, "YarnConfig.", beta_slow=above(0, at_most=self.beta_fast, why="beta_fast is the upper end"))


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding. `interleaved` pairs dimensions (0, 1), (2, 3), … as DeepSeek's weights do; otherwise (i, i +
    d/2)."""

    theta: float = 10_000.0
    interleaved: bool = True
    yarn: YarnConfig | None = None

    def __post_init__(self):
        check(self, "RopeConfig.", theta=above(0))


@dataclasses.dataclass(frozen=True)
class AttentionConfig(Variant, abc.ABC):
    """An attention variant: `config.model.attention` is {"kind": "mla", "gqa" or "package.module:Class", its fields}.

    A subclass says everything that the rest of the program asks of a variant, so that a new one is one class in a file
    of its own. `sharding_rules` has rows for logical axes that only its parameters have (see `parallel/rules.py`).
    `hugging_face` is its row in the table of `interop/attention.py`; None: it cannot be exported. A method
    `attends_to(distance)` says which of the earlier tokens a query attends to, by their distance; None: all of them.
    """

    variants: ClassVar[dict[str, type]] = {}
    sharding_rules: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    hugging_face: ClassVar[str | None] = None
    attends_to: ClassVar[Callable[[Any], Any] | None] = None

    @property
    @abc.abstractmethod
    def module(self) -> type:
        """The Flax module that computes it; see `model/attention.py` for what it is given and returns."""

    @property
    @abc.abstractmethod
    def cache_dims(self) -> dict[str, int]:
        """The arrays that a cache keeps, and how many numbers each has per token and layer."""

    @property
    @abc.abstractmethod
    def num_key_heads(self) -> int:
        """The number of heads that have keys of their own: tensor parallelism has to divide it."""

    @property
    @abc.abstractmethod
    def qk_head_dim(self) -> int:
        """The width of the product of a query with a key, from which the softmax scale follows."""

    @property
    @abc.abstractmethod
    def rotary_dim(self) -> int:
        """The number of a head's dimensions that are rotated; 0 without rotary embedding."""

    @property
    @abc.abstractmethod
    def pair_flops(self) -> int:
        """Forward FLOPs of one layer for one (query, key) pair over all heads: QKᵀ and PV."""

    @property
    def cached_pair_flops(self) -> int:
        """The same for a key in the cache."""
        return self.pair_flops

    def mean_keys(self, seq_len: int) -> float:
        """Keys that a query of a causal sequence attends to, on average: half of the sequence."""
        return seq_len / 2

    def cached_keys(self, context: int) -> int:
        """Keys that a decoded token attends to, of `context` tokens in the cache: all of them."""
        return context


@dataclasses.dataclass(frozen=True)
class MLAConfig(AttentionConfig, kind="mla"):
    """Multi-head latent attention (V2 §2.1). `q_lora_rank=None` projects queries directly, as V2-Lite does."""

    hugging_face: ClassVar[str | None] = "mla"

    num_heads: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    q_lora_rank: int | None = None

    def __post_init__(self):
        check(
            self,
            "MLAConfig.",
            num_heads=COUNT,
            q_lora_rank=or_none(COUNT, "for a direct query projection"),
            kv_lora_rank=COUNT,
            qk_nope_head_dim=COUNT,
            qk_rope_head_dim=EVEN,
            v_head_dim=COUNT,
        )

    @property
    def module(self) -> type:
        from deepseek_jax.model.attention import LatentAttention  # it takes this class, so it is imported late

        return LatentAttention

    @property
    def cache_dims(self) -> dict[str, int]:
        """The latent c_kv and the rotary key that all heads share."""
        return {"c_kv": self.kv_lora_rank, "k_rope": self.qk_rope_head_dim}

    @property
    def num_key_heads(self) -> int:
        return self.num_heads

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def rotary_dim(self) -> int:
        return self.qk_rope_head_dim

    @property
    def pair_flops(self) -> int:
        """In the expanded form."""
        return 2 * self.num_heads * (self.qk_head_dim + self.v_head_dim)

    @property
    def cached_pair_flops(self) -> int:
        """In the absorbed form, which scores and sums latents: kv_lora_rank wide for any size of head."""
        return 2 * self.num_heads * (2 * self.kv_lora_rank + self.qk_rope_head_dim)


@dataclasses.dataclass(frozen=True)
class GQAConfig(AttentionConfig, kind="gqa"):
    """Grouped-query attention, for ablations: `num_kv_heads = num_heads` is MHA, `num_kv_heads = 1` is MQA."""

    hugging_face: ClassVar[str | None] = "gqa"

    num_heads: int
    num_kv_heads: int
    head_dim: int

    def __post_init__(self):
        check(self, "GQAConfig.", num_heads=COUNT, num_kv_heads=COUNT, head_dim=EVEN)
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(f"GQAConfig: num_kv_heads={self.num_kv_heads} must divide num_heads={self.num_heads}")

    @property
    def module(self) -> type:
        from deepseek_jax.model.attention import GroupedQueryAttention  # it takes this class, so it is imported late

        return GroupedQueryAttention

    @property
    def cache_dims(self) -> dict[str, int]:
        """Keys and values of all key-value heads."""
        return {"k": self.num_kv_heads * self.head_dim, "v": self.num_kv_heads * self.head_dim}

    @property
    def num_key_heads(self) -> int:
        return self.num_kv_heads

    @property
    def qk_head_dim(self) -> int:
        return self.head_dim

    @property
    def rotary_dim(self) -> int:
        return self.head_dim

    @property
    def pair_flops(self) -> int:
        return 4 * self.num_heads * self.head_dim


@dataclasses.dataclass(frozen=True)
class MoEConfig(Variant, kind="moe"):
    """DeepSeekMoE: `num_experts` routed experts of width `intermediate_size`, of which `top_k` see each token, beside
    `num_shared_experts` that see every token.

    Routing is described by fields alone. `scoring` is "sigmoid" (V3) or "softmax" (V2). With `num_groups > 1` experts
    are chosen inside the best `topk_groups` groups, ranked by `group_score`: "top2_sum" (V3) or "max" (V2). `router` is
    "top_k". Each of the three may be `package.module:attribute`: a function as `model/scores.py` says, or a subclass of
    `Router`.
    `norm_topk_prob` normalizes the gates over the chosen experts; all gates are then multiplied by
    `routed_scaling_factor`. `correction_bias` adds V3's auxiliary-loss-free bias to the scores that choose.
    A subclass with a `module` of its own is another kind: `config.model.moe` is {"kind": "package.module:Class", …}.
    """

    variants: ClassVar[dict[str, type]] = {}

    num_experts: int
    top_k: int
    intermediate_size: int
    num_shared_experts: int = 0
    scoring: str = "sigmoid"
    num_groups: int = 1
    topk_groups: int = 1
    group_score: str = "top2_sum"
    router: str = "top_k"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    correction_bias: bool = True

    def __post_init__(self):
        check(
            self,
            "MoEConfig.",
            num_experts=COUNT,
            top_k=COUNT,
            intermediate_size=COUNT,
            num_groups=COUNT,
            topk_groups=COUNT,
            num_shared_experts=integer(0),
            routed_scaling_factor=above(0),
        )
        from deepseek_jax.model.router import ROUTERS  # it takes this class, so it is imported late

        for field, names in (("scoring", SCORES), ("group_score", GROUP_SCORES), ("router", ROUTERS)):
            resolve(names, getattr(self, field), f"MoEConfig.{field}")
        if self.top_k > self.num_experts:
            raise ConfigError(
                f"MoEConfig: top_k={self.top_k} exceeds num_experts={self.num_experts}; a token visits each expert once"
            )
        if self.num_experts % self.num_groups:
            raise ConfigError(f"MoEConfig: num_groups={self.num_groups} must divide num_experts={self.num_experts}")
        if self.topk_groups > self.num_groups:
            raise ConfigError(f"MoEConfig: topk_groups={self.topk_groups} exceeds num_groups={self.num_groups}")
        reachable = self.num_experts // self.num_groups * self.topk_groups
        if self.top_k > reachable:
            raise ConfigError(
                f"MoEConfig: top_k={self.top_k} exceeds the {reachable} experts in {self.topk_groups} of "
                f"{self.num_groups} groups; raise topk_groups or lower top_k"
            )
        if self.group_score == "top2_sum" and self.num_groups > 1 and self.num_experts // self.num_groups < 2:
            raise ConfigError(
                f"MoEConfig: group_score='top2_sum' needs two experts a group; num_experts={self.num_experts}, "
                f"num_groups={self.num_groups}"
            )

    @property
    def module(self) -> type:
        """The Flax module of the feed-forward; see `model/moe.py` for what it is given and returns."""
        from deepseek_jax.model.moe import MoE  # it takes this class, so it is imported late

        return MoE


# Fields of earlier versions that are fields of `RuntimeConfig` now.
MOVED = {
    "remat": "remat",
    "scan_unroll": "scan_unroll",
    "attention_chunk": "attention_chunk",
    "attention_heads_at_once": "attention_heads_at_once",
    "moe.implementation": "experts",
}


def _moved(fields: Any) -> set[str]:
    """The fields of MOVED among the nested fields of a ModelConfig."""
    if not is_mapping(fields):
        return set()
    moe = fields.get("moe")
    return MOVED.keys() & {*fields, *(f"moe.{name}" for name in (moe if is_mapping(moe) else ()))}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A DeepSeek network: `first_k_dense` dense layers, then MoE layers, then `mtp_depth` multi-token-prediction
    modules.

    `moe=None` makes every layer dense. `latent_norm_eps` is the epsilon of the norms inside MLA, which the released
    code keeps at 1e-6 for any `rms_norm_eps`. Choices that do not change what the network computes are in
    `RuntimeConfig`.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    intermediate_size: int
    attention: AttentionConfig
    moe: MoEConfig | None = None
    first_k_dense: int = 0
    rope: RopeConfig = RopeConfig()
    mtp_depth: int = 0
    rms_norm_eps: float = 1e-6
    latent_norm_eps: float = 1e-6
    init_std: float = 0.006
    tie_embeddings: bool = False

    def __post_init__(self):
        check(
            self,
            "ModelConfig.",
            vocab_size=COUNT,
            hidden_size=COUNT,
            num_layers=COUNT,
            intermediate_size=COUNT,
            mtp_depth=integer(0),
            rms_norm_eps=at_least(0),
            latent_norm_eps=at_least(0),
            init_std=at_least(0),
        )
        check(self, "ModelConfig.", first_k_dense=at_least(0, at_most=self.num_layers, why="num_layers is the limit"))
        for field, kinds in (
            ("attention", (AttentionConfig,)),
            ("moe", (MoEConfig, type(None))),
            ("rope", (RopeConfig,)),
        ):
            allowed = " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
            if not isinstance(getattr(self, field), kinds):
                raise ConfigError(f"ModelConfig.{field}={getattr(self, field)!r}: must be {allowed}")

    @property
    def num_dense_layers(self) -> int:
        return self.num_layers if self.moe is None else self.first_k_dense

    @property
    def num_moe_layers(self) -> int:
        return self.num_layers - self.num_dense_layers

    def replace(self, **changes) -> "ModelConfig":
        return dataclasses.replace(self, **changes)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "ModelConfig":
        """Builds a config from nested mappings (a ConfigDict, JSON). An `attention` without a kind is of the one of
        ours that has most of its fields.

        Raises ConfigError for an unknown or a missing field, naming the nearest known one, for a value of the wrong
        kind, and for sizes that don't fit.
        """
        for field in sorted(_moved(fields)):
            raise ConfigError(
                f"model.{field} is now runtime.{MOVED[field]}: it changes speed and memory, not what the network "
                f"computes. Write config.runtime.{MOVED[field]}"
            )
        return build(cls, fields, "model")

    @classmethod
    def from_saved(cls, fields: Mapping[str, Any]) -> "ModelConfig":
        """`from_dict` for what an earlier run saved: leaves out fields that have moved to `config.runtime` since."""
        saved = {name: dict(value) if name == "moe" and value else value for name, value in fields.items()}
        for field in _moved(fields):
            section, _, name = field.rpartition(".")
            del (saved[section] if section else saved)[name]
        return cls.from_dict(saved)

    def to_dict(self) -> dict[str, Any]:
        """Nested plain dictionaries; `from_dict` is the inverse."""
        return dataclasses.asdict(self)

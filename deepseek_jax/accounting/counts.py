"""Parameter counts, from the shapes of the real network (`jax.eval_shape`: nothing is allocated)."""

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Mapping

import jax

from deepseek_jax.model.config import ModelConfig
from deepseek_jax.model.transformer import Transformer, abstract_variables

COMPONENTS = (
    "embedding",
    "attention",
    "dense FFN",
    "router",
    "shared experts",
    "routed experts",
    "norms",
    "MTP projection",
    "head",
)


@dataclasses.dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters by component (keys: COMPONENTS), router bias included.

    `mtp` holds all MTP modules; their embedding and head are the main model's and count there. `active_experts` is the
    share of the routed experts that one token visits, as the exact fraction (top_k, num_experts).
    """

    main: Mapping[str, int]
    mtp: Mapping[str, int]
    active_experts: tuple[int, int]
    tied: bool

    @property
    def total(self) -> int:
        """Parameters of the main model, which the reports call its size."""
        return sum(self.main.values())

    @property
    def mtp_total(self) -> int:
        return sum(self.mtp.values())

    def activated(self, *, embedding: bool = False, head: bool = True) -> int:
        """Parameters of the main model that one token uses.

        Published figures differ in convention: V3, V2 and Kimi K2 count the head only (the default), DeepSeekMoE counts
        embedding and head, Moonlight neither. A tied matrix counts once if either role counts.
        """
        body = self._visited({name: n for name, n in self.main.items() if name not in ("embedding", "head")})
        if self.tied:
            return body + (self.main["embedding"] if embedding or head else 0)
        return body + embedding * self.main["embedding"] + head * self.main["head"]

    @property
    def mtp_activated(self) -> int:
        """Parameters of the MTP modules that one token uses, without the shared embedding and head."""
        return self._visited(self.mtp)

    @property
    def head_product(self) -> int:
        """Parameters in the product that makes the logits; with tied embeddings, those of the embedding."""
        return self.main["embedding"] if self.tied else self.main["head"]

    def _visited(self, components: Mapping[str, int]) -> int:
        top_k, num_experts = self.active_experts
        experts = components.get("routed experts", 0)
        return sum(components.values()) - experts + experts * top_k // num_experts


@functools.cache
def count_parameters(config: ModelConfig) -> ParameterCounts:
    """Counts the parameters of `config` on abstract shapes; a trillion of them take a second or two."""
    main, mtp = Counter(), Counter()
    for path, leaf in jax.tree.leaves_with_path(abstract_variables(Transformer(config))):
        names = [entry.key for entry in path[1:]]  # path[0] is the collection: params or router_bias
        part = mtp if names[0].startswith("mtp_") else main
        part[component(names)] += math.prod(leaf.shape)
    moe = config.moe
    return ParameterCounts(
        main={name: main[name] for name in COMPONENTS if main[name]},
        mtp={name: mtp[name] for name in COMPONENTS if mtp[name]},
        active_experts=(moe.top_k, moe.num_experts) if moe else (1, 1),
        tied=config.tie_embeddings,
    )


def component(names: list[str]) -> str:
    """The component that the parameter with this path belongs to. Norms inside attention belong to attention, as in the
    reports' tables."""
    if "attn" in names:
        return "attention"
    if names[-2].endswith("norm"):
        return "norms"
    if "ffn" in names:
        return {"router": "router", "experts": "routed experts", "shared": "shared experts"}.get(
            names[names.index("ffn") + 1], "dense FFN"
        )
    return {"embed": "embedding", "head": "head", "proj": "MTP projection"}[names[-2]]

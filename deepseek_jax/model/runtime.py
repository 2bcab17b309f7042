"""RuntimeConfig: choices that change how fast the network runs and how much memory it takes, not what it computes."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from deepseek_jax.fields import build
from deepseek_jax.ranges import check, integer, one_of


@dataclasses.dataclass(frozen=True)
class RuntimeConfig:
    """The section `config.runtime` of an experiment. A checkpoint of one runtime goes on under any other.

    remat                    what a layer keeps for its backward pass: "none" keeps everything, "full" recomputes the
                             layer from its input, "dots" keeps the results of products with weights
    scan_unroll              layers that one step of the scan over layers runs: more compile longer and may run faster
    attention_chunk          queries attended at a time (0: all), so that no whole T x S score matrix exists
    attention_heads_at_once  MLA heads whose keys and values are expanded at a time (0: all): the greatest common
                             divisor of this and the number of heads
    experts                  "grouped" (each expert multiplies its own tokens) or "dense" (every expert multiplies every
                             token: the oracle)
    """

    remat: str = "none"
    scan_unroll: int = 1
    attention_chunk: int = 0
    attention_heads_at_once: int = 0
    experts: str = "grouped"

    def __post_init__(self):
        check(
            self,
            "runtime.",
            remat=one_of(("none", "full", "dots")),
            scan_unroll=integer(1),
            attention_chunk=integer(0),
            attention_heads_at_once=integer(0),
            experts=one_of(("grouped", "dense")),
        )

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "RuntimeConfig":
        """From the fields of `config.runtime`. Raises ConfigError for an unknown field or a value out of range."""
        return build(cls, fields, "runtime")

"""RuntimeConfig: choices that change how fast the network runs and how much memory it takes, not what it computes."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from deepseek_jax.fields import build
from deepseek_jax.ranges import check, integer, one_of


@dataclasses.dataclass(frozen=True)
class RuntimeConfig:
    """The section `config.runtime` of an experiment. A checkpoint of one runtime resumes under any other.

    remat                    the backward pass keeps everything ("none"), the results of products with weights
                             ("dots"), or recomputes each layer from its input ("full")
    scan_unroll              layers in one step of the scan over layers: more compile longer and may run faster
    attention_chunk          queries attended at a time (0: all), so that no whole T x S score matrix exists
    attention_heads_at_once  MLA heads whose keys and values exist at a time (0: all); the largest number that divides
                             this and the heads
    experts                  "grouped": each expert multiplies its own tokens; "dense": all tokens, as an oracle
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

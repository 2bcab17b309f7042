"""Model-size ladders: one experiment at several sizes, each with its batch, length, learning rate and hardware."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from deepseek_jax.fields import flatten
from deepseek_jax.launch.resources import Resources
from deepseek_jax.launch.sweep import Run
from deepseek_jax.model.config import ModelConfig
from deepseek_jax.model.runtime import RuntimeConfig


@dataclasses.dataclass(frozen=True)
class Rung:
    """One size. `batch_size` is in sequences of `seq_len` tokens, `learning_rate` is the schedule's peak."""

    name: str
    model: ModelConfig
    seq_len: int
    batch_size: int
    steps: int
    learning_rate: float
    warmup_steps: int
    resources: Resources = Resources()
    runtime: RuntimeConfig = RuntimeConfig()
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def ladder(rungs: Iterable[Rung], stage: str = "pretrain") -> tuple[Run, ...]:
    """A run for each rung, over a base experiment whose training stage is called `stage` and whose learning rate has a
    'peak'."""
    return tuple(Run(rung.name, _overrides(rung, stage), rung.resources) for rung in rungs)


def _overrides(rung: Rung, stage: str) -> dict[str, Any]:
    learning_rate = f"{stage}.train.optimizer.learning_rate"
    return {
        **flatten(rung.model.to_dict(), "model"),
        **flatten(dataclasses.asdict(rung.runtime), "runtime"),
        f"{stage}.seq_len": rung.seq_len,
        f"{stage}.batch_size": rung.batch_size,
        f"{stage}.train.steps": rung.steps,
        f"{learning_rate}.peak": rung.learning_rate,
        f"{learning_rate}.warmup_steps": rung.warmup_steps,
        **rung.overrides,
    }

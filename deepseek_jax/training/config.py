"""What a training stage is: frozen dataclasses, built from an experiment file's nested dictionaries."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from deepseek_jax.errors import ConfigError, build
from deepseek_jax.training.objective import ObjectiveConfig
from deepseek_jax.training.optimizer import OptimizerConfig
from deepseek_jax.training.schedules import Schedule, build_schedule


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A stage of `steps` optimiser steps.

    `batch_size` (sequences a step, over steps) is None where every batch is what the loader gives; a schedule ramps
    it, and each new size compiles once more. `microbatch` sequences are differentiated at a time (0: all at once).
    `router_bias_rate` is V3's γ, `router_bias_centred` Moonlight's variant. Every `eval_every` steps, and at the end,
    the held-out loss is taken over `eval_batches` batches (None: all). Every `checkpoint_every` steps, and at the
    end, a checkpoint is written; the newest `keep_last` and the best `keep_best` by bits per byte stay. 0 switches off
    what happens every so often, not what happens at the end.
    """

    steps: int
    optimizer: OptimizerConfig = OptimizerConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    router_bias_rate: Schedule = Schedule(0.001)
    router_bias_centred: bool = False
    batch_size: Schedule | None = None
    microbatch: int = 0
    log_every: int = 10
    eval_every: int = 0
    eval_batches: int | None = None
    checkpoint_every: int = 0
    keep_last: int = 2
    keep_best: int = 1

    def __post_init__(self):
        for name, least in (
            *(("steps", 1), ("log_every", 1), ("keep_last", 1)),
            *(("microbatch", 0), ("eval_every", 0), ("checkpoint_every", 0), ("keep_best", 0)),
        ):
            if getattr(self, name) < least:
                raise ConfigError(f"train.{name}={getattr(self, name)}: at least {least}")
        if self.eval_batches is not None and self.eval_batches < 1:
            raise ConfigError(f"train.eval_batches={self.eval_batches}: at least 1, or None for all")

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "TrainConfig":
        """Schedules may be numbers or {"kind": …} (see `schedules.build_schedule`); those without `steps` span the stage.

        Raises ConfigError for an unknown or missing field, naming the nearest known one.
        """
        fields = dict(fields)
        if "steps" not in fields:
            raise ConfigError("missing field train.steps: how many optimiser steps to make")
        steps = fields["steps"]
        for name, kind, schedule in (("optimizer", OptimizerConfig, "learning_rate"), ("objective", ObjectiveConfig, "mtp_weight")):
            if isinstance(fields.get(name), Mapping):
                part = dict(fields[name])
                if schedule in part:
                    part[schedule] = build_schedule(part[schedule], f"train.{name}.{schedule}", steps)
                fields[name] = build(kind, part, f"train.{name}")
        for name in ("router_bias_rate", "batch_size"):
            if fields.get(name) is not None:
                fields[name] = build_schedule(fields[name], f"train.{name}", steps)
        return build(cls, fields, "train")

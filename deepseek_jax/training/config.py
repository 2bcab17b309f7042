"""The config of a training stage: frozen dataclasses, built from an experiment file's nested dictionaries."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from deepseek_jax.errors import ConfigError
from deepseek_jax.fields import NO_CONTEXT, build, convert, is_mapping
from deepseek_jax.identity import free
from deepseek_jax.ranges import at_least, check, check_value, everywhere, or_none
from deepseek_jax.training.objective import ObjectiveConfig
from deepseek_jax.training.optimizer import OptimizerConfig
from deepseek_jax.training.schedules import Schedule


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A stage of `steps` optimizer steps.

    `batch_size` (sequences a step, over steps) is None where every batch is what the loader gives; a schedule ramps
    it, and each new size compiles once more. `microbatch` sequences are differentiated at a time (0: all at once).
    `bias_update_speed` is V3's γ, `bias_update_zero_sum` Moonlight's variant. Every `eval_every` steps, and at the end,
    the held-out loss is taken over `eval_batches` batches (None: all). Every `checkpoint_every` steps, and at the
    end, a checkpoint is written; the newest `keep_last` and the best `keep_best` by bits per byte stay. 0 switches off
    what happens every so often, not what happens at the end.
    """

    steps: int
    optimizer: OptimizerConfig = OptimizerConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    bias_update_speed: Schedule = Schedule(0.001)
    bias_update_zero_sum: bool = False
    batch_size: Schedule | None = None
    microbatch: int = 0
    log_every: int = free(10)
    eval_every: int = free(0)
    eval_batches: int | None = free(None)
    checkpoint_every: int = free(0)
    keep_last: int = free(2)
    keep_best: int = free(1)

    def __post_init__(self):
        check(
            self,
            "train.",
            steps=at_least(1),
            bias_update_speed=everywhere(at_least(0)),
            microbatch=at_least(0),
            log_every=at_least(1),
            eval_every=at_least(0),
            eval_batches=or_none(at_least(1), "for all"),
            checkpoint_every=at_least(0),
            keep_last=at_least(1),
            keep_best=at_least(0),
        )

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "TrainConfig":
        """As `read`, of a mapping called "train"."""
        return cls.read(fields, "train", NO_CONTEXT)

    @classmethod
    def read(cls, fields: Mapping[str, Any], path: str, context: Mapping[str, Any]) -> "TrainConfig":
        """Schedules may be numbers or {"kind": …} (see `schedules.build_schedule`); those without `steps` span the
        stage.

        Raises ConfigError for an unknown or missing field, naming the nearest known one, and for a value of the wrong
        kind.
        """
        if is_mapping(fields):  # schedules are built over so many
            if "steps" not in fields:
                raise ConfigError(f"missing field {path}.steps: how many optimizer steps to make")
            context = {**context, "steps": convert(fields["steps"], int, f"{path}.steps")}
            check_value(f"{path}.steps", context["steps"], at_least(1, below=2**31, why="a step is an int32"))
        return build(cls, fields, path, context)

    def batch_sizes(self, batch_size: int | None) -> tuple[int, ...]:
        """Sequences a step, ascending: `batch_size` of the stage, or all that the schedule names; it rounds what lies
        between.

        Raises ConfigError for a size that no step can have, and where the stage's and the schedule's disagree.
        """
        if self.batch_size is None:
            if batch_size is None:
                raise ConfigError("missing field batch_size: sequences a step")
            field, sizes = "batch_size", (batch_size,)
        else:
            field, sizes = "train.batch_size", tuple(sorted(set(self.batch_size.values)))
        for size in sizes:
            if size < 1 or size != int(size):
                raise ConfigError(f"{field}={size:g}: a whole number of sequences, at least 1")
            if self.microbatch and size % self.microbatch:
                raise ConfigError(f"train.microbatch={self.microbatch} does not divide {field}={size:g}")
        if batch_size is not None and batch_size != sizes[-1]:
            raise ConfigError(
                f"batch_size={batch_size} and train.batch_size, which reaches {sizes[-1]:g}, are two answers to one "
                "question: leave one of them out, or train.batch_size=None for the same size throughout"
            )
        return tuple(map(int, sizes))

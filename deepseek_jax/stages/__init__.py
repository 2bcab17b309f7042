"""Stages of an experiment: each takes the weights that the one before left and leaves its own in workdir/<stage>/.

A stage is built from its section of the experiment file, and checked, before anything runs. Starting a finished stage
again returns what it left.
"""

from collections.abc import Iterable

from deepseek_jax.accounting.cost import Work
from deepseek_jax.errors import ConfigError
from deepseek_jax.fields import inside
from deepseek_jax.registry import resolve
from deepseek_jax.stages.base import Experiment, Stage, Variables
from deepseek_jax.stages.eval import EvalStage
from deepseek_jax.stages.grpo import GRPOSection, GRPOStage
from deepseek_jax.stages.train import TrainStage

__all__ = [
    "KINDS",
    "EvalStage",
    "Experiment",
    "GRPOSection",
    "GRPOStage",
    "Stage",
    "TrainStage",
    "Variables",
    "build_stage",
    "build_stages",
    "find_kind",
    "works",
]

KINDS = {"pretrain": TrainStage, "sft": TrainStage, "grpo": GRPOStage, "eval": EvalStage}


def build_stages(experiment: Experiment) -> list[Stage]:
    """All stages, checked: a mistake in the last one is found before the first one runs."""
    return [build_stage(experiment, name) for name in experiment.sections]


def build_stage(experiment: Experiment, name: str) -> Stage:
    """The stage called `name`. Raises ConfigError for what its section of the experiment file cannot be."""
    fields = dict(experiment.sections[name])
    kind = find_kind(name, fields.pop("kind"))
    with inside(f"config.{name}"):
        return kind.build(name, experiment, fields)


def find_kind(stage: str, kind: str) -> type[Stage]:
    """The class of a stage's kind: one of `KINDS`, or your own as package.module:Class. Raises ConfigError for an
    unknown name, and for an attribute that is not a class derived from Stage."""
    found = resolve(KINDS, kind, f"config.{stage}.kind")
    if not (isinstance(found, type) and issubclass(found, Stage)):
        raise ConfigError(
            f"config.{stage}.kind={kind!r} is a {type(found).__name__}: must be a class derived from "
            "deepseek_jax.stages.Stage"
        )
    return found


def works(stages: Iterable[Stage], shards: int | None = None) -> dict[str, Work]:
    """Tokens and FLOPs of the stages that have any, by name (see `Stage.work`)."""
    return {stage.name: work for stage in stages if (work := stage.work(shards)) is not None}

"""Metric names of a sweep's runs, from their program before it runs."""

import re
from collections.abc import Sequence

import jax

from deepseek_jax.dry_run.programs import PROGRAMS
from deepseek_jax.errors import ConfigError, nearest
from deepseek_jax.stages import EvalStage, GRPOStage, Stage, TrainStage

HELD_OUT = ("bits_per_byte", "held_out_loss")
CLOCK = ("step", "tokens_per_second", "flops_per_second", "mfu")
EVALUATION = (
    "bits_per_byte",
    "greedy_accuracy",
    "greedy_length",
    "sampled_accuracy",
    "response_length",
    "format_share",
    "truncated_share",
)
OF_SAMPLES = re.compile(r"(pass|maj)@\d+|held_out_[\w@]+")


def check_metric(metric: str, stages: Sequence[Stage]) -> None:
    """Raises ConfigError for a metric, "stage.name", that no stage will log. Costs a trace of the stage's program,
    unless the name is a usual one."""
    by_name = {stage.name: stage for stage in stages}
    stage_name, _, name = metric.partition(".")
    if stage_name not in by_name or not name:
        raise ConfigError(
            f"metric={metric!r}: a stage and one of its metrics, such as '{stages[0].name}.loss'; stages: "
            f"{nearest(stage_name, by_name)}"
        )
    stage = by_name[stage_name]
    if isinstance(stage, TrainStage):
        known, program = (*HELD_OUT, *CLOCK), "train"
    elif isinstance(stage, GRPOStage):
        known, program = ("step", "rollout_seconds"), "grpo"
    elif isinstance(stage, EvalStage):
        known, program = EVALUATION, None
    else:
        return  # a stage of another kind logs what it likes
    if name in known or (program != "train" and OF_SAMPLES.fullmatch(name)):
        return
    if program is not None:
        plan = PROGRAMS[program](stage.experiment, stage.name)
        metrics = jax.eval_shape(plan.jitted, *plan.arguments)[1]
        known += tuple(name for name, value in metrics.items() if value.ndim == 0)
    if name not in known:
        raise ConfigError(f"metric={metric!r}: stage {stage_name} logs no {name!r}; {nearest(name, known)}")

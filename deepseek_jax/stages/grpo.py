"""GRPO stage: reinforcement learning with rule rewards on the experiment's task."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from deepseek_jax.accounting.cost import Work
from deepseek_jax.accounting.flops import rollout_flops
from deepseek_jax.errors import ConfigError, nearest
from deepseek_jax.fields import build, change
from deepseek_jax.ranges import at_least, check
from deepseek_jax.rl.config import GRPOConfig, learning_rate
from deepseek_jax.rl.diagnostics import DiagnosticsConfig
from deepseek_jax.rl.evaluate import EvalConfig
from deepseek_jax.rl.grpo import GRPO
from deepseek_jax.rl.loop import LoopConfig, train_grpo
from deepseek_jax.rl.rewards import build_rewards
from deepseek_jax.stages.base import Batches, Experiment, Stage, Variables
from deepseek_jax.training.optimizer import OptimizerConfig, build_optimizer, updated_by


@dataclasses.dataclass(frozen=True)
class GRPOSection:
    """The fields of a GRPO stage's section besides those of GRPOConfig. `optimizer` has the fields that differ from the
    recipe's; `loss_chunk` is how many tokens' logits exist at once."""

    optimizer: dict[str, Any] = dataclasses.field(default_factory=dict)
    loop: LoopConfig = LoopConfig()
    eval: EvalConfig = EvalConfig()
    diagnostics: DiagnosticsConfig = DiagnosticsConfig()
    loss_chunk: int = 4096

    def __post_init__(self):
        check(self, "", loss_chunk=at_least(1))


@dataclasses.dataclass(frozen=True)
class GRPOStage(Stage):
    """Reinforcement learning with rule rewards on the experiment's task, kind "grpo". Also leaves curves.png.

    Its section has the fields of GRPOConfig, `preset` among them, and those of GRPOSection.
    """

    program: GRPO
    optimizer: OptimizerConfig
    loop: LoopConfig
    evaluation: EvalConfig
    diagnostics: DiagnosticsConfig

    length: ClassVar[str] = "steps"

    @classmethod
    def build(cls, name: str, experiment: Experiment, fields: Mapping[str, Any]) -> "GRPOStage":
        given, others = divided(fields)
        section = build(GRPOSection, others, "")
        task = Stage(name, experiment).require_task()
        config = GRPOConfig.from_dict(
            {"max_prompt_length": task.prompt_length, "max_completion_length": task.completion_length} | given
        )
        if config.max_prompt_length < task.prompt_length:
            raise ConfigError(
                f"max_prompt_length={config.max_prompt_length}: the task's prompts have {task.prompt_length} tokens"
            )
        recipe = OptimizerConfig(learning_rate(config), weight_decay=0.0)
        optimizer = change(recipe, section.optimizer, "optimizer", {"steps": config.steps})
        twice = [field for field in ("learning_rate", "warmup_steps") if field in given]
        if twice and optimizer.learning_rate != recipe.learning_rate:
            raise ConfigError(
                f"optimizer.learning_rate and {' and '.join(twice)} are two answers to "
                "one question: leave one of them out"
            )
        rewards, update = build_rewards(config, task), build_optimizer(optimizer, experiment.model)
        program = GRPO(experiment.model, task, config, rewards, update, section.loss_chunk)
        return cls(name, experiment, program, optimizer, section.loop, section.eval, section.diagnostics)

    @classmethod
    def batches(cls, name: str, fields: Mapping[str, Any]) -> Batches:
        size = GRPOConfig.from_dict(divided(fields)[0]).minibatch_size
        return Batches([(f"{name}'s prompts_per_rollout × group_size / num_minibatches", size)])

    def summary(self) -> str:
        config = self.program.config
        rewards = ", ".join(f"{name} × {weight:g}" for name, weight in config.rewards)
        return (
            f"{config.rollouts} rollouts of {config.prompts_per_rollout} × {config.group_size}, "
            f"{config.steps_per_rollout} updates each; {rewards}"
        )

    def settings(self) -> dict[str, Any]:
        """`loop`, `eval` and `loss_chunk` change no weights."""
        return vars(self.program.config) | {"optimizer": self.optimizer}

    def finished(self) -> bool:
        config = self.program.config
        return max(self.made(), default=0) >= config.rollouts * config.steps_per_rollout

    def rollout_flops(self, sampled: bool = True) -> float:
        """FLOPs of one rollout with its updates (see `accounting.flops.rollout_flops`)."""
        config = self.program.config
        reference_passes = config.has_reference * (config.oversampling if config.kl_in_reward else config.inner_epochs)
        return rollout_flops(
            self.experiment.model.config,
            completions=config.completions_per_rollout,
            group_size=config.group_size,
            prompt_length=config.max_prompt_length,
            completion_length=config.max_completion_length,
            passes=3 * config.inner_epochs + reference_passes,
            oversampling=config.oversampling if sampled else 0,
        )

    def work(self, shards: int | None = None) -> Work:
        config, drawn = self.program.config, self.program.config.max_completion_length
        tokens = config.rollouts * config.completions_per_rollout * drawn
        return Work(tokens, config.rollouts * self.rollout_flops(), config.max_prompt_length + drawn)

    def updated_by(self) -> dict[str, dict[str, int]]:
        return updated_by(self.optimizer.name, self.experiment.model.config)

    def run(self, variables: Variables | None) -> Variables:
        self.keep_tokenizer()
        state = train_grpo(
            self.program,
            self.loop,
            self.evaluation,
            self.initial_weights(variables),
            self.folder,
            diagnostics=self.diagnostics,
            seed=self.seed("sampling"),
            name=self.name,
        )
        self.draw_curves()
        return state.variables


def divided(fields: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A section's fields -> (those of GRPOConfig, `preset` among them; those of GRPOSection). Raises ConfigError for an
    unknown field, naming the nearest of both."""
    names = {field.name for field in dataclasses.fields(GRPOConfig)} | {"preset"}
    others = {field.name for field in dataclasses.fields(GRPOSection)}
    for name in fields:
        if name == "grpo":
            raise ConfigError(
                "grpo: GRPO's own fields now stand in the stage's section itself, as config.STAGE.group_size instead "
                "of config.STAGE.grpo.group_size: move them up"
            )
        if name not in names | others:
            raise ConfigError(f"unknown field {name}: {nearest(str(name), names | others)}")
    return (
        {name: value for name, value in fields.items() if name in names},
        {name: value for name, value in fields.items() if name in others},
    )

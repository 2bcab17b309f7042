"""GRPO stage: reinforcement learning with rule rewards on the experiment's task."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from deepseek_jax.accounting.cost import Work
from deepseek_jax.accounting.flops import rollout_flops
from deepseek_jax.errors import ConfigError
from deepseek_jax.fields import build, change
from deepseek_jax.rl.config import GRPOConfig, learning_rate
from deepseek_jax.rl.diagnostics import DiagnosticsConfig
from deepseek_jax.rl.evaluate import EvalConfig
from deepseek_jax.rl.grpo import GRPO
from deepseek_jax.rl.loop import LoopConfig, train_grpo
from deepseek_jax.rl.rewards import build_rewards
from deepseek_jax.stages.base import Experiment, Stage, Variables
from deepseek_jax.training.optimizer import OptimizerConfig, build_optimizer


@dataclasses.dataclass(frozen=True)
class GRPOSection:
    """What an experiment file says of a GRPO stage: `grpo` the fields of GRPOConfig, `optimizer` those that differ from
    the recipe's."""

    grpo: dict[str, Any]
    optimizer: dict[str, Any] = dataclasses.field(default_factory=dict)
    loop: LoopConfig = LoopConfig()
    eval: EvalConfig = EvalConfig()
    diagnostics: DiagnosticsConfig = DiagnosticsConfig()
    loss_chunk: int = 4096

    def __post_init__(self):
        if self.loss_chunk < 1:
            raise ConfigError(f"loss_chunk={self.loss_chunk}: at least 1 token at a time")


@dataclasses.dataclass(frozen=True)
class GRPOStage(Stage):
    """Reinforcement learning with rule rewards on the experiment's task. Also leaves curves.png."""

    grpo: GRPO
    optimizer: OptimizerConfig
    loop: LoopConfig
    evaluation: EvalConfig
    diagnostics: DiagnosticsConfig

    length: ClassVar[str] = "grpo.steps"

    @classmethod
    def build(cls, name: str, experiment: Experiment, fields: Mapping[str, Any]) -> "GRPOStage":
        section = build(GRPOSection, fields, "")
        task = Stage(name, experiment).require_task()
        config = GRPOConfig.from_dict(
            {"max_prompt_length": task.prompt_length, "max_completion_length": task.completion_length} | section.grpo
        )
        if config.max_prompt_length < task.prompt_length:
            raise ConfigError(
                f"grpo.max_prompt_length={config.max_prompt_length}: the task's prompts have {task.prompt_length} "
                "tokens"
            )
        recipe = OptimizerConfig(learning_rate(config), weight_decay=0.0)
        optimizer = change(recipe, section.optimizer, "optimizer", {"steps": config.steps})
        twice = [field for field in ("learning_rate", "warmup_steps") if field in section.grpo]
        if twice and optimizer.learning_rate != recipe.learning_rate:
            raise ConfigError(
                f"optimizer.learning_rate and {' and '.join(f'grpo.{field}' for field in twice)} are two answers to "
                "one question: leave one of them out"
            )
        program = GRPO(
            experiment.model, task, config, build_rewards(config, task), build_optimizer(optimizer), section.loss_chunk
        )
        return cls(name, experiment, program, optimizer, section.loop, section.eval, section.diagnostics)

    def summary(self) -> str:
        config = self.grpo.config
        rewards = ", ".join(f"{name} × {weight:g}" for name, weight in config.rewards)
        return (
            f"{config.rollouts} rollouts of {config.prompts_per_rollout} × {config.group_size}, "
            f"{config.steps_per_rollout} updates each; {rewards}"
        )

    def settings(self) -> dict[str, Any]:
        """`loop`, `eval` and `loss_chunk` change no weights."""
        return {"grpo": self.grpo.config, "optimizer": self.optimizer}

    def finished(self) -> bool:
        config = self.grpo.config
        return max(self.made(), default=0) >= config.rollouts * config.steps_per_rollout

    def rollout_flops(self, sampled: bool = True) -> float:
        """FLOPs of one rollout with its updates (see `accounting.flops.rollout_flops`)."""
        config = self.grpo.config
        return rollout_flops(
            self.experiment.model.config,
            completions=config.completions_per_rollout,
            group_size=config.group_size,
            prompt_length=config.max_prompt_length,
            completion_length=config.max_completion_length,
            passes=(3 + config.has_reference) * config.inner_epochs,
            oversampling=config.oversampling if sampled else 0,
        )

    def work(self, shards: int | None = None) -> Work:
        config, drawn = self.grpo.config, self.grpo.config.max_completion_length
        tokens = config.rollouts * config.completions_per_rollout * drawn
        return Work(tokens, config.rollouts * self.rollout_flops(), config.max_prompt_length + drawn)

    def run(self, variables: Variables | None) -> Variables:
        self.keep_tokenizer()
        state = train_grpo(
            self.grpo,
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

"""Tokens and FLOPs of an experiment's stages, by the closed formulas; plans, sweeps and dry runs share them."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from deepseek_jax.accounting.cost import Work
from deepseek_jax.accounting.flops import decode_flops_per_token, forward_flops_per_token
from deepseek_jax.model.config import ModelConfig
from deepseek_jax.rl.config import GRPOConfig
from deepseek_jax.stages import GRPOStage, TrainStage
from deepseek_jax.training.batches import batch_rows


def stage_work(stage: Any, shards: int | None = None) -> Work | None:
    """The work of a stage; None for one that trains nothing. `shards`: into how many parts the mesh divides the rows of
    a batch (default: as the stage's own placement does)."""
    if isinstance(stage, TrainStage):
        tokens = int(np.sum(training_rows(stage, shards))) * stage.seq_len
        return Work(tokens, float(tokens) * stage.flops_per_token, stage.seq_len)
    if isinstance(stage, GRPOStage):
        config, program = stage.grpo.config, stage.grpo
        rollout = rollout_flops(program.model.config, config, sampled=True)
        drawn, length = config.max_completion_length, config.max_prompt_length + config.max_completion_length
        return Work(config.rollouts * config.completions_per_rollout * drawn, config.rollouts * rollout, length)
    return None


def works(stages: Iterable[Any], shards: int | None = None) -> dict[str, Work]:
    """The work of the stages that have any, by name."""
    return {stage.name: work for stage in stages if (work := stage_work(stage, shards)) is not None}


def training_rows(stage: TrainStage, shards: int | None = None) -> np.ndarray:
    """Rows of the batch of every step, as the training loop takes them."""
    config = stage.train
    if config.batch_size is None:
        return np.full(config.steps, stage.batch_size)
    return batch_rows(
        config, np.arange(config.steps), stage.experiment.model.placement.batch_shards if shards is None else shards
    )


def rollout_flops(model: ModelConfig, config: GRPOConfig, sampled: bool) -> float:
    """FLOPs of a rollout with its updates, every completion at its full length; `sampled` False: of the updates alone.

    An epoch is a forward and a backward pass, and another forward pass by the reference where the KL counts. Each
    prompt is read once for its group.
    """
    rows, drawn = config.completions_per_rollout, config.max_completion_length
    length = config.max_prompt_length + drawn
    passes = (3 + config.has_reference) * config.inner_epochs
    flops = passes * rows * length * forward_flops_per_token(model, length)
    if sampled:
        sequences = rows * config.oversampling
        flops += sequences * sum(decode_flops_per_token(model, context) for context in range(length - drawn, length))
        flops += sequences // config.group_size * (length - drawn) * forward_flops_per_token(model, length - drawn)
    return float(flops)

"""Programs of an experiment, ready to compile: the jitted function and its abstract arguments with their shardings."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.accounting.flops import decode_flops_per_token
from deepseek_jax.dry_run.program_flops import FlopAssumptions
from deepseek_jax.errors import ConfigError, nearest
from deepseek_jax.experiment import Experiment
from deepseek_jax.generation.generate import advance, start
from deepseek_jax.generation.sampling import SamplingConfig
from deepseek_jax.model.ops import Ops
from deepseek_jax.model.transformer import Transformer, abstract_variables
from deepseek_jax.parallel.arrays import batch_sharding, variables_sharding, with_sharding
from deepseek_jax.parallel.sharding import MeshOps
from deepseek_jax.ranges import at_least, check_value, or_none
from deepseek_jax.rl.grpo import abstract_grpo_state
from deepseek_jax.stages import KINDS, GRPOStage, Stage, TrainStage, build_stages
from deepseek_jax.training.optimizer import build_optimizer
from deepseek_jax.training.state import TrainState, abstract_state
from deepseek_jax.training.step import build_train_step


@dataclasses.dataclass(frozen=True)
class Program:
    """A program to compile.

    A call processes `tokens` (training) or draws them (decoding, RL), and the run makes `calls` calls; None for
    decoding, which has no end. `named` are arguments to report apart, `model_flops` the useful work of a call by the
    closed formulas.
    """

    jitted: Callable
    arguments: tuple
    named: dict[str, Any]
    tokens: int
    calls: float | None
    model_flops: float
    assumptions: FlopAssumptions


def train(experiment: Experiment, stage: str | None) -> Program:
    """The optimizer step of a pre-training or SFT stage, on the largest batch that its ramp reaches."""
    section = _stage(experiment, stage, TrainStage)
    model, config = experiment.model, section.train
    optimizer = build_optimizer(config.optimizer, model)
    state = abstract_state(model, optimizer)
    shape = (section.batch_size, section.seq_len)
    field = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=batch_sharding(model.ops, shape))
    batch = dict.fromkeys(("tokens", "segment_ids", "positions", "loss_mask"), field)
    step = build_train_step(model, config, optimizer)
    # smaller batches first: as many tokens take fewer of the largest
    calls = float(section.total_sequences()) / section.batch_size
    tokens = section.batch_size * section.seq_len
    return Program(
        step, (state, batch), _parts(state), tokens, calls, tokens * section.flops_per_token, assumptions(experiment)
    )


def decode(experiment: Experiment, stage: str | None, sequences: int | None = None, context: int = 4096) -> Program:
    """One token for each of `sequences` sequences (default: 8 a device) that have `context` tokens in the cache."""
    model = experiment.model
    if stage is not None:
        raise ConfigError(f"--stage={stage}: decoding belongs to no stage; leave it out")
    check_value("--context", context, at_least(2, why="a prompt's token and the one that is decoded"))
    check_value("--sequences", sequences, or_none(at_least(1), "for 8 a device"))
    shards = model.ops.batch_shards
    sequences = sequences or 8 * shards
    if sequences % shards:
        raise ConfigError(f"--sequences={sequences}: the mesh divides them among {shards} devices; give a multiple")
    sampling = SamplingConfig(max_new_tokens=2, eos_id=-1, pad_id=0)
    variables = with_sharding(abstract_variables(model), variables_sharding(model))
    prompts, lengths = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((sequences, context - 1), (sequences,)))
    single = Transformer(model.config, Ops(model.ops.precision, model.ops.runtime))  # divided among devices below
    state = jax.eval_shape(
        lambda *args: start(single, *args, jax.random.key(0), sampling), abstract_variables(single), prompts, lengths
    )
    state = with_sharding(state, jax.tree.map(functools.partial(_sequence_sharding, model, sequences), state))
    program = jax.jit(lambda variables, state: advance(model, variables, state, sampling, 1), donate_argnums=1)
    named = {"parameters": variables["params"], "cache": state.cache}
    return Program(
        program,
        (variables, state),
        named,
        sequences,
        None,
        sequences * decode_flops_per_token(model.config, context),
        assumptions(experiment),
    )


def grpo(experiment: Experiment, stage: str | None) -> Program:
    """One rollout with its updates, every completion at its full length; with rewards in Python, the updates alone."""
    section = _stage(experiment, stage, GRPOStage)
    program, config, model = section.program, section.program.config, experiment.model
    state = abstract_grpo_state(model, program.optimizer, config.has_reference)
    sequences, drawn = config.completions_per_rollout, config.max_completion_length
    useful = section.rollout_flops(sampled=program.rewards.in_graph)
    if program.rewards.in_graph:
        jitted, arguments = type(program).iteration, (program, state)
    else:
        samples = jax.eval_shape(lambda state: program.sample(state), state)
        parts = {
            reward.name: jax.ShapeDtypeStruct((sequences,), jnp.float32)
            for reward in program.rewards.rewards
            if not reward.in_graph
        }
        jitted, arguments = type(program).learn, (program, state, samples, parts)
    named = _parts(state) | ({"reference": state.reference} if config.has_reference else {})
    return Program(
        jitted,
        arguments,
        named,
        sequences * drawn,
        float(config.rollouts),
        useful,
        assumptions(experiment, while_trips=drawn - 1),
    )


PROGRAMS: dict[str, Callable[..., Program]] = {"train": train, "decode": decode, "grpo": grpo}


def assumptions(experiment: Experiment, **changes: Any) -> FlopAssumptions:
    """A balanced load: it fits the receive buffers, and fills 1 / `buffer_factor` of them."""
    ops, fill = experiment.model.ops, 1.0
    if isinstance(ops, MeshOps) and ops.sizes["expert"] > 1 and ops.dispatch.on(ops.device) != "gather":
        fill = 1 / ops.dispatch.buffer_factor
    return FlopAssumptions(branch="least", ragged_fill=fill, **changes)


def _stage(experiment: Experiment, stage: str | None, cls: type[Stage]) -> Stage:
    """The stage of that name, or the first one, of a class or derived from it."""
    fitting = {built.name: built for built in build_stages(experiment) if isinstance(built, cls)}
    if not fitting:
        kinds = " or ".join(kind for kind, known in KINDS.items() if known is cls)
        raise ConfigError(
            f"{experiment.name} has no stage of kind {kinds}; its stages: {', '.join(experiment.sections) or 'none'}"
        )
    if stage is not None and stage not in fitting:
        raise ConfigError(f"stage {stage!r}: {nearest(stage, fitting)}")
    return next(iter(fitting.values())) if stage is None else fitting[stage]


def _parts(state: TrainState) -> dict[str, Any]:
    return {"parameters": state.params, "optimizer": state.opt_state}


def _sequence_sharding(model: Transformer, sequences: int, leaf: jax.ShapeDtypeStruct):
    """Sequences are divided like those of a batch; in a cache they are the axis after the layers."""
    if not isinstance(model.ops, MeshOps):
        return None
    axis = next(
        (axis for axis, size in enumerate(leaf.shape) if size == sequences and axis == (len(leaf.shape) > 3)), None
    )
    names = ["batch" if i == axis else None for i in range(len(leaf.shape))]
    return model.ops.sharding(names, leaf.shape)

"""One optimizer step as one jitted function: microbatches, gradients, update, router bias, and metrics."""

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax

from deepseek_jax.errors import ConfigError
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.parallel.arrays import constrain_state
from deepseek_jax.training.auxiliary import add_names, mean_metrics
from deepseek_jax.training.balance import load_metrics, update_router_bias
from deepseek_jax.training.config import TrainConfig
from deepseek_jax.training.objective import ObjectiveConfig, loss_fn, uses_mtp
from deepseek_jax.training.schedules import Schedule
from deepseek_jax.training.state import TrainState
from deepseek_jax.training.targets import denominators

Batch = Mapping[str, jax.Array]
TrainStep = Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]


def build_train_step(model: Transformer, config: TrainConfig, optimizer: optax.GradientTransformation) -> TrainStep:
    """The step of a stage: `make_train_step` with the stage's settings. The dry run compiles this one too."""
    return make_train_step(
        model,
        config.objective,
        optimizer,
        config.optimizer.learning_rate,
        config.bias_update_speed,
        microbatch=config.microbatch,
        zero_sum=config.bias_update_zero_sum,
    )


def make_train_step(
    model: Transformer,
    objective: ObjectiveConfig,
    optimizer: optax.GradientTransformation,
    learning_rate: Schedule,
    bias_update_speed: Schedule,
    *,
    microbatch: int = 0,
    zero_sum: bool = False,
) -> TrainStep:
    """-> jitted train_step(state, batch) -> (state, metrics). The state is donated: use the returned one.

    batch: int32 [B, T] each of tokens, segment_ids, positions, loss_mask. `microbatch` sequences are differentiated at
    a time (0: all B at once); it has to divide B. A step whose loss or gradient is not finite changes neither weights,
    nor biases, nor moments, and is counted in `state.skipped`. `learning_rate` is the optimizer's, to be reported.
    `bias_update_speed` is γ of V3 §2.1.2, `zero_sum` Moonlight's variant.
    """

    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(state: TrainState, batch: Batch):
        loss, aux, grads = accumulate(model, objective, state, batch, microbatch)
        gamma = bias_update_speed(state.step)
        new_state, grad_norm = guarded_update(state, optimizer, loss, grads, aux.loads, gamma, zero_sum)
        metrics = {
            "loss": loss,
            "grad_norm": grad_norm,
            "learning_rate": learning_rate(state.step - state.skipped),
            "tokens": aux.tokens,
            "skipped": new_state.skipped,
        }
        if uses_mtp(model, objective):
            metrics["mtp_weight"] = objective.mtp_weight(state.step)
        if aux.loads:
            metrics["bias_update_speed"] = gamma
            metrics |= load_metrics(aux.loads)
            metrics["expert_overflows"] = aux.overflows
        metrics = add_names(metrics, aux.losses)
        return constrain_state(model, new_state), add_names(metrics, mean_metrics(aux.metrics))

    return train_step


def guarded_update(
    state: TrainState,
    optimizer: optax.GradientTransformation,
    loss: jax.Array,
    grads,
    loads: Mapping[str, jax.Array],
    bias_update_speed: jax.Array,
    zero_sum: bool = False,
) -> tuple[TrainState, jax.Array]:
    """Applies gradients and moves the router biases, unless the loss or the gradient's norm is not finite.

    Then weights, biases and moments stay as they are and `skipped` counts one more. -> (state one step on, gradient
    norm)
    """
    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    proposed = (
        optax.apply_updates(state.params, updates),
        opt_state,
        update_router_bias(state.router_bias, loads, bias_update_speed, zero_sum),
    )
    current = (state.params, state.opt_state, state.router_bias)
    params, opt_state, router_bias = jax.tree.map(lambda new, old: jnp.where(finite, new, old), proposed, current)
    skipped = state.skipped + (1 - finite.astype(jnp.int32))
    state = state.replace(
        step=state.step + 1, params=params, router_bias=router_bias, opt_state=opt_state, skipped=skipped
    )
    return state, grad_norm


def accumulate(model: Transformer, objective: ObjectiveConfig, state: TrainState, batch: Batch, microbatch: int):
    """Loss, `LossAux` and float32 gradients of the global batch, `microbatch` sequences at a time."""
    denominator = denominators(batch, model.config.mtp_depth if uses_mtp(model, objective) else 0)
    sequences = batch["tokens"].shape[0]
    if microbatch and sequences % microbatch:
        raise ConfigError(f"microbatch={microbatch} does not divide the {sequences} sequences of the batch")
    count = sequences // microbatch if microbatch else 1

    def differentiate(batch):
        grad_fn = jax.value_and_grad(functools.partial(loss_fn, model, objective), has_aux=True)
        (loss, aux), grads = grad_fn(state.params, state.router_bias, batch, state.step, denominator)
        return loss, aux, grads

    if count == 1:
        return differentiate(batch)

    # Microbatch i takes every count-th sequence: a batch axis sharded over devices stays sharded in each microbatch.
    microbatches = jax.tree.map(lambda x: jnp.swapaxes(x.reshape(microbatch, count, *x.shape[1:]), 0, 1), batch)

    def add(total, batch):
        batch = jax.tree.map(lambda x: model.ops.shard(x, "batch", "length"), batch)
        return jax.tree.map(jnp.add, total, differentiate(batch)), None

    shapes = jax.eval_shape(differentiate, jax.tree.map(lambda x: x[0], microbatches))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.scan(add, zeros, microbatches)[0]

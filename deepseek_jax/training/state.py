"""The state that training carries from step to step."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from deepseek_jax.model.transformer import Transformer, abstract_variables, init_variables
from deepseek_jax.parallel.arrays import state_sharding, variables_sharding, with_sharding


@flax.struct.dataclass
class TrainState:
    """`step` counts batches seen, `skipped` those among them whose update was thrown away. A pytree of arrays.

    `rng` is for stages that sample; pre-training and SFT draw nothing and leave it as it is.
    """

    step: jax.Array  # int32
    params: Any
    router_bias: Any  # float32, outside params: no gradient, no decay; {} for a model without correction bias
    opt_state: optax.OptState
    rng: jax.Array  # a jax.random key
    skipped: jax.Array  # int32

    @property
    def variables(self) -> dict[str, Any]:
        """The variables for `model.apply`."""
        return {"params": self.params, "router_bias": self.router_bias}


def abstract_state(model: Transformer, optimizer: optax.GradientTransformation) -> TrainState:
    """The state's shapes, dtypes and shardings as jax.ShapeDtypeStruct; nothing is allocated."""
    abstract = jax.eval_shape(
        lambda variables, rng: _fresh(variables, optimizer.init, rng), abstract_variables(model), jax.random.key(0)
    )
    return with_sharding(abstract, state_sharding(model, abstract))


def state_from_variables(
    model: Transformer, variables: dict[str, Any], optimizer: optax.GradientTransformation, rng: jax.Array
) -> TrainState:
    """A state at step 0 with fresh moments around a copy of given weights, since a train step may destroy its buffers.

    On a mesh every device gets its shard of each array, wherever the weights are now.
    """
    variables, rng = jax.tree.map(jnp.copy, (jax.device_put(dict(variables), variables_sharding(model)), rng))
    return _placed(model, variables, optimizer, rng)


def create_state(model: Transformer, optimizer: optax.GradientTransformation, rng: jax.Array) -> TrainState:
    """A state at step 0 with random weights, made in place: the same numbers on every mesh."""
    init_rng, rng = jax.random.split(rng)
    return _placed(model, init_variables(model, init_rng, variables_sharding(model)), optimizer, rng)


def _placed(
    model: Transformer, variables: dict[str, Any], optimizer: optax.GradientTransformation, rng: jax.Array
) -> TrainState:
    """The weights, where they are, and the rest made around them: in a jitted function, since no process can put an
    array on the devices of another."""

    def rest(params, rng):
        return _fresh({"params": params}, optimizer.init, rng).replace(params=None, router_bias=None)

    abstract = jax.eval_shape(lambda variables, rng: _fresh(variables, optimizer.init, rng), variables, rng)
    shardings = state_sharding(model, abstract)
    places = None if shardings is None else shardings.replace(params=None, router_bias=None)
    state = jax.jit(rest, out_shardings=places)(variables["params"], rng)
    return state.replace(params=variables["params"], router_bias=variables.get("router_bias", {}))


def _fresh(variables: dict[str, Any], init: Callable[[Any], optax.OptState], rng: jax.Array) -> TrainState:
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=variables["params"],
        router_bias=variables.get("router_bias", {}),
        opt_state=init(variables["params"]),
        rng=rng,
        skipped=jnp.zeros((), jnp.int32),
    )

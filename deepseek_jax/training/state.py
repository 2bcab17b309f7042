"""What training carries from step to step."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from deepseek_jax.model.transformer import Transformer, init_variables


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
        """What `model.apply` takes."""
        return {"params": self.params, "router_bias": self.router_bias}


def state_of(variables: dict[str, Any], optimizer: optax.GradientTransformation, rng: jax.Array) -> TrainState:
    """A state at step 0 with fresh moments around a copy of given weights: a train step may destroy its buffers."""
    params, router_bias, rng = jax.tree.map(jnp.copy, (variables["params"], variables.get("router_bias", {}), rng))
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        router_bias=router_bias,
        opt_state=jax.jit(optimizer.init)(params),
        rng=rng,
        skipped=jnp.zeros((), jnp.int32),
    )


def create_state(model: Transformer, optimizer: optax.GradientTransformation, rng: jax.Array) -> TrainState:
    """A state at step 0 with random weights."""
    init_rng, rng = jax.random.split(rng)
    return state_of(init_variables(model, init_rng), optimizer, rng)

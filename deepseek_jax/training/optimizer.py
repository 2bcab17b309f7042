"""AdamW as DeepSeek publishes it (V3 §4.2, V2 §3.1.2): β 0.9/0.95, decay 0.1, clip 1.0, float32 master weights."""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from deepseek_jax.errors import ConfigError, nearest
from deepseek_jax.fields import Unbounded
from deepseek_jax.training.schedules import Schedule

MOMENT_DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """`learning_rate` counts applied updates: a skipped step does not advance it. The reports do not give `eps`.

    `moment_dtype="bfloat16"` stores both moments in half the memory (V3 §3.3.3); they are computed in float32.
    """

    learning_rate: Schedule = Schedule(3e-4)
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: Unbounded = 1.0
    moment_dtype: str = "float32"

    def __post_init__(self):
        if self.moment_dtype not in MOMENT_DTYPES:
            raise ConfigError(
                f"optimizer.moment_dtype={self.moment_dtype!r}: {nearest(self.moment_dtype, MOMENT_DTYPES)}"
            )
        for name in ("b1", "b2"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise ConfigError(f"optimizer.{name}={value}: from 0 up to, but not including, 1")
        if min(self.learning_rate.values) < 0:
            raise ConfigError(f"optimizer.learning_rate goes down to {min(self.learning_rate.values):g}: 0 or more")
        for name in ("eps", "weight_decay"):
            if getattr(self, name) < 0:
                raise ConfigError(f"optimizer.{name}={getattr(self, name)}: 0 or more")
        if self.clip_norm <= 0:
            raise ConfigError(f"optimizer.clip_norm={self.clip_norm}: more than 0 (use inf for no clipping)")


def decayed(params):
    """True for the leaves that weight decay pulls on: every matrix, embedding and head included; never a norm's scale.

    By name, because scanned layers make a matrix of their norms' scales. Router biases are not in `params` at all.
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key != "scale", params)


def store_moments(inner: optax.GradientTransformation, dtype: str) -> optax.GradientTransformation:
    """Keeps the moments of `inner` (an Adam state with mu and nu) in `dtype` between steps, in float32 within one."""

    def cast(state, to):
        mu, nu = jax.tree.map(lambda x: x.astype(to), (state.mu, state.nu))
        return state._replace(mu=mu, nu=nu)

    def update(updates, state, params=None):
        updates, state = inner.update(updates, cast(state, jnp.float32), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(lambda params: cast(inner.init(params), dtype), update)


def build_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Clip by global norm, Adam, decoupled decay on `decayed` leaves, times -learning rate."""
    adam = optax.scale_by_adam(config.b1, config.b2, config.eps)
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        adam if config.moment_dtype == "float32" else store_moments(adam, config.moment_dtype),
        optax.add_decayed_weights(config.weight_decay, mask=decayed),
        optax.scale_by_learning_rate(config.learning_rate),
    )

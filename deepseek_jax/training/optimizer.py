"""Optimizers: AdamW as DeepSeek publishes it (V3 §4.2, V2 §3.1.2), Muon, or one of the user's own."""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from deepseek_jax.errors import ConfigError
from deepseek_jax.fields import Unbounded
from deepseek_jax.model.config import ModelConfig
from deepseek_jax.model.transformer import Transformer, abstract_variables
from deepseek_jax.ranges import above, at_least, check, everywhere, one_of
from deepseek_jax.registry import resolve
from deepseek_jax.training.muon import MuonConfig, muon_labels, orthogonalized
from deepseek_jax.training.schedules import Schedule

MOMENT_DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """An optimizer by `name` (see `OPTIMIZERS`) and what surrounds it: clipping, weight decay, the learning rate.

    `learning_rate` counts applied updates: a skipped step does not advance it. `b1`, `b2` and `eps` are Adam's; the
    reports do not give `eps`. `moment_dtype="bfloat16"` stores moments in half the memory (V3 §3.3.3); they are
    computed in float32. `muon` is read by Muon alone.
    """

    learning_rate: Schedule = Schedule(3e-4)
    name: str = "adamw"
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: Unbounded = 1.0
    moment_dtype: str = "float32"
    muon: MuonConfig = MuonConfig()

    def __post_init__(self):
        resolve(OPTIMIZERS, self.name, "optimizer.name")
        check(
            self,
            "optimizer.",
            learning_rate=everywhere(at_least(0)),
            b1=at_least(0, below=1),
            b2=at_least(0, below=1),
            eps=at_least(0),
            weight_decay=at_least(0),
            clip_norm=above(0, why="use inf for no clipping"),
            moment_dtype=one_of(MOMENT_DTYPES),
        )


def decayed(params):
    """True for the leaves that weight decay pulls on: every matrix, embedding and head included; never a norm's scale.

    By name, because scanned layers make a matrix of their norms' scales. Router biases are not in `params` at all.
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key != "scale", params)


def store_moments(inner: optax.GradientTransformation, dtype: str) -> optax.GradientTransformation:
    """Keeps the floating-point state of `inner`, its moments, in `dtype` between steps, in float32 within one."""

    def cast(state, to):
        return jax.tree.map(lambda x: x.astype(to) if jnp.issubdtype(x.dtype, jnp.floating) else x, state)

    def update(updates, state, params=None):
        updates, state = inner.update(updates, cast(state, jnp.float32), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(lambda params: cast(inner.init(params), dtype), update)


def adamw(config: OptimizerConfig, model: Transformer | None) -> optax.GradientTransformation:
    """β 0.9 and 0.95, for every parameter."""
    return optax.scale_by_adam(config.b1, config.b2, config.eps)


def muon(config: OptimizerConfig, model: Transformer) -> optax.GradientTransformation:
    """Muon for weight matrices (`muon.is_matrix`), AdamW for embedding, head and norms, at one learning rate."""
    return optax.partition(
        {"muon": orthogonalized(config.muon, model), "adamw": adamw(config, model)}, muon_labels(model)
    )


# An optimizer takes the configuration and the network, and returns an optax.GradientTransformation from clipped
# gradients to the update's direction. `build_optimizer` adds the rest, which is the same for all.
OPTIMIZERS: dict[str, Callable[[OptimizerConfig, Transformer], optax.GradientTransformation]] = {
    "adamw": adamw,
    "muon": muon,
}


def build_optimizer(config: OptimizerConfig, model: Transformer | None = None) -> optax.GradientTransformation:
    """Clip by global norm, the optimizer `config.name`, decoupled decay on `decayed` leaves, times -learning rate.

    AdamW needs no `model`.
    """
    direction = resolve(OPTIMIZERS, config.name, "optimizer.name")(config, model)
    if not isinstance(direction, optax.GradientTransformation):
        raise ConfigError(
            f"optimizer.name={config.name!r} returned {direction!r}: it must be a function of (config, model) that "
            "returns an optax.GradientTransformation"
        )
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        direction if config.moment_dtype == "float32" else store_moments(direction, config.moment_dtype),
        optax.add_decayed_weights(config.weight_decay, mask=decayed),
        optax.scale_by_learning_rate(config.learning_rate),
    )


@functools.cache
def updated_by(name: str, config: ModelConfig) -> dict[str, dict[str, int]]:
    """{rule: {parameter: its size}} of the optimizer `name`: which parameters Muon updates, and which AdamW."""
    model = Transformer(config)
    params = abstract_variables(model)["params"]
    labels = muon_labels(model) if name == "muon" else jax.tree.map(lambda _: name, params)
    result: dict[str, dict[str, int]] = {}
    for (path, leaf), label in zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(labels), strict=True):
        parameter = jax.tree_util.keystr(path, simple=True, separator="/")
        result.setdefault(label, {})[parameter] = math.prod(leaf.shape)
    return result

"""Group-relative advantages: a completion's reward relative to the other completions of the same prompt.

A batch holds Q prompts with G completions each, siblings adjacent: completion b belongs to group b // G.

An estimator is a function (rewards_QG, valid_QG, config) -> advantages_QG, float32. `rewards_QG` is what each
completion earned. Where a reward is given to tokens, it is `rewards_QGN`: what each completion still earns from token n
on (undiscounted); after its end that is what it earned as a whole completion. `valid_QG`, of the same shape, is False
for a completion without a finite reward, and for tokens after the end; the rewards are 0 where it is False because of
the former. The result has the shape of the rewards; what it says where `valid` is False is ignored. A config names an
estimator of `ESTIMATORS`, or your own as package.module:function.
"""

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp

from deepseek_jax.errors import ConfigError
from deepseek_jax.registry import resolve
from deepseek_jax.rl.config import GRPOConfig

EQUAL_WITHIN = 1e-6  # rewards of a group that differ by no more than this differ by rounding alone

Estimator = Callable[[jax.Array, jax.Array, GRPOConfig], jax.Array]


@flax.struct.dataclass
class Advantages:
    advantages: jax.Array  # float32 [B], or [B, N] with rewards for tokens; 0 for what is not valid
    valid_B: jax.Array  # bool: the completion has a finite reward
    live_B: jax.Array  # bool: the completion is valid and its group carries a gradient


def group_advantages(rewards: jax.Array, config: GRPOConfig, mask_BN: jax.Array | None = None) -> Advantages:
    """The advantages of float32 rewards [B], or [B, N] with `mask_BN`, by the config's estimator.

    A completion whose reward is not finite gets advantage 0 and enters no statistic.
    """
    rewards = rewards.astype(jnp.float32)
    finite = jnp.isfinite(rewards)
    real = finite if rewards.ndim == 1 else finite.all(1, keepdims=True) & (mask_BN > 0)
    rewards_QG, valid_QG = (_grouped(x, config.group_size) for x in (jnp.where(finite, rewards, 0.0), real))
    advantages_QG = jnp.where(valid_QG, find_estimator(config.advantage_estimator)(rewards_QG, valid_QG, config), 0.0)
    sample_QG = _of_completion(valid_QG)
    live_QG = sample_QG & (advantages_QG != 0).reshape(len(rewards_QG), -1).any(1)[:, None]
    return Advantages(advantages_QG.reshape(rewards.shape), sample_QG.reshape(-1), live_QG.reshape(-1))


def group_std(rewards_QG: jax.Array, valid_QG: jax.Array, config: GRPOConfig) -> jax.Array:
    """A_i = (r_i - mean(r)) / std(r) over the G completions of one prompt (DeepSeekMath §4.1.2, R1 eq. 3).

    Deviations are populational (ddof 0) and taken in two passes, because E[r^2] - E[r]^2 in float32 turns equal rewards
    into a small number that would then be divided by; the divisor is max(std, advantage_std_floor) + advantage_eps.
    """
    return _centered(rewards_QG, valid_QG) / _divisor(rewards_QG, valid_QG, config, axis=1)  # GRPO: advantage


def batch_std(rewards_QG: jax.Array, valid_QG: jax.Array, config: GRPOConfig) -> jax.Array:
    """As `group_std`, divided by the deviation of the whole batch of rewards."""
    return _centered(rewards_QG, valid_QG) / _divisor(rewards_QG, valid_QG, config, axis=None)


def group_mean(rewards_QG: jax.Array, valid_QG: jax.Array, config: GRPOConfig) -> jax.Array:
    """A_i = r_i - mean(r) (Dr. GRPO; V3.2 §3.1)."""
    del config
    return _centered(rewards_QG, valid_QG)


ESTIMATORS: dict[str, Estimator] = {f.__name__: f for f in (group_std, batch_std, group_mean)}


def find_estimator(name: str) -> Estimator:
    """The estimator that a config names. Raises ConfigError for an unknown name, and for an attribute that is not a
    function."""
    estimator = resolve(ESTIMATORS, name, "advantage_estimator")
    if not callable(estimator):
        raise ConfigError(
            f"advantage_estimator={name!r} is a {type(estimator).__name__}: must be a function (rewards_QG, valid_QG, "
            "config) -> advantages"
        )
    return estimator


def group_metrics(rewards_B: jax.Array, group_size: int, correct_B: jax.Array | None = None) -> dict[str, jax.Array]:
    """Counters a run is watched by; `diagnostics` turns them into words.

    `reward_mean` and `reward_std` are over valid samples, the latter averaged over groups that have any; NaN where
    there are none. `zero_variance_fraction` is the share of groups that give no gradient; given which completions are
    right (above 0, NaN where that is not known), `all_right_fraction` and `all_wrong_fraction` say why: groups whose
    judged completions are all right, or all wrong.
    """
    rewards_QG = _grouped(rewards_B.astype(jnp.float32), group_size)
    valid_QG = jnp.isfinite(rewards_QG)
    rewards_QG = jnp.where(valid_QG, rewards_QG, 0.0)
    std_Q1 = _center(rewards_QG, valid_QG, axis=1)[1]
    metrics = {
        "reward_mean": finite_mean(jnp.where(valid_QG, rewards_QG, jnp.nan)),
        "reward_std": finite_mean(jnp.where(valid_QG.any(1, keepdims=True), std_Q1, jnp.nan)),
        "zero_variance_fraction": (_spread(rewards_QG, valid_QG) <= EQUAL_WITHIN).mean(dtype=jnp.float32),
        "non_finite_rewards": (~valid_QG).sum().astype(jnp.float32),
    }
    if correct_B is not None:
        correct_QG = correct_B.reshape(-1, group_size)
        right_Q, wrong_Q = (correct_QG > 0).any(1), (correct_QG <= 0).any(1)
        metrics["all_right_fraction"] = (right_Q & ~wrong_Q).mean(dtype=jnp.float32)
        metrics["all_wrong_fraction"] = (wrong_Q & ~right_Q).mean(dtype=jnp.float32)
    return metrics


def finite_mean(x: jax.Array, axis: int | None = None) -> jax.Array:
    """The mean over `axis` (None: everything) of the numbers that are finite, NaN where there are none."""
    finite = jnp.isfinite(x)
    return jnp.where(finite, x, 0.0).sum(axis) / finite.sum(axis)


def first_live_groups(live_B: jax.Array, group_size: int, keep: int) -> jax.Array:
    """Completions of the first `keep` groups that carry a gradient, dead groups only making up the number (DAPO §3.2).

    Dynamic sampling in a static shape: sample more prompts than needed, then take these. Returns indices, int32
    [keep * G].
    """
    live_Q = live_B.reshape(-1, group_size).any(1)
    groups_K = jnp.argsort(~live_Q, stable=True)[:keep]
    return (groups_K[:, None] * group_size + jnp.arange(group_size)).reshape(-1)


def _grouped(x: jax.Array, group_size: int) -> jax.Array:
    return x.reshape(-1, group_size, *x.shape[1:])


def _of_completion(x: jax.Array) -> jax.Array:
    """[Q, G] of rewards or validity: at the first token, where a completion still earns all of it."""
    return x if x.ndim == 2 else x[..., 0]


def _centered(rewards_QG: jax.Array, valid_QG: jax.Array) -> jax.Array:
    """Deviations from the group's mean, for tokens at each position; exactly 0 in a group of equal rewards, whose
    deviations are rounding."""
    sample_QG = _of_completion(valid_QG)
    sample = sample_QG.reshape(*sample_QG.shape, *[1] * (rewards_QG.ndim - 2))
    return jnp.where(_spread(rewards_QG, sample) > EQUAL_WITHIN, _center(rewards_QG, sample, axis=1)[0], 0.0)


def _divisor(rewards_QG: jax.Array, valid_QG: jax.Array, config: GRPOConfig, axis: int | None) -> jax.Array:
    """max(std, floor) + eps over groups (axis 1) or the batch (None), of what completions earn as a whole."""
    std = _center(_of_completion(rewards_QG), _of_completion(valid_QG), axis)[1]
    divisor = jnp.maximum(std, config.advantage_std_floor) + config.advantage_eps
    return divisor.reshape(*divisor.shape, *[1] * (rewards_QG.ndim - 2))


def _center(rewards_QG: jax.Array, valid_QG: jax.Array, axis: int | None) -> tuple[jax.Array, jax.Array]:
    """Deviations from the mean over `axis` (None: everything), and their root mean square."""
    count = jnp.maximum(valid_QG.sum(axis, keepdims=True), 1)
    mean = jnp.where(valid_QG, rewards_QG, 0.0).sum(axis, keepdims=True) / count
    centered_QG = jnp.where(valid_QG, rewards_QG - mean, 0.0)
    return centered_QG, jnp.sqrt((centered_QG**2).sum(axis, keepdims=True) / count)


def _spread(rewards_QG: jax.Array, valid_QG: jax.Array) -> jax.Array:
    """The largest minus the smallest reward of each group, 0 where none is valid."""
    highest = jnp.where(valid_QG, rewards_QG, -jnp.inf).max(1, keepdims=True)
    lowest = jnp.where(valid_QG, rewards_QG, jnp.inf).min(1, keepdims=True)
    return jnp.where(valid_QG.any(1, keepdims=True), highest - lowest, 0.0)

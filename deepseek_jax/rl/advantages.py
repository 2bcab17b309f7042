"""Group-relative advantages: what a completion earned above its siblings.

A batch holds Q prompts with G completions each, siblings adjacent: row b belongs to group b // G.
"""

import flax.struct
import jax
import jax.numpy as jnp

EQUAL_WITHIN = 1e-6  # rewards of a group that differ by no more than this differ by rounding alone


@flax.struct.dataclass
class Advantages:
    advantages_B: jax.Array  # float32; 0 for rejected samples and for groups without variance
    valid_B: jax.Array  # bool: the sample has a finite reward
    live_B: jax.Array  # bool: the sample is valid and its group has variance, so that it carries a gradient


def group_advantages(
    rewards_B: jax.Array, group_size: int, normalization: str = "group_std", eps: float = 1e-4, std_floor: float = 1e-3
) -> Advantages:
    """A_i = (r_i - mean(r)) / std(r) over the G completions of one prompt (DeepSeekMath §4.1.2, R1 eq. 3).

    `normalization` is the divisor: "group_std" as published, "none" (Dr. GRPO; V3.2 §3.1), or "batch_std", the
    deviation of the whole batch of rewards. Deviations are populational (ddof 0) and taken in two passes, because
    E[r^2] - E[r]^2 in float32 turns equal rewards into a small number that would then be divided by; the divisor is
    max(std, std_floor) + eps. A sample whose reward is not finite gets advantage 0 and enters no statistic.
    """
    rewards_QG, valid_QG = _grouped(rewards_B, group_size)
    centered_QG, std_Q1 = _center(rewards_QG, valid_QG, axis=1)
    live_QG = valid_QG & (_spread(rewards_QG, valid_QG) > EQUAL_WITHIN)

    if normalization == "group_std":
        divisor = jnp.maximum(std_Q1, std_floor) + eps
    elif normalization == "batch_std":
        divisor = jnp.maximum(_center(rewards_QG, valid_QG, axis=None)[1], std_floor) + eps
    elif normalization == "none":
        divisor = 1.0
    else:
        raise ValueError(f"normalization={normalization!r}: 'group_std', 'batch_std' or 'none'")

    advantages_QG = jnp.where(live_QG, centered_QG / divisor, 0.0)
    return Advantages(advantages_QG.reshape(-1), valid_QG.reshape(-1), live_QG.reshape(-1))


def group_metrics(rewards_B: jax.Array, group_size: int, correct_B: jax.Array | None = None) -> dict[str, jax.Array]:
    """Counters a run is watched by; `diagnostics` turns them into words.

    `reward_mean` and `reward_std` are over valid samples, the latter averaged over groups that have any; NaN where
    there are none. `zero_variance_fraction` is the share of groups that give no gradient; given which completions are
    right (above 0, NaN where that is not known), `all_right_fraction` and `all_wrong_fraction` say why: groups whose
    judged completions are all right, or all wrong.
    """
    rewards_QG, valid_QG = _grouped(rewards_B, group_size)
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
    """Rows of the first `keep` groups that carry a gradient, dead groups only making up the number (DAPO §3.2).

    Dynamic sampling in a static shape: sample more prompts than needed, then take these rows. Returns int32[keep * G].
    """
    live_Q = live_B.reshape(-1, group_size).any(1)
    groups_K = jnp.argsort(~live_Q, stable=True)[:keep]
    return (groups_K[:, None] * group_size + jnp.arange(group_size)).reshape(-1)


def _grouped(rewards_B: jax.Array, group_size: int) -> tuple[jax.Array, jax.Array]:
    rewards_QG = rewards_B.astype(jnp.float32).reshape(-1, group_size)
    valid_QG = jnp.isfinite(rewards_QG)
    return jnp.where(valid_QG, rewards_QG, 0.0), valid_QG


def _center(rewards_QG: jax.Array, valid_QG: jax.Array, axis: int | None) -> tuple[jax.Array, jax.Array]:
    """Deviations from the mean over `axis` (None: everything), and their root mean square."""
    count = jnp.maximum(valid_QG.sum(axis, keepdims=True), 1)
    centered_QG = jnp.where(valid_QG, rewards_QG - rewards_QG.sum(axis, keepdims=True) / count, 0.0)
    return centered_QG, jnp.sqrt((centered_QG**2).sum(axis, keepdims=True) / count)


def _spread(rewards_QG: jax.Array, valid_QG: jax.Array) -> jax.Array:
    highest_Q1 = jnp.where(valid_QG, rewards_QG, -jnp.inf).max(1, keepdims=True)
    lowest_Q1 = jnp.where(valid_QG, rewards_QG, jnp.inf).min(1, keepdims=True)
    return jnp.where(valid_QG.any(1, keepdims=True), highest_Q1 - lowest_Q1, 0.0)

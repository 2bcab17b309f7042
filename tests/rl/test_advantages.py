"""Advantages and the counters next to them."""

import statistics

import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.errors import ConfigError
from deepseek_jax.rl.advantages import finite_mean, first_live_groups, group_advantages, group_metrics
from deepseek_jax.rl.config import GRPOConfig


def advantages_of(rewards, group_size, estimator="group_std", *, eps=1e-4, std_floor=1e-3, mask=None):
    config = GRPOConfig(
        group_size=group_size, advantage_estimator=estimator, advantage_eps=eps, advantage_std_floor=std_floor
    )
    return group_advantages(rewards, config, mask)


def test_published_form_has_ddof_zero():
    rewards = np.random.default_rng(0).normal(size=(3, 4))
    result = advantages_of(jnp.asarray(rewards.reshape(-1)), 4, "group_std", eps=0.0)
    for row, advantages in zip(rewards.tolist(), np.asarray(result.advantages).reshape(3, 4), strict=True):
        mean, std = statistics.fmean(row), statistics.pstdev(row)
        np.testing.assert_allclose(advantages, [(r - mean) / std for r in row], rtol=1e-5, atol=1e-6)


def test_the_divisor_is_the_floored_deviation_plus_eps():
    """Both constants where they are felt: a deviation below the floor, and one above it."""
    rewards = jnp.array([0.0, 0.01, 0.0, 2.0])
    result = advantages_of(rewards, 2, "group_std", eps=0.5, std_floor=0.25)
    np.testing.assert_allclose(result.advantages, [-0.005 / 0.75, 0.005 / 0.75, -1 / 1.5, 1 / 1.5], rtol=1e-6)
    batch = advantages_of(rewards, 2, "batch_std", eps=0.5, std_floor=3.0)
    np.testing.assert_allclose(batch.advantages, [-0.005 / 3.5, 0.005 / 3.5, -1 / 3.5, 1 / 3.5], rtol=1e-6)


def test_other_estimators():
    rewards = jnp.array([0.0, 1.0, 2.0, 5.0])
    np.testing.assert_allclose(advantages_of(rewards, 2, "group_mean").advantages, [-0.5, 0.5, -1.5, 1.5], rtol=1e-6)
    batch = advantages_of(rewards, 2, "batch_std", eps=0.0).advantages
    np.testing.assert_allclose(
        batch, np.array([-0.5, 0.5, -1.5, 1.5]) / statistics.pstdev([0.0, 1.0, 2.0, 5.0]), rtol=1e-5
    )


@pytest.mark.parametrize("estimator", ["group_std", "group_mean", "batch_std"])
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 1 / 3, 2.7182817])
def test_equal_rewards_give_exactly_nothing(estimator, reward):
    rewards = jnp.full(16, reward, jnp.float32).at[-1].multiply(1 + 1e-7)
    result = advantages_of(rewards, 16, estimator)
    assert not np.asarray(result.advantages).any() and not np.asarray(result.live_B).any()


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize("estimator", ["group_std", "group_mean", "batch_std"])
def test_a_reward_that_is_not_finite_spreads_nowhere(bad, estimator):
    rewards = jnp.array([1.0, bad, 0.0, 1.0, bad, bad, bad, 3.0])
    result = advantages_of(rewards, 4, estimator)
    assert np.isfinite(result.advantages).all()
    np.testing.assert_array_equal(result.valid_B, [1, 0, 1, 1, 0, 0, 0, 1])
    np.testing.assert_array_equal(result.live_B, [1, 0, 1, 1, 0, 0, 0, 0])
    assert float(result.advantages[1]) == 0.0 and not np.asarray(result.advantages[4:]).any()
    assert float(result.advantages[:4].sum()) == pytest.approx(0.0, abs=1e-6)
    if estimator == "group_std":
        alone = advantages_of(jnp.array([1.0, 0.0, 1.0]), 3).advantages
        np.testing.assert_allclose(result.advantages[jnp.array([0, 2, 3])], alone, rtol=1e-6)


def test_metrics_count_and_explain():
    rewards = jnp.array([2.0, 2.0, 1.0, 1.0, 2.0, 1.0, jnp.nan, 2.0])
    correct = jnp.array([1, 1, 0, 0, 1, 0, 1, 1])
    metrics = {name: float(value) for name, value in group_metrics(rewards, 2, correct).items()}
    assert metrics["zero_variance_fraction"] == 0.75 and metrics["non_finite_rewards"] == 1
    assert metrics["all_right_fraction"] == 0.5 and metrics["all_wrong_fraction"] == 0.25
    assert metrics["reward_mean"] == pytest.approx(11 / 7) and metrics["reward_std"] == pytest.approx(0.5 / 4)


def test_what_was_not_judged_enters_no_metric():
    """NaN is neither right nor wrong, and a group without a reward has no deviation; with none at all there is no
    mean."""
    rewards = jnp.array([1.0, 3.0, jnp.nan, jnp.nan, jnp.inf, 2.0])
    correct = jnp.array([jnp.nan, 1.0, jnp.nan, jnp.nan, 0.0, jnp.nan])
    metrics = {name: float(value) for name, value in group_metrics(rewards, 2, correct).items()}
    assert metrics["reward_mean"] == pytest.approx(2.0) and metrics["reward_std"] == pytest.approx(0.5)
    assert metrics["all_right_fraction"] == metrics["all_wrong_fraction"] == pytest.approx(1 / 3)
    assert metrics["non_finite_rewards"] == 3 and metrics["zero_variance_fraction"] == pytest.approx(2 / 3)
    assert np.isnan(group_metrics(jnp.full(4, jnp.nan), 2)["reward_mean"])
    assert float(finite_mean(jnp.array([1.0, -jnp.inf, 3.0, jnp.nan]))) == 2.0
    np.testing.assert_array_equal(finite_mean(jnp.array([[1.0, jnp.nan], [3.0, 4.0]]), axis=0), [2.0, 4.0])


def test_dynamic_sampling_keeps_live_groups_first():
    live = jnp.array([0, 0, 1, 1, 0, 0, 0, 1, 1, 1], bool)
    np.testing.assert_array_equal(first_live_groups(live, 2, 3), [2, 3, 6, 7, 8, 9])
    np.testing.assert_array_equal(first_live_groups(live, 2, 4), [2, 3, 6, 7, 8, 9, 0, 1])


def reward_minus_one(rewards_QG, valid_QG, config):
    """An estimator of one's own, with a field of the config."""
    return rewards_QG - config.group_size


NOT_A_FUNCTION = 3


def test_an_estimator_of_ones_own_by_its_name():
    rewards = jnp.array([1.0, jnp.nan, 2.0, 2.0])
    result = advantages_of(rewards, 2, f"{__name__}:reward_minus_one")
    np.testing.assert_array_equal(result.advantages, [-1.0, 0.0, 0.0, 0.0])
    # a group that its advantages leave alone carries no gradient
    np.testing.assert_array_equal(result.live_B, [1, 0, 0, 0])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "group_sdt",
            "advantage_estimator='group_sdt': did you mean 'group_std'.*or your own as package.module:attrib",
        ),
        (f"{__name__}:NOT_A_FUNCTION", r"is a int: must be a function \(rewards_QG, valid_QG, config\)"),
    ],
)
def test_an_estimator_that_there_is_none_of(name, message):
    with pytest.raises(ConfigError, match=message):
        advantages_of(jnp.zeros(4), 2, name)


@pytest.mark.parametrize("estimator", ["group_std", "group_mean", "batch_std"])
def test_tokens_that_earn_nothing_of_their_own_have_their_completions_advantage(estimator):
    rewards = jnp.array([1.0, 3.0, jnp.nan, 0.0, 2.0, 2.0])
    mask = (jnp.arange(5) < jnp.array([3, 5, 2, 1, 4, 4])[:, None]).astype(jnp.int32)
    whole = advantages_of(rewards, 3, estimator)
    tokens = advantages_of(jnp.broadcast_to(rewards[:, None], mask.shape), 3, estimator, mask=mask)
    np.testing.assert_allclose(tokens.advantages, np.asarray(whole.advantages)[:, None] * mask, rtol=1e-6)
    np.testing.assert_array_equal(tokens.live_B, whole.live_B)
    np.testing.assert_array_equal(tokens.valid_B, whole.valid_B)


def test_a_token_is_compared_with_its_group_at_the_same_place():
    """By hand, in Python: what is still to come minus the group's mean at that position, over the deviation of what the
    completions earn as a whole."""
    to_come = np.array([[5.0, 4.0, 2.0, 2.0], [1.0, 0.0, 0.0, 0.0], [3.0, 3.0, 1.0, 0.0]])
    mask = np.array([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]])
    result = advantages_of(jnp.asarray(to_come), 3, "group_std", eps=0.0, std_floor=0.5, mask=jnp.asarray(mask))
    deviation = statistics.pstdev(to_come[:, 0])
    for n in range(4):
        mean = statistics.fmean(to_come[:, n])
        expected = [(value - mean) / deviation * real for value, real in zip(to_come[:, n], mask[:, n], strict=True)]
        np.testing.assert_allclose(result.advantages[:, n], expected, rtol=1e-6, atol=1e-7)

"""Advantages and the counters beside them."""

import statistics

import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.rl.advantages import finite_mean, first_live_groups, group_advantages, group_metrics


def test_published_form_has_ddof_zero():
    rewards = np.random.default_rng(0).normal(size=(3, 4))
    result = group_advantages(jnp.asarray(rewards.reshape(-1)), 4, "group_std", eps=0.0)
    for row, advantages in zip(rewards.tolist(), np.asarray(result.advantages_B).reshape(3, 4), strict=True):
        mean, std = statistics.fmean(row), statistics.pstdev(row)
        np.testing.assert_allclose(advantages, [(r - mean) / std for r in row], rtol=1e-5, atol=1e-6)


def test_the_divisor_is_the_floored_deviation_plus_eps():
    """Both constants where they are felt: a deviation below the floor, and one above it."""
    rewards = jnp.array([0.0, 0.01, 0.0, 2.0])
    result = group_advantages(rewards, 2, "group_std", eps=0.5, std_floor=0.25)
    np.testing.assert_allclose(result.advantages_B, [-0.005 / 0.75, 0.005 / 0.75, -1 / 1.5, 1 / 1.5], rtol=1e-6)
    batch = group_advantages(rewards, 2, "batch_std", eps=0.5, std_floor=3.0)
    np.testing.assert_allclose(batch.advantages_B, [-0.005 / 3.5, 0.005 / 3.5, -1 / 3.5, 1 / 3.5], rtol=1e-6)


def test_other_normalizations():
    rewards = jnp.array([0.0, 1.0, 2.0, 5.0])
    np.testing.assert_allclose(group_advantages(rewards, 2, "none").advantages_B, [-0.5, 0.5, -1.5, 1.5], rtol=1e-6)
    batch = group_advantages(rewards, 2, "batch_std", eps=0.0).advantages_B
    np.testing.assert_allclose(
        batch, np.array([-0.5, 0.5, -1.5, 1.5]) / statistics.pstdev([0.0, 1.0, 2.0, 5.0]), rtol=1e-5
    )


@pytest.mark.parametrize("normalization", ["group_std", "none", "batch_std"])
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 1 / 3, 2.7182817])
def test_equal_rewards_give_exactly_nothing(normalization, reward):
    rewards = jnp.full(16, reward, jnp.float32).at[-1].multiply(1 + 1e-7)
    result = group_advantages(rewards, 16, normalization)
    assert not np.asarray(result.advantages_B).any() and not np.asarray(result.live_B).any()


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize("normalization", ["group_std", "none", "batch_std"])
def test_a_reward_that_is_not_finite_spreads_nowhere(bad, normalization):
    rewards = jnp.array([1.0, bad, 0.0, 1.0, bad, bad, bad, 3.0])
    result = group_advantages(rewards, 4, normalization)
    assert np.isfinite(result.advantages_B).all()
    np.testing.assert_array_equal(result.valid_B, [1, 0, 1, 1, 0, 0, 0, 1])
    np.testing.assert_array_equal(result.live_B, [1, 0, 1, 1, 0, 0, 0, 0])
    assert float(result.advantages_B[1]) == 0.0 and not np.asarray(result.advantages_B[4:]).any()
    assert float(result.advantages_B[:4].sum()) == pytest.approx(0.0, abs=1e-6)
    if normalization == "group_std":
        alone = group_advantages(jnp.array([1.0, 0.0, 1.0]), 3).advantages_B
        np.testing.assert_allclose(result.advantages_B[jnp.array([0, 2, 3])], alone, rtol=1e-6)


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

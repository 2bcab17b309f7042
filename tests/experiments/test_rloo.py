"""RLOO's leave-one-out baseline, against loops over single completions."""

import jax.numpy as jnp
import numpy as np
import pytest
from rloo import leave_one_out

from deepseek_jax.rl.advantages import group_advantages
from deepseek_jax.rl.config import GRPOConfig

CONFIG = GRPOConfig(group_size=4, advantage_estimator="rloo:leave_one_out")


def by_loops(rewards_QG):
    """r_i minus the mean over the others that have a finite reward."""
    found = np.zeros_like(rewards_QG)
    for q, rewards in enumerate(rewards_QG):
        for i, reward in enumerate(rewards):
            others = [other for j, other in enumerate(rewards) if j != i and np.isfinite(other)]
            if np.isfinite(reward) and others:
                found[q, i] = reward - sum(others) / len(others)
    return found


def test_each_is_compared_with_the_mean_of_the_others():
    rewards = np.random.default_rng(0).normal(size=(5, 4))
    rewards[1, 2], rewards[2, :3] = np.nan, np.inf  # a failed reward, and a group with a single good one
    result = group_advantages(jnp.asarray(rewards.reshape(-1)), CONFIG)
    np.testing.assert_allclose(result.advantages.reshape(5, 4), by_loops(rewards), rtol=1e-5, atol=1e-6)
    assert not np.asarray(result.live_B).reshape(5, 4)[2].any()


@pytest.mark.parametrize("group_size", [2, 16])
def test_it_is_the_centered_reward_times_g_over_g_minus_1(group_size):
    """The identity by which RLOO differs from Dr. GRPO in a factor alone."""
    rewards_QG = jnp.asarray(np.random.default_rng(1).normal(size=(3, group_size)), jnp.float32)
    centered_QG = rewards_QG - rewards_QG.mean(1, keepdims=True)
    found_QG = leave_one_out(rewards_QG, jnp.ones(rewards_QG.shape, bool), CONFIG)
    np.testing.assert_allclose(found_QG, centered_QG * group_size / (group_size - 1), rtol=1e-4, atol=1e-6)

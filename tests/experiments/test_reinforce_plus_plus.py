"""REINFORCE++ against the paper's formula, token by token, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import reinforce_plus_plus

from deepseek_jax.rl.advantages import group_advantages
from deepseek_jax.rl.config import GRPOConfig
from deepseek_jax.rl.rewards import reward_to_go

B, N, BETA = 6, 5, 0.3


def formula(rewards_B, old_logp_BN, ref_logp_BN, lengths_B):
    """A_t = r - beta sum_{i >= t} log(pi_old / pi_ref)_i, normalized over every token of the batch."""
    advantages = {}
    for b in range(B):
        for t in range(lengths_B[b]):
            kl = sum(old_logp_BN[b, i] - ref_logp_BN[b, i] for i in range(t, lengths_B[b]))
            advantages[b, t] = rewards_B[b] - BETA * kl
    values = np.array(list(advantages.values()))
    found = np.zeros((B, N))
    for (b, t), value in advantages.items():
        found[b, t] = (value - values.mean()) / values.std()
    return found


def test_advantages_are_the_papers():
    rng = np.random.default_rng(0)
    lengths_B = np.array([5, 3, 1, 4, 2, 5])
    mask_BN = (np.arange(N) < lengths_B[:, None]).astype(np.int32)
    rewards_B, old_BN, ref_BN = rng.normal(size=B), *rng.normal(size=(2, B, N))
    penalty_BN = jnp.asarray(-BETA * (old_BN - ref_BN))
    rewards = jnp.asarray(rewards_B)[:, None] + reward_to_go(penalty_BN, jnp.asarray(mask_BN))
    config = GRPOConfig(group_size=2, advantage_estimator="reinforce_plus_plus:normalized_over_batch")
    found = group_advantages(rewards, config, jnp.asarray(mask_BN)).advantages
    np.testing.assert_allclose(found, formula(rewards_B, old_BN, ref_BN, lengths_B), rtol=1e-5, atol=1e-5)


def test_groups_do_not_matter_and_failed_rewards_do_not_count():
    """Siblings that earn the same still train: they are compared with the batch."""
    rewards = jnp.array([1.0, 1.0, 0.0, 0.0, jnp.nan, 2.0])
    config = GRPOConfig(group_size=2, advantage_estimator="reinforce_plus_plus:normalized_over_batch")
    result = group_advantages(rewards, config)
    finite = np.array([1.0, 1.0, 0.0, 0.0, 2.0])
    expected = (finite - finite.mean()) / finite.std()
    np.testing.assert_allclose(result.advantages, [*expected[:4], 0.0, expected[4]], rtol=1e-5)
    np.testing.assert_array_equal(result.live_B, [1, 1, 1, 1, 0, 1])


def test_the_trainer_pays_the_kl_out_of_the_reward():
    """The config's three fields, which make the rewards those of tokens and take the KL out of the loss."""
    section = {name: value for name, value in reinforce_plus_plus.get_config().grpo.to_dict().items() if name != "kind"}
    config = GRPOConfig.from_dict({name: value for name, value in section.items() if name != "loop" and name != "eval"})
    assert config.has_reference and config.kl_in_reward and not config.kl_in_loss
    assert jax.tree.leaves(config.kl_coefficient) == [0.01]

"""The cost of thinking, token by token, and the advantages [B, N] that it gives."""

import jax.numpy as jnp
import numpy as np
from length_aware_reward import COST, get_config

from deepseek_jax.rl.advantages import group_advantages
from deepseek_jax.rl.config import GRPOConfig
from deepseek_jax.rl.rewards import build_rewards
from deepseek_jax.rl.tasks import ParityTask, base
from deepseek_jax.rl.tasks.parity import Bits

WIDTH = 20
TASK = ParityTask(bits=8)
TEXTS = [
    "<think></think><answer>1</answer>.",  # right
    "<think>1101</think><answer>1</answer>.",  # right, after four tokens
    "<think>11</think><answer>0</answer>.",  # wrong, after two
    "<think>110</think>1.",  # no answer block: every token costs
]


def test_rewards_and_advantages_by_hand():
    encoded = [base.TOKENIZER.encode(text.removesuffix("."), eos=True, allow_special=True) for text in TEXTS]
    completions_BN = jnp.asarray([ids + [base.PAD] * (WIDTH - len(ids)) for ids in encoded])
    mask_BN = jnp.asarray([[1] * len(ids) + [0] * (WIDTH - len(ids)) for ids in encoded])
    instances = Bits(jnp.tile(jnp.array([1, 0, 1, 1, 0, 0, 0, 0]), (4, 1)))  # parity 1
    names = dict(get_config().grpo.rewards)
    config = GRPOConfig(
        group_size=4, rewards=tuple(names.items()), advantage_estimator="group_mean", prompts_per_rollout=16
    )
    rewards = build_rewards(config, TASK)
    components = rewards.graph_components(TASK, instances, completions_BN, mask_BN)

    outcome, expected = [2.0, 2.0, 1.0, 0.0], np.zeros((4, WIDTH))
    for b, text in enumerate(TEXTS):
        thinks = [False] * WIDTH
        if b < 3:
            length = len(text.partition("<think>")[2].partition("</think>")[0])
            thinks[1 : 1 + length] = [True] * length
        else:
            thinks[: len(encoded[b])] = [True] * len(encoded[b])
        for n in range(WIDTH):
            expected[b, n] = outcome[b] - COST * sum(thinks[n:])
    total_BN = rewards.total(components, mask_BN)
    np.testing.assert_allclose(total_BN, expected, rtol=1e-6, atol=1e-6)

    found_BN = np.asarray(group_advantages(total_BN, config, mask_BN).advantages)
    np.testing.assert_allclose(found_BN, (expected - expected.mean(0)) * np.asarray(mask_BN), rtol=1e-5, atol=1e-6)
    # while the second one thinks, each token less to come raises what is still earned
    assert (np.diff(total_BN[1, 1:6]) > 0).all()

"""REINFORCE++: KL in the reward, and advantages normalized over the whole batch (Hu 2025, arXiv 2501.03262).

    python -m deepseek_jax --config=experiments/ablations/reinforce_plus_plus.py

A token's advantage is the completion's reward less the KL that its tokens from here on pay,
A_t = r - beta sum_{i >= t} log(pi_old / pi_ref)_i, and then (A - mean) / std over all tokens of the batch: no group
enters. The trainer pays the KL out of the reward (`kl_in_reward`), which makes rewards those of tokens; the function
below does the rest.

Measured as in r1_minute (seed 0, two CPU cores, jax 0.10.2): 63 s on an idle machine, compilation included.

    held out            before    after     GRPO in r1_minute
    greedy accuracy      0.805    1.000     1.000
    sampled accuracy     0.672    0.969     0.969
    response length     10.234   15.820    15.859     tokens
"""

import jax
import jax.numpy as jnp
from r1_minute import get_config as r1_minute

from deepseek_jax.rl.config import GRPOConfig


def normalized_over_batch(rewards_QG: jax.Array, valid_QG: jax.Array, config: GRPOConfig) -> jax.Array:
    """(A - mean(A)) / (std(A) + 1e-8) over everything valid: all tokens of rewards [Q, G, N]. float32, that shape."""
    del config
    count = jnp.maximum(valid_QG.sum(), 1)
    mean = jnp.where(valid_QG, rewards_QG, 0.0).sum() / count
    centered_QG = jnp.where(valid_QG, rewards_QG - mean, 0.0)
    return centered_QG / (jnp.sqrt((centered_QG**2).sum() / count) + 1e-8)


def get_config():
    config = r1_minute()
    config.grpo.advantage_estimator = "reinforce_plus_plus:normalized_over_batch"
    config.grpo.kl_in_reward = True
    config.grpo.kl_estimator = "k1"
    config.grpo.kl_coefficient = 0.01
    return config

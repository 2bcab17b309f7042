"""RLOO: each completion is compared with the mean of the others of its group (Ahmadian et al. 2024, arXiv 2402.14740).

    python -m deepseek_jax --config=experiments/ablations/rloo.py

A_i = r_i - mean of r_j over j != i: the baseline does not hold the completion's own reward, so that it is unbiased, and
nothing is divided by a deviation. The config names the function below; the trainer knows nothing of it.

Measured as in r1_minute (seed 0, two CPU cores, jax 0.10.2): 59 s on an idle machine, compilation included.

    held out            before    after     GRPO in r1_minute
    greedy accuracy      0.805    1.000     1.000
    sampled accuracy     0.672    0.973     0.969
    response length     10.234   15.820    15.859     tokens
"""

import jax
import jax.numpy as jnp
from r1_minute import get_config as r1_minute

from deepseek_jax.rl.config import GRPOConfig


def leave_one_out(rewards_QG: jax.Array, valid_QG: jax.Array, config: GRPOConfig) -> jax.Array:
    """A_i = r_i - 1/(G-1) sum_{j != i} r_j over the valid rewards of a group; 0 for one alone. float32 [Q, G]."""
    del config
    rewards_QG = jnp.where(valid_QG, rewards_QG, 0.0)
    others_Q1 = valid_QG.sum(1, keepdims=True) - 1
    baseline_QG = (rewards_QG.sum(1, keepdims=True) - rewards_QG) / jnp.maximum(others_Q1, 1)
    return jnp.where(others_Q1 > 0, rewards_QG - baseline_QG, 0.0)


def get_config():
    config = r1_minute()
    config.grpo.advantage_estimator = "rloo:leave_one_out"
    return config

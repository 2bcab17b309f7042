"""A reward that each token earns or pays: thinking costs, so that chains get no longer than the answer needs.

    python -m deepseek_jax --config=experiments/ablations/length_aware_reward.py

Every token inside <think>…</think> costs `COST` of a right answer. The reward is in the graph and given to tokens, so
that advantages are [B, N]: a token that is followed by little thinking has a larger one than a token that is followed
by much. Malformed completions pay for every token, so that leaving a tag out saves nothing.

Measured as in r1_minute (seed 0, two CPU cores, jax 0.10.2): 63 s on an idle machine, compilation included. Sampled
answers are a fifth shorter, and the guesses among them cost accuracy; the greedy answer still thinks to the end.

    held out            before    after     GRPO in r1_minute
    greedy accuracy      0.805    1.000     1.000
    sampled accuracy     0.672    0.793     0.969
    response length     10.234   12.652    15.859     tokens
"""

import jax
import jax.numpy as jnp
from r1_minute import get_config as r1_minute

from deepseek_jax.rl.rewards import Reward
from deepseek_jax.rl.tasks import base

COST = 0.05


def thinking(task: base.Task, instances: base.Instance, completions_BN: jax.Array, mask_BN: jax.Array) -> jax.Array:
    """-1 for each token of the chain of thought, 0 for the others; -1 for all if the format fails. float32 [B, N]."""
    del task, instances
    parsed = base.parse(completions_BN, mask_BN)
    return -jnp.where(parsed.ok_B[:, None], parsed.think_BN, mask_BN > 0).astype(jnp.float32)


THINKING = Reward("thinking", thinking, in_graph=True, per_token=True)


def get_config():
    config = r1_minute()
    config.grpo.rewards = {"accuracy": 1.0, "format": 1.0, "length_aware_reward:THINKING": COST}
    return config

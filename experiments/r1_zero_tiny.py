"""R1-Zero at tiny size: reinforcement learning straight on the pre-trained base, without a cold start.

    python -m deepseek_jax --config=experiments/r1_zero_tiny.py

The base has read worked solutions among other text and reasons in seven answers of ten by itself. Measured (seed 0, two
CPU cores, jax 0.10.2, on held-out problems; before the balance loss was summed over layers and RL's shuffles had keys
of their own): sampled accuracy 0.849 before RL, 0.993 after 80 steps; response length 20.5 to 26.0 tokens.

The honest contrast is the same RL on random weights, where no completion ever earns a reward and nothing is learnt:

    python -m deepseek_jax --config=experiments/r1_zero_tiny.py --workdir=runs/r1_zero_random --config.stages="('before', 'grpo', 'after')"

Measured: reward 0.000 in all 40 rollouts, greedy accuracy 0.000 before and after, and from the fifth rollout on the run
says that 93% of the completions hit the length limit and earn nothing.
"""

from r1_tiny import get_config as r1_tiny


def get_config():
    config = r1_tiny()
    config.stages = ("pretrain", "before", "grpo", "after")
    return config

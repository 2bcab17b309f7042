"""R1-Zero at tiny size: reinforcement learning straight on the pre-trained base, without a cold start.

    python -m deepseek_jax --config=experiments/r1_zero_tiny.py

The base has read worked solutions among other text, so that now and then it reasons by itself and GRPO has something to
reward. The honest contrast is the same RL on random weights, where no completion ever earns a reward and nothing is learnt:

    python -m deepseek_jax --config=experiments/r1_zero_tiny.py --workdir=runs/r1_zero_random --config.stages="('before', 'grpo', 'after')"

Hardware: two CPU cores.
"""

from r1_tiny import get_config as r1_tiny


def get_config():
    config = r1_tiny()
    config.stages = ("pretrain", "before", "grpo", "after")
    return config

"""R1-Zero at tiny size: reinforcement learning straight on the pre-trained base, without a cold start.

    python -m deepseek_jax --config=experiments/r1_zero_tiny.py

Three in ten of the solutions that the base has read among other text are worked out, so that it reasons now and then by itself and
GRPO has something to reward. The honest contrast is the same RL on random weights, where no completion ever earns a reward and
nothing is learnt; the run says so:

    python -m deepseek_jax --config=experiments/r1_zero_tiny.py --workdir=runs/r1_zero_random --config.stages="('before', 'grpo', 'after')"
"""

from r1_tiny import get_config as r1_tiny


def get_config():
    config = r1_tiny()
    config.stages = ("pretrain", "before", "grpo", "after")
    config.pretrain.task_documents.cot_probability = 0.3
    config.pretrain.train.steps = 320
    return config

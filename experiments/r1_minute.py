"""r1_tiny in a minute: the base that experiments/ablations compare with.

    python -m deepseek_jax --config=experiments/r1_minute.py

The network is r1_tiny's. The parity is of 10 bits, pre-training sees half of its solutions worked out, and the
cold start is left out.

Measured (seed 0, two CPU cores, jax 0.10.2): 58 s on an idle machine, compilation included.

    held out            before    after 40 steps
    greedy accuracy      0.805    1.000
    sampled accuracy     0.672    0.969
    response length     10.234   15.859     tokens
"""

from r1_tiny import get_config as r1_tiny


def get_config():
    config = r1_tiny()
    config.task = {"name": "parity", "bits": 10}
    config.stages = ("pretrain", "before", "grpo", "after")
    for stage in ("pretrain", "before", "after"):
        config[stage].seq_len = 58  # two demonstrations of 29 tokens
        config[stage].batch_size = 32
    config.pretrain.data.sources = ({"name": "task", "format": "tokens"},)
    config.pretrain.task_documents = {"count": 4096, "cot_probability": 0.5}
    config.pretrain.train.steps = 160
    config.pretrain.train.checkpoint_every = 0
    config.grpo.prompts_per_rollout = 8
    config.grpo.group_size = 8
    config.grpo.steps = 40
    config.grpo.loop = {"log_every": 1, "eval_every": 0, "checkpoint_every": 0}
    for stage in ("before", "after"):
        config[stage].eval = {"problems": 128, "sampled_problems": 32, "samples": 8}
        del config[stage].data
    return config

"""The gradual R1 curve: length first, then accuracy, on chains of modular arithmetic.

    python -m deepseek_jax --config=experiments/r1_chain_tiny.py

The cold start shows chains that write down every value, every second, every fifth, or none. RL first finds that
writing more pays, then makes the steps themselves reliable.
"""

from r1_tiny import get_config as r1_tiny


def get_config():
    config = r1_tiny()
    config.task = {"name": "chain", "operations": 10, "cot_probability": 0.1}
    for stage in ("pretrain", "sft", "before", "after"):
        config[stage].seq_len = 100  # two demonstrations of 50 tokens
    config.pretrain.task_documents.cot_probability = 0.5
    config.pretrain.train.steps = 600
    config.sft.task_documents.cot_probability = 0.1
    config.sft.train.steps = 120
    config.grpo.grpo.steps = 240
    config.grpo.loop.eval_every = 10
    return config

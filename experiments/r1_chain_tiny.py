"""The gradual R1 curve: length first, then accuracy, on chains of modular arithmetic.

    python -m deepseek_jax --config=experiments/r1_chain_tiny.py

The cold start shows chains that write down every value, every second, every fifth, or none. RL first finds that
writing more pays, then makes the steps themselves reliable.

Measured (seed 0, two CPU cores, jax 0.10.2), seven minutes when nothing else runs. Sampled in training:

    RL step                 8      38      88     128
    length, tokens       12.5    25.9    25.9    26.0
    accuracy             0.12    0.57    0.64    0.73

    held out           before   after 160 steps
    greedy accuracy     0.162   0.930
    maj@16              0.184   0.934
    pass@16             0.852   0.977
    response length      11.9    26.0

In an earlier run, half of the pre-training chains skipped steps. The network never learned the single step, and RL then
removed the reasoning (length 12 to 6 in 44 rollouts): it makes a step reliable, it does not teach one.
"""

from r1_tiny import get_config as r1_tiny


def get_config():
    config = r1_tiny()
    config.task = {"name": "chain", "operations": 10, "cot_probability": 0.1}
    for stage in ("pretrain", "sft", "before", "after"):
        config[stage].seq_len = 100  # two demonstrations of 50 tokens
    config.pretrain.task_documents.cot_probability = 1.0  # the single step has to be there: RL does not teach it
    config.pretrain.train.steps = 420
    config.sft.task_documents.cot_probability = 0.1
    config.sft.train.steps = 80
    config.grpo.steps = 160
    config.grpo.loop.eval_every = 10
    return config

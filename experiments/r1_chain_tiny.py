"""The gradual R1 curve: length first, then accuracy, on chains of modular arithmetic.

    python -m deepseek_jax --config=experiments/r1_chain_tiny.py

The cold start shows chains that write down every value, every second, every fifth, or none. RL first finds that
writing more pays, then makes the steps themselves reliable.

Measured (seed 0, two CPU cores shared with other work, jax 0.10.2; before the balance loss was summed over layers and
RL's shuffles had keys of their own): 426 s in all. Sampled in training, at RL step 8, 38, 88, 128: length 12.4, 25.8,
25.9, 25.9 tokens; accuracy 0.13, 0.57, 0.70, 0.81. Held out, before and after 160 steps: greedy accuracy 0.174 and
0.963, maj@16 0.142 and 0.969, pass@16 0.852 and 0.992, response length 11.5 and 25.9.

With half of the pre-training chains leaping over steps the single step was never learnt, and RL then removed the
reasoning instead (length 12 to 6 in 44 rollouts): it makes a step reliable, it does not teach one.
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
    config.grpo.grpo.steps = 160
    config.grpo.loop.eval_every = 10
    return config

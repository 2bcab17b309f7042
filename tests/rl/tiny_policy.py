"""The policy that the tests of reinforcement learning share: MLA with q-LoRA, grouped routing, shared experts, bias and
an MTP module."""

import jax
import jax.numpy as jnp

from deepseek_jax.model.config import MLAConfig, ModelConfig, MoEConfig
from deepseek_jax.model.transformer import Transformer, init_variables
from deepseek_jax.rl.config import GRPOConfig
from deepseek_jax.rl.grpo import GRPO
from deepseek_jax.rl.rewards import Reward, RewardSet
from deepseek_jax.rl.tasks.parity import ParityTask
from deepseek_jax.training.optimizer import OptimizerConfig, build_optimizer
from deepseek_jax.training.schedules import constant

TASK = ParityTask(bits=8)
MODEL = Transformer(
    ModelConfig(
        vocab_size=272,
        hidden_size=32,
        num_layers=2,
        intermediate_size=48,
        first_k_dense=1,
        mtp_depth=1,
        init_std=0.2,
        attention=MLAConfig(
            num_heads=2, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8
        ),
        moe=MoEConfig(
            num_experts=8,
            top_k=2,
            intermediate_size=16,
            num_shared_experts=1,
            num_groups=4,
            topk_groups=2,
            routed_scaling_factor=2.5,
        ),
    )
)
CONFIG = GRPOConfig(
    group_size=4,
    prompts_per_rollout=4,
    num_minibatches=1,
    steps=4,
    kl_coefficient=0.01,
    reference_refresh_every=2,
    learning_rate=1e-3,
    max_prompt_length=TASK.prompt_length,
    max_completion_length=6,
    rewards=(("accuracy", 1.0), ("format", 1.0)),
    replay_experts=True,
    bias_update_speed=1e-3,
)


def digit_share(prompt: str, completion: str, answer: str) -> float:
    """A Python reward that random weights can earn: the share of characters below 'A'."""
    return sum(c < "A" for c in completion) / max(len(completion), 1)


def digit_share_in_graph(task, instances, completions_BN, mask_BN):
    text_BN = (mask_BN > 0) & (completions_BN != 258)
    return (text_BN & (completions_BN < ord("A"))).sum(1) / jnp.maximum(text_BN.sum(1), 1)


def rewards_of(function, in_graph):
    return RewardSet((Reward("digits", function, in_graph),), (1.0,))


def grpo_of(config=CONFIG, rewards=None, model=MODEL, task=TASK, eps=1e-5):
    # eps: a first step of Adam is the sign of the gradient, even of one that is rounding alone.
    optimizer = build_optimizer(
        OptimizerConfig(learning_rate=constant(config.learning_rate), weight_decay=0.0, eps=eps)
    )
    return GRPO(model, task, config, rewards or rewards_of(digit_share_in_graph, True), optimizer)


def random_variables(model=MODEL):
    """Random weights, and biases that change which experts are chosen."""
    variables = init_variables(model, jax.random.key(0))
    bias = jax.tree.map(lambda b: jax.random.normal(jax.random.key(1), b.shape) * 0.1, variables["router_bias"])
    return {"params": variables["params"], "router_bias": bias}

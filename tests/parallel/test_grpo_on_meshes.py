"""Reinforcement learning and generation on a mesh: the same tokens, the same update."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import MESHES, assert_close, jit, on

from deepseek_jax.generation.generate import generate
from deepseek_jax.generation.sampling import SamplingConfig
from deepseek_jax.model.config import MLAConfig, ModelConfig, MoEConfig, RopeConfig
from deepseek_jax.model.transformer import Transformer, init_variables
from deepseek_jax.parallel.arrays import variables_sharding
from deepseek_jax.rl.config import GRPOConfig
from deepseek_jax.rl.grpo import GRPO, grpo_state
from deepseek_jax.rl.rewards import Reward, RewardSet
from deepseek_jax.rl.rollout import roll_out
from deepseek_jax.rl.tasks import build_task
from deepseek_jax.training.optimizer import OptimizerConfig, build_optimizer
from deepseek_jax.training.schedules import Schedule

MODEL = Transformer(
    ModelConfig(
        vocab_size=272,
        hidden_size=16,
        num_layers=1,
        intermediate_size=24,
        attention=MLAConfig(
            num_heads=2, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, q_lora_rank=16
        ),
        moe=MoEConfig(num_experts=8, top_k=2, intermediate_size=8, num_shared_experts=1, num_groups=4, topk_groups=2),
        rope=RopeConfig(theta=1000.0),
        init_std=0.2,
    )
)
TASK = build_task({"name": "parity", "bits": 8})
CONFIG = GRPOConfig(
    group_size=4,
    prompts_per_rollout=4,
    steps=1,
    learning_rate=1e-3,
    kl_coefficient=0.01,
    max_prompt_length=TASK.prompt_length,
    max_completion_length=6,
)


def share_of_small_ids(task, instances, completions_BN, mask_BN):
    return jnp.sum((completions_BN < 100) & (mask_BN > 0), axis=1) / jnp.maximum(jnp.sum(mask_BN, axis=1), 1)


def grpo_on(sizes) -> GRPO:
    optimizer = build_optimizer(OptimizerConfig(learning_rate=Schedule(1e-3), weight_decay=0.0, eps=1e-3))
    rewards = RewardSet((Reward("small", share_of_small_ids, True),), (1.0,))
    return GRPO(on(sizes, MODEL), TASK, CONFIG, rewards, optimizer, loss_chunk=64)


@pytest.fixture(scope="module")
def variables():
    return init_variables(MODEL, jax.random.key(0))


@pytest.fixture(scope="module")
def rollout(variables):
    roll = functools.partial(roll_out, MODEL, task=TASK, config=CONFIG, num_prompts=4)
    _, trajectories = jit(lambda variables, key: roll(variables, key=key))(variables, jax.random.key(2))
    return trajectories


def update_on(sizes, variables, trajectories):
    grpo = grpo_on(sizes)
    state = grpo_state(grpo.model, variables, grpo.optimizer, jax.random.key(3))
    advantages, live = jnp.linspace(-1.0, 2.0, 16), jnp.ones(16, bool)  # no zero sum: a loss to compare
    state, metrics = jit(grpo._update)(state, trajectories, advantages, live)
    assert metrics["kl"] < 1e-12  # the policy is still the reference: rounding, with which nothing can be compared
    return state.params, state.router_bias, {name: metrics[name] for name in ("loss", "grad_norm", "entropy")}


@pytest.fixture(scope="module")
def one_device(variables, rollout):
    return update_on(None, variables, rollout)


@pytest.mark.parametrize("name", MESHES)
def test_the_update_is_the_same(name, variables, rollout, one_device):
    got = update_on(MESHES[name], variables, rollout)
    assert_close((got[0], got[2]), (one_device[0], one_device[2]), 1e-5)
    jax.tree.map(np.testing.assert_array_equal, got[1], one_device[1])


@functools.cache
def generated(name: str | None, temperature: float):
    """(tokens, lengths, experts) that a mesh, or one device, generates for eight prompts, the last of them empty."""
    sampling = SamplingConfig(max_new_tokens=8, eos_id=-1, pad_id=0, temperature=temperature)
    prompts = jnp.asarray(np.random.default_rng(0).integers(1, 256, (8, 4)), jnp.int32)
    lengths = jnp.asarray([4, 3, 4, 1, 2, 4, 4, 0], jnp.int32)
    model = on(None if name is None else MESHES[name], MODEL)
    weights = jax.device_put(init_variables(MODEL, jax.random.key(0)), variables_sharding(model))
    made = jit(functools.partial(generate, model, sampling=sampling, return_experts=True))(
        weights, prompts, lengths, jax.random.key(1)
    )
    return jax.tree.map(np.asarray, (made.tokens_BN, made.lengths_B, made.expert_ids_LBTK))


@pytest.mark.parametrize(
    ("name", "temperature"),
    [("fsdp2 expert4", 0.0), ("fsdp2 expert4", 1.0), ("fsdp2 tensor2 expert2", 1.0), ("context4 fsdp2", 1.0)],
)
def test_generation_gives_the_same_tokens(name, temperature):
    one_device = generated(None, temperature)
    jax.tree.map(np.testing.assert_array_equal, generated(name, temperature), one_device)
    assert len(np.unique(one_device[0])) > 8


def test_a_whole_iteration_is_the_same(variables):
    results = []
    for sizes in (None, {"fsdp": 2, "expert": 4}):
        grpo = grpo_on(sizes)
        state = grpo_state(grpo.model, variables, grpo.optimizer, jax.random.key(2))
        places = jax.tree.map(lambda x: x.sharding, state)
        state, metrics, samples, rewards_B = grpo.iteration(state)
        if sizes is not None:
            assert jax.tree.all(
                jax.tree.map(lambda x, place: x.sharding.is_equivalent_to(place, x.ndim), state, places)
            )
        np.testing.assert_allclose(metrics["first_ratio_error"], 0, atol=1e-5)
        results.append((samples.trajectories.completions_BN, rewards_B, state.params, metrics["grad_norm"]))
    np.testing.assert_array_equal(results[0][0], results[1][0])
    assert_close(results[1][1:], results[0][1:], 1e-5)

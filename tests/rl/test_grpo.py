"""One GRPO iteration on the real network: MLA with q-LoRA, grouped routing, shared experts, bias and an MTP module."""

import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.errors import RewardError
from deepseek_jax.model.config import MLAConfig, ModelConfig, MoEConfig
from deepseek_jax.model.transformer import Transformer, init_variables
from deepseek_jax.precision import recipe
from deepseek_jax.rl import loop
from deepseek_jax.rl.config import GRPOConfig
from deepseek_jax.rl.evaluate import EvalConfig
from deepseek_jax.rl.grpo import GRPO, grpo_state
from deepseek_jax.rl.rewards import Reward, RewardSet, build_rewards
from deepseek_jax.rl.rollout import completion_log_probs
from deepseek_jax.rl.tasks.base import to_texts
from deepseek_jax.rl.tasks.parity import ParityTask
from deepseek_jax.training.checkpoints import load_variables
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
        attention=MLAConfig(num_heads=2, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8),
        moe=MoEConfig(num_experts=8, top_k=2, intermediate_size=16, num_shared_experts=1, num_groups=4, topk_groups=2, routed_scaling_factor=2.5),
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
    bias_update_rate=1e-3,
)


def digit_share(prompt: str, completion: str, answer: str) -> float:
    """A Python reward that random weights can earn: the share of characters below 'A'."""
    return sum(c < "A" for c in completion) / max(len(completion), 1)


def digit_share_in_graph(task, instances, completions_BN, mask_BN):
    text_BN = (mask_BN > 0) & (completions_BN != 258)
    return (text_BN & (completions_BN < ord("A"))).sum(1) / jnp.maximum(text_BN.sum(1), 1)


def rewards_of(function, in_graph):
    return RewardSet((Reward("digits", function, in_graph),), (1.0,))


def grpo_of(config=CONFIG, rewards=None, model=MODEL):
    # eps: a first step of Adam is the sign of the gradient, even of one that is rounding alone.
    optimizer = build_optimizer(OptimizerConfig(learning_rate=constant(config.learning_rate), weight_decay=0.0, eps=1e-5))
    return GRPO(model, TASK, config, rewards or rewards_of(digit_share_in_graph, True), optimizer)


@pytest.fixture(scope="module")
def variables():
    variables = init_variables(MODEL, jax.random.key(0))
    bias = jax.tree.map(lambda b: jax.random.normal(jax.random.key(1), b.shape) * 0.1, variables["router_bias"])
    return {"params": variables["params"], "router_bias": bias}


@pytest.fixture(scope="module")
def grpo():
    return grpo_of()


@pytest.fixture(scope="module")
def first(grpo, variables):
    """(state, metrics, samples, rewards) after one iteration."""
    return grpo.iteration(grpo_state(MODEL, variables, grpo.optimizer, jax.random.key(2)))


def test_first_ratio_is_one_with_and_without_replay(first, grpo, variables):
    _, metrics, samples, _ = first
    assert float(metrics["first_ratio_error"]) < 1e-5
    for trajectories in (samples.trajectories, samples.trajectories.replace(expert_ids_BLTK=None)):
        logp_BN, entropy_BN, _ = completion_log_probs(MODEL, variables, trajectories, 1.0, 64)
        error = np.abs(np.asarray(logp_BN - trajectories.old_logp_BN)) * np.asarray(trajectories.mask_BN)
        assert error.max() < 1e-5
        assert float(entropy_BN.min()) >= 0
    assert int(samples.trajectories.mask_BN.sum()) > 16  # there was something to compare


def test_an_iteration_in_fp8(variables):
    """Sampling, both passes and the update in FP8. Sampler and update round differently, so that the first ratio is near one, not one."""
    grpo = grpo_of(model=MODEL.clone(precision=recipe("fp8_deepseek")))
    state, metrics, samples, _ = grpo.iteration(grpo_state(grpo.model, variables, grpo.optimizer, jax.random.key(2)))
    assert int(state.step) == 1 and int(state.skipped) == 0
    assert 1e-5 < float(metrics["first_ratio_error"]) < 0.5 and float(metrics["grad_norm"]) > 0
    assert int(samples.trajectories.mask_BN.sum()) > 16
    for (path, new), old in zip(jax.tree_util.tree_leaves_with_path(state.params), jax.tree.leaves(variables["params"]), strict=True):
        assert new.dtype == old.dtype == jnp.float32 and jnp.isfinite(new).all()
        assert jnp.any(new != old) or "mtp" in jax.tree_util.keystr(path), path


def test_replay_routes_through_the_given_experts(first, variables):
    trajectories = first[2].trajectories
    other = trajectories.replace(expert_ids_BLTK=(trajectories.expert_ids_BLTK + 1) % 8)
    routed, _, routing = completion_log_probs(MODEL, variables, other, 1.0, 64)
    own, _, _ = completion_log_probs(MODEL, variables, trajectories, 1.0, 64)
    assert (jnp.swapaxes(routing.expert_ids_LBTK, 0, 1) == other.expert_ids_BLTK).all()
    assert float(jnp.abs((routed - own) * trajectories.mask_BN).max()) > 1e-3


def test_loss_starts_at_zero_and_the_gradient_does_not(first):
    """Centred advantages at ratio 1 cancel in the value, not in the gradient."""
    _, metrics, _, _ = first
    assert float(metrics["reward_std"]) > 0.01
    assert abs(float(metrics["pg_loss"])) < 1e-5
    assert float(metrics["kl"]) < 1e-6  # the reference is the policy
    assert float(metrics["grad_norm"]) > 1e-3


def test_an_iteration_changes_weights_bias_and_counters(first, variables):
    state = first[0]
    assert int(state.step) == 1 and int(state.rollouts) == 1 and int(state.skipped) == 0
    bias = state.router_bias["moe_layers"]["ffn"]["router"]["bias"] - variables["router_bias"]["moe_layers"]["ffn"]["router"]["bias"]
    assert 0 < float(jnp.abs(bias).max()) <= 1e-3 + 1e-6
    assert float(jnp.abs(state.params["head"]["kernel"] - variables["params"]["head"]["kernel"]).max()) > 0
    same_mtp = jax.tree.map(lambda a, b: bool((a == b).all()), state.params["mtp_0"], variables["params"]["mtp_0"])
    assert all(jax.tree.leaves(same_mtp))  # reinforcement learning leaves the MTP module alone


def test_reference_is_refreshed_when_due(first, grpo, variables):
    """Every 2 steps: not after the first, the policy itself after the second, kept by the third."""
    state = first[0]
    head = variables["params"]["head"]["kernel"]
    assert bool((state.reference["params"]["head"]["kernel"] == head).all())
    second = grpo.iteration(jax.tree.map(jnp.copy, state))[0]
    chex.assert_trees_all_equal(second.reference, second.variables)
    third = grpo.iteration(jax.tree.map(jnp.copy, second))[0]
    np.testing.assert_array_equal(third.reference["params"]["head"]["kernel"], second.reference["params"]["head"]["kernel"])
    assert float(jnp.abs(third.params["head"]["kernel"] - second.params["head"]["kernel"]).max()) > 0


def test_python_rewards_give_what_in_graph_rewards_give(first, grpo, variables):
    host = grpo_of(rewards=rewards_of(digit_share, False))
    state = grpo_state(MODEL, variables, host.optimizer, jax.random.key(2))
    samples = host.sample(state)
    texts = to_texts(samples.trajectories.completions_BN, samples.trajectories.mask_BN)
    parts = host.rewards.text_parts([""] * len(texts), texts, [""] * len(texts))
    in_graph = np.asarray(digit_share_in_graph(TASK, samples.instances, samples.trajectories.completions_BN, samples.trajectories.mask_BN))
    assert np.array_equal(np.asarray(samples.trajectories.completions_BN), np.asarray(first[2].trajectories.completions_BN))
    state, metrics, _, rewards_B = host.learn(state, samples, {"digits": jnp.asarray(in_graph)})
    np.testing.assert_allclose(rewards_B, first[3], atol=1e-6)
    chex.assert_trees_all_close(state.params, first[0].params, atol=1e-6)
    assert parts["digits"].shape == in_graph.shape and np.isfinite(parts["digits"]).all()

    # All rewards fail: the weights stay, but for the rounding of a divergence from themselves, and it is counted.
    before = grpo_state(MODEL, variables, host.optimizer, jax.random.key(2))
    after, metrics, _, _ = host.learn(before, samples, {"digits": jnp.full(16, jnp.nan)})
    assert float(metrics["non_finite_rewards"]) == 16 and float(metrics["zero_variance_fraction"]) == 1
    chex.assert_trees_all_close(after.params, variables["params"], rtol=0, atol=1e-3 * host.config.learning_rate)


def test_a_killed_run_goes_on_bit_for_bit(grpo, variables, tmp_path, monkeypatch):
    """4 rollouts at once against 2, a crash in the third, and a restart; the reference is refreshed on either side."""
    settings = loop.LoopConfig(eval_every=0, checkpoint_every=1, show=1)

    def run(folder):
        return loop.train_grpo(grpo, settings, EvalConfig(), variables, tmp_path / folder, seed=5)

    whole = run("whole")
    calls, sample_rows = [], loop.sample_rows

    def crash_in_the_third(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return sample_rows(*args)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "sample_rows", crash_in_the_third)
        with pytest.raises(KeyboardInterrupt):
            run("killed")
    resumed = run("killed")
    assert int(resumed.rollouts) == int(whole.rollouts) == 4
    for ours, theirs in zip(jax.tree.leaves(resumed), jax.tree.leaves(whole), strict=True):
        if jax.dtypes.issubdtype(ours.dtype, jax.dtypes.prng_key):
            ours, theirs = jax.random.key_data(ours), jax.random.key_data(theirs)
        np.testing.assert_array_equal(ours, theirs)

    def lines(folder):
        records = [json.loads(line) for line in (tmp_path / folder / "metrics.jsonl").read_text().splitlines()]
        return [{k: v for k, v in record.items() if k != "rollout_seconds"} for record in records]

    assert len(lines("whole")) == 4 and lines("whole") == lines("killed")
    assert (tmp_path / "whole" / "samples.jsonl").read_text() == (tmp_path / "killed" / "samples.jsonl").read_text()


def test_a_failing_reward_saves_what_was_reached(grpo, variables, tmp_path):
    calls = []

    def fails_later(prompt, completion, answer):
        calls.append(completion)
        if len(calls) > 20:
            raise ZeroDivisionError("too much")
        return len(completion)

    host = grpo_of(rewards=rewards_of(fails_later, False))
    with pytest.raises(RewardError, match="(?s)'digits' raised ZeroDivisionError: too much.*completion: .*on_reward_error='skip'"):
        loop.train_grpo(host, loop.LoopConfig(eval_every=0, checkpoint_every=0), EvalConfig(), variables, tmp_path, seed=5)
    config, saved = load_variables(tmp_path)
    assert config == MODEL.config
    moved = jnp.abs(saved["params"]["head"]["kernel"] - variables["params"]["head"]["kernel"]).max()
    assert float(moved) > 0  # the first rollout's update is there


def test_rollouts_differ_and_stay_in_the_training_split(first, grpo):
    state, _, samples, _ = first
    again = grpo.sample(state)
    assert not bool((again.trajectories.prompts_BP == samples.trajectories.prompts_BP).all())
    assert not bool(TASK.heldout(samples.instances).any()) and not bool(TASK.heldout(again.instances).any())


def test_in_graph_rewards_of_the_task_run_in_one_call(variables):
    """Random weights never hold the format: reward 0, zero variance, and the weights stay (KL of the reference is 0)."""
    grpo = grpo_of(CONFIG.replace(oversampling=2, num_minibatches=2, replay_experts=False), build_rewards(CONFIG, TASK))
    state, metrics, samples, rewards_B = grpo.iteration(grpo_state(MODEL, variables, grpo.optimizer, jax.random.key(3)))
    assert int(state.step) == 2 and float(metrics["first_ratio_error"]) < 1e-5
    assert rewards_B.shape == (16,) and float(rewards_B.max()) == 0
    assert float(metrics["zero_variance_fraction"]) == 1 and float(metrics["all_wrong_fraction"]) == 1
    assert samples.trajectories.expert_ids_BLTK is None
    drift = max(float(jnp.abs(a - b).max()) for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(variables["params"]), strict=True))
    assert drift < 1e-4

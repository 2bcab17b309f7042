"""One GRPO iteration on the real network: MLA with q-LoRA, grouped routing, shared experts, bias and an MTP module."""

import contextlib
import itertools
import json
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_policy import CONFIG, MODEL, TASK, digit_share, digit_share_in_graph, grpo_of, random_variables, rewards_of

from deepseek_jax.errors import CheckpointError, RewardError
from deepseek_jax.model.ops import Ops
from deepseek_jax.rl import loop
from deepseek_jax.rl.evaluate import EvalConfig
from deepseek_jax.rl.grpo import abstract_grpo_state, grpo_state
from deepseek_jax.rl.rewards import build_rewards
from deepseek_jax.rl.rollout import completion_log_probs
from deepseek_jax.rl.tasks.base import PAD, to_texts
from deepseek_jax.training import metrics
from deepseek_jax.training.checkpoints import Checkpoints, load_variables, steps_in
from deepseek_jax.training.metrics import MetricsWriter


@pytest.fixture(scope="module")
def variables():
    return random_variables()


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
        logp_BN, entropy_BN, *_ = completion_log_probs(MODEL, variables, trajectories, 1.0, 64)
        error = np.abs(np.asarray(logp_BN - trajectories.old_logp_BN)) * np.asarray(trajectories.mask_BN)
        assert error.max() < 1e-5
        assert float(entropy_BN.min()) >= 0
    assert int(samples.trajectories.mask_BN.sum()) > 16  # there was something to compare


def test_an_iteration_in_fp8(variables):
    """Sampling, both passes and the update in FP8. Sampler and update round differently, so that first ratios are near
    one on average, and nowhere near what another seed's completions would have."""
    grpo = grpo_of(model=MODEL.clone(ops=Ops("fp8_deepseek")))
    state, metrics, samples, _ = grpo.iteration(grpo_state(grpo.model, variables, grpo.optimizer, jax.random.key(2)))
    assert int(state.step) == 1 and int(state.skipped) == 0
    assert 1e-5 < float(metrics["log_ratio_abs_mean"]) < 0.1 and float(metrics["grad_norm"]) > 0
    assert int(samples.trajectories.mask_BN.sum()) > 16
    for (path, new), old in zip(
        jax.tree_util.tree_leaves_with_path(state.params), jax.tree.leaves(variables["params"]), strict=True
    ):
        assert new.dtype == old.dtype == jnp.float32 and jnp.isfinite(new).all()
        assert jnp.any(new != old) or "mtp" in jax.tree_util.keystr(path), path


def test_replay_routes_through_the_given_experts(first, variables):
    trajectories = first[2].trajectories
    other = trajectories.replace(expert_ids_BLTK=(trajectories.expert_ids_BLTK + 1) % 8)
    routed, _, routing, _ = completion_log_probs(MODEL, variables, other, 1.0, 64)
    own, *_ = completion_log_probs(MODEL, variables, trajectories, 1.0, 64)
    assert (jnp.swapaxes(routing.expert_ids_LBTK, 0, 1) == other.expert_ids_BLTK).all()
    assert float(jnp.abs((routed - own) * trajectories.mask_BN).max()) > 1e-3


def test_loss_starts_at_zero_and_the_gradient_does_not(first):
    """Centered advantages at ratio 1 cancel in the value, not in the gradient."""
    _, metrics, _, _ = first
    assert float(metrics["reward_std"]) > 0.01
    assert abs(float(metrics["pg_loss"])) < 1e-5
    assert float(metrics["kl"]) < 1e-6  # the reference is the policy
    assert float(metrics["grad_norm"]) > 1e-3


def test_an_iteration_changes_weights_bias_and_counters(first, variables):
    state = first[0]
    assert int(state.step) == 1 and int(state.rollouts) == 1 and int(state.skipped) == 0
    bias = (
        state.router_bias["moe_layers"]["ffn"]["router"]["bias"]
        - variables["router_bias"]["moe_layers"]["ffn"]["router"]["bias"]
    )
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
    np.testing.assert_array_equal(
        third.reference["params"]["head"]["kernel"], second.reference["params"]["head"]["kernel"]
    )
    assert float(jnp.abs(third.params["head"]["kernel"] - second.params["head"]["kernel"]).max()) > 0


def test_python_rewards_give_what_in_graph_rewards_give(first, grpo, variables):
    host = grpo_of(rewards=rewards_of(digit_share, False))
    state = grpo_state(MODEL, variables, host.optimizer, jax.random.key(2))
    samples = host.sample(state)
    texts = to_texts(samples.trajectories.completions_BN, samples.trajectories.mask_BN)
    parts = host.rewards.text_components([""] * len(texts), texts, [""] * len(texts))
    in_graph = np.asarray(
        digit_share_in_graph(TASK, samples.instances, samples.trajectories.completions_BN, samples.trajectories.mask_BN)
    )
    assert np.array_equal(
        np.asarray(samples.trajectories.completions_BN), np.asarray(first[2].trajectories.completions_BN)
    )
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
    with pytest.raises(
        RewardError, match="(?s)'digits' raised ZeroDivisionError: too much.*completion: .*on_reward_error='skip'"
    ):
        loop.train_grpo(
            host, loop.LoopConfig(eval_every=0, checkpoint_every=0), EvalConfig(), variables, tmp_path, seed=5
        )
    config, saved = load_variables(tmp_path)
    assert config == MODEL.config
    moved = jnp.abs(saved["params"]["head"]["kernel"] - variables["params"]["head"]["kernel"]).max()
    assert float(moved) > 0  # the first rollout's update is there


def test_an_evaluation_that_fails_loses_no_rollout(grpo, variables, tmp_path, monkeypatch, capsys):
    """It comes after the save; started again, the run makes up for it and goes on. Every fourth has samples too."""
    settings = loop.LoopConfig(eval_every=2, sampled_eval_every=4, checkpoint_every=0, show=0)
    accuracies = iter([0.25, None, 0.5, 0.75])

    def greedy(model, variables, task, config):
        accuracy = next(accuracies)
        if accuracy is None:
            raise RuntimeError("the plot of it failed")
        return {"greedy_accuracy": accuracy, "greedy_length": 6.0}

    monkeypatch.setattr(loop, "greedy", greedy)
    monkeypatch.setattr(loop, "evaluate", lambda *args: greedy(*args) | {"pass@2": 0.5, "maj@2": 0.25, "samples": []})
    with pytest.raises(RuntimeError, match="the plot of it failed"):
        loop.train_grpo(grpo, settings, EvalConfig(), variables, tmp_path, seed=5)
    assert "rollouts 1 to 2: saved step 2 in" in capsys.readouterr().out
    state = loop.train_grpo(grpo, settings, EvalConfig(), variables, tmp_path, seed=5)
    assert int(state.rollouts) == 4
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(r["step"], r["held_out_accuracy"]) for r in records if "held_out_accuracy" in r] == [
        (0, 0.25),
        (2, 0.5),
        (4, 0.75),
    ]
    assert [r["step"] for r in records if "loss" in r] == [1, 2, 3, 4]
    assert [(r["step"], r["held_out_maj@2"]) for r in records if "held_out_pass@2" in r] == [(0, 0.25), (4, 0.25)]
    # asks for no evaluation
    assert loop.train_grpo(grpo, settings, EvalConfig(), variables, tmp_path, seed=5).rollouts == 4


def test_an_update_that_fails_hides_neither_its_error_nor_what_is_safe(grpo, variables, tmp_path, monkeypatch, capsys):
    """An accelerator out of memory has already been given the state's buffers: there is nothing to save."""
    iterate = loop.iterate

    def out_of_memory_in_the_third(grpo, state):
        if int(state.rollouts) == 2:
            jax.tree.map(lambda x: x.delete(), state)
            raise RuntimeError("RESOURCE_EXHAUSTED")
        return iterate(grpo, state)

    monkeypatch.setattr(loop, "iterate", out_of_memory_in_the_third)
    with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
        loop.train_grpo(
            grpo, loop.LoopConfig(eval_every=0, checkpoint_every=0), EvalConfig(), variables, tmp_path / "none", seed=5
        )
    assert (
        "rollouts 1 to 2: The step that failed has destroyed its state. Nothing was saved yet."
        in capsys.readouterr().out
    )
    with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
        loop.train_grpo(
            grpo, loop.LoopConfig(eval_every=0, checkpoint_every=1), EvalConfig(), variables, tmp_path / "two", seed=5
        )
    said = capsys.readouterr().out
    assert "rollout 2 is saved in" in said and "nothing is lost" in said
    assert steps_in(tmp_path / "two" / "checkpoints")[-1] == 2


@pytest.mark.parametrize("where", ["a metric", "a picture", "a sample"])
def test_an_exception_in_the_log_loses_no_rollout(grpo, variables, tmp_path, monkeypatch, capsys, where):
    """It ends the run after the third rollout, which is saved first; started again, the run goes on from there."""
    settings = loop.LoopConfig(eval_every=0, checkpoint_every=2, show=1)
    owner, name = {
        "a metric": (MetricsWriter, "write"),
        "a picture": (metrics, "_picture"),
        "a sample": (loop, "sample_rows"),
    }[where]
    original, calls = getattr(owner, name), itertools.count(1)

    def fails_in_the_third(*args):
        if next(calls) == 3:
            raise RuntimeError("no space for it")
        return original(*args)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="no space for it"):
        patch.setattr(owner, name, fails_in_the_third)
        loop.train_grpo(grpo, settings, EvalConfig(), variables, tmp_path, seed=5)
    assert "rollout 3: saved step 3 in" in capsys.readouterr().out
    assert steps_in(tmp_path / "checkpoints")[-1] == 3
    state = loop.train_grpo(grpo, settings, EvalConfig(), variables, tmp_path, seed=5)
    assert int(state.rollouts) == 4 and "going on from rollout 3 of 4" in capsys.readouterr().out


def test_python_rewards_do_not_judge_what_a_broken_network_left(first, variables):
    """Its rows are emptied; a function may well divide by the length of a completion."""
    judged = []
    mask_BN = first[2].trajectories.mask_BN.at[3].set(0)
    samples = first[2].replace(trajectories=first[2].trajectories.replace(mask_BN=mask_BN))

    class Recorded:
        in_graph = False

        def text_components(self, prompts, completions, answers, finished):
            judged.append(list(zip(prompts, completions, answers, finished, strict=True)))
            return {"digits": np.arange(len(completions), dtype=np.float32)}

    class Halves:
        rewards, task = Recorded(), TASK
        sample = staticmethod(lambda state: samples)
        learn = staticmethod(lambda state, samples, parts: parts)

    parts = loop.iterate(Halves(), None)
    np.testing.assert_array_equal(parts["digits"], [0, 1, 2, np.nan, *range(3, 15)])
    texts = to_texts(samples.trajectories.completions_BN, mask_BN)
    assert [row[1] for row in judged[0]] == texts[:3] + texts[4:]
    assert [row[3] for row in judged[0]] == np.delete(np.asarray(samples.trajectories.finished_B), 3).tolist()


def test_lengths_of_answers_that_there_were_none_of_are_not_logged():
    metrics = {"length_right_mean": math.nan, "length_wrong_mean": 6.0, "loss": math.nan}
    assert loop.measured(metrics).keys() == {"length_wrong_mean", "loss"}


def test_samples_are_the_first_of_each_group_with_their_own_reward(first, grpo):
    _, _, samples, rewards_B = first
    distinct_B = rewards_B + jnp.arange(16)
    rows = loop.sample_rows(grpo, samples, distinct_B, 3)
    t = samples.trajectories
    texts = to_texts(t.completions_BN[:12:4], t.mask_BN[:12:4])
    assert [row["completion"] for row in rows] == texts and len(rows) == 3
    assert [row["reward"] for row in rows] == [float(distinct_B[i]) for i in (0, 4, 8)]
    assert len(loop.sample_rows(grpo, samples, distinct_B, 9)) == 4


def test_the_headline_has_what_was_measured():
    values = {
        "reward_mean": 1.5,
        "reward_std": 0.1,
        "reward_digits": 0.25,
        "length_mean": 6.0,
        "entropy": 1.0,
        "grad_norm": 2.0,
    }
    assert loop.headline(values) == "reward 1.500  digits 0.250  length 6.0  entropy 1.000  grad 2.00"
    assert "kl 0.0100  grad 2.00  held-out 0.500" in loop.headline(values | {"kl": 0.01, "held_out_accuracy": 0.5})


def test_a_checkpoint_with_a_reference_is_read_where_none_is_kept(variables, tmp_path):
    """Runs without a KL term used to keep one. The other way round there is nothing to take it from, which is said."""
    optimizer = grpo_of().optimizer
    state = grpo_state(MODEL, variables, optimizer, jax.random.key(2))
    with contextlib.closing(Checkpoints(tmp_path / "old", MODEL.config)) as store:
        store.save(state)
        store.wait()
        restored = store.restore(abstract_grpo_state(MODEL, optimizer, has_reference=False)).state
    assert restored.reference is None and state.reference is not None
    chex.assert_trees_all_equal(restored.params, state.params)
    chex.assert_trees_all_equal(restored.opt_state, state.opt_state)
    with contextlib.closing(Checkpoints(tmp_path / "new", MODEL.config)) as store:
        store.save(restored)
        store.wait()
        saved = sum(file.stat().st_size for file in (tmp_path / "new").rglob("*") if file.is_file())
        assert saved < 0.8 * sum(file.stat().st_size for file in (tmp_path / "old").rglob("*") if file.is_file())
        with pytest.raises(CheckpointError, match="reference.*absent from the checkpoint"):
            store.restore(abstract_grpo_state(MODEL, optimizer))


def test_dynamic_sampling_trains_on_live_groups_alone(variables):
    """Eight groups drawn, four of them dead: the update is that of the four live ones, whatever the dead ones hold."""
    two = grpo_of(CONFIG.replace(oversampling=2, kl_coefficient=0.0), rewards_of(digit_share, False))
    one = grpo_of(CONFIG.replace(kl_coefficient=0.0), rewards_of(digit_share, False))
    state = grpo_state(MODEL, variables, two.optimizer, jax.random.key(2), has_reference=False)
    samples = two.sample(state)
    live, rewards = (
        np.array([1, 3, 4, 6]),
        np.tile(np.array([[1.0], [0.0], [5.0], [0.5], [0.0], [2.0], [1.0], [3.0]]), 4),
    )
    rewards[live, 0] += [1.0, 2.0, -1.0, 0.5]
    rows = (live[:, None] * 4 + np.arange(4)).reshape(-1)
    alone, _, _, _ = one.learn(
        jax.tree.map(jnp.copy, state), jax.tree.map(lambda x: x[rows], samples), {"digits": rewards.reshape(-1)[rows]}
    )
    after, metrics, kept, rewards_B = two.learn(state, samples, {"digits": jnp.asarray(rewards.reshape(-1))})
    np.testing.assert_array_equal(rewards_B, rewards[live].reshape(-1))
    np.testing.assert_array_equal(kept.trajectories.completions_BN, samples.trajectories.completions_BN[rows])
    assert float(metrics["zero_variance_fraction"]) == 0.5 and float(metrics["reward_mean"]) == pytest.approx(
        rewards.mean()
    )
    assert "kl" not in metrics and after.reference is None
    chex.assert_trees_all_close(after.params, alone.params, atol=1e-6)
    assert float(jnp.abs(after.params["head"]["kernel"] - variables["params"]["head"]["kernel"]).max()) > 1e-4


def test_completions_of_a_network_whose_numbers_break_train_nothing(first, grpo, variables):
    """The embedding of one token is NaN: completions that drew it are emptied and counted, the others train."""
    drawn = np.asarray(first[2].trajectories.completions_BN)
    prompts = set(np.asarray(first[2].trajectories.prompts_BP).reshape(-1).tolist())
    token = next(
        int(token) for token in drawn[:, 1] if token not in prompts and token not in drawn[:, -1] and token != 258
    )
    broken_B = (drawn == token).any(1)
    embedding = variables["params"]["embed"]["embedding"].at[token].set(jnp.nan)
    params = variables["params"] | {"embed": {"embedding": embedding}}
    before = grpo_state(MODEL, variables | {"params": params}, grpo.optimizer, jax.random.key(2))
    state, metrics, samples, rewards_B = grpo.iteration(before)
    t = samples.trajectories
    np.testing.assert_array_equal(t.mask_BN.sum(1) == 0, broken_B)
    assert 0 < broken_B.sum() < 16 and float(metrics["non_finite_completions"]) == broken_B.sum()
    prompts_BP, lengths_B, old_logp_BN = map(np.asarray, (t.prompts_BP, t.prompt_lengths_B, t.old_logp_BN))
    assert (prompts_BP[broken_B] == PAD).all() and not lengths_B[broken_B].any() and not old_logp_BN[broken_B].any()
    np.testing.assert_array_equal(np.asarray(t.sequences()[1]).any(1), ~broken_B)  # no router's load counts them
    np.testing.assert_array_equal(np.isnan(rewards_B), broken_B)
    assert float(metrics["reward_mean"]) == pytest.approx(float(first[3][~broken_B].mean()), abs=1e-6)
    assert float(metrics["length_mean"]) == pytest.approx(
        np.asarray(first[2].trajectories.mask_BN)[~broken_B].sum(1).mean()
    )
    assert int(state.skipped) == 0 and float(metrics["grad_norm"]) > 1e-3
    same = jnp.isnan(state.params["embed"]["embedding"]).any(1)
    np.testing.assert_array_equal(same, np.arange(272) == token)  # the update itself is finite
    assert all(np.isfinite(float(metrics[name])) for name in ("loss", "entropy", "kl", "ratio_max"))


def test_rollouts_differ_and_stay_in_the_training_split(first, grpo):
    state, _, samples, _ = first
    again = grpo.sample(state)
    assert not bool((again.trajectories.prompts_BP == samples.trajectories.prompts_BP).all())
    assert not bool(TASK.heldout(samples.instances).any()) and not bool(TASK.heldout(again.instances).any())


def test_in_graph_rewards_of_the_task_run_in_one_call(variables):
    """Random weights never hold the format: reward 0, zero variance, and the weights stay (KL of the reference is
    0)."""
    grpo = grpo_of(CONFIG.replace(oversampling=2, num_minibatches=2, replay_experts=False), build_rewards(CONFIG, TASK))
    state, metrics, samples, rewards_B = grpo.iteration(grpo_state(MODEL, variables, grpo.optimizer, jax.random.key(3)))
    assert int(state.step) == 2 and float(metrics["first_ratio_error"]) < 1e-5
    assert rewards_B.shape == (16,) and float(rewards_B.max()) == 0
    assert float(metrics["zero_variance_fraction"]) == 1 and float(metrics["all_wrong_fraction"]) == 1
    assert samples.trajectories.expert_ids_BLTK is None
    drift = max(
        float(jnp.abs(a - b).max())
        for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(variables["params"]), strict=True)
    )
    assert drift < 1e-4


def test_tokens_pay_the_kl_out_of_their_reward(grpo, variables):
    """Against the log-probabilities of both policies: the mean KL a completion pays, and that advantages are those of
    tokens, the tokens of one completion differing by the KL between them."""
    config = CONFIG.replace(kl_in_reward=True, kl_estimator="k1", kl_coefficient=0.5, num_minibatches=2)
    paying = grpo_of(config)
    state = grpo_state(MODEL, variables, paying.optimizer, jax.random.key(2))
    reference = jax.tree.map(lambda x: x * 1.1, state.reference)
    samples = paying.sample(state)
    trajectories = samples.trajectories
    ref_logp_BN, *_ = completion_log_probs(MODEL, reference, trajectories.replace(expert_ids_BLTK=None), 1.0, 64)
    kl_BN = np.where(trajectories.mask_BN > 0, trajectories.old_logp_BN - ref_logp_BN, 0.0)
    paid_B = -0.5 * kl_BN.sum(1)
    _, metrics, _, rewards_B = paying.learn(state.replace(reference=reference), samples, {})
    assert np.abs(paid_B).max() > 1e-3  # the policies differ
    np.testing.assert_allclose(metrics["reward_kl_penalty"], paid_B.mean(), rtol=1e-4, atol=1e-6)
    digits_B = digit_share_in_graph(TASK, samples.instances, trajectories.completions_BN, trajectories.mask_BN)
    np.testing.assert_allclose(rewards_B, digits_B + paid_B, rtol=1e-4, atol=1e-5)
    assert "kl" not in metrics and float(metrics["grad_norm"]) > 0

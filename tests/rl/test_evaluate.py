"""Evaluation on completions that are known: a stand-in for the network answers by rules that depend on the problem
alone.

Greedily it is right on held-out problems that don't begin with 11, and wrong on all others. Of four samples as many are
right as there are ones among the first three bits; the others are wrong, cut off with the right answer, empty, or
broken.
"""

import collections
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_policy import MODEL, TASK

from deepseek_jax.generation.generate import Generation
from deepseek_jax.rl import evaluate as module
from deepseek_jax.rl.evaluate import EvalConfig, evaluate, greedy
from deepseek_jax.rl.loop import held_out_metrics
from deepseek_jax.rl.tasks import base
from deepseek_jax.rl.tasks.parity import Bits

CONFIG = EvalConfig(
    problems=48, sampled_problems=20, samples=4, temperature=0.9, max_completion_length=8, show=3, seed=5
)
RIGHT, LONG, WRONG, CUT_OFF, EMPTY, BROKEN = range(6)
TEXTS = ["<think></think><answer>{}</answer>", "<think>1</think><answer>{}</answer>",
         "<think></think><answer>{}</answer>",
         "<think></think><answer>{}</answer>", "<think></think><answer></answer>", "<think></think>"]  # fmt: skip
LENGTHS = np.array([6, 7, 6, 5, 5, 2])  # the end-of-text token included, where there is one


def kind(bits, sample, heldout, temperature):
    """The stand-in's answers, for arrays of numpy or of jax."""
    xp = jnp if isinstance(bits, jax.Array) else np
    right = xp.where(bits[..., 0] > 0, LONG, RIGHT)
    if temperature == 0:
        return xp.where(heldout & ~((bits[..., 0] > 0) & (bits[..., 1] > 0)), right, WRONG)
    other = xp.where(
        bits[..., 3] > 0, xp.where(bits[..., 4] > 0, BROKEN, EMPTY), xp.where(bits[..., 5] > 0, CUT_OFF, WRONG)
    )
    other = xp.where(sample % 2 > 0, other, WRONG)
    return xp.where(sample < bits[..., :3].sum(-1), right, other)


def stand_in(model, variables, prompts_BP, lengths_B, key, sampling, *, samples_per_prompt):
    del model, variables, lengths_B, key
    bits = jnp.repeat(prompts_BP[:, 2:10] - ord("0"), samples_per_prompt, axis=0)
    sample = jnp.tile(jnp.arange(samples_per_prompt), len(prompts_BP))
    kind_B = kind(bits, sample, TASK.heldout(Bits(bits)), sampling.temperature)
    answer_B = ord("0") + (bits.sum(1) + (kind_B == WRONG)) % 2
    zero, N = jnp.zeros_like(answer_B), sampling.max_new_tokens

    def tokens(*columns):
        columns = [zero + column for column in columns]
        return jnp.stack(columns + [zero + base.PAD] * (N - len(columns)), 1)

    short = tokens(base.THINK, base.END_THINK, base.ANSWER, answer_B, base.END_ANSWER, base.EOS)
    long = tokens(base.THINK, ord("1"), base.END_THINK, base.ANSWER, answer_B, base.END_ANSWER, base.EOS)
    empty = tokens(base.THINK, base.END_THINK, base.ANSWER, base.END_ANSWER, base.EOS)
    tokens_BN = jnp.where((kind_B == LONG)[:, None], long, jnp.where((kind_B == EMPTY)[:, None], empty, short))
    length_B = jnp.asarray(LENGTHS)[kind_B]
    mask_BN = jnp.arange(N) < length_B[:, None]
    return Generation(
        tokens_BN=jnp.where(mask_BN, tokens_BN, base.PAD),
        mask_BN=mask_BN,
        lengths_B=length_B,
        finished_B=(kind_B != CUT_OFF) & (kind_B != BROKEN),
        finite_B=kind_B != BROKEN,
        logp_BN=jnp.zeros(mask_BN.shape),
        expert_ids_LBTK=None,
    )


@pytest.fixture
def result(monkeypatch):
    monkeypatch.setattr(module, "generate", stand_in)
    return evaluate(MODEL, {}, TASK, CONFIG)


def problems():
    return np.asarray(TASK.sample(jax.random.key(CONFIG.seed), CONFIG.problems, "heldout").bits_BK)


def test_greedy_answers_to_held_out_problems(result):
    bits = problems()
    kinds = kind(bits, np.zeros(len(bits), int), np.ones(len(bits), bool), 0)
    assert result["greedy_accuracy"] == pytest.approx(np.mean(kinds != WRONG)) and 0.5 < result["greedy_accuracy"] < 1
    assert result["greedy_length"] == pytest.approx(LENGTHS[kinds].mean())
    logged = held_out_metrics(greedy(MODEL, {}, TASK, CONFIG))
    assert logged == {"held_out_accuracy": result["greedy_accuracy"], "held_out_length": result["greedy_length"]}


def test_sampled_answers_are_counted_in_one_way(result):
    bits = problems()[:20]
    kinds = kind(bits[:, None], np.arange(4), None, 0.9)
    assert set(kinds.reshape(-1).tolist()) == {RIGHT, LONG, WRONG, CUT_OFF, EMPTY, BROKEN}
    right = (kinds == RIGHT) | (kinds == LONG)
    majorities = []
    for row in kinds:  # a vote for the right answer, for the wrong one, or none: cut off, empty or broken
        votes = collections.Counter(
            "right" if k in (RIGHT, LONG) else "wrong" for k in row if k in (RIGHT, LONG, WRONG)
        )
        majorities.append(0.5 if votes["right"] == votes["wrong"] else float(votes["right"] > votes["wrong"]))
    assert 0.5 in majorities
    expected = {
        "sampled_accuracy": right.mean(),
        "pass@4": right.any(1).mean(),
        "maj@4": np.mean(majorities),
        "response_length": LENGTHS[kinds[kinds != BROKEN]].mean(),
        "format_share": ((kinds != CUT_OFF) & (kinds != BROKEN)).mean(),
        "truncated_share": (kinds == CUT_OFF).mean(),
        "non_finite_share": (kinds == BROKEN).mean(),
    }
    for name, value in expected.items():
        assert result[name] == pytest.approx(value), name
    assert len({round(value, 6) for value in expected.values()}) == len(expected), "no two are alike by chance"
    logged = held_out_metrics(result)
    assert logged["held_out_pass@4"] == result["pass@4"] and "held_out_samples" not in logged


def test_the_majority_counts_an_answer_in_every_spelling(monkeypatch):
    """Of four samples two say 0.5, as ".5" and "0.5", and two say 1 and 7: no tie of four but two votes to one."""
    bits = TASK.sample(jax.random.key(CONFIG.seed), CONFIG.problems, "heldout")
    texts = ["<think></think><answer>.5</answer>", "<think></think><answer>0.5</answer>"]
    texts += [f"<think></think><answer>{x}</answer>" for x in (1, 7)]
    right_QK = np.tile([1.0, 1.0, 0.0, 0.0], (20, 1)).astype(np.float32)

    def answered(model, variables, task, instances, key, sampling, samples=1):
        count = len(instances.bits_BK) * samples
        generation = types.SimpleNamespace(
            tokens_BN=None,
            mask_BN=None,
            lengths_B=np.ones(count),
            finite_B=np.ones(count, bool),
            finished_B=np.ones(count, bool),
        )
        return generation, right_QK if samples == 4 else np.ones((count, 1)), np.ones(count, bool)

    monkeypatch.setattr(module, "answer_everywhere", answered)
    monkeypatch.setattr(module, "to_texts", lambda *_: 20 * texts)
    assert len(bits.bits_BK) == 48 and evaluate(MODEL, {}, TASK, CONFIG)["maj@4"] == 1.0


def test_samples_to_be_read_belong_to_their_problems(result):
    bits = problems()[:3]
    first = kind(bits, np.zeros(3, int), None, 0.9)
    answers = (bits.sum(1) + (first == WRONG)) % 2
    assert result["samples"] == [
        {"prompt": "".join(map(str, b)), "completion": TEXTS[k].format(a), "right": bool(k in (RIGHT, LONG))}
        for b, k, a in zip(bits.tolist(), first.tolist(), answers.tolist(), strict=True)
    ]
    json.dumps(result, allow_nan=False)

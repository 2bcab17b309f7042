"""In-graph rewards on good, bad and malicious token sequences; the registry; the weighted sum; Python rewards that
misbehave."""

import concurrent.futures
import importlib.util
import math
import os
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.errors import ConfigError, RewardError
from deepseek_jax.rl import rewards as rewards_module
from deepseek_jax.rl.advantages import group_advantages
from deepseek_jax.rl.config import GRPOConfig
from deepseek_jax.rl.math_reward import Worker, Workers, math_accuracy_reward
from deepseek_jax.rl.rewards import Reward, RewardSet, build_rewards, call_reward, soft_overlong_punishment
from deepseek_jax.rl.tasks import ChainTask, CountdownTask, ParityTask, base
from deepseek_jax.rl.tasks.chain import Chain
from deepseek_jax.rl.tasks.countdown import Goal
from deepseek_jax.rl.tasks.parity import Bits

WIDTH = 40


def completions(texts):
    """Token ids of texts whose tags are control tokens; '.' at the very end is <eos>."""
    rows = [base.TOKENIZER.encode(text.removesuffix("."), eos=text.endswith("."), allow_special=True) for text in texts]
    tokens = np.array([row[:WIDTH] + [base.PAD] * (WIDTH - len(row)) for row in rows])
    return jnp.asarray(tokens), jnp.asarray([[1] * len(row) + [0] * (WIDTH - len(row)) for row in rows])


def masks(lengths, width):
    """mask_BN of completions of these lengths."""
    return (jnp.arange(width) < jnp.asarray(lengths)[:, None]).astype(jnp.int32)


graph_components = jax.jit(RewardSet.graph_components, static_argnums=(0, 1))


def scores(name, task, instance, texts):
    reward_set = build_rewards(GRPOConfig(rewards=((name, 1.0),)), task)
    instances = type(instance)(*(np.repeat(x[None], len(texts), 0) for x in vars(instance).values()))
    return np.asarray(graph_components(reward_set, task, instances, *completions(texts))[name]).tolist()


PARITY = ParityTask(bits=8)
BITS = Bits(np.array([1, 0, 1, 1, 0, 0, 0, 0]))  # parity 1

GOOD = [
    "<think></think><answer>1</answer>.",
    "<think>11011111</think><answer>1</answer>.",
    "<think>anything</think><answer>1</answer>.",
]
HACKS = {
    "no end": "<think></think><answer>1</answer>",
    "truncated": "<think>1101",
    "nothing": "",
    "only end": ".",
    "answer in the chain only": "<think><answer>1</answer></think>.",
    "answer in the chain, none outside": "<think>1</think>.",
    "two answers": "<think></think><answer>1</answer><answer>0</answer>.",
    "both answers": "<think></think><answer>1</answer><answer>1</answer>.",
    "tag stuffing": "<think></think></think><answer>1</answer>.",
    "two chains": "<think><think></think><answer>1</answer>.",
    "wrong order": "<answer>1</answer><think></think>.",
    "crossed": "<think><answer></think>1</answer>.",
    "text between": "<think></think>1<answer>1</answer>.",
    "text after": "<think></think><answer>1</answer>1.",
    "text before": "1<think></think><answer>1</answer>.",
    "new turn in the chain": "<think><user></think><answer>1</answer>.",
    "padding in the chain": "<think><pad></think><answer>1</answer>.",
    "early end": "<think><eos></think><answer>1</answer>.",
}


def test_format_and_accuracy_on_good_completions():
    assert scores("format", PARITY, BITS, GOOD) == [1.0] * 3 and scores("accuracy", PARITY, BITS, GOOD) == [1.0] * 3


def test_hacks_get_neither_format_nor_accuracy():
    texts = list(HACKS.values())
    for name in ("format", "accuracy"):
        assert dict(zip(HACKS, scores(name, PARITY, BITS, texts), strict=True)) == dict.fromkeys(HACKS, 0.0)


def test_wrong_answers_keep_their_format():
    wrong = [f"<think>1</think><answer>{answer}</answer>." for answer in ("0", "", "11", "10110000", "01", "1 ", "odd")]
    assert scores("format", PARITY, BITS, wrong) == [1.0] * 7 and scores("accuracy", PARITY, BITS, wrong) == [0.0] * 7


def test_spelt_out_tags_are_no_tags():
    tokens = jnp.asarray([[*b"<think></think><answer>1</answer>", base.EOS]])
    assert not bool(base.parse(tokens, jnp.ones_like(tokens)).ok_B[0])


def test_tokens_behind_the_mask_do_not_count():
    tokens, mask = completions(GOOD[:1])
    assert bool(base.parse(tokens.at[0, 8:].set(base.THINK), mask).ok_B[0])
    hidden = mask.at[0, 5:].set(0)
    assert not bool(base.parse(tokens, hidden).ok_B[0])


CHAIN = ChainTask(operations=2, modulus=10, alphabets=2)


def chain(language):
    return Chain(np.int32(3), np.array([0, 1]), np.array([4, 2]), np.int32(language))  # (3+4)*2 = 4


def test_chain_answers_in_either_alphabet():
    texts = [f"<think></think><answer>{a}</answer>." for a in ("4", "e", "5", "A", "44", "+4")]
    assert scores("accuracy", CHAIN, chain(0), texts) == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]


def test_language_consistency_counts_symbols_of_the_chain():
    chains = ("A7B4", "AhBe", "A7Be", "", "AB")
    texts = [f"<think>{c}</think><answer>4</answer>." for c in chains] + [
        "<think>7777",
        "<think>7</think>7<answer>4</answer>.",
    ]
    assert scores("language_consistency", CHAIN, chain(0), texts) == [1.0, 0.0, 0.5, 0.0, 0.0, 0.0, 0.0]
    assert scores("language_consistency", CHAIN, chain(1), texts) == [0.0, 1.0, 0.5, 0.0, 0.0, 0.0, 0.0]


def test_countdown_hacks():
    goal = Goal(np.array([2, 3, 5]), np.int32(16), np.array([*b"35+2*"]))
    task = CountdownTask(numbers=3, max_number=9)
    hacks = ["2**9**9", "2**9*", "16", "82*", "44*1+", "88+", "35+2*16", "350/+", "(3+5)*2", "2,3,5=16", "35+22", "2"]
    answers = {"35+2*": 1.0, "235+*": 1.0, "53+2*": 1.0, "": 0.0, **dict.fromkeys(hacks, 0.0)}
    texts = [f"<think></think><answer>{answer}</answer>." for answer in answers]
    assert dict(zip(answers, scores("accuracy", task, goal, texts), strict=True)) == answers


# --- the weighted sum -------------------------------------------------------------------------------------------------


def test_total_weighs_and_accuracy_needs_the_format():
    reward_set = build_rewards(GRPOConfig(rewards=(("accuracy", 1.0), ("format", 0.5))), PARITY)
    parts = {"accuracy": jnp.array([1.0, 0.0, 1.0, 0.0]), "format": jnp.array([1.0, 1.0, 0.0, 0.0])}
    lengths = jnp.array([3, 3, 3, 3])
    np.testing.assert_allclose(reward_set.total(parts, masks(lengths, 8)), [1.5, 0.5, 0.0, 0.0])


def test_wrong_reward_and_overlong_punishment():
    reward_set = build_rewards(GRPOConfig(rewards=(("accuracy", 1.0),), wrong_reward=-1.0, overlong_buffer=4), PARITY)
    parts = {"accuracy": jnp.array([1.0, 0.0, 1.0, 0.0])}
    np.testing.assert_allclose(reward_set.total(parts, masks([4, 4, 6, 8], 8)), [1.0, -1.0, 0.5, -2.0])
    np.testing.assert_allclose(
        soft_overlong_punishment(jnp.array([0, 16_384, 18_432, 20_480, 30_000]), 20_480, 4_096), [0, 0, -0.5, -1, -1]
    )


def test_a_reward_of_weight_zero_cannot_spoil_the_sum():
    reward_set = build_rewards(GRPOConfig(rewards=(("accuracy", 1.0), ("text_format", 0.0))), PARITY)
    total = reward_set.total({"accuracy": jnp.array([1.0]), "text_format": jnp.array([jnp.nan])}, masks([3], 8))
    assert float(total[0]) == 0.0, "without a format that holds, no accuracy"
    reward_set = build_rewards(GRPOConfig(rewards=(("format", 1.0), ("text_language_consistency", 0.0))), PARITY)
    total = reward_set.total(
        {"format": jnp.array([1.0]), "text_language_consistency": jnp.array([jnp.nan])}, masks([3], 8)
    )
    assert float(total[0]) == 1.0


def test_in_graph_or_not():
    assert build_rewards(GRPOConfig(), PARITY).in_graph
    assert not build_rewards(GRPOConfig(rewards=(("text_accuracy", 1.0),)), PARITY).in_graph


# --- Python rewards ---------------------------------------------------------------------------------------------------


def own_reward(prompt, completion, answer):
    return len(completion) / 10


def raising(prompt, completion, answer):
    raise KeyError("no such thing")


def test_own_function_by_name(monkeypatch):
    module = type(rewards_module)("own_rewards")
    module.own_reward = own_reward
    monkeypatch.setitem(__import__("sys").modules, "own_rewards", module)
    reward_set = build_rewards(GRPOConfig(rewards=(("own_rewards:own_reward", 2.0), ("text_format", 1.0))))
    parts = reward_set.text_components(["p", "p"], ["12345", "<think></think><answer></answer>"], ["a", "a"])
    np.testing.assert_allclose(parts["own_rewards:own_reward"], [0.5, 3.2])
    np.testing.assert_allclose(reward_set.total(parts, masks([1, 1], 8)), [1.0, 7.4], rtol=1e-6)
    assert parts["text_format"].dtype == np.float32


@pytest.mark.parametrize(
    "function,words",
    [
        (raising, "raised KeyError: 'no such thing'"),
        (lambda p, c, a: None, "returned None, which is not a number"),
        (lambda p, c, a: "1.0", "returned '1.0', which is not a number"),
        (lambda p, c, a: [1.0], "which is not a number"),
        (lambda p, c, a: 1j, "which is not a number"),
        (lambda p, c, a: math.nan, "returned nan, which is not a number"),
        (lambda p, c, a: np.float32("-inf"), "which is not a number"),
        (lambda p, c, a: 1e39, "returned 1e+39, which is not a number that float32 holds"),
        (lambda p, c, a: 10**400, "raised OverflowError"),
        (lambda p: 1.0, "raised TypeError"),
    ],
)
def test_a_reward_that_misbehaves(function, words):
    reward = Reward("mine", function, in_graph=False)
    with pytest.raises(RewardError) as caught:
        call_reward(reward, "the prompt", "the completion", "the answer", "raise")
    assert all(part in str(caught.value) for part in ("'mine'", words, "the completion", "on_reward_error='skip'"))
    assert math.isnan(call_reward(reward, "p", "c", "a", "skip"))


@pytest.mark.parametrize("value", [1, 0.5, True, np.float32(2), np.bool_(True), np.int64(3)])
def test_any_number_is_a_reward(value):
    assert call_reward(Reward("mine", lambda p, c, a: value, in_graph=False), "p", "c", "a", "raise") == float(value)


def test_a_skipped_sample_trains_nothing_and_spoils_nothing():
    config = GRPOConfig(rewards=(("text_accuracy", 1.0),), on_reward_error="skip")
    reward_set = build_rewards(config)
    broken = Reward("text_accuracy", lambda p, c, a: {"a": 1.0, "b": 0.0}[c], in_graph=False, role="accuracy")
    reward_set = type(reward_set)((broken,), reward_set.weights, on_error=reward_set.on_error)
    parts = reward_set.text_components(["p"] * 4, ["a", "b", "?", "a"], [""] * 4)
    advantages = group_advantages(reward_set.total(parts, masks([1] * 4, 8)), GRPOConfig(group_size=4))
    assert (
        np.asarray(advantages.valid_B).tolist() == [True, True, False, True] and float(advantages.advantages[2]) == 0.0
    )
    assert np.isfinite(advantages.advantages).all() and float(advantages.advantages[0]) > 0


@pytest.mark.parametrize(
    "names,task,message",
    [
        (["acuracy"], PARITY, "did you mean 'accuracy'"),
        (["no_such_module:reward"], PARITY, "Write package.module:attribute; the folder that holds the module"),
        (["math:no_such_function"], PARITY, "math has no 'no_such_function'"),
        (["accuracy"], None, "use 'text_accuracy'"),
        (["language_consistency"], PARITY, r"a task with a method in_alphabet \(chain\).*use 'text_language"),
    ],
)
def test_refused(names, task, message):
    with pytest.raises(ConfigError, match=message):
        build_rewards(GRPOConfig(rewards=tuple((name, 1.0) for name in names)), task)


def test_missing_math_verify_is_said_before_the_run(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'math-verify\[antlr4-13-2\]'"):
        build_rewards(GRPOConfig(rewards=(("math_accuracy", 1.0),)))


def test_worker_is_killed_when_late_and_replaced():
    worker = Worker(time.sleep, seconds=0.5)
    assert worker(0.0) is None and worker._process is not None
    start = time.monotonic()
    assert worker(600.0) is None and time.monotonic() - start < 5 and worker._process is None
    assert Worker(math.sqrt, seconds=20.0)(16.0) == 4.0
    failing = Worker(math.sqrt, seconds=20.0)
    assert failing(-1.0) is None and failing(9.0) == 3.0, (
        "an error in the function is no result, and the process lives on"
    )
    worker.stop()
    failing.stop()


def test_a_worker_that_died_is_replaced():
    """Between two calls or in one; a call that kills two of them has no result, and the next one does."""
    worker = Worker(math.sqrt, seconds=20.0)
    assert worker(4.0) == 2.0
    worker._process.kill()
    worker._process.join()
    assert worker(9.0) == 3.0
    died = type("Died", (), {"is_alive": lambda self: True, "kill": lambda self: None, "join": lambda self: None})()
    worker._process.kill()
    worker._process.join()
    worker._process = died  # as it looks when it dies between the question whether it lives and the call
    assert worker(16.0) == 4.0
    worker.stop()
    deadly = Worker(os._exit, seconds=20.0)
    assert deadly(1) is None and deadly(1) is None
    deadly.stop()


def test_workers_do_not_wait_for_one_another(tmp_path):
    """Two ends of a named pipe: each is opened only once the other is, so two calls have to run at the same time."""
    os.mkfifo(tmp_path / "pipe")
    workers = Workers(os.open, seconds=20.0, count=2)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        ends = list(pool.map(lambda flag: workers(str(tmp_path / "pipe"), flag), [os.O_RDONLY, os.O_WRONLY]))
    assert all(isinstance(end, int) for end in ends) and workers._free.qsize() == 2
    for _ in range(2):
        workers._free.get().stop()


def test_rewards_in_threads_keep_the_order_and_the_first_error():
    def slow(prompt, completion, answer):
        time.sleep(0.2 if completion == "0" else 0.0)
        if completion == "bad":
            raise KeyError("bad")
        return float(completion)

    reward_set = RewardSet((Reward("slow", slow, in_graph=False, threads=4),), (1.0,))
    texts = [str(i) for i in range(12)]
    assert reward_set.text_components(texts, texts, texts)["slow"].tolist() == list(range(12))
    with pytest.raises(RewardError, match="raised KeyError: 'bad'"):
        reward_set.text_components(["p"] * 3, ["0", "bad", "2"], ["a"] * 3)


def test_a_completion_without_its_end_has_no_format():
    """Cut off right after </answer>: its text cannot be told from a finished one's, and in-graph it scores 0 too."""
    reward_set = build_rewards(
        GRPOConfig(rewards=(("text_format", 1.0), ("text_accuracy", 1.0), ("text_language_consistency", 1.0)))
    )
    text = "<think>one and one</think><answer>2</answer>"
    parts = reward_set.text_components(["how many"] * 2, [text] * 2, ["2"] * 2, [True, False])
    assert {name: values.tolist() for name, values in parts.items()} == dict.fromkeys(parts, [1.0, 0.0]) and len(
        parts
    ) == 3
    own = RewardSet((Reward("own", own_reward, in_graph=False),), (1.0,))
    assert (own.text_components(["p"], [text], ["2"], [False])["own"] > 0).all(), (
        "a function of one's own sees every completion"
    )


@pytest.mark.skipif(importlib.util.find_spec("math_verify") is None, reason="math-verify is not installed")
def test_math_accuracy():
    def score(given, expected):
        return math_accuracy_reward("", f"<think>hm</think><answer>{given}</answer>", expected)

    assert score("12", "12") == score(r"\frac{1}{2}", "0.5") == score(r"\boxed{07}", "7") == 1.0
    assert score("１２", "12") == score(r"x=\frac{1}{2}", "0.5") == score("x+y", "y+x") == 1.0
    assert score("13", "12") == score("", "12") == score("9**9**9**9", "12") == 0.0
    assert math_accuracy_reward("", "<answer>12</answer>", "12") == 0.0


def own_count(prompt, completion, answer):
    """A plain function, as a user writes one."""
    return float(len(completion))


def positions(task, instances, completions_BN, mask_BN):
    """Token n earns n + 1."""
    return jnp.broadcast_to(jnp.arange(1.0, mask_BN.shape[1] + 1), mask_BN.shape)


OWN_TOKENS = Reward("whatever", positions, in_graph=True, per_token=True)
OWN_FORMAT = Reward("whatever", lambda task, instances, c, mask_BN: mask_BN[:, 2] > 0, in_graph=True, role="format")
OWN_MODULE = Reward("whatever", own_count, in_graph=False, requires=("no_such_package", "no-such-package"))
OWN_METHOD = Reward("whatever", positions, in_graph=True, per_token=True, requires_task="grade")
NOT_A_REWARD = 3


def test_a_reward_of_ones_own_is_a_function_or_says_more():
    names = {"accuracy": 2.0, f"{__name__}:OWN_FORMAT": 0.5, f"{__name__}:own_count": 1.0}
    reward_set = build_rewards(GRPOConfig(rewards=tuple(names.items())), PARITY)
    assert [(r.name, r.role, r.in_graph) for r in reward_set.rewards] == [
        ("accuracy", "accuracy", True),
        (f"{__name__}:OWN_FORMAT", "format", True),
        (f"{__name__}:own_count", "", False),
    ]
    components = {"accuracy": jnp.ones(2), f"{__name__}:OWN_FORMAT": jnp.array([1.0, 0.0])}
    components |= reward_set.text_components(["p"] * 2, ["abc", "ab"], ["a"] * 2)
    # the own format gates our accuracy: 2 + 0.5 + 3 letters, and 0 + 0 + 2 letters
    np.testing.assert_allclose(reward_set.total(components, masks([3, 2], 4)), [5.5, 2.0])


def test_a_reward_of_tokens_is_what_is_still_to_come():
    names = {"accuracy": 10.0, f"{__name__}:OWN_TOKENS": 0.5}
    reward_set = build_rewards(GRPOConfig(rewards=tuple(names.items())), PARITY)
    tokens, mask = completions([GOOD[0], HACKS["truncated"]])
    instances = Bits(np.repeat(BITS.bits_BK[None], 2, 0))
    components = graph_components(reward_set, PARITY, instances, tokens, mask)
    total = np.asarray(reward_set.total(components, mask))
    for b, outcome in enumerate((10.0, 0.0)):
        length = int(mask[b].sum())
        expected = [outcome + 0.5 * sum(s + 1 for s in range(n, length)) for n in range(WIDTH)]
        np.testing.assert_allclose(total[b], expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("NOT_A_REWARD", "is a int: must be a function .* or a deepseek_jax.rl.rewards.Reward"),
        ("OWN_MODULE", "needs a package that is not installed; run pip install 'no-such-package'"),
        ("OWN_METHOD", "needs a task with a method grade, and ParityTask has none"),
        ("own_cuont", "has no 'own_cuont': did you mean 'own_count'"),
    ],
)
def test_a_reward_of_ones_own_that_cannot_work(name, message):
    with pytest.raises(ConfigError, match=message):
        build_rewards(GRPOConfig(rewards=((f"{__name__}:{name}", 1.0),)), PARITY)


def test_a_reward_of_the_wrong_shape_is_one_sentence():
    reward_set = RewardSet((Reward("flat", positions, in_graph=True),), (1.0,))
    with pytest.raises(ConfigError, match=r"'flat' returns shape \(1, 40\) .* must be \(1,\)"):
        reward_set.graph_components(PARITY, Bits(BITS.bits_BK[None]), *completions([GOOD[0]]))
    with pytest.raises(ConfigError, match="per_token: then it runs in the graph .* and has no role"):
        Reward("both", positions, in_graph=True, per_token=True, role="accuracy")
    with pytest.raises(ConfigError, match="role='acuracy': did you mean 'accuracy'"):
        Reward("role", positions, in_graph=True, role="acuracy")

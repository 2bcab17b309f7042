"""Tasks: the in-graph checks against independent Python, splits that can't overlap, demonstrations that are right when
they should be."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.errors import ConfigError
from deepseek_jax.rl.tasks import CountdownTask, ParityTask, base, build_task

SPECS = {
    "parity": {"name": "parity", "bits": 12, "cot_probability": 0.5},
    "chain": {
        "name": "chain",
        "operations": 6,
        "modulus": 97,
        "alphabets": 2,
        "leaps": [1, 2, 6],
        "cot_probability": 0.4,
    },
    "countdown": {"name": "countdown", "numbers": 3, "max_number": 9, "cot_probability": 0.5, "max_tries": 4},
}
N = 1024


class Compiled:
    """One task, its methods compiled once for N problems, and good and bad demonstrations of the training split."""

    def __init__(self, spec):
        self.task = task = build_task(spec)
        self.sample = jax.jit(task.sample, static_argnums=(1, 2))
        self.demonstrate = jax.jit(task.demonstrations)
        self.accuracy = jax.jit(task.accuracy)
        self.instances = self.sample(jax.random.key(0), N, "train")
        self.good = self.demonstrate(jax.random.key(1), self.instances, jnp.ones(N, bool))
        self.bad = self.demonstrate(jax.random.key(2), self.instances, jnp.zeros(N, bool))


@functools.cache
def compiled(name):
    return Compiled(SPECS[name])


@pytest.fixture(params=SPECS)
def c(request):
    return compiled(request.param)


def identities(task, instances):
    return {tuple(row) for row in np.asarray(task.hashed(instances)).tolist()}


def test_splits_are_disjoint_and_sized(c):
    heldout = c.sample(jax.random.key(3), N, "heldout")
    assert bool(c.task.heldout(heldout).all()) and not bool(c.task.heldout(c.instances).any())
    assert not identities(c.task, heldout) & identities(c.task, c.instances)
    classes = np.asarray(jax.jit(lambda key: classes_of(c.task, c.task.draw(key, 4 * N)))(jax.random.key(4)))
    frequencies = np.bincount(classes[classes >= 0], minlength=8)
    expected = frequencies.sum() / 8
    assert expected > N / 8 and (np.abs(frequencies - expected) < 6 * np.sqrt(expected)).all(), frequencies


def classes_of(task, instances):
    classes = base.hash_words(task.hashed(instances)) % jnp.uint32(8)
    return jnp.where(task.usable(instances), classes.astype(jnp.int32), -1)


def test_hash_spreads_over_classes():
    bits = (np.arange(2**14)[:, None] >> np.arange(14)) & 1
    hashes = np.asarray(base.hash_words(jnp.asarray(bits)))
    assert len(set(hashes.tolist())) > 2**14 - 40, (
        "about 0.03 collisions are expected of 32 random bits, subset sums allow a few more"
    )
    frequencies = np.bincount(hashes % 8, minlength=8)
    assert (np.abs(frequencies - 2**11) < 6 * np.sqrt(2**11)).all(), frequencies


def test_sampling_is_reproducible_and_varied(c):
    again = c.sample(jax.random.key(0), N, "train")
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), again, c.instances))
    assert len(identities(c.task, c.instances)) > N / 3


def test_prompts_are_chats_of_their_text(c):
    prompts, lengths = jax.jit(c.task.prompts)(c.instances)
    assert (
        prompts.shape == (N, c.task.prompt_length)
        and prompts.dtype == jnp.int32
        and (np.asarray(lengths) <= c.task.prompt_length).all()
    )
    for row, length, text in list(
        zip(np.asarray(prompts).tolist(), lengths, c.task.prompt_text(c.instances), strict=True)
    )[:50]:
        assert row[:length] == base.TOKENIZER.chat([{"role": "user", "content": text}])


def test_good_demonstrations_are_right(c):
    tokens, mask = c.good
    assert tokens.shape == mask.shape == (N, c.task.completion_length) and tokens.dtype == jnp.int32
    assert np.asarray(c.accuracy(c.instances, tokens, mask)).all()
    assert bool(base.parse(tokens, mask).ok_B.all())
    assert (np.asarray(tokens)[np.asarray(mask) == 0] == base.PAD).all()
    lengths = np.asarray(mask.sum(1))
    long = lengths > lengths.min()
    expected = c.task.cot_probability if not hasattr(c.task, "leaps") else 0.4 + 0.6 / 2  # leaps 1 and 2 of 1, 2, 6
    assert abs(long.mean() - expected) < 0.08


def test_bad_demonstrations_are_well_formed_and_mostly_wrong(c):
    accuracy = np.asarray(c.accuracy(c.instances, *c.bad))
    assert bool(base.parse(*c.bad).ok_B.all())
    assert accuracy.mean() < 0.2 if c.task.__class__.__name__ == "ChainTask" else not accuracy.any()


def test_corrupt_probability_mixes():
    c = compiled("parity")
    half = build_task({**SPECS["parity"], "corrupt_probability": 0.5})
    accuracy = c.accuracy(c.instances, *jax.jit(half.demonstrations)(jax.random.key(5), c.instances))
    assert 0.45 < float(accuracy.mean()) < 0.55


def corrupted(rng, tokens, mask):
    """Rows with tokens replaced, swapped, repeated or cut off, and rows that are left alone."""
    tokens, mask = np.array(tokens), np.array(mask)
    alphabet = [*b"0123456789abj+-*/=x,A #", base.THINK, base.END_THINK, base.ANSWER, base.END_ANSWER, base.EOS]
    for row, keep in zip(tokens, mask, strict=True):
        length = keep.sum()
        kind = rng.integers(6)
        i = rng.integers(length)
        if kind == 0:
            row[i] = rng.choice(alphabet)
        elif kind == 1:
            j = max(i, 1)
            row[j - 1], row[j] = row[j], row[j - 1]
        elif kind == 2:
            row[length - 4 : length - 2] = rng.choice(alphabet, 2)  # the end of the answer
        elif kind == 3 and length > 6:
            keep[i + 1 :] = 0  # the budget ran out
            row[i + 1 :] = base.PAD
        elif kind == 4:
            answer = int(np.argmax(row == base.ANSWER)) + 1
            inside = row[answer : length - 2].copy()
            rng.shuffle(inside)
            row[answer : length - 2] = inside
    return jnp.asarray(tokens), jnp.asarray(mask)


def test_accuracy_agrees_with_independent_check(c):
    """In-graph and text verdicts on thousands of completions. A text form can't show whether <eos> came, so that is
    asked apart."""
    rng = np.random.default_rng(0)
    prompts = c.task.prompt_text(c.instances)
    right = total = 0
    for source in (c.good, c.bad, c.good, c.bad):
        tokens, mask = corrupted(rng, *source)
        ended = np.asarray((tokens == base.EOS).sum(1) == 1) & (
            np.take_along_axis(np.asarray(tokens), np.asarray(mask.sum(1, keepdims=True)) - 1, 1)[:, 0] == base.EOS
        )
        verdicts = np.asarray(c.accuracy(c.instances, tokens, mask)) > 0
        texts = base.to_texts(tokens, mask)
        for prompt, text, end, verdict in zip(prompts, texts, ended, verdicts, strict=True):
            assert (end and c.task.check_text(prompt, text)) == verdict, (prompt, text)
        right, total = right + verdicts.sum(), total + N
    assert 0.1 < right / total < 0.6, "the comparison must see both verdicts"


def test_answer_text_is_right(c):
    for prompt, answer in zip(c.task.prompt_text(c.instances), c.task.answer_text(c.instances), strict=True):
        assert c.task.check_text(prompt, f"<think></think><answer>{answer}</answer>")


def test_documents_have_static_shapes(c):
    shapes = jax.eval_shape(lambda key: c.task.documents(key, 8), jax.random.key(6))
    assert {x.shape for x in shapes.values()} == {(8, c.task.prompt_length + c.task.completion_length)}
    assert {x.dtype for x in shapes.values()} == {jnp.dtype("int32")}


def test_documents():
    task = compiled("parity").task
    key = jax.random.key(6)
    whole, completion = jax.jit(lambda key: [task.documents(key, 64, "heldout", only) for only in (False, True)])(key)
    tokens, mask = np.asarray(whole["tokens_BT"]), np.asarray(whole["mask_BT"])
    assert (tokens[:, 0] == base.BOS).all() and (tokens[:, task.prompt_length - 1] == base.ASSISTANT).all()
    assert (tokens[mask == 0] == base.PAD).all() and (tokens[np.arange(64), mask.sum(1) - 1] == base.EOS).all()
    assert (whole["loss_mask_BT"] == mask).all()
    in_completion = np.arange(tokens.shape[1]) >= task.prompt_length
    assert (completion["loss_mask_BT"] == mask * in_completion).all() and (completion["tokens_BT"] == tokens).all()
    bits = jnp.asarray(tokens[:, 2 : 2 + task.bits] - ord("0"))
    assert (base.hash_words(bits) % jnp.uint32(8) == 0).all(), "documents of a split hold its problems only"


def test_chain_of_parities_is_what_it_says():
    c = compiled("parity")
    tokens, mask = c.good
    chain = np.asarray(tokens)[np.asarray(mask.sum(1)) == c.task.completion_length][:, 1 : c.task.bits + 1] - ord("0")
    bits = np.asarray(c.instances.bits_BK)[np.asarray(mask.sum(1)) == c.task.completion_length]
    assert (chain == np.cumsum(bits, 1) % 2).all()


def test_chain_values_against_python():
    c = compiled("chain")
    i = c.instances
    for start, operators, operands, values in zip(
        *(np.asarray(x).tolist() for x in (i.start_B, i.operators_BK, i.operands_BK, c.task.values(i))), strict=True
    ):
        value, expected = start, []
        for operator, operand in zip(operators, operands, strict=True):
            value = (value + operand, value * operand, value - operand)[operator] % 97
            expected.append(value)
        assert values == expected


def test_chain_alphabets():
    c = compiled("chain")
    tokens, mask = c.good
    think = np.asarray(base.parse(tokens, mask).think_BN)
    target, symbol = (np.asarray(x) & think for x in c.task.in_alphabet(c.instances, tokens))
    assert (target <= symbol).all()
    assert abs(target.sum() / symbol.sum() - 0.65) < 0.03
    languages = np.asarray(c.instances.language_B)
    assert {text[0] for text in c.task.prompt_text(c.instances)} == {"#", "$"} and 0.4 < languages.mean() < 0.6


@functools.cache
def machine(numbers):
    return jax.jit(CountdownTask(numbers=numbers).value)


def judge(expressions, numbers=(3, 5, 2)):
    width = 2 * len(numbers) - 1
    rows = [[*e.encode()] + [base.PAD] * (width - len(e)) for e in expressions]
    return np.asarray(
        machine(len(numbers))(jnp.array(rows), jnp.broadcast_to(jnp.array(numbers), (len(rows), len(numbers))))
    ).tolist()


def test_countdown_machine_on_known_and_hostile_expressions():
    assert judge(["35+2*", "352+*", "235*-", "532-/", "25*3-", "53/2*", "32-5*"]) == [16, 21, -1, 5, 7, -1, 5]
    hostile = [
        "2**9*",
        "35+",
        "35+2",
        "+35*2",
        "35++2",
        "33+2*",
        "35+9*",
        "30+2*",
        "3522*",
        "     ",
        "35+2x",
        "",
        "35 2*",
        "325-0",
        "**9**",
    ]
    assert judge(hostile) == [-1] * len(hostile)
    assert judge(["22-5/", "522-/"], (2, 2, 5)) == [0, -1], "0/5 is 0, 5/0 is nothing"
    assert judge(["7522-//", "7522+//"], (2, 2, 5, 7)) == [-1, -1], (
        "7/(5/0) is nothing either, though its fraction would be 0/5"
    )
    assert judge(["7225*-/", "7522/*-"], (2, 2, 5, 7)) == [-1, 2]


def test_countdown_fractions_are_exact():
    assert judge(["31/3*", "13/3*", "33/1+"], (1, 3, 3)) == [9, 1, 2], "(1/3)*3 is exactly 1"


@pytest.mark.parametrize(
    "fields,message",
    [
        ({"name": "sudoku"}, "allowed: chain, countdown, parity"),
        ({"name": "parity", "bit": 20}, "did you mean 'bits'"),
        ({"name": "parity", "bits": 4}, "at least 8"),
        ({"name": "parity", "cot_probability": 1.5}, "from 0 to 1"),
        ({"name": "chain", "modulus": 101}, "from 2 to 100"),
        ({"name": "chain", "alphabets": 3}, "from 1 to 2"),
        ({"name": "countdown", "numbers": 6, "max_number": 50}, "overflow"),
    ],
)
def test_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        build_task(fields)


def test_task_is_a_static_argument():
    assert hash(build_task(SPECS["chain"])) == hash(build_task(SPECS["chain"])) and ParityTask(bits=8) != ParityTask(
        bits=9
    )
    with pytest.raises(ValueError, match="heldout"):
        ParityTask().sample(jax.random.key(0), 2, "test")

"""pass@k and maj@k against enumeration."""

import itertools

import numpy as np
import pytest

from deepseek_jax.rl.evaluate import maj_at_k, pass_at_k


@pytest.mark.parametrize("n", [1, 4, 7])
def test_pass_at_k_counts_subsets(n):
    for k in range(1, n + 1):
        for c in range(n + 1):
            subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
            assert pass_at_k(np.array([c]), n, k)[0] == pytest.approx(np.mean([any(s) for s in subsets]), abs=1e-12)


def test_pass_at_k_at_sizes_where_binomials_overflow():
    values = pass_at_k(np.array([0, 1, 5000, 10_000]), 10_000, 5_000)
    np.testing.assert_allclose(values, [0.0, 0.5, 1.0, 1.0], atol=1e-12)
    np.testing.assert_allclose(pass_at_k(np.array([[3, 0], [16, 8]]), 16, 1), np.array([[3, 0], [16, 8]]) / 16)


@pytest.mark.parametrize("correct,n,k", [([1], 4, 0), ([1], 4, 5), ([5], 4, 2), ([-1], 4, 2)])
def test_pass_at_k_refuses(correct, n, k):
    with pytest.raises(ValueError, match="between"):
        pass_at_k(np.array(correct), n, k)


def brute_force(answers, correct, k):
    """The expectation over every subset of k, a tie broken by every tied answer in turn."""
    values = []
    for subset in itertools.combinations(range(len(answers)), k):
        given = [answers[i] for i in subset if answers[i] is not None]
        tied = [a for a in set(given) if given.count(a) == max(map(given.count, given))]
        values.append(np.mean([correct[answers.index(a)] for a in tied]) if tied else 0.0)
    return np.mean(values)


@pytest.mark.parametrize(
    "answers", [["7", "7", "3", None, "5"], ["3", "7", "3", "7"], [None, None], ["1", "1.0", "2", "2"]]
)
def test_maj_of_all_samples(answers):
    correct = [a in ("7", "1", "1.0") for a in answers]
    assert maj_at_k(answers, correct) == pytest.approx(brute_force(answers, correct, len(answers)))


@pytest.mark.parametrize("k", [1, 2, 3, 4, 6])
def test_maj_at_k_is_unbiased(k):
    answers = ["7", "7", "3", None, "3", "5"]
    correct = [a == "7" for a in answers]
    expected = pytest.approx(brute_force(answers, correct, k))
    for order in list(itertools.permutations(range(6)))[::7]:
        assert maj_at_k([answers[i] for i in order], [correct[i] for i in order], k) == expected, "in every order"


@pytest.mark.parametrize("k", [1, 5, 8])
def test_maj_at_k_against_every_choice(k):
    rng = np.random.default_rng(k)
    for _ in range(20):
        answers = [None if a == 4 else str(a) for a in rng.integers(0, 5, 9)]
        correct = [a in ("0", "1") for a in answers]
        assert maj_at_k(answers, correct, k) == pytest.approx(brute_force(answers, correct, k), abs=1e-12)


def test_one_answer_with_two_verdicts_does_not_depend_on_their_order():
    """As where a completion with the right answer did not end."""
    for order in itertools.permutations([("7", True), ("7", False), ("7", True), ("3", False)]):
        assert maj_at_k(*zip(*order, strict=True)) == pytest.approx(2 / 3)


def test_maj_at_k_of_many_samples():
    answers = ["right"] * 40 + [f"wrong {i}" for i in range(60)]
    values = [maj_at_k(answers, [a == "right" for a in answers], k) for k in (1, 8, 32, 100)]
    assert values[0] == pytest.approx(0.4) and values[-1] == 1.0 and values == sorted(values)


def test_ties_do_not_depend_on_the_order():
    assert maj_at_k(["a", "b"], [True, False]) == maj_at_k(["b", "a"], [False, True]) == 0.5
    assert maj_at_k(["a", "b", "c", "d"], [True, False, True, False]) == 0.5


def test_maj_refuses():
    with pytest.raises(ValueError, match="verdict"):
        maj_at_k(["a", "b"], [True])
    with pytest.raises(ValueError, match="between 1"):
        maj_at_k(["a"], [True], 2)

"""What repeated sampling is worth: pass@k and maj@k."""

import math
from collections.abc import Hashable, Sequence

import numpy as np


def pass_at_k(correct_Q: np.ndarray, samples: int, k: int) -> np.ndarray:
    """Probability that at least one of k samples is right, for each problem, from `correct_Q` right ones among
    `samples`: 1 - C(n-c, k) / C(n, k) (Chen et al. 2021, arXiv 2107.03374, eq. 1). Unbiased; float64[Q].

    Computed as 1 - prod_{i=n-c+1..n} (1 - k/i), whose factors lie between 0 and 1, where the binomials would overflow.
    Raises ValueError unless 1 <= k <= samples and 0 <= correct <= samples.
    """
    correct_Q = np.asarray(correct_Q)
    if not 1 <= k <= samples:
        raise ValueError(f"k={k} must lie between 1 and the number of samples, {samples}")
    if correct_Q.size and not (correct_Q.min() >= 0 and correct_Q.max() <= samples):
        raise ValueError(f"the number of right samples must lie between 0 and {samples}")
    i_n = np.arange(1, samples + 1)
    factors_Qn = np.where(i_n > samples - correct_Q[..., None], np.maximum(1.0 - k / i_n, 0.0), 1.0)
    return 1.0 - factors_Qn.prod(-1)


def maj_at_k(answers: Sequence[Hashable | None], correct: Sequence[bool], k: int | None = None) -> float:
    """Probability that the commonest of k sampled answers to one problem is right (R1's cons@k); `correct[i]` belongs
    to `answers[i]`.

    Answers that could not be read (None) have no vote; no vote at all is wrong. A tie counts as the share of the tied
    answers that are right: what a fair draw among them is worth, without drawing. With more than k samples it is the
    mean over all choices of k of them, as `pass_at_k` is. Nothing depends on the order of the samples: an answer that
    was found right in some of them and wrong in others counts as the share in which it was right.

    Counted, for each number of votes m that may win: with c votes of an answer there are C(c, i) ways to choose i, and
    choices of different answers multiply. `ways[n, t]` are the ways to choose n samples so that t answers have m votes
    and none has more, `right[n, t]` the sum over those ways of how many of the t are right. Raises ValueError unless 1
    <= k <= samples, each with its verdict.
    """
    k = len(answers) if k is None else k
    if not 1 <= k <= len(answers) or len(answers) != len(correct):
        raise ValueError(
            f"k={k} must lie between 1 and the number of answers, {len(answers)}, each with its verdict "
            f"({len(correct)})"
        )
    votes: dict[Hashable, list[bool]] = {}
    for answer, verdict in zip(answers, correct, strict=True):
        votes.setdefault(answer, []).append(bool(verdict))
    silent = len(votes.pop(None, []))
    total = 0.0
    for m in range(1, min(k, max(map(len, votes.values()), default=0)) + 1):
        ways, right = np.zeros((2, k + 1, k // m + 1))
        ways[: silent + 1, 0] = [math.comb(silent, i) for i in range(min(silent, k) + 1)]
        for verdicts in votes.values():
            below = [math.comb(len(verdicts), i) for i in range(min(m, len(verdicts) + 1))]
            tied = math.comb(len(verdicts), m)
            ways, right, before = _convolved(ways, below), _convolved(right, below), (ways, right)
            ways[m:, 1:] += tied * before[0][:-m, :-1]
            right[m:, 1:] += tied * (before[1] + np.mean(verdicts) * before[0])[:-m, :-1]
        total += np.sum(right[k, 1:] / np.arange(1, right.shape[1]))
    return float(total / math.comb(len(answers), k))


def _convolved(x: np.ndarray, ways: Sequence[int]) -> np.ndarray:
    """x with its first axis moved on by i in ways[i] ways, for every i."""
    return sum(count * np.pad(x[: len(x) - i], ((i, 0), (0, 0))) for i, count in enumerate(ways))

"""What repeated sampling is worth: pass@k and maj@k."""

import collections
from collections.abc import Hashable, Sequence

import numpy as np


def pass_at_k(correct_Q: np.ndarray, samples: int, k: int) -> np.ndarray:
    """Probability that at least one of k samples is right, for each problem, from `correct_Q` right ones among `samples`:
    1 - C(n-c, k) / C(n, k) (Chen et al. 2021, arXiv 2107.03374, eq. 1). Unbiased; float64[Q].

    Computed as 1 - prod_{i=n-c+1..n} (1 - k/i), whose factors lie between 0 and 1, where the binomials would overflow.
    Raises ValueError unless 1 <= k <= samples and 0 <= correct <= samples.
    """
    correct_Q = np.asarray(correct_Q)
    if not 1 <= k <= samples:
        raise ValueError(f"k={k} must lie between 1 and the number of samples, {samples}")
    if correct_Q.size and not (0 <= correct_Q.min() and correct_Q.max() <= samples):
        raise ValueError(f"the number of right samples must lie between 0 and {samples}")
    i_n = np.arange(1, samples + 1)
    factors_Qn = np.where(i_n > samples - correct_Q[..., None], np.maximum(1.0 - k / i_n, 0.0), 1.0)
    return 1.0 - factors_Qn.prod(-1)


def maj_at_k(answers: Sequence[Hashable | None], correct: Sequence[bool], k: int | None = None) -> float:
    """Whether the commonest of k sampled answers to one problem is right (R1's cons@k). `correct[i]` belongs to `answers[i]`.

    Answers that could not be read (None) have no vote; no vote at all is wrong. A tie counts as the share of the tied
    answers that are right: what a fair draw among them is worth, without drawing. With more than k samples the mean over
    successive blocks of k is returned, an unbiased estimate since samples are independent; samples left over are not used.
    """
    k = len(answers) if k is None else k
    if not 1 <= k <= len(answers) or len(answers) != len(correct):
        raise ValueError(f"k={k} must lie between 1 and the number of answers, {len(answers)}, each with its verdict ({len(correct)})")
    starts = range(0, len(answers) - k + 1, k)
    return float(np.mean([_majority(answers[i : i + k], correct[i : i + k]) for i in starts]))


def _majority(answers: Sequence[Hashable | None], correct: Sequence[bool]) -> float:
    votes = collections.Counter(answer for answer in answers if answer is not None)
    if not votes:
        return 0.0
    most = max(votes.values())
    verdict = dict(zip(answers, correct, strict=True))
    return float(np.mean([bool(verdict[answer]) for answer, count in votes.items() if count == most]))

"""Evaluation on held-out problems: greedy accuracy, pass@k, maj@k, response length.

The problems are of the held-out split, which no training stage ever draws from, and depend on the evaluation's seed
alone, so that two models are asked the same ones.
"""

import dataclasses
import functools
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import process_allgather

from deepseek_jax.fields import build
from deepseek_jax.generation.generate import Generation, generate
from deepseek_jax.generation.sampling import SamplingConfig
from deepseek_jax.identity import free
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.ranges import above, at_least, check, check_value
from deepseek_jax.rl.answers import votes
from deepseek_jax.rl.tasks.base import EOS, PAD, Task, answer_in, parse, to_texts


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Greedy answers to `problems` problems; `samples` sampled answers to each of the first `sampled_problems` of them
    (None: 128, or all if there are fewer).

    `max_completion_length` 0 takes the task's. `show` is how many completions are kept to be read. `seed` draws the
    problems.
    """

    problems: int = 512
    sampled_problems: int | None = None
    samples: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    max_completion_length: int = 0
    show: int = free(4)
    seed: int = 0

    def __post_init__(self):
        check(
            self,
            "eval.",
            problems=at_least(1),
            samples=at_least(1),
            max_completion_length=at_least(0),
            show=at_least(0),
            temperature=above(0, why="greedy accuracy is measured too"),
            top_p=above(0, at_most=1, why="1 turns it off"),
            seed=at_least(0, at_most=2**32 - 2),
        )
        check_value("eval.sampled_problems", self.num_sampled, at_least(1, at_most=self.problems))

    @property
    def num_sampled(self) -> int:
        """Problems that get sampled answers."""
        return min(128, self.problems) if self.sampled_problems is None else self.sampled_problems

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "EvalConfig":
        return build(cls, fields, "eval")


@functools.partial(jax.jit, static_argnames=("model", "task", "sampling", "samples"))
def answer(
    model: Transformer, variables, task: Task, instances, key: jax.Array, sampling: SamplingConfig, samples: int
):
    """Completions of each problem -> (Generation of n · samples rows, right float32 [n, samples], formatted bool [n ·
    samples]).

    A completion is formatted where `parse` says so; what is cut off or ends badly is neither formatted nor right.
    """
    prompts_BP, lengths_B = task.prompts(instances)
    generation = generate(model, variables, prompts_BP, lengths_B, key, sampling, samples_per_prompt=samples)
    repeated = jax.tree.map(lambda x: jnp.repeat(x, samples, axis=0), instances)
    mask_BN = generation.mask_BN.astype(jnp.int32)
    right_B = task.accuracy(repeated, generation.tokens_BN, mask_BN)
    return generation, right_B.reshape(-1, samples), parse(generation.tokens_BN, mask_BN).ok_B


def answer_everywhere(
    model: Transformer, variables, task: Task, instances, key: jax.Array, sampling: SamplingConfig, samples: int = 1
):
    """As `answer`, whole on every host, as numpy arrays."""
    return process_allgather(answer(model, variables, task, instances, key, sampling, samples), tiled=True)


def sampling_config(config: EvalConfig, task: Task, temperature: float) -> SamplingConfig:
    return SamplingConfig(
        max_new_tokens=config.max_completion_length or task.completion_length,
        temperature=temperature,
        top_p=config.top_p,
        eos_id=EOS,
        pad_id=PAD,
    )


def greedy(model: Transformer, variables, task: Task, config: EvalConfig) -> dict[str, float]:
    """Accuracy and mean length of greedy answers: the short evaluation, for curves."""
    problems = task.sample(jax.random.key(config.seed), config.problems, "heldout")
    generation, right, _ = answer_everywhere(
        model, variables, task, problems, jax.random.key(0), sampling_config(config, task, 0.0)
    )
    return {"greedy_accuracy": float(right.mean()), "greedy_length": mean_length(generation)}


def mean_length(generation: Generation) -> float:
    """Tokens a completion, over those that no broken logit ended; NaN if there is none."""
    lengths_B = np.where(generation.finite_B, generation.lengths_B, 0)
    return float(lengths_B.sum() / generation.finite_B.sum()) if generation.finite_B.any() else math.nan


def evaluate(model: Transformer, variables, task: Task, config: EvalConfig) -> dict[str, Any]:
    """All of it: greedy_accuracy, greedy_length, sampled_accuracy, pass@k, maj@k, response_length, format_share,
    truncated_share, non_finite_share and `samples`, a list of {"prompt", "completion", "right"}.

    The response length is the mean over sampled answers, as in R1's figure 3. An answer has a vote in maj@k where its
    completion is formatted and says something, for the answer as a number or text (`votes`); a truncated one is not
    formatted. Completions that met a broken logit
    are wrong and not formatted, have no length, and are counted in non_finite_share alone.
    """
    result: dict[str, Any] = greedy(model, variables, task, config)
    problems = task.sample(jax.random.key(config.seed), config.problems, "heldout")
    asked = jax.tree.map(lambda x: x[: config.num_sampled], problems)
    k = config.samples
    sampling = sampling_config(config, task, config.temperature)
    generation, right_QK, formatted_B = answer_everywhere(
        model, variables, task, asked, jax.random.key(config.seed + 1), sampling, k
    )
    right_QK = right_QK > 0
    texts = to_texts(generation.tokens_BN, generation.mask_BN)
    answers = [
        answer_in(text) or None if formatted else None for text, formatted in zip(texts, formatted_B, strict=True)
    ]
    result["sampled_accuracy"] = float(right_QK.mean())
    result[f"pass@{k}"] = float(np.mean(pass_at_k(right_QK.sum(1), k, k)))
    result[f"maj@{k}"] = float(
        np.mean([maj_at_k(votes(answers[q * k : (q + 1) * k]), right_QK[q]) for q in range(len(right_QK))])
    )
    result["response_length"] = mean_length(generation)
    result["format_share"] = float(formatted_B.mean())
    result["truncated_share"] = float((generation.finite_B & ~generation.finished_B).mean())
    result["non_finite_share"] = float(1.0 - generation.finite_B.mean())
    prompts = task.prompt_text(asked)
    result["samples"] = [
        {"prompt": prompts[q], "completion": texts[q * k], "right": bool(right_QK[q, 0])}
        for q in range(min(config.show, len(prompts)))
    ]
    return result


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

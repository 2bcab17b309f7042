"""Rewards by name, and their weighted sum.

A reward is either a function in the graph, (task, instances, completions_BN, mask_BN) -> float32[B], or a plain Python
function, (prompt, completion, answer) -> float. An experiment names them; `package.module:function` names a Python
function of the user's own.
"""

import concurrent.futures
import dataclasses
import importlib
import importlib.util
import math
import numbers
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.errors import ConfigError, RewardError, nearest
from deepseek_jax.rl import math_reward, text_rewards
from deepseek_jax.rl.config import GRPOConfig
from deepseek_jax.rl.tasks import ChainTask, base


@dataclasses.dataclass(frozen=True)
class Reward:
    """`role` is "accuracy" for a reward that counts only if the format holds, "format" for one that says so, else "".
    `requires` is (module, what to install) of an optional dependency. A Python function is called for `threads`
    completions at a time, and one that `needs_end` not at all for a completion that was cut off: that scores 0."""

    name: str
    function: Callable
    in_graph: bool
    role: str = ""
    requires: tuple[str, str] | None = None
    needs_end: bool = False
    threads: int = 1


def accuracy(task: base.Task, instances: base.Instance, completions_BN: jax.Array, mask_BN: jax.Array) -> jax.Array:
    """The task's own exact check (R1 §2.1): 1 or 0."""
    return task.accuracy(instances, completions_BN, mask_BN)


def format_(task: base.Task, instances: base.Instance, completions_BN: jax.Array, mask_BN: jax.Array) -> jax.Array:
    """1 where the token ids are exactly <think>…</think><answer>…</answer><eos>, else 0: a truncated completion has no
    format."""
    return base.parse(completions_BN, mask_BN).ok_B.astype(jnp.float32)


def language_consistency(
    task: ChainTask, instances: base.Instance, completions_BN: jax.Array, mask_BN: jax.Array
) -> jax.Array:
    """Num(symbols of the prompt's alphabet) / Num(symbols) over the chain of thought (R1 eq. 7). A chain without
    symbols scores 0, since otherwise saying nothing would be perfect; so does one that isn't delimited by its tags."""
    think_BN = base.parse(completions_BN, mask_BN).think_BN
    target_BN, symbol_BN = task.in_alphabet(instances, completions_BN)
    return ((target_BN & think_BN).sum(1) / jnp.maximum((symbol_BN & think_BN).sum(1), 1)).astype(jnp.float32)


REWARDS: dict[str, Reward] = {
    reward.name: reward
    for reward in (
        Reward("accuracy", accuracy, in_graph=True, role="accuracy"),
        Reward("format", format_, in_graph=True, role="format"),
        Reward("language_consistency", language_consistency, in_graph=True),
        Reward("text_accuracy", text_rewards.accuracy_reward, in_graph=False, role="accuracy", needs_end=True),
        Reward("text_format", text_rewards.format_reward, in_graph=False, role="format", needs_end=True),
        Reward("text_language_consistency", text_rewards.language_consistency_reward, in_graph=False, needs_end=True),
        Reward(
            "math_accuracy",
            math_reward.math_accuracy_reward,
            in_graph=False,
            role="accuracy",
            requires=("math_verify", "math-verify[antlr4-13-2]"),
            needs_end=True,
            threads=math_reward.WORKERS,
        ),
    )
}


def find_reward(name: str) -> Reward:
    """The registered reward, or the Python function that `package.module:function` names. ConfigError where there is
    none."""
    if ":" in name:
        module, _, attribute = name.partition(":")
        try:
            function = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise ConfigError(
                f"grpo.rewards: {name!r} can't be imported ({error}); write package.module:function"
            ) from error
        return Reward(name, function, in_graph=False)
    if name not in REWARDS:
        raise ConfigError(
            f"grpo.rewards: unknown reward {name!r}: {nearest(name, REWARDS)}, or package.module:function"
        )
    reward = REWARDS[name]
    if reward.requires is not None and importlib.util.find_spec(reward.requires[0]) is None:
        raise ConfigError(
            f"grpo.rewards: {name!r} needs a package that is not installed; run pip install '{reward.requires[1]}'"
        )
    return reward


@dataclasses.dataclass(frozen=True)
class RewardSet:
    """The rewards of one run. Frozen, so that it can be a static argument of jit."""

    rewards: tuple[Reward, ...]
    weights: tuple[float, ...]
    wrong_reward: float = 0.0
    overlong_buffer: int = 0
    on_error: str = "raise"

    @property
    def in_graph(self) -> bool:
        """Whether no Python function is among them, so that a whole iteration can be one jitted call."""
        return all(reward.in_graph for reward in self.rewards)

    def graph_parts(
        self, task: base.Task, instances: base.Instance, completions_BN: jax.Array, mask_BN: jax.Array
    ) -> dict[str, jax.Array]:
        """Every in-graph reward by name: float32[B]."""
        return {r.name: r.function(task, instances, completions_BN, mask_BN) for r in self.rewards if r.in_graph}

    def text_parts(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        answers: Sequence[str],
        finished: Sequence[bool] | None = None,
    ) -> dict[str, np.ndarray]:
        """Every Python reward by name: float32[B]. `finished` says which completions reached their end (None: all).

        Where a function raises or returns no finite number: RewardError, or NaN with on_error="skip", which
        `group_advantages` keeps out of the statistics and `group_metrics` counts.
        """
        finished = [True] * len(completions) if finished is None else finished
        rows = list(zip(prompts, completions, answers, finished, strict=True))

        def score(reward: Reward) -> np.ndarray:
            def one(row) -> float:
                *texts, ended = row
                return 0.0 if reward.needs_end and not ended else call_reward(reward, *texts, self.on_error)

            if reward.threads == 1:
                return np.array([one(row) for row in rows], np.float32)
            with concurrent.futures.ThreadPoolExecutor(reward.threads) as pool:
                return np.array(list(pool.map(one, rows)), np.float32)

        return {reward.name: score(reward) for reward in self.rewards if not reward.in_graph}

    def total(self, parts: Mapping[str, jax.Array], lengths_B: jax.Array, max_length: int) -> jax.Array:
        """Weighted sum of the parts, float32[B]. An accuracy counts only where every format reward in the set holds; a
        wrong answer scores `wrong_reward`. Parts of weight 0 are for logging and can't spoil the sum. Overlong
        punishment is added if it is on."""
        formats = [jnp.asarray(parts[r.name]) >= 1 for r in self.rewards if r.role == "format"]
        total_B = jnp.zeros(lengths_B.shape, jnp.float32)
        for reward, weight in zip(self.rewards, self.weights, strict=True):
            part_B = jnp.asarray(parts[reward.name], jnp.float32)
            if reward.role == "accuracy":
                for holds_B in formats:
                    part_B = jnp.where(holds_B, part_B, 0.0)
                part_B = part_B + (1.0 - part_B) * self.wrong_reward
            if weight != 0:
                total_B = total_B + weight * part_B
        if self.overlong_buffer > 0:
            total_B = total_B + soft_overlong_punishment(lengths_B, max_length, self.overlong_buffer)
        return total_B


def build_rewards(config: GRPOConfig, task: base.Task | None = None) -> RewardSet:
    """The rewards `config` names, checked against the task: ConfigError for a name, a package or a task that can't
    work. `task=None` is a data set of texts, which in-graph rewards can't check."""
    rewards = tuple(find_reward(name) for name, _ in config.rewards)
    for reward in rewards:
        if reward.in_graph and task is None:
            text = f"text_{reward.name}"
            raise ConfigError(
                f"grpo.rewards: {reward.name!r} works on a task's token ids, and there is no task here; use {text!r}"
            )
        if reward.function is language_consistency and not isinstance(task, ChainTask):
            raise ConfigError(
                f"grpo.rewards: 'language_consistency' needs a task with two alphabets, not {type(task).__name__}; "
                "use the chain task with alphabets=2, or 'text_language_consistency'"
            )
    return RewardSet(
        rewards,
        tuple(weight for _, weight in config.rewards),
        config.wrong_reward,
        config.overlong_buffer,
        config.on_reward_error,
    )


def call_reward(reward: Reward, prompt: str, completion: str, answer: str, on_error: str) -> float:
    """One call of a Python reward, which may be anybody's code: see `RewardSet.text_parts`."""
    cause = None
    try:
        value = reward.function(prompt, completion, answer)
        if isinstance(value, numbers.Real | np.bool_) and abs(float(value)) <= np.finfo(np.float32).max:  # NaN is not
            return float(value)
        problem = f"returned {_shown(value)}, which is not a number that float32 holds"
    except Exception as error:
        problem, cause = f"raised {type(error).__name__}: {error}", error
    if on_error == "skip":
        return math.nan
    raise RewardError(
        f"reward {reward.name!r} {problem}\n  prompt: {_shown(prompt)}\n  completion: {_shown(completion)}\n"
        "Mend the function, or set grpo.on_reward_error='skip' to leave such completions out of training."
    ) from cause


def soft_overlong_punishment(lengths_B: jax.Array, max_length: int, buffer: int) -> jax.Array:
    """0 up to max_length - buffer tokens, then falling linearly to -1 at max_length (DAPO eq. 13). float32[B]."""
    return -jnp.clip((lengths_B - (max_length - buffer)) / buffer, 0.0, 1.0).astype(jnp.float32)


def _shown(value: object, limit: int = 400) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[:limit] + "…"

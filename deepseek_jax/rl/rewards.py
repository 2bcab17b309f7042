"""Rewards by name, and their weighted sum.

A config's `rewards` name the components of a completion's reward, each with its weight: entries of `REWARDS`, or your
own as package.module:attribute. Your own is either

- a plain Python function (prompt, completion, answer) -> float, called outside the graph for each completion, or
- a `Reward`, which says more: that its function runs in the graph, that it has a role, needs a package, …

    shorter = Reward("shorter", length_cost, in_graph=True, per_token=True)     # in my_rewards.py
    config.grpo.rewards = {"accuracy": 1.0, "my_rewards:shorter": 0.01}

An in-graph function is (task, instances, completions_BN, mask_BN) -> float32 [B], one number for each completion, or
with `per_token` [B, N]: each token's own reward. Then the tokens of one completion have different advantages, each by
what the completion earns from that token on.
"""

import concurrent.futures
import dataclasses
import importlib.util
import math
import numbers
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.errors import ConfigError, RewardError, nearest
from deepseek_jax.registry import resolve
from deepseek_jax.rl import math_reward, text_rewards
from deepseek_jax.rl.config import GRPOConfig
from deepseek_jax.rl.tasks import TASKS, base

ROLES = ("", "accuracy", "format")


@dataclasses.dataclass(frozen=True)
class Reward:
    """One component of a completion's reward, and how its function is called.

    `role` is "accuracy" for one that counts only if the format holds, "format" for one that says so, else "".
    `requires` is (module, what to install) of an optional dependency, `requires_task` a method that the task must have.
    An in-graph function may be `per_token`. A Python function is called for `threads` completions at a time, and one
    that `needs_end` not at all for a completion that was cut off, which scores 0. In metrics and messages a reward has
    the name that the config gives it.
    """

    name: str
    function: Callable
    in_graph: bool
    role: str = ""
    requires: tuple[str, str] | None = None
    requires_task: str | None = None
    per_token: bool = False
    needs_end: bool = False
    threads: int = 1

    def __post_init__(self):
        if self.role not in ROLES:
            raise ConfigError(f"reward {self.name!r}: role={self.role!r}: {nearest(str(self.role), ROLES)}")
        if self.per_token and (self.role or not self.in_graph):
            raise ConfigError(
                f"reward {self.name!r} is per_token: then it runs in the graph (in_graph=True) and has no role, which "
                "judges whole completions"
            )


def accuracy(task: base.Task, instances: base.Instance, completions_BN: jax.Array, mask_BN: jax.Array) -> jax.Array:
    """The task's own exact check (R1 §2.1): 1 or 0."""
    return task.accuracy(instances, completions_BN, mask_BN)


def format_(task: base.Task, instances: base.Instance, completions_BN: jax.Array, mask_BN: jax.Array) -> jax.Array:
    """1 where the token ids are exactly <think>…</think><answer>…</answer><eos>, else 0: a truncated completion has no
    format."""
    return base.parse(completions_BN, mask_BN).ok_B.astype(jnp.float32)


def language_consistency(
    task: base.Task, instances: base.Instance, completions_BN: jax.Array, mask_BN: jax.Array
) -> jax.Array:
    """Num(symbols of the prompt's alphabet) / Num(symbols) over the chain of thought (R1 eq. 7). A chain without
    symbols scores 0, since otherwise saying nothing would be perfect; so does one that isn't delimited by its tags. The
    task says which tokens are symbols: `in_alphabet(instances, completions_BN) -> (target_BN, symbol_BN)`."""
    think_BN = base.parse(completions_BN, mask_BN).think_BN
    target_BN, symbol_BN = task.in_alphabet(instances, completions_BN)
    return ((target_BN & think_BN).sum(1) / jnp.maximum((symbol_BN & think_BN).sum(1), 1)).astype(jnp.float32)


REWARDS: dict[str, Reward] = {
    reward.name: reward
    for reward in (
        Reward("accuracy", accuracy, in_graph=True, role="accuracy"),
        Reward("format", format_, in_graph=True, role="format"),
        Reward("language_consistency", language_consistency, in_graph=True, requires_task="in_alphabet"),
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
    """The reward that a config names (see the module's docstring). Raises ConfigError for an unknown name, for what is
    neither a function nor a Reward, and for a package that is not installed."""
    found = resolve(REWARDS, name, "rewards")
    if isinstance(found, Reward):
        reward = dataclasses.replace(found, name=name)
    elif callable(found):
        reward = Reward(name, found, in_graph=False)
    else:
        raise ConfigError(
            f"rewards: {name!r} is a {type(found).__name__}: must be a function (prompt, completion, answer) -> float, "
            "or a deepseek_jax.rl.rewards.Reward"
        )
    if reward.requires is not None and importlib.util.find_spec(reward.requires[0]) is None:
        raise ConfigError(
            f"rewards: {name!r} needs a package that is not installed; run pip install '{reward.requires[1]}'"
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
        """True if all rewards are in the graph, so that a whole iteration can be one jitted call."""
        return all(reward.in_graph for reward in self.rewards)

    def graph_components(
        self, task: base.Task, instances: base.Instance, completions_BN: jax.Array, mask_BN: jax.Array
    ) -> dict[str, jax.Array]:
        """Every in-graph reward by name: float32 [B], or [B, N] for those of tokens, 0 outside the mask. Raises
        ConfigError for a result of another shape."""
        found = {}
        for reward in self.rewards:
            if not reward.in_graph:
                continue
            values = jnp.asarray(reward.function(task, instances, completions_BN, mask_BN), jnp.float32)
            shape = mask_BN.shape if reward.per_token else mask_BN.shape[:1]
            if values.shape != shape:
                raise ConfigError(
                    f"rewards: {reward.name!r} returns shape {values.shape} for {mask_BN.shape[0]} completions of "
                    f"{mask_BN.shape[1]} tokens: must be {shape}, as its per_token={reward.per_token} says"
                )
            found[reward.name] = jnp.where(mask_BN > 0, values, 0.0) if reward.per_token else values
        return found

    def text_components(
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
        texts = list(zip(prompts, completions, answers, finished, strict=True))

        def score(reward: Reward) -> np.ndarray:
            def one(completion) -> float:
                *arguments, ended = completion
                return 0.0 if reward.needs_end and not ended else call_reward(reward, *arguments, self.on_error)

            if reward.threads == 1:
                return np.array([one(completion) for completion in texts], np.float32)
            with concurrent.futures.ThreadPoolExecutor(reward.threads) as pool:
                return np.array(list(pool.map(one, texts)), np.float32)

        return {reward.name: score(reward) for reward in self.rewards if not reward.in_graph}

    def total(self, components: Mapping[str, jax.Array], mask_BN: jax.Array) -> jax.Array:
        """Weighted sum of the components: float32 [B], or with a reward of tokens [B, N], what each completion still
        earns from token n on (undiscounted; after its end what it earned as a whole).

        An accuracy counts only where every format reward in the set holds; a wrong answer scores `wrong_reward`.
        Components of weight 0 are for logging and can't spoil the sum. Overlong punishment is added if it is on.
        """
        formats = [components[r.name] >= 1 for r in self.rewards if r.role == "format"]
        total_B, tokens_BN = jnp.zeros(mask_BN.shape[:1], jnp.float32), None
        for reward, weight in zip(self.rewards, self.weights, strict=True):
            values = jnp.asarray(components[reward.name], jnp.float32)
            if reward.role == "accuracy":
                for holds_B in formats:
                    values = jnp.where(holds_B, values, 0.0)
                values = values + (1.0 - values) * self.wrong_reward
            if weight != 0 and reward.per_token:
                tokens_BN = weight * values + (0.0 if tokens_BN is None else tokens_BN)
            elif weight != 0:
                total_B = total_B + weight * values
        if self.overlong_buffer > 0:
            total_B = total_B + soft_overlong_punishment(mask_BN.sum(1), mask_BN.shape[1], self.overlong_buffer)
        return total_B if tokens_BN is None else total_B[:, None] + reward_to_go(tokens_BN, mask_BN)


def reward_to_go(rewards_BN: jax.Array, mask_BN: jax.Array) -> jax.Array:
    """The reward to go from each token on: sum over s >= t of r_s, real tokens only. float32 [B, N]."""
    return jax.lax.cumsum(jnp.where(mask_BN > 0, rewards_BN, 0.0), axis=1, reverse=True)


def build_rewards(config: GRPOConfig, task: base.Task | None = None) -> RewardSet:
    """The rewards that `config` names, checked against the task: ConfigError for a name, a package or a task that can't
    work. `task=None` is a data set of texts, which in-graph rewards can't check."""
    rewards = tuple(find_reward(name) for name, _ in config.rewards)
    for reward in rewards:
        twin = f"text_{reward.name}"
        instead = f"; use {twin!r}" if twin in REWARDS else ""
        if reward.in_graph and task is None:
            raise ConfigError(f"rewards: {reward.name!r} reads a task's token ids, and this run has no task{instead}")
        if reward.requires_task is not None and not hasattr(task, reward.requires_task):
            able = ", ".join(name for name, kind in TASKS.items() if hasattr(kind, reward.requires_task))
            raise ConfigError(
                f"rewards: {reward.name!r} needs a task with a method {reward.requires_task}"
                f"{f' ({able})' if able else ''}, and {type(task).__name__} has none{instead}"
            )
    return RewardSet(
        rewards,
        tuple(weight for _, weight in config.rewards),
        config.wrong_reward,
        config.overlong_buffer,
        config.on_reward_error,
    )


def call_reward(reward: Reward, prompt: str, completion: str, answer: str, on_error: str) -> float:
    """One call of a Python reward, which may be anybody's code: see `RewardSet.text_components`."""
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
        "Correct the function, or set on_reward_error='skip' in the stage's section to leave such completions out of "
        "training."
    ) from cause


def soft_overlong_punishment(lengths_B: jax.Array, max_length: int, buffer: int) -> jax.Array:
    """0 up to max_length - buffer tokens, then falling linearly to -1 at max_length (DAPO eq. 13). float32[B]."""
    return -jnp.clip((lengths_B - (max_length - buffer)) / buffer, 0.0, 1.0).astype(jnp.float32)


def _shown(value: object, limit: int = 400) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[:limit] + "…"

"""Every published GRPO hyper-parameter as a field, and the published recipes as presets."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from deepseek_jax.errors import ConfigError, nearest
from deepseek_jax.fields import change, is_mapping
from deepseek_jax.training.schedules import Schedule, constant, ramp

CHOICES = {
    "ratio": ("token", "sequence"),
    "kl_estimator": ("k1", "k2", "k3", "unbiased_k3"),
    "aggregation": ("sequence_mean", "token_mean", "constant"),
    "denominator": ("all", "live"),
    "advantage_normalization": ("group_std", "none", "batch_std"),
    "on_reward_error": ("raise", "skip"),
}
AT_LEAST_ONE = (
    "prompts_per_rollout",
    "num_minibatches",
    "inner_epochs",
    "steps",
    "oversampling",
    "max_prompt_length",
    "max_completion_length",
)
AT_LEAST_ZERO = (
    "learning_rate",
    "warmup_steps",
    "kl_coefficient",
    "reference_refresh_every",
    "advantage_eps",
    "advantage_std_floor",
    "overlong_buffer",
    "bias_update_speed",
)


@dataclasses.dataclass(frozen=True)
class GRPOConfig:
    """Group relative policy optimization (DeepSeekMath §4, R1 §2.1). A "step" is one optimizer update, as in R1.

    Rollout: `prompts_per_rollout` prompts with `group_size` completions each, drawn with `temperature` from the whole
    vocabulary, up to `max_prompt_length` and `max_completion_length` tokens. `oversampling` draws that many times the
    prompts and keeps the groups that carry a gradient (DAPO's dynamic sampling).

    Update: the rollout is split at random into `num_minibatches`, each used once per inner epoch; `inner_epochs` > 1
    reuses samples. `clip_epsilon` is (low, high); R1's 10 leaves the lower side open. `dual_clip` bounds the loss of
    bad tokens, `off_policy_delta` is V3.2's sequence mask; None turns either off. Every `reference_refresh_every` steps
    (0: never) the reference policy becomes ref_mix * policy + (1 - ref_mix) * reference. `denominator="live"` divides
    the policy term by the completions whose group has variance. `mask_truncated` leaves completions that hit the length
    limit out of the loss; `overlong_buffer` > 0 takes up to 1 off the reward of those that end within so many tokens of
    it (DAPO eq. 13).

    Reward: `rewards` are (name, weight) pairs; `wrong_reward` is what a wrong answer scores where a right one scores 1.
    `on_reward_error="skip"` gives a completion whose Python reward failed no reward, so that it trains nothing; "raise"
    stops the run.

    `replay_experts` makes training route as sampling did (V3.2's Keep Routing). `bias_update_speed` is gamma of the
    auxiliary-loss-free balance during RL. `learning_rate` and `warmup_steps` are the recipe's, for the stage's
    optimizer.
    """

    group_size: int = 16
    prompts_per_rollout: int = 512
    num_minibatches: int = 16
    inner_epochs: int = 1
    steps: int = 10_400
    oversampling: int = 1
    learning_rate: float = 3e-6
    warmup_steps: int = 0
    clip_epsilon: tuple[float, float] = (0.2, 0.2)
    dual_clip: float | None = None
    ratio: str = "token"
    aggregation: str = "sequence_mean"
    denominator: str = "all"
    kl_coefficient: float = 0.001
    kl_estimator: str = "k3"
    off_policy_delta: float | None = None
    reference_refresh_every: int = 400
    ref_mix: float = 1.0
    advantage_normalization: str = "group_std"
    advantage_eps: float = 1e-4
    advantage_std_floor: float = 1e-3
    temperature: float = 1.0
    max_prompt_length: int = 1024
    max_completion_length: int = 32_768
    mask_truncated: bool = False
    overlong_buffer: int = 0
    rewards: tuple[tuple[str, float], ...] = (("accuracy", 1.0), ("format", 1.0))
    wrong_reward: float = 0.0
    on_reward_error: str = "raise"
    replay_experts: bool = False
    bias_update_speed: float = 0.0

    def __post_init__(self):
        for field, allowed in CHOICES.items():
            value = getattr(self, field)
            _require(value in allowed, f"grpo.{field}={value!r}: {nearest(str(value), allowed)}")
        for field in AT_LEAST_ONE:
            _require(getattr(self, field) >= 1, f"grpo.{field}={getattr(self, field)}: must be at least 1")
        for field in AT_LEAST_ZERO:
            _require(getattr(self, field) >= 0, f"grpo.{field}={getattr(self, field)}: 0 or more")
        _require(
            self.group_size >= 2,
            f"grpo.group_size={self.group_size}: a completion is judged against its siblings, so a group needs at "
            "least 2",
        )
        _require(
            self.completions_per_rollout % self.num_minibatches == 0,
            f"grpo: num_minibatches={self.num_minibatches} must divide prompts_per_rollout * group_size = "
            f"{self.completions_per_rollout}",
        )
        _require(
            self.temperature > 0,
            f"grpo.temperature={self.temperature}: must be above 0; greedy completions of one prompt are all alike and "
            "teach nothing",
        )
        low_high = self.clip_epsilon
        _require(
            len(low_high) == 2 and min(low_high) > 0,
            f"grpo.clip_epsilon={low_high}: two positive numbers, (low, high); values above 1 are fine (R1 uses 10)",
        )
        _require(
            self.dual_clip is None or self.dual_clip > 1,
            f"grpo.dual_clip={self.dual_clip}: above 1, or None to turn it off",
        )
        _require(
            0 < self.ref_mix <= 1,
            f"grpo.ref_mix={self.ref_mix}: above 0 and at most 1 (1 replaces the reference by the policy)",
        )
        _require(
            self.advantage_eps + self.advantage_std_floor > 0,
            "grpo: advantage_eps and advantage_std_floor are both 0; one of them must keep the division by the "
            "deviation finite",
        )
        _require(
            self.overlong_buffer < self.max_completion_length,
            f"grpo.overlong_buffer={self.overlong_buffer} must be below "
            f"max_completion_length={self.max_completion_length}",
        )
        names = [name for name, _ in self.rewards]
        _require(
            len(names) > 0,
            "grpo.rewards is empty: name at least one reward, for example {'accuracy': 1.0, 'format': 1.0}",
        )
        _require(len(names) == len(set(names)), f"grpo.rewards names a reward twice: {', '.join(names)}")
        _require(
            any(weight != 0 for _, weight in self.rewards),
            "grpo.rewards: every weight is 0, so no completion is better than another",
        )

    @property
    def completions_per_rollout(self) -> int:
        return self.prompts_per_rollout * self.group_size

    @property
    def minibatch_size(self) -> int:
        """Completions per optimizer step."""
        return self.completions_per_rollout // self.num_minibatches

    @property
    def steps_per_rollout(self) -> int:
        return self.num_minibatches * self.inner_epochs

    @property
    def has_reference(self) -> bool:
        """Whether a reference policy is kept: a copy of the weights, which the KL term alone needs."""
        return self.kl_coefficient > 0

    @property
    def rollouts(self) -> int:
        """Rollouts needed for `steps` optimizer steps, the last one used in full."""
        return -(-self.steps // self.steps_per_rollout)

    def replace(self, **changes) -> "GRPOConfig":
        return dataclasses.replace(self, **changes)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "GRPOConfig":
        """Builds a config from a mapping; `preset` names the recipe whose values the other fields replace.

        `clip_epsilon` may be one number for both sides, `rewards` a mapping from name to weight.
        Raises ConfigError for an unknown field, naming the nearest known one, and for values that can't work.
        """
        fields = dict(fields.items()) if is_mapping(fields) else fields
        base = cls()
        if is_mapping(fields):
            base = preset(fields.pop("preset")) if fields.get("preset") is not None else base
            fields.pop("preset", None)
            if isinstance(fields.get("clip_epsilon"), int | float):
                fields["clip_epsilon"] = [fields["clip_epsilon"]] * 2
        return change(base, fields, "grpo")

    def to_dict(self) -> dict[str, Any]:
        """A plain dictionary; `from_dict` is the inverse."""
        return {**dataclasses.asdict(self), "clip_epsilon": list(self.clip_epsilon), "rewards": dict(self.rewards)}


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def learning_rate(config: GRPOConfig) -> Schedule:
    """The recipe's learning rate: a linear warm-up, then constant."""
    if config.warmup_steps:
        return ramp(0.0, config.learning_rate, config.warmup_steps)
    return constant(config.learning_rate)


# ----------------------------------------------------------------------------------------------------------------------
# The published recipes. Where a paper leaves a value open, the docstring says which one stands here.


def deepseekmath() -> GRPOConfig:
    """DeepSeekMath-RL (§4.2): 16 questions of 64 completions, one update each. The paper does not give epsilon (PPO's
    0.2 here) or a reference refresh, and its rewards come from a reward model; rules stand here. 144K questions make
    9,000 steps.
    """
    return GRPOConfig(
        group_size=64,
        prompts_per_rollout=16,
        num_minibatches=1,
        steps=9_000,
        learning_rate=1e-6,
        kl_coefficient=0.04,
        reference_refresh_every=0,
        max_completion_length=1024,
        rewards=(("accuracy", 1.0),),
    )


def r1_zero() -> GRPOConfig:
    """DeepSeek-R1-Zero (R1 §2.1). Epsilon is not given for this run; stage 1's stands here. From step 8,200 on the
    length limit was 65,536: a second stage with `max_completion_length` changed.
    """
    return GRPOConfig(clip_epsilon=(10.0, 10.0))


def r1_stage1() -> GRPOConfig:
    """First RL stage of DeepSeek-R1 (§3.2.1): R1-Zero's figures, epsilon 10, and the language-consistency reward (eq.
    7). It ran until it converged; R1-Zero's number of steps stands here.
    """
    return r1_zero().replace(rewards=(("accuracy", 1.0), ("format", 1.0), ("language_consistency", 1.0)))


def r1_stage2() -> GRPOConfig:
    """Second RL stage of DeepSeek-R1 (§3.2.2): temperature 0.7 and 1,700 steps. Its preference rewards on general
    prompts, used in the last 400 steps, come from reward models and are not part of this recipe.
    """
    return r1_stage1().replace(temperature=0.7, steps=1_700)


def v32() -> GRPOConfig:
    """GRPO as changed in DeepSeek-V3.2 (§3.1): no division by the deviation, the unbiased KL, the off-policy sequence
    mask, Keep Routing. The report gives no figures; the sizes are R1's and delta = 0.5 is a choice.
    """
    return r1_stage1().replace(
        advantage_normalization="none", kl_estimator="unbiased_k3", off_policy_delta=0.5, replay_experts=True
    )


def dapo() -> GRPOConfig:
    """DAPO (§4.1): token mean, clip-higher, dynamic sampling, soft overlong punishment, rewards of +-1, no KL. Prompts
    are oversampled by a factor of 2, where the paper samples until the batch is full; the warm-up is 20 rollouts; the
    number of steps is R1-Zero's.
    """
    return GRPOConfig(
        oversampling=2,
        learning_rate=1e-6,
        warmup_steps=20 * 16,
        clip_epsilon=(0.2, 0.28),
        aggregation="token_mean",
        kl_coefficient=0.0,
        reference_refresh_every=0,
        max_completion_length=20_480,
        overlong_buffer=4_096,
        rewards=(("accuracy", 1.0),),
        wrong_reward=-1.0,
    )


def dr_grpo() -> GRPOConfig:
    """Dr. GRPO's released recipe: 128 prompts of 8 completions in updates of 128 completions, no deviation, constant
    length divisor, no KL. Epsilon is PPO's 0.2 and the number of steps R1-Zero's; neither is in the recipe.
    """
    return GRPOConfig(
        group_size=8,
        prompts_per_rollout=128,
        num_minibatches=8,
        learning_rate=1e-6,
        aggregation="constant",
        advantage_normalization="none",
        kl_coefficient=0.0,
        reference_refresh_every=0,
        max_completion_length=3_000,
        rewards=(("accuracy", 1.0),),
    )


PRESETS: dict[str, Callable[[], GRPOConfig]] = {
    f.__name__: f for f in (deepseekmath, r1_zero, r1_stage1, r1_stage2, v32, dapo, dr_grpo)
}


def preset(name: str) -> GRPOConfig:
    """The published recipe called `name`; raises ConfigError with the nearest name."""
    _require(isinstance(name, str) and name in PRESETS, f"grpo.preset={name!r}: {nearest(str(name), PRESETS)}")
    return PRESETS[name]()

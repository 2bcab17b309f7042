"""GRPO's configuration: every published hyper-parameter as a field, and the published recipes as presets."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from deepseek_jax.errors import ConfigError, nearest
from deepseek_jax.fields import change, is_mapping
from deepseek_jax.ranges import above, at_least, check, one_of, or_none
from deepseek_jax.training.schedules import Schedule, constant, ramp

RATIOS = ("token", "sequence")
AGGREGATIONS = ("sequence_mean", "token_mean", "constant")
DENOMINATORS = ("all", "live")
KL_ESTIMATORS = ("k1", "k2", "k3", "unbiased_k3")
ON_REWARD_ERROR = ("raise", "skip")


@dataclasses.dataclass(frozen=True)
class GRPOConfig:
    """Group relative policy optimization (DeepSeekMath §4, R1 §2.1). A "step" is one optimizer update, as in R1.

    Rollout: `prompts_per_rollout` prompts with `group_size` completions each, drawn with `temperature` from the whole
    vocabulary, up to `max_prompt_length` and `max_completion_length` tokens. `oversampling` draws that many times the
    prompts and keeps the groups that carry a gradient (DAPO's dynamic sampling).

    Advantage: `advantage_estimator` is a name of `advantages.ESTIMATORS` or your own as package.module:function;
    `advantage_eps` and `advantage_std_floor` keep its division by a deviation finite.

    Update: the rollout is split at random into `num_minibatches`, each used once per inner epoch; `inner_epochs` > 1
    reuses samples. `clip_epsilon` is (low, high); R1's 10 leaves the lower side open. `dual_clip` bounds the loss of
    bad tokens, `off_policy_delta` is V3.2's sequence mask; None turns either off. Every `reference_refresh_every` steps
    (0: never) the reference policy becomes ref_mix * policy + (1 - ref_mix) * reference. With `kl_in_reward` each token
    pays kl_coefficient * k1 out of its reward (PPO, REINFORCE++), and the loss has no KL term. `denominator="live"`
    divides the policy term by the completions whose group carries a gradient. `mask_truncated` leaves completions that
    hit the length limit out of the loss; `overlong_buffer` > 0 takes up to 1 off the reward of those that end within so
    many tokens of it (DAPO eq. 13).

    Reward: `rewards` are (name, weight) pairs, names of `rewards.REWARDS` or your own as package.module:attribute.
    `wrong_reward` is what a wrong answer scores where a right one scores 1. `on_reward_error="skip"` gives a completion
    whose Python reward failed no reward, so that it trains nothing; "raise" stops the run.

    `replay_experts` makes training route as sampling did (V3.2's Keep Routing). `bias_update_speed` is gamma of the
    auxiliary-loss-free balance during RL. `auxiliary` has the weights of losses that the network's modules return,
    {name: weight} (see `model/auxiliary.py`). `learning_rate` and `warmup_steps` are the recipe's, for the stage's
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
    kl_in_reward: bool = False
    off_policy_delta: float | None = None
    reference_refresh_every: int = 400
    ref_mix: float = 1.0
    advantage_estimator: str = "group_std"
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
    auxiliary: tuple[tuple[str, float], ...] = ()

    def __post_init__(self):
        check(
            self,
            "",
            group_size=at_least(2, why="a completion is judged against the others of its group"),
            prompts_per_rollout=at_least(1),
            num_minibatches=at_least(1),
            inner_epochs=at_least(1),
            steps=at_least(1, at_most=2**31 - 1, why="a step is an int32"),
            oversampling=at_least(1),
            max_prompt_length=at_least(1),
            max_completion_length=at_least(1),
            learning_rate=at_least(0),
            warmup_steps=at_least(0),
            ratio=one_of(RATIOS),
            aggregation=one_of(AGGREGATIONS),
            denominator=one_of(DENOMINATORS),
            kl_estimator=one_of(KL_ESTIMATORS),
            on_reward_error=one_of(ON_REWARD_ERROR),
            dual_clip=or_none(above(1), "to turn it off"),
            kl_coefficient=at_least(0),
            reference_refresh_every=at_least(0),
            ref_mix=above(0, at_most=1, why="1 replaces the reference by the policy"),
            advantage_eps=at_least(0),
            advantage_std_floor=at_least(0),
            temperature=above(0, why="greedy completions of one prompt are all alike and teach nothing"),
            overlong_buffer=at_least(0, below=self.max_completion_length, why="max_completion_length is the limit"),
            bias_update_speed=at_least(0),
        )
        length = self.max_prompt_length + self.max_completion_length
        if length >= 2**31:
            raise ConfigError(
                f"max_prompt_length + max_completion_length = {length}: must be at most {2**31 - 1}; positions are "
                "int32"
            )
        if self.completions_per_rollout % self.num_minibatches:
            raise ConfigError(
                f"num_minibatches={self.num_minibatches} must divide prompts_per_rollout * group_size = "
                f"{self.completions_per_rollout}"
            )
        if len(self.clip_epsilon) != 2 or min(self.clip_epsilon) <= 0:
            raise ConfigError(
                f"clip_epsilon={self.clip_epsilon}: must be two positive numbers, (low, high); values above 1 are fine "
                "(R1 uses 10)"
            )
        if self.advantage_eps + self.advantage_std_floor == 0:
            raise ConfigError(
                "advantage_eps and advantage_std_floor are both 0; one of them must keep the division by the deviation "
                "finite"
            )
        if self.kl_in_reward and self.kl_estimator != "k1":
            raise ConfigError(
                f"kl_estimator={self.kl_estimator!r}: must be 'k1' with kl_in_reward=True; the others are made for the "
                "loss"
            )
        names = [name for name, _ in self.rewards]
        if not names:
            raise ConfigError(
                "rewards is empty: name at least one reward, for example {'accuracy': 1.0, 'format': 1.0}"
            )
        if len(names) != len(set(names)):
            raise ConfigError(f"rewards names a reward twice: {', '.join(names)}")
        if all(weight == 0 for _, weight in self.rewards):
            raise ConfigError("rewards: every weight is 0, so no completion is better than another")

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
        """True if a reference policy is kept: a copy of the weights, which only the KL term needs."""
        return self.kl_coefficient > 0

    @property
    def kl_in_loss(self) -> bool:
        """True if the loss has a KL term."""
        return self.has_reference and not self.kl_in_reward

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
        return change(base, fields, "")

    def to_dict(self) -> dict[str, Any]:
        """A plain dictionary; `from_dict` is the inverse."""
        return {
            **dataclasses.asdict(self),
            "clip_epsilon": list(self.clip_epsilon),
            "rewards": dict(self.rewards),
            "auxiliary": dict(self.auxiliary),
        }


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
        advantage_estimator="group_mean", kl_estimator="unbiased_k3", off_policy_delta=0.5, replay_experts=True
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
        advantage_estimator="group_mean",
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
    if not isinstance(name, str) or name not in PRESETS:
        raise ConfigError(f"preset={name!r}: {nearest(str(name), PRESETS)}")
    return PRESETS[name]()

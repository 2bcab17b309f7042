"""Warnings about a GRPO run: why it learns nothing or the wrong thing, said while it can still be stopped."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from deepseek_jax.ranges import above, at_least, check


@dataclasses.dataclass(frozen=True)
class DiagnosticsConfig:
    """Shares from which a batch counts as dead (`zero_variance` of its groups, `truncated` of its completions), and by
    which completions may get shorter without being more often right (`shorter`); for how many iterations in a row
    before it is said (`patience`), and after how many it is said again (`repeat`)."""

    zero_variance: float = 0.95
    truncated: float = 0.9
    shorter: float = 0.25
    patience: int = 5
    repeat: int = 50

    def __post_init__(self):
        share = above(0, at_most=1)
        check(self, "diagnostics.", zero_variance=share, truncated=share, shorter=share)
        check(self, "diagnostics.", patience=at_least(1), repeat=at_least(1))


class Diagnostics:
    """Watches the metrics of successive iterations; `observe` returns sentences, usually none.

    Reads zero_variance_fraction, all_right_fraction, all_wrong_fraction and non_finite_rewards (see `group_metrics`),
    truncated_fraction, non_finite_completions and length_mean (see `length_metrics`), skipped_updates and
    held_out_accuracy; what is absent or None isn't watched. Numbers that are not finite are reported at once,
    everything else after `patience` iterations in a row; both again every `repeat` iterations while they last.
    """

    def __init__(self, config: DiagnosticsConfig = DiagnosticsConfig()):
        self.config = config
        self.streaks: dict[str, int] = {}
        # length and held-out accuracy as they were first measured, and as they are now
        self.first: dict[str, float] = {}
        self.now: dict[str, float] = {}

    def observe(self, metrics: Mapping[str, Any]) -> list[str]:
        def read(name: str) -> float:
            value = metrics.get(name)
            return 0.0 if value is None else float(value)

        same, cut = read("zero_variance_fraction"), read("truncated_fraction")
        truncated = cut >= self.config.truncated
        dead = same >= self.config.zero_variance
        right = dead and read("all_right_fraction") > read("all_wrong_fraction")
        wrong = dead and not right and not truncated

        messages = []
        if self._lasts("truncated", truncated, self.config.patience):
            messages.append(
                f"{cut:.0%} of the completions hit the length limit and earn nothing: raise max_completion_length, or "
                "teach shorter chains in the cold start"
            )
        if self._lasts("right", right, self.config.patience):
            messages.append(
                f"{same:.0%} of the groups earn one and the same reward, most of them all right: the task is solved "
                "and gives no more gradient; make it harder, or stop here"
            )
        if self._lasts("wrong", wrong, self.config.patience):
            messages.append(
                f"{same:.0%} of the groups earn one and the same reward, and not for being right: nothing is learnt; "
                "check the cold start and the format, or make the task easier"
            )
        if self._lasts("shorter", self._shorter(metrics), self.config.patience):
            messages.append(
                f"completions have shrunk from {self.first['length_mean']:.1f} to {self.now['length_mean']:.1f} "
                "tokens, and held-out accuracy "
                f"went from {self.first['held_out_accuracy']:.3f} to {self.now['held_out_accuracy']:.3f}: the policy "
                "gives up its reasoning, "
                "whose steps go wrong too often to pay; teach the single step first, with longer pre-training or more "
                "long demonstrations"
            )
        if self._lasts("broken", read("non_finite_completions") > 0, 1):
            messages.append(
                f"{read('non_finite_completions'):.0f} completions met logits that were not finite; they train "
                "nothing. Lower the learning rate, or go back to an earlier checkpoint"
            )
        if self._lasts("non-finite", read("non_finite_rewards") > 0, 1):
            messages.append(
                f"{read('non_finite_rewards'):.0f} rewards failed or were not finite; those completions train nothing"
            )
        if self._lasts("skipped", read("skipped_updates") > 0, 1):
            messages.append(
                f"{read('skipped_updates'):.0f} updates were skipped because loss or gradient were not finite; the "
                "weights are intact"
            )
        return messages

    def _shorter(self, metrics: Mapping[str, Any]) -> bool:
        """True if completions are much shorter than at first, and held-out answers are not more often right."""
        names = ("length_mean", "held_out_accuracy")
        self.now |= {name: float(metrics[name]) for name in names if metrics.get(name) is not None}
        self.first = self.now | self.first
        if len(self.now) < len(names):
            return False
        length, accuracy = (self.now[name] for name in names)
        return (
            length <= (1 - self.config.shorter) * self.first["length_mean"]
            and accuracy <= self.first["held_out_accuracy"]
        )

    def _lasts(self, name: str, holds: bool, patience: int) -> bool:
        streak = self.streaks[name] = self.streaks.get(name, 0) + 1 if holds else 0
        return streak >= patience and (streak - patience) % self.config.repeat == 0

"""Counters into words: why a run learns nothing, said while it can still be stopped."""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class HealthConfig:
    """Shares from which a batch counts as dead, for how many iterations in a row before it is said, and when it is said again."""

    zero_variance: float = 0.95
    truncated: float = 0.9
    patience: int = 5
    repeat: int = 50


class Health:
    """Watches the metrics of successive iterations; `observe` returns sentences, usually none.

    Reads zero_variance_fraction, all_right_fraction, all_wrong_fraction and non_finite_rewards (see `group_metrics`),
    truncated_fraction and skipped_updates; what is absent isn't watched. Numbers that are not finite are reported at
    once, everything else after `patience` iterations in a row; both again every `repeat` iterations while they last.
    """

    def __init__(self, config: HealthConfig = HealthConfig()):
        self.config = config
        self.streaks: dict[str, int] = {}

    def observe(self, metrics: Mapping[str, float]) -> list[str]:
        def read(name: str) -> float:
            return float(metrics.get(name, 0.0))

        same, cut = read("zero_variance_fraction"), read("truncated_fraction")
        truncated = cut >= self.config.truncated
        dead = same >= self.config.zero_variance
        right = dead and read("all_right_fraction") > read("all_wrong_fraction")
        wrong = dead and not right and not truncated

        messages = []
        if self._lasts("truncated", truncated, self.config.patience):
            messages.append(
                f"{cut:.0%} of the completions hit the length limit and earn nothing: raise max_completion_length, or teach "
                "shorter chains in the cold start"
            )
        if self._lasts("right", right, self.config.patience):
            messages.append(
                f"{same:.0%} of the groups earn one and the same reward, most of them all right: the task is solved and gives no more "
                "gradient; make it harder, or stop here"
            )
        if self._lasts("wrong", wrong, self.config.patience):
            messages.append(
                f"{same:.0%} of the groups earn one and the same reward, and not for being right: nothing is learnt; check the "
                "cold start and the format, or make the task easier"
            )
        if self._lasts("non-finite", read("non_finite_rewards") > 0, 1):
            messages.append(f"{read('non_finite_rewards'):.0f} rewards failed or were not finite; those completions train nothing")
        if self._lasts("skipped", read("skipped_updates") > 0, 1):
            messages.append(
                f"{read('skipped_updates'):.0f} updates were skipped because loss or gradient were not finite; the weights are intact"
            )
        return messages

    def _lasts(self, name: str, holds: bool, patience: int) -> bool:
        streak = self.streaks[name] = self.streaks.get(name, 0) + 1 if holds else 0
        return streak >= patience and (streak - patience) % self.config.repeat == 0


def dead_group_probability(success: float, group_size: int) -> float:
    """p^G + (1-p)^G: how often a group is all right or all wrong, and teaches nothing, if a completion is right with probability p."""
    return success**group_size + (1.0 - success) ** group_size

"""Counters into words: why a run learns nothing, said while it can still be stopped."""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class HealthConfig:
    """Shares from which a batch counts as dead, and for how many iterations in a row before it is said. Repeated every `repeat`."""

    zero_variance: float = 0.95
    truncated: float = 0.9
    patience: int = 5
    repeat: int = 50


class Health:
    """Watches the metrics of successive iterations; `observe` returns sentences, usually none.

    Reads zero_variance_fraction, all_right_fraction, all_wrong_fraction and non_finite_rewards (see `group_metrics`), truncated_fraction
    and skipped_updates; what is absent is not watched. Non-finite rewards and skipped updates are reported at once, the rest after `patience` iterations in a row.
    """

    def __init__(self, config: HealthConfig = HealthConfig()):
        self.config = config
        self.streaks: dict[str, int] = {}

    def observe(self, metrics: Mapping[str, float]) -> list[str]:
        config = self.config
        share = {name: float(metrics.get(name, 0.0)) for name in ("zero_variance_fraction", "truncated_fraction", "all_right_fraction")}
        wrong = float(metrics.get("all_wrong_fraction", 0.0))
        dead = share["zero_variance_fraction"] >= config.zero_variance
        truncated = share["truncated_fraction"] >= config.truncated
        right = dead and share["all_right_fraction"] > wrong
        percent = {name: f"{100 * value:.0f}%" for name, value in share.items()}
        findings = [
            (
                "truncated",
                truncated,
                0,
                f"{percent['truncated_fraction']} of the completions hit the length limit, so that none gets a reward: "
                "raise max_completion_length, or teach shorter chains in the cold start",
            ),
            (
                "all right",
                right,
                0,
                f"{percent['zero_variance_fraction']} of the groups earn the same reward throughout, most of them all right: "
                "the task is solved and gives no more gradient; make it harder, or stop here",
            ),
            (
                "all wrong",
                dead and not right and not truncated,
                0,
                f"{percent['zero_variance_fraction']} of the groups earn the same reward throughout, and it isn't for being right: "
                "nothing is learnt; check the cold start and the format, or make the task easier",
            ),
            (
                "non-finite",
                float(metrics.get("non_finite_rewards", 0.0)) > 0,
                1,
                f"{float(metrics.get('non_finite_rewards', 0.0)):.0f} rewards were not finite or failed; those completions were left out",
            ),
            (
                "skipped",
                float(metrics.get("skipped_updates", 0.0)) > 0,
                1,
                f"{float(metrics.get('skipped_updates', 0.0)):.0f} updates were skipped because the loss or its gradient was not finite; the weights are intact",
            ),
        ]
        return [sentence for name, holds, patience, sentence in findings if self._due(name, holds, patience or config.patience)]

    def _due(self, name: str, holds: bool, patience: int) -> bool:
        streak = self.streaks[name] = self.streaks.get(name, 0) + 1 if holds else 0
        due = streak >= patience and (streak - patience) % self.config.repeat == 0
        return due


def dead_group_probability(success: float, group_size: int) -> float:
    """p^G + (1-p)^G: how often a group is all right or all wrong, and teaches nothing, if each completion is right with probability p."""
    return success**group_size + (1.0 - success) ** group_size

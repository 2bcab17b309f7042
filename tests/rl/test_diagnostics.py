"""Counters into words, at the right time and with the right cause."""

import pytest

from deepseek_jax.errors import ConfigError
from deepseek_jax.rl.diagnostics import Diagnostics, DiagnosticsConfig

SOLVED = {
    "zero_variance_fraction": 0.97,
    "all_right_fraction": 0.95,
    "all_wrong_fraction": 0.02,
    "truncated_fraction": 0.0,
}
HOPELESS = {
    "zero_variance_fraction": 1.0,
    "all_right_fraction": 0.0,
    "all_wrong_fraction": 1.0,
    "truncated_fraction": 0.1,
}
CUT_OFF = {
    "zero_variance_fraction": 1.0,
    "all_right_fraction": 0.0,
    "all_wrong_fraction": 1.0,
    "truncated_fraction": 0.99,
}
ALIVE = {"zero_variance_fraction": 0.5, "all_right_fraction": 0.4, "all_wrong_fraction": 0.1, "truncated_fraction": 0.3}


def run(metrics, steps, **settings):
    diagnostics = Diagnostics(DiagnosticsConfig(**settings))
    return [diagnostics.observe(metrics) for _ in range(steps)]


@pytest.mark.parametrize(
    "metrics,words", [(SOLVED, "solved"), (HOPELESS, "nothing is learnt"), (CUT_OFF, "max_completion_length")]
)
def test_cause_is_named_once_after_patience(metrics, words):
    messages = run(metrics, 8, patience=3)
    assert [len(m) for m in messages] == [0, 0, 1, 0, 0, 0, 0, 0]
    assert words in messages[2][0] and "%" in messages[2][0]


def test_live_runs_are_left_alone():
    assert not any(run(ALIVE, 100))


def test_a_good_iteration_starts_the_count_anew():
    diagnostics = Diagnostics(DiagnosticsConfig(patience=3))
    assert not any(diagnostics.observe(m) for m in (HOPELESS, HOPELESS, ALIVE, HOPELESS, HOPELESS))
    assert diagnostics.observe(HOPELESS)


def test_repeated_while_it_lasts():
    assert [i for i, m in enumerate(run(HOPELESS, 25, patience=5, repeat=10)) if m] == [4, 14, 24]


@pytest.mark.parametrize(
    "metrics,words",
    [
        ({"non_finite_rewards": 3.0}, "3 rewards"),
        ({"skipped_updates": 2}, "2 updates were skipped"),
        ({"non_finite_completions": 4.0}, "4 completions met logits"),
    ],
)
def test_non_finite_numbers_are_reported_at_once(metrics, words):
    assert words in run(metrics, 1)[0][0]


def iteration(length, held_out=None):
    return {"length_mean": length} | ({} if held_out is None else {"held_out_accuracy": held_out})


def test_reasoning_that_disappears_is_said():
    """As when a cold start never taught the single step: shorter and no more often right. Held out is measured now and
    then."""
    diagnostics = Diagnostics(DiagnosticsConfig(patience=3))
    curve = [
        iteration(11.7, 0.164),
        iteration(9.0),
        iteration(8.5),
        iteration(8.0, 0.158),
        iteration(7.0),
        iteration(6.1, 0.152),
    ]
    said = [diagnostics.observe(metrics) for metrics in curve]
    assert [len(sentences) for sentences in said] == [0, 0, 0, 0, 1, 0]  # below three quarters of 11.7 since the third
    assert "from 11.7 to 7.0 tokens" in said[4][0] and "from 0.164 to 0.158" in said[4][0] and "steps" in said[4][0]


@pytest.mark.parametrize(
    "last", [iteration(11.0, 0.1), iteration(5.0, 0.2), iteration(5.0, None), iteration(20.0, 0.9)]
)
def test_shorter_and_better_or_as_long_is_left_alone(last):
    diagnostics = Diagnostics(DiagnosticsConfig(patience=1))
    first = iteration(11.7) if "held_out_accuracy" not in last else iteration(11.7, 0.164)
    assert not diagnostics.observe(first) and not diagnostics.observe(last)


def test_lines_of_a_metrics_file_may_hold_null():
    assert not Diagnostics().observe(
        {"step": 3, "non_finite_rewards": None, "length_mean": None, "held_out_accuracy": None}
    )


@pytest.mark.parametrize(
    "fields", [{"patience": 0}, {"repeat": 0}, {"shorter": 0.0}, {"zero_variance": 1.5}, {"truncated": float("nan")}]
)
def test_refused(fields):
    with pytest.raises(ConfigError, match=f"diagnostics.{next(iter(fields))}"):
        DiagnosticsConfig(**fields)

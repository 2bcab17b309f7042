"""Counters into words, at the right time and with the right cause."""

import pytest

from deepseek_jax.rl.health import Health, HealthConfig, dead_group_probability

SOLVED = {"zero_variance_fraction": 0.97, "all_right_fraction": 0.95, "all_wrong_fraction": 0.02, "truncated_fraction": 0.0}
HOPELESS = {"zero_variance_fraction": 1.0, "all_right_fraction": 0.0, "all_wrong_fraction": 1.0, "truncated_fraction": 0.1}
CUT_OFF = {"zero_variance_fraction": 1.0, "all_right_fraction": 0.0, "all_wrong_fraction": 1.0, "truncated_fraction": 0.99}
ALIVE = {"zero_variance_fraction": 0.5, "all_right_fraction": 0.4, "all_wrong_fraction": 0.1, "truncated_fraction": 0.3}


def run(metrics, steps, **settings):
    health = Health(HealthConfig(**settings))
    return [health.observe(metrics) for _ in range(steps)]


@pytest.mark.parametrize("metrics,words", [(SOLVED, "solved"), (HOPELESS, "nothing is learnt"), (CUT_OFF, "max_completion_length")])
def test_cause_is_named_once_after_patience(metrics, words):
    messages = run(metrics, 8, patience=3)
    assert [len(m) for m in messages] == [0, 0, 1, 0, 0, 0, 0, 0]
    assert words in messages[2][0] and "%" in messages[2][0]


def test_live_runs_are_left_alone():
    assert not any(run(ALIVE, 100))


def test_a_good_iteration_starts_the_count_anew():
    health = Health(HealthConfig(patience=3))
    assert not any(health.observe(m) for m in (HOPELESS, HOPELESS, ALIVE, HOPELESS, HOPELESS))
    assert health.observe(HOPELESS)


def test_repeated_while_it_lasts():
    assert [i for i, m in enumerate(run(HOPELESS, 25, patience=5, repeat=10)) if m] == [4, 14, 24]


@pytest.mark.parametrize("metrics,words", [({"non_finite_rewards": 3.0}, "3 rewards"), ({"skipped_updates": 2}, "2 updates were skipped")])
def test_non_finite_numbers_are_reported_at_once(metrics, words):
    assert words in run(metrics, 1)[0][0]


def test_probability_of_a_dead_group():
    assert dead_group_probability(0.18, 2) == pytest.approx(0.7, abs=0.01)
    assert dead_group_probability(0.18, 16) == pytest.approx(0.04, abs=0.005)

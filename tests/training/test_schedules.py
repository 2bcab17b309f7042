"""Schedules against the published numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.errors import ConfigError
from deepseek_jax.training import schedules
from deepseek_jax.training.schedules import MOONLIGHT_BATCH, V2_BATCH, V2_LITE_BATCH, V3_BATCH, Segment, build_schedule


def at(schedule, *steps):
    return np.asarray(schedule(jnp.array(steps)))


def test_v3_batches_reach_14_8_trillion_tokens():
    ramp = V3_BATCH.step_at(469e9)
    assert ramp == pytest.approx(12_424, abs=1)
    assert V3_BATCH.step_at(14.8e12) == pytest.approx(240_209, abs=2)
    assert V3_BATCH.size(0) == 3072 and V3_BATCH.size(ramp + 1) == 15_360
    tokens = 4096 * sum(V3_BATCH.size(step) for step in range(ramp))
    assert tokens == pytest.approx(469e9, rel=1e-3)
    half = V3_BATCH.step_at(200e9)
    assert 4096 * sum(V3_BATCH.size(step) for step in range(half)) == pytest.approx(200e9, rel=1e-3)
    assert pytest.approx(62.9e6, rel=1e-3) == 4096 * 15_360


def test_other_published_batches():
    assert V2_BATCH.step_at(225e9) == pytest.approx(225e9 / 4096 / 5760, abs=1)
    assert V2_LITE_BATCH.step_at(5.7e12) == pytest.approx(301_997, abs=2) and V2_LITE_BATCH.size(7) == 4608
    jump = MOONLIGHT_BATCH.step_at(200e9)
    assert (MOONLIGHT_BATCH.size(jump - 1), MOONLIGHT_BATCH.size(jump + 1)) == (2048, 4096)
    assert MOONLIGHT_BATCH.step_at(33e9) == pytest.approx(2000, rel=0.02)  # the report's 2K steps of warm-up


def test_v3_learning_rate():
    schedule = schedules.deepseek_v3()
    constant_end, cosine_end, low_end, end = (V3_BATCH.step_at(t) for t in (10e12, 14.3e12, 14.633e12, 14.8e12))
    values = at(
        schedule,
        0,
        1000,
        2000,
        constant_end,
        (constant_end + cosine_end) // 2,
        cosine_end,
        low_end - 1,
        low_end,
        end,
        end + 10,
    )
    expected = [0, 1.1e-4, 2.2e-4, 2.2e-4, 1.21e-4, 2.2e-5, 2.2e-5, 7.3e-6, 7.3e-6, 7.3e-6]
    np.testing.assert_allclose(values, expected, rtol=1e-4)
    assert sum(segment.steps for segment in schedule.segments) == end


def test_v3_mtp_weight_and_bias_speed():
    ten, fourteen = V3_BATCH.step_at(10e12), V3_BATCH.step_at(14.3e12)
    np.testing.assert_allclose(at(schedules.deepseek_v3_mtp_weight(), 0, ten - 1, ten, 10 * ten), [0.3, 0.3, 0.1, 0.1])
    np.testing.assert_allclose(
        at(schedules.deepseek_v3_bias_speed(), 0, fourteen - 1, fourteen, 240_000), [1e-3, 1e-3, 0, 0]
    )
    np.testing.assert_allclose(at(schedules.deepseek_v3_mtp_weight(1480), 999, 1000), [0.3, 0.1])


def test_v2_and_v2_lite_learning_rates():
    sixty, ninety = V2_BATCH.step_at(0.6 * 8.1e12), V2_BATCH.step_at(0.9 * 8.1e12)
    values = at(schedules.deepseek_v2(), 2000, sixty - 1, sixty, ninety - 1, ninety, 10**6)
    np.testing.assert_allclose(values, [2.4e-4, 2.4e-4, 7.584e-5, 7.584e-5, 2.3965e-5, 2.3965e-5], rtol=1e-4)
    eighty, ninety = V2_LITE_BATCH.step_at(0.8 * 5.7e12), V2_LITE_BATCH.step_at(0.9 * 5.7e12)
    values = at(schedules.deepseek_v2_lite(), 1000, 2000, eighty - 1, eighty, ninety)
    np.testing.assert_allclose(values, [2.1e-4, 4.2e-4, 4.2e-4, 1.3272e-4, 4.194e-5], rtol=1e-4)


def test_moonlight_learning_rate():
    cooldown, end = MOONLIGHT_BATCH.step_at(5.2e12), MOONLIGHT_BATCH.step_at(5.7e12)
    values = at(schedules.moonlight(), 2000, cooldown, cooldown + 100, (cooldown + 100 + end) // 2, end)
    np.testing.assert_allclose(values, [4.2e-4, 4.2e-5, 1e-4, 5e-5, 0], rtol=1e-3, atol=1e-12)


def test_plain_schedules_squeezed_into_a_short_run():
    np.testing.assert_allclose(
        at(schedules.cosine(1.0, 110, 10), 0, 5, 10, 60, 110, 200), [0, 0.5, 1, 0.55, 0.1, 0.1], rtol=1e-5
    )
    np.testing.assert_allclose(
        at(schedules.step_decay(1.0, 100, 10), 10, 59, 60, 90), [1, 1, 0.316, 0.316**2], rtol=1e-5
    )
    np.testing.assert_allclose(at(schedules.constant(0.5), 0, 9), [0.5, 0.5])
    np.testing.assert_allclose(at(schedules.ramp(1, 5, 4), 0, 2, 4, 9), [1, 3, 5, 5])
    short = schedules.deepseek_v3(1.0, steps=1480, warmup_steps=20)
    np.testing.assert_allclose(at(short, 20, 1000, 1430, 1463), [1, 1, 0.1, 7.3e-6 / 2.2e-4], rtol=1e-5)


def test_schedule_is_static_and_traceable():
    schedule = schedules.deepseek_v3(steps=100, warmup_steps=5)
    assert hash(schedule) == hash(schedules.deepseek_v3(steps=100, warmup_steps=5))
    assert jax.eval_shape(schedule, jnp.int32(3)).dtype == jnp.float32
    assert schedules.constant(0.0).always(0.0) and not schedules.switch(0.0, 1.0, 0.5, 10).always(0.0)


def test_specifications():
    assert build_schedule(3, "x", 10) == schedules.constant(3.0)
    assert build_schedule({"kind": "cosine", "peak": 1.0}, "x", 10) == schedules.cosine(1.0, 10)
    assert build_schedule({"kind": "deepseek_v3", "steps": None}, "x", 10) == schedules.deepseek_v3()
    with pytest.raises(ConfigError, match="train.lr.kind='cosin'.*did you mean 'cosine'"):
        build_schedule({"kind": "cosin"}, "train.lr", 10)
    with pytest.raises(ConfigError, match="train.lr.peek.*did you mean 'peak'"):
        build_schedule({"kind": "cosine", "peek": 1}, "train.lr", 10)
    with pytest.raises(ConfigError, match="needs 'peak'"):
        build_schedule({"kind": "cosine"}, "train.lr", 10)
    with pytest.raises(ConfigError, match="longer than the schedule"):
        build_schedule({"kind": "cosine", "peak": 1.0, "warmup_steps": 20}, "train.lr", 10)
    with pytest.raises(ConfigError, match="linear"):
        Segment("linea", 1, 1.0)

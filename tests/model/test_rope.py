"""Rotary embedding against complex multiplication, YaRN against its published constants."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.model.config import RopeConfig, YarnConfig
from deepseek_jax.model.presets import preset
from deepseek_jax.model.rope import (
    apply_rotary,
    inverse_frequencies,
    rotary_angles,
    softmax_scale,
    yarn_correction_range,
    yarn_mscale,
)

V3, V2 = preset("v3_671b").rope, preset("v2_236b").rope


def test_published_constants():
    assert yarn_mscale(40.0, 1.0) == pytest.approx(1.368888, abs=5e-7)
    assert yarn_mscale(40.0, 0.707) == pytest.approx(1.260804, abs=5e-7)
    assert yarn_mscale(1.0, 1.0) == 1.0
    assert softmax_scale(RopeConfig(), 192) == pytest.approx(0.0721688, abs=5e-8)
    assert softmax_scale(V3, 192) == pytest.approx(0.1352338, abs=5e-8)
    assert softmax_scale(V2, 192) == pytest.approx(0.1147214, abs=5e-8)
    assert yarn_correction_range(V3.yarn, 64, 10_000.0) == (10, 23)
    assert softmax_scale(RopeConfig(yarn=YarnConfig()), 192) == 192**-0.5  # mscale_all_dim unset


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"original_max_position_embeddings": 8}, (0, 1)),  # the fastest pair turns less than 32 times in 8 tokens
        ({"beta_slow": 1e-9}, (10, 63)),  # no pair turns so little: cut at the last of 64 dimensions
        ({"original_max_position_embeddings": 8, "beta_slow": 1e-9}, (0, 63)),
    ],
)
def test_yarns_range_is_cut_at_both_ends(changes, expected):
    assert yarn_correction_range(YarnConfig(**changes), 64, 10_000.0) == expected


@pytest.mark.parametrize("rope", [V3, V2])
def test_magnitude_is_one_where_both_mscales_agree(rope):
    cos, sin = rotary_angles(rope, 64, jnp.arange(3))
    np.testing.assert_allclose(cos**2 + sin**2, 1.0, rtol=1e-6)


def test_magnitude_is_mscale_where_all_dim_is_unset():
    cos, sin = rotary_angles(RopeConfig(yarn=YarnConfig(mscale=0.707)), 64, jnp.arange(3))
    np.testing.assert_allclose(np.sqrt(cos**2 + sin**2), 1.260804, rtol=1e-6)


def test_yarn_frequencies():
    """Fast pairs keep their frequency, slow ones are divided by 40, in between it is a linear ramp (low 10, high
    23)."""
    plain, yarn = inverse_frequencies(RopeConfig(), 64), inverse_frequencies(V3, 64)
    for i in range(32):
        assert plain[i] == pytest.approx(10_000 ** (-2 * i / 64))
        share = min(max((i - 10) / 13, 0), 1)
        assert yarn[i] == pytest.approx(plain[i] * (1 - share) + plain[i] / 40 * share)
    equal_betas = inverse_frequencies(RopeConfig(yarn=YarnConfig(factor=32.0, beta_fast=1.0, beta_slow=1.0)), 64)
    pair = 64 * math.log(4096 / (2 * math.pi)) / (2 * math.log(10_000))
    assert equal_betas[math.floor(pair)] == pytest.approx(plain[math.floor(pair)])
    assert equal_betas[math.ceil(pair)] == pytest.approx(plain[math.ceil(pair)] / 32)


def rotated(interleaved, positions, x):
    cos, sin = rotary_angles(RopeConfig(interleaved=interleaved), x.shape[-1], jnp.asarray(positions))
    return np.asarray(apply_rotary(jnp.asarray(x, jnp.float32), cos, sin, interleaved))


@pytest.mark.parametrize("interleaved", [True, False])
def test_equals_complex_multiplication(interleaved):
    rng, positions = np.random.default_rng(0), np.array([0, 1, 7, 100])
    x = rng.normal(size=(4, 16))
    first, second = (x[:, 0::2], x[:, 1::2]) if interleaved else (x[:, :8], x[:, 8:])
    turned = (first + 1j * second) * np.exp(1j * positions[:, None] * 10_000.0 ** (-np.arange(8) / 8))
    expected = (
        np.stack([turned.real, turned.imag], -1).reshape(4, 16)
        if interleaved
        else np.concatenate([turned.real, turned.imag], -1)
    )
    np.testing.assert_allclose(rotated(interleaved, positions, x), expected, atol=2e-5)


@pytest.mark.parametrize("interleaved", [True, False])
def test_products_depend_on_the_distance_alone(interleaved):
    rng = np.random.default_rng(1)
    q, k = rng.normal(size=(1, 16)), rng.normal(size=(1, 16))
    near = rotated(interleaved, [5], q) @ rotated(interleaved, [2], k).T
    far = rotated(interleaved, [43], q) @ rotated(interleaved, [40], k).T
    other = rotated(interleaved, [43], q) @ rotated(interleaved, [39], k).T
    assert near == pytest.approx(far, abs=1e-4)
    assert abs(near - other) > 1e-2

"""FP8 values with 128 x 128 block scales."""

import ml_dtypes
import numpy as np

from deepseek_jax.interop.fp8_blocks import dequantise_rows, quantise, scale_shape


def dequantise(values, scale_inv):
    return np.concatenate([rows for _, rows in dequantise_rows(values, scale_inv)])


def test_ragged_blocks_are_ceil_divided():
    assert scale_shape((576, 7168)) == (5, 56)


def test_dequantise_is_value_times_its_blocks_scale():
    rng = np.random.default_rng(0)
    values = rng.normal(0, 50, (200, 300)).astype(ml_dtypes.float8_e4m3fn)
    scale_inv = rng.uniform(0.5, 2.0, (2, 3)).astype(np.float32)
    expected = np.empty((200, 300), np.float32)
    for i in range(200):
        for j in range(300):
            expected[i, j] = float(values[i, j]) * scale_inv[i // 128, j // 128]
    np.testing.assert_array_equal(dequantise(values, scale_inv), expected)


def test_quantise_keeps_three_mantissa_bits_of_every_block():
    rng = np.random.default_rng(1)
    w = rng.standard_normal((200, 300)).astype(np.float32)
    w[:128, 128:256] *= 1e4  # one scale for the whole matrix would lose the other blocks
    w[128:, 256:] = 0
    values, scale_inv = quantise(w)
    assert values.dtype == ml_dtypes.float8_e4m3fn and scale_inv.shape == (2, 3)
    assert scale_inv[1, 2] == 1.0
    np.testing.assert_allclose(scale_inv[0, 1], np.abs(w[:128, 128:256]).max() / 448, rtol=1e-6)
    subnormal_step = 2**-9 * np.repeat(np.repeat(scale_inv, 128, 0), 128, 1)[:200, :300]
    error = np.abs(dequantise(values, scale_inv) - w)
    assert np.all(error <= np.maximum(np.abs(w) * 2**-4, subnormal_step / 2) * 1.0001)


def test_dequantised_weights_quantise_to_the_same_bytes():
    values, scale_inv = quantise(np.random.default_rng(2).standard_normal((130, 257)).astype(np.float32))
    again, scales = quantise(dequantise(values, scale_inv))
    np.testing.assert_array_equal(again.view(np.uint8), values.view(np.uint8))
    np.testing.assert_allclose(scales, scale_inv, rtol=1e-6)

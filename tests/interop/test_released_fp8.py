"""FP8 values with 128 x 128 block scales."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from deepseek_jax.interop.fp8_blocks import dequantize_rows, quantize, scale_shape
from kernels_pallas import quantize_block


def dequantize(values, scale_inv):
    return np.concatenate([rows for _, rows in dequantize_rows(values, scale_inv)])


def test_ragged_blocks_are_ceil_divided():
    assert scale_shape((576, 7168)) == (5, 56)


def test_dequantize_is_value_times_its_blocks_scale():
    rng = np.random.default_rng(0)
    values = rng.normal(0, 50, (200, 300)).astype(ml_dtypes.float8_e4m3fn)
    scale_inv = rng.uniform(0.5, 2.0, (2, 3)).astype(np.float32)
    expected = np.empty((200, 300), np.float32)
    for i in range(200):
        for j in range(300):
            expected[i, j] = float(values[i, j]) * scale_inv[i // 128, j // 128]
    np.testing.assert_array_equal(dequantize(values, scale_inv), expected)


def test_quantize_keeps_three_mantissa_bits_of_every_block():
    rng = np.random.default_rng(1)
    w = rng.standard_normal((200, 300)).astype(np.float32)
    w[:128, 128:256] *= 1e4  # one scale for the whole matrix would lose the other blocks
    w[128:, 256:] = 0
    values, scale_inv = quantize(w)
    assert values.dtype == ml_dtypes.float8_e4m3fn and scale_inv.shape == (2, 3)
    assert scale_inv[1, 2] == np.float32(1e-4) * np.float32(1 / 448) and not values[128:, 256:].astype(np.float32).any()
    np.testing.assert_allclose(scale_inv[0, 1], np.abs(w[:128, 128:256]).max() / 448, rtol=1e-6)
    subnormal_step = 2**-9 * np.repeat(np.repeat(scale_inv, 128, 0), 128, 1)[:200, :300]
    error = np.abs(dequantize(values, scale_inv) - w)
    assert np.all(error <= np.maximum(np.abs(w) * 2**-4, subnormal_step / 2) * 1.0001)


def test_dequantized_weights_quantize_to_the_same_bytes():
    values, scale_inv = quantize(np.random.default_rng(2).standard_normal((130, 257)).astype(np.float32))
    again, scales = quantize(dequantize(values, scale_inv))
    np.testing.assert_array_equal(again.view(np.uint8), values.view(np.uint8))
    np.testing.assert_allclose(scales, scale_inv, rtol=1e-6)


def test_extreme_blocks_are_what_training_makes_of_them():
    """Zeros, denormals, tiny, huge, NaN and infinite: one row of blocks, the same rule as
    `kernels_pallas.quantize_block`."""
    blocks = {"zero": 0.0, "denormal": 1e-42, "tiny": 3e-5, "least": 1e-4, "huge": 3e38, "nan": np.nan, "inf": -np.inf}
    w = np.concatenate([np.full((128, 128), value, np.float32) for value in blocks.values()], axis=1)
    w[0, 5 * 128 + 1 : 6 * 128] = w[0, 6 * 128 + 1 :] = 1.0  # one NaN or infinity in a block is enough
    values, scale_inv = quantize(w)
    reference = quantize_block(jnp.asarray(w))
    np.testing.assert_array_equal(values.view(np.uint8), np.asarray(reference.values).view(np.uint8))
    np.testing.assert_array_equal(scale_inv, reference.scales)
    expected = {"zero": 1e-4 / 448, "denormal": 1e-4 / 448, "tiny": 1e-4 / 448, "least": 1e-4 / 448, "huge": 3e38 / 448}
    np.testing.assert_allclose(scale_inv[0, :5], list(expected.values()), rtol=1e-6)
    with np.errstate(invalid="ignore"):
        back = dequantize(values, scale_inv)
    back = back.reshape(128, len(blocks), 128).swapaxes(0, 1)
    for block, (name, value) in zip(back, blocks.items(), strict=True):
        if name in ("nan", "inf"):
            assert np.isnan(block).all(), name
        else:
            np.testing.assert_allclose(block, 0.0 if value < 1e-9 else value, rtol=2**-4, err_msg=name)


def test_powers_of_two_are_rounded_up_and_quantize_to_the_same_numbers_again():
    w = np.random.default_rng(3).standard_normal((130, 257)).astype(np.float32)
    values, scale_inv = quantize(w, power_of_two=True)
    mantissa, _ = np.frexp(scale_inv)
    assert (mantissa == 0.5).all() and (scale_inv >= quantize(w)[1]).all() and (scale_inv < 2 * quantize(w)[1]).all()
    np.testing.assert_array_equal(
        dequantize(*quantize(dequantize(values, scale_inv), power_of_two=True)), dequantize(values, scale_inv)
    )

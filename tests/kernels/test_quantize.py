"""The quantizers against NumPy and ml_dtypes, whose casts to eight bits are independent of ours, and against torch's if
torch is installed."""

import math

import fp8_oracles as oracle
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from kernels_pallas import (
    QTensor,
    Quantizer,
    Unsupported,
    dequantize,
    quantize,
    quantize_block,
    quantize_tile,
    quantize_transposed,
    requantize_transposed,
    swiglu,
    swiglu_quantize,
)

E4M3 = ml_dtypes.float8_e4m3fn
AS_NUMPY = {"float8_e4m3fn": (448, E4M3), "float8_e5m2": (57344, ml_dtypes.float8_e5m2)}


def released(x, tile, largest, dtype, power_of_two=False, min_amax=1e-4):
    """The released quantizer, one tile after another, in NumPy's float32, with amax times 1/448, as compilers and torch
    on a GPU divide by a constant."""
    rows, columns = x.shape
    values, scales = np.zeros(x.shape, dtype), np.zeros((-(-rows // tile[0]), -(-columns // tile[1])), np.float32)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = np.s_[i * tile[0] : (i + 1) * tile[0], j * tile[1] : (j + 1) * tile[1]]
            scale = np.maximum(np.abs(x[part]).max(), np.float32(min_amax)) * (np.float32(1) / np.float32(largest))
            if power_of_two:
                mantissa, exponent = math.frexp(scale)
                scale = np.float32(2.0 ** (exponent - (mantissa == 0.5)))
            scales[i, j] = scale
            values[part] = np.clip(x[part] / scale, -largest, largest).astype(dtype)
    return values, scales


@pytest.mark.parametrize("kind", oracle.KINDS)
@pytest.mark.parametrize(
    "fields",
    [
        dict(),
        dict(power_of_two=True),
        dict(scope="block"),
        dict(scope="block", size=256, power_of_two=True),
        dict(size=256),
        dict(dtype="float8_e5m2"),
        dict(min_amax=1e-30),
    ],
    ids=str,
)
def test_equals_the_released_quantizer_bit_for_bit(kind, fields):
    x = oracle.matrix(kind, 131, 300)
    quantizer = Quantizer(**fields)
    q = oracle.call(quantize, x, quantizer=quantizer)
    if kind == "denormals":
        x = x * 0  # which XLA takes for zeros
    values, scales = released(
        x, quantizer.tile(x.shape), *AS_NUMPY[quantizer.dtype], quantizer.power_of_two, quantizer.min_amax
    )
    np.testing.assert_array_equal(q.scales, scales)
    assert q.values.dtype == values.dtype
    np.testing.assert_array_equal(np.asarray(q.values).astype(np.float32), values.astype(np.float32))
    assert np.all(np.isfinite(values.astype(np.float32)))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_any_float_dtype_is_taken_as_float32(dtype):
    x = jnp.asarray(oracle.matrix("normal", 3, 200), dtype)
    for got, expected in zip(
        jax.tree.leaves(oracle.call(quantize, x)),
        jax.tree.leaves(oracle.call(quantize, x.astype(jnp.float32))),
        strict=True,
    ):
        np.testing.assert_array_equal(got, expected)


def test_powers_of_two_are_the_smallest_that_hold_the_tile():
    amax = np.float32([448, 448.0001, 447.9, 224, 1, 3e38, 2e-3, 0.875 * 2**-6, 1e-4, 0])
    x = np.repeat(amax[:, None], 128, axis=1)
    scales = np.asarray(oracle.call(quantize, x, quantizer=Quantizer(power_of_two=True)).scales, np.float64)[:, 0]
    needed = np.maximum(amax, np.float32(1e-4)) / np.float32(448)
    assert all(math.frexp(scale)[0] == 0.5 for scale in scales)
    assert np.all(scales >= needed) and np.all(scales / 2 < needed)
    assert scales[0] == 1 and scales[1] == 2 and scales[2] == 1 and scales[3] == 0.5
    np.testing.assert_array_equal(scales, 2.0 ** np.ceil(np.log2(needed.astype(np.float64))))


@pytest.mark.parametrize("scope", ["tile", "tensor"])
@pytest.mark.parametrize("format", oracle.STEPS)
@pytest.mark.parametrize("kind", oracle.KINDS)
def test_each_number_is_within_half_a_step(kind, format, scope):
    x = oracle.matrix(kind, 20, 260)
    q = oracle.call(quantize, x, quantizer=Quantizer(scope, dtype=format))
    assert np.all(np.abs(oracle.exact(q) - x) <= oracle.quantization_bound(x, q, format))


def test_every_number_of_the_format_comes_back_and_ties_go_to_even():
    numbers = np.arange(256, dtype=np.uint8).view(E4M3).astype(np.float32)
    numbers = np.sort(numbers[np.isfinite(numbers)])
    between = (numbers[1:] + numbers[:-1]) / 2
    x = np.concatenate([numbers, between, np.nextafter(between, np.float32(1e9)), [448]]).astype(np.float32)
    q = quantize(jnp.asarray(x[None]), Quantizer("tensor"))  # the largest magnitude is 448, so that the scale is one
    assert q.scales.item() == 1
    np.testing.assert_array_equal(np.asarray(q.values[0]).astype(np.float32), x.astype(E4M3).astype(np.float32))
    np.testing.assert_array_equal(q.values[0, : numbers.size].astype(jnp.float32), numbers)


def test_equals_the_cast_of_torch():
    torch = pytest.importorskip("torch", reason="needs torch")
    x = oracle.matrix("mixed_magnitudes", 64, 256)
    for fields in (dict(), dict(power_of_two=True), dict(dtype="float8_e5m2")):
        q = oracle.call(quantize, x, quantizer=Quantizer(**fields))
        tiles = torch.from_numpy(x).view(64, 2, 128)
        largest, dtype = (57344.0, torch.float8_e5m2) if fields.get("dtype") else (448.0, torch.float8_e4m3fn)
        scales = tiles.abs().amax(-1).clamp(1e-4) * torch.tensor(1 / largest)
        scales = torch.exp2(torch.ceil(torch.log2(scales))) if fields.get("power_of_two") else scales
        values = (tiles / scales[..., None]).clamp(-largest, largest).to(dtype).float().view(64, 256)
        np.testing.assert_array_equal(q.scales, scales.numpy())
        np.testing.assert_array_equal(q.values.astype(jnp.float32), values.numpy())


def test_no_tile_is_scaled_as_if_it_were_smaller_than_the_clamp():
    x = np.full((2, 128), 1e-6, np.float32)
    q = oracle.call(quantize, x)
    np.testing.assert_array_equal(q.scales, np.float32(1e-4) * np.float32(1 / 448))
    assert abs(oracle.exact(q) / x - 1).max() < 2.0**-4
    small = jnp.asarray(oracle.matrix("normal", 4, 256) * 1e-9)  # a gradient of a mean over many tokens
    kept = oracle.call(quantize, small, quantizer=Quantizer(min_amax=1e-30))
    assert oracle.calc_diff(oracle.exact(oracle.call(quantize, small)), small) > 5e-3
    assert oracle.calc_diff(oracle.exact(kept), small) < 1e-3


@pytest.mark.parametrize("scope", ["tile", "block"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_a_number_spoils_its_tile_and_no_other(bad, scope):
    for power_of_two in (False, True):
        quantizer = Quantizer(scope, power_of_two=power_of_two)
        x = oracle.matrix("normal", 200, 300)
        clean = oracle.exact(oracle.call(quantize, x, quantizer=quantizer))
        x[140, 130] = bad
        q = oracle.exact(oracle.call(quantize, x, quantizer=quantizer))
        spoilt = np.zeros(x.shape, bool)
        spoilt[140 if scope == "tile" else slice(128, 200), 128:256] = True
        assert np.all(np.isnan(q[spoilt]))
        np.testing.assert_array_equal(q[~spoilt], clean[~spoilt])


def test_e5m6_is_rounded_to_six_fraction_bits():
    """Numbers below its smallest normal one, 2^-30 of the largest, become zero."""
    x = oracle.matrix("mixed_magnitudes", 16, 256)
    x[0, :3] = 1e-9, 2e-8, -1e-7
    q = oracle.call(quantize, x, quantizer=Quantizer(dtype="e5m6", power_of_two=True))
    scaled = x / oracle.scale_at(q)
    mantissa, exponent = np.frexp(scaled)
    expected = np.ldexp(np.rint(mantissa * 128), exponent - 7)
    expected = np.where(np.abs(expected) < 2.0**-14, 0, expected)
    np.testing.assert_array_equal(np.asarray(q.values).astype(np.float64), expected)
    assert q.values.dtype == jnp.bfloat16 and np.abs(expected).max() <= 65024
    largest = oracle.call(
        quantize, np.full((16, 256), 65024, np.float32), quantizer=Quantizer(dtype="e5m6", power_of_two=True)
    )
    assert np.all(np.asarray(largest.values).astype(np.float32) == 65024)


def test_leading_axes_are_matrices_of_their_own():
    x = jnp.asarray(oracle.matrix("normal", 6 * 130, 140).reshape(2, 3, 130, 140))
    for scope in ("block", "tensor"):
        q = oracle.call(quantize, x, quantizer=Quantizer(scope))
        one = oracle.call(quantize, x[1, 2], quantizer=Quantizer(scope))
        np.testing.assert_array_equal(q.values[1, 2], one.values)
        np.testing.assert_array_equal(q.scales[1, 2], one.scales)


def test_names_for_tiles_and_blocks():
    x = jnp.ones((130, 257))
    tiles, wide, blocks = (
        jax.eval_shape(f, x)
        for f in (quantize_tile, lambda x: quantize_tile(x, size=256), lambda x: quantize_block(x, power_of_two=True))
    )
    assert (
        tiles.scales.shape == (130, 3)
        and wide.scales.shape == (130, 2)
        and blocks.scales.shape == (2, 3)
        and blocks.tile == (128, 128)
    )


def test_transposed_tiles_run_along_rows():
    x = jnp.asarray(oracle.matrix("outlier_rows", 200, 131))
    q, turned = oracle.call(quantize_transposed, x), oracle.call(quantize, x.T)
    assert q.shape == (131, 200) and q.scales.shape == (131, 2)
    np.testing.assert_array_equal(q.values, turned.values)
    np.testing.assert_array_equal(q.scales, turned.scales)


def test_requantized_numbers_are_within_half_a_step_of_what_was_kept():
    for residual in (Quantizer(dtype="e5m6", power_of_two=True), Quantizer("block")):
        kept = oracle.call(quantize, oracle.matrix("outlier_channels", 200, 131), quantizer=residual)
        again = oracle.call(requantize_transposed, kept)
        assert again.tile == (1, 128) and again.shape == (131, 200)
        assert np.all(
            np.abs(oracle.exact(again) - oracle.exact(kept).T) <= oracle.quantization_bound(oracle.exact(kept).T, again)
        )


def test_dequantize_and_transpose():
    q = quantize_block(jnp.asarray(oracle.matrix("normal", 130, 257)))
    np.testing.assert_array_equal(dequantize(q), oracle.exact(q).astype(np.float32))
    np.testing.assert_array_equal(dequantize(q.mT), dequantize(q).T)
    assert dequantize(q, jnp.bfloat16).dtype == jnp.bfloat16


def test_a_qtensor_is_a_pytree_of_eight_bits_and_scales():
    q = quantize(jnp.ones((4, 256)))
    values, scales = jax.tree.leaves(q)
    assert values.dtype == jnp.float8_e4m3fn and scales.dtype == jnp.float32
    assert q.nbytes == 4 * 256 + 4 * 2 * 4
    doubled = jax.jit(lambda q: QTensor(q.values, 2 * q.scales, q.tile))(q)
    assert doubled.tile == (1, 128)
    np.testing.assert_array_equal(dequantize(doubled), 2 * dequantize(q))


def test_swiglu_is_computed_in_float32_and_rounded_to_the_dtype_of_its_inputs():
    gate, up = (jnp.asarray(oracle.matrix("normal", 5, 260, seed) * 3, jnp.bfloat16) for seed in (0, 1))
    gate64, up64 = (np.asarray(x).astype(np.float64) for x in (gate, up))
    hidden = gate64 / (1 + np.exp(-gate64)) * up64
    assert np.all(np.abs(np.asarray(swiglu(gate, up)).astype(np.float64) - hidden) <= np.abs(hidden) * 2.0**-8 * 1.001)
    q = oracle.call(swiglu_quantize, gate, up)
    assert np.all(
        np.abs(oracle.exact(q) - hidden)
        <= oracle.quantization_bound(hidden, q) * (1 + 2.0**-7) + np.abs(hidden) * 2.0**-8
    )
    with pytest.raises(ValueError, match="must be alike"):
        swiglu_quantize(gate, up.astype(jnp.float32))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(scope="row"), "one of tile, block, tensor"),
        (dict(dtype="int8"), "one of float8_e4m3fn"),
        (dict(size=64), "128 or 256"),
        (dict(min_amax=0.0), "at least 1e-30"),
        (dict(min_amax=math.nan), "at least 1e-30"),
    ],
)
def test_a_quantizer_that_is_none_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Quantizer(**fields)


def test_an_implementation_that_is_none_is_refused():
    with pytest.raises(
        Unsupported, match=r"quantize: 'cublas' is not one of its implementations, .*These would do it: .*xla"
    ):
        quantize(jnp.ones((4, 128)), implementation="cublas")

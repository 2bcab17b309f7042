"""The product of quantized matrices against exact integers and float64."""

import fp8_oracles as oracle
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from kernels_pallas import (
    Accumulation,
    QTensor,
    Quantizer,
    Unsupported,
    fp8_matmul,
    quantize,
    quantize_block,
    quantize_tile,
)
from kernels_pallas.matmul import reference

SHAPES = [(1, 128, 128), (7, 130, 576), (3, 5, 100), (1, 64, 1)]


def product(a, b, accumulation=Accumulation(), out_dtype=jnp.float32):
    return np.asarray(oracle.call(fp8_matmul, a, b, out_dtype=out_dtype, accumulation=accumulation))


def check_integers(shape, tiles, accumulation):
    """Bit-equal to the product in float64, which is exact."""
    rows, columns, depth = shape
    a, b = oracle.small_integers(rows, depth, 0, tiles[0]), oracle.small_integers(columns, depth, 1, tiles[1])
    np.testing.assert_array_equal(product(a, b, accumulation), oracle.exact(a) @ oracle.exact(b).T)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tiles", [((1, 128), (128, 128)), ((1, 128), (1, 128)), ((1, 256), (256, 256))], ids=str)
def test_small_integers_with_power_of_two_scales_are_exact(shape, tiles):
    check_integers(shape, tiles, Accumulation())


@pytest.mark.parametrize("accumulator", ["float32", "hopper_fp22", "fp22_register"])
@pytest.mark.parametrize("promote_every", [32, 128, 256])
def test_small_integers_are_exact_however_they_are_summed(accumulator, promote_every):
    check_integers((3, 130, 576), ((1, 128), (256, 256)), Accumulation(promote_every, accumulator))


def check_against_float64(x, w, quantizers=(Quantizer(), Quantizer("block")), accumulation=Accumulation()):
    """Checks the product within rounding of the quantized operands' product, within the sum of all half steps of the
    unquantized one, and by `calc_diff`."""
    a, b = (oracle.call(quantize, z, quantizer=quantizer) for z, quantizer in zip((x, w), quantizers, strict=True))
    got = product(a, b, accumulation).astype(np.float64)
    a64, b64, parts = oracle.exact(a), oracle.exact(b), -(-x.shape[1] // 32)
    rounding = oracle.summation_bound(a64, b64, parts)
    assert np.all(np.abs(got - a64 @ b64.T) <= rounding)
    x64, w64 = x.astype(np.float64), w.astype(np.float64)
    steps = oracle.quantized_product_bound(x64, oracle.quantization_bound(x, a), w64, oracle.quantization_bound(w, b))
    assert np.all(np.abs(got - x64 @ w64.T) <= rounding + steps)
    return oracle.calc_diff(got, x64 @ w64.T)


@pytest.mark.parametrize("kind", oracle.KINDS)
@pytest.mark.parametrize("other", ["normal", "uniform"])
def test_within_bounds_of_float64(kind, other):
    diff = check_against_float64(oracle.matrix(kind, 33, 576), oracle.matrix(other, 130, 576, 1))
    if kind != "denormals":  # of which nothing is left
        assert diff < 1e-3


@pytest.mark.parametrize(("rows", "columns", "depth"), [(1, 130, 128), (17, 40, 1000), (17, 40, 4096), (1, 40, 16384)])
def test_depth_and_rows(rows, columns, depth):
    assert (
        check_against_float64(oracle.matrix("normal", rows, depth), oracle.matrix("normal", columns, depth, 1)) < 1e-3
    )


@pytest.mark.parametrize(
    ("quantizers", "promote_every"),
    [
        ((Quantizer(), Quantizer()), 256),  # scales finer than that are multiplied in before the sum
        ((Quantizer(), Quantizer("block")), None),
        ((Quantizer(power_of_two=True), Quantizer("block", power_of_two=True)), 128),
        ((Quantizer("tensor"), Quantizer("tensor")), 128),
        ((Quantizer("tensor"), Quantizer("tensor")), None),
        ((Quantizer(size=256), Quantizer("block", size=256)), 128),
        ((Quantizer("block"), Quantizer("tensor")), 256),
    ],
    ids=range(7),
)
def test_other_scales(quantizers, promote_every):
    assert (
        check_against_float64(
            oracle.matrix("normal", 33, 576),
            oracle.matrix("normal", 130, 576, 1),
            quantizers,
            Accumulation(promote_every),
        )
        < 1e-3
    )


def test_fine_scales_save_small_numbers_beside_outliers_and_coarse_ones_do_not():
    """Every third row is 1e5 times larger. The error of the other rows does not show in the whole matrix's
    `calc_diff`."""
    x, w = oracle.matrix("normal", 33, 256), oracle.matrix("normal", 64, 256, 1)
    x[::3] *= 1e5
    expected = x[1::3].astype(np.float64) @ w.T.astype(np.float64)
    b = oracle.call(quantize_block, w)
    assert oracle.calc_diff(product(oracle.call(quantize_tile, x), b)[1::3], expected) < 1e-3
    assert oracle.calc_diff(product(oracle.call(quantize, x, quantizer=Quantizer("tensor")), b)[1::3], expected) > 0.01


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_a_number_spoils_what_depends_on_it(bad):
    x, w = oracle.matrix("normal", 5, 576), oracle.matrix("normal", 300, 576, 1)
    clean = product(oracle.call(quantize_tile, x), oracle.call(quantize_block, w))
    x[3, 200], w[130, 570] = bad, bad
    got = product(oracle.call(quantize_tile, x), oracle.call(quantize_block, w))
    spoilt = np.zeros(got.shape, bool)
    spoilt[3], spoilt[:, 128:256] = True, True
    assert np.all(np.isnan(got[spoilt]))
    np.testing.assert_array_equal(got[~spoilt], clean[~spoilt])


def test_the_result_is_rounded_once():
    a, b = (
        oracle.call(quantize_tile, oracle.matrix("normal", 9, 300)),
        oracle.call(quantize_block, oracle.matrix("normal", 20, 300, 1)),
    )
    exact = product(a, b)
    for dtype, as_numpy in ((jnp.bfloat16, ml_dtypes.bfloat16), (jnp.float16, np.float16)):
        np.testing.assert_array_equal(product(a, b, out_dtype=dtype), exact.astype(as_numpy))


def test_an_operand_may_lie_the_other_way():
    w = oracle.matrix("normal", 300, 130, 1)  # [K, N], as a Linear keeps it
    a = oracle.call(quantize_tile, oracle.matrix("normal", 4, 300))
    np.testing.assert_array_equal(
        product(a, oracle.call(quantize_block, w).mT), product(a, oracle.call(quantize_block, w.T.copy()))
    )


def test_scales_off_by_one_tile_are_caught():
    right = reference.spread
    with oracle.planted(
        reference, "spread", lambda scales, tile, shape: right(jnp.roll(scales, 1, axis=-1), tile, shape)
    ):
        with pytest.raises(AssertionError):
            check_integers((7, 130, 576), ((1, 128), (128, 128)), Accumulation())
        for kind in ("normal", "outlier_channels"):
            with pytest.raises(AssertionError):
                check_against_float64(oracle.matrix(kind, 33, 576), oracle.matrix("normal", 130, 576, 1))


@pytest.mark.parametrize("planted", ["a part left out", "scales of a part twice"])
def test_a_wrong_sum_is_caught(planted):
    right = reference.partial_product

    def wrong(a_Mk, b_Nk, accumulator):
        return (
            right(a_Mk.at[:, -1].set(0), b_Nk, accumulator)
            if planted == "a part left out"
            else 2 * right(a_Mk, b_Nk, accumulator)
        )

    with oracle.planted(reference, "partial_product", wrong), pytest.raises(AssertionError):
        check_against_float64(oracle.matrix("normal", 33, 576), oracle.matrix("normal", 130, 576, 1))


def test_operands_that_do_not_match_are_refused():
    a, b = oracle.small_integers(4, 128, 0), oracle.small_integers(8, 256, 0, (128, 128))
    with pytest.raises(ValueError, match=r"a \(4, 128\) and b \(8, 256\) must be \[M, K\] and \[N, K\]"):
        fp8_matmul(a, b)
    with pytest.raises(ValueError, match="must be"):
        fp8_matmul(QTensor(a.values[None], a.scales[None], a.tile), a)


def test_an_implementation_that_is_none_is_refused_with_those_there_are():
    a = oracle.small_integers(4, 128, 0)
    with pytest.raises(
        Unsupported, match=r"fp8_matmul: 'triton' is not one of its implementations.*These would do it: .*xla"
    ):
        fp8_matmul(a, a, implementation="triton")
    np.testing.assert_array_equal(fp8_matmul(a, a, implementation=("triton", "xla")), fp8_matmul(a, a))

"""The emulated tensor-core accumulator against exact integers, and the effect of promotion on its error (V3 §3.3.2)."""

import dataclasses

import fp8_oracles as oracle
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from kernels_pallas import Accumulation, QTensor, fp8_matmul, quantize
from kernels_pallas.matmul import api, reference
from kernels_pallas.matmul.accumulation import partial_product, truncate
from kernels_pallas.qtensor import GRADIENT

# an E4M3 number is a multiple of 2^-9, a product of two of 2^-18, what is left of one after cutting of 2^-31 or more
UNIT = 2.0**40


def cut(x: int, bits: int) -> int:
    return (abs(x) >> bits << bits) * (1 if x >= 0 else -1) if bits > 0 else x


def fourteen_bits(x: int) -> int:
    """The leading one and 13 bits after it."""
    return cut(x, abs(x).bit_length() - 14)


def tensor_core(a_k, b_k) -> int:
    """Hopper's sum of products, in units of 1/UNIT: of 32 products and the sum so far only bits down to 2^-13 of the
    largest count."""
    total = 0
    for start in range(0, len(a_k), 32):
        pairs = zip(a_k[start : start + 32], b_k[start : start + 32], strict=True)
        addends = [int(float(a) * float(b) * UNIT) for a, b in pairs] + [total]
        bits = max(abs(x) for x in addends).bit_length() - 14
        total = fourteen_bits(sum(cut(x, bits) for x in addends))
    return total


def register(a_k, b_k) -> int:
    """Sums of 32 are exact; the running sum keeps 14 bits."""
    total = 0
    for start in range(0, len(a_k), 32):
        total = fourteen_bits(
            total
            + sum(
                int(float(a) * float(b) * UNIT)
                for a, b in zip(a_k[start : start + 32], b_k[start : start + 32], strict=True)
            )
        )
    return total


def emulated(core, a_MK, b_NK, promote_every):
    """float32 [M, N]: sums of `promote_every` numbers each by `core`, added in float32."""
    result = np.zeros((len(a_MK), len(b_NK)), np.float32)
    for i, a in enumerate(a_MK):
        for j, b in enumerate(b_NK):
            for start in range(0, len(a), promote_every):
                result[i, j] += np.float32(
                    core(a[start : start + promote_every], b[start : start + promote_every]) / UNIT
                )
    return result


def plain(values) -> QTensor:
    """A QTensor with scales of one."""
    return QTensor(jnp.asarray(values, jnp.float8_e4m3fn), jnp.ones((values.shape[0], 1)), (1, values.shape[1]))


def product(a, b, promote_every, accumulator="float32"):
    return np.asarray(
        oracle.call(fp8_matmul, a, b, out_dtype=jnp.float32, accumulation=Accumulation(promote_every, accumulator))
    )


def numbers(kind, rows, depth, seed):
    rng = np.random.default_rng(seed)
    if kind == "any E4M3":
        values = (
            rng.integers(0, 256, size=(rows, depth), dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
        )
        return np.where(np.isfinite(values), values, 0)
    values = {
        "normal": rng.normal(size=(rows, depth)),
        "uniform": rng.uniform(size=(rows, depth)),
        "zeros": np.zeros((rows, depth)),
    }[kind]
    return values.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)


@pytest.mark.parametrize("kind", ["any E4M3", "normal", "uniform", "zeros"])
@pytest.mark.parametrize("promote_every", [32, 128, 256, None])
def test_hopper_is_exactly_the_cut_sum_of_integers(kind, promote_every):
    depth = 544  # one step past four promotions
    a, b = numbers(kind, 2, depth, 0), numbers(kind, 3, depth, 1)
    got = product(plain(a), plain(b), promote_every, "hopper_fp22")
    np.testing.assert_array_equal(got, emulated(tensor_core, a, b, promote_every or depth))


@pytest.mark.parametrize("promote_every", [128, None])
def test_register_is_exactly_the_cut_sum_of_integers(promote_every):
    depth = 1056
    rng = np.random.default_rng(0)
    # sums of 32 fit into float32
    a, b = rng.integers(0, 16, size=(2, depth)) / 8, rng.integers(0, 16, size=(3, depth)) / 16
    got = product(plain(a), plain(b), promote_every, "fp22_register")
    expected = emulated(register, a, b, promote_every or depth)
    np.testing.assert_array_equal(got, expected)
    assert promote_every or np.any(expected != np.float32(a @ b.T))


def test_a_cut_goes_towards_zero():
    x = np.float32([1 + 2.0**-13, 1 + 2.0**-14, -1 - 2.0**-14 * 1.9, 3.4e38, 0, np.inf, -np.inf, np.nan])
    expected = np.float32([1 + 2.0**-13, 1, -1, 3.4e38, 0, np.inf, -np.inf, np.nan])
    expected[3] = np.float32(np.floor(3.4e38 / 2.0**114) * 2.0**114)
    np.testing.assert_array_equal(truncate(jnp.asarray(x)), expected)


@pytest.mark.parametrize("accumulator", ["hopper_fp22", "fp22_register"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_a_number_spoils_its_row(accumulator, bad):
    a, b = numbers("normal", 3, 96, 0), numbers("uniform", 4, 96, 1)
    clean = np.asarray(partial_product(jnp.asarray(a), jnp.asarray(b), accumulator))
    a[1, 40] = bad
    expected = np.where(np.arange(3)[:, None] == 1, np.float32(bad), clean)
    np.testing.assert_array_equal(partial_product(jnp.asarray(a), jnp.asarray(b), accumulator), expected)


@pytest.mark.parametrize("accumulator", ["hopper_fp22", "fp22_register"])
def test_tiny_products_are_summed_too(accumulator):
    """Gradients of 1e-33, scaled before the sum because it is never promoted."""
    a, b = jnp.full((1, 256), 1e-33, jnp.float32), jnp.full((1, 256), 1e-3, jnp.float32)
    kept = product(oracle.call(quantize, a, quantizer=GRADIENT), oracle.call(quantize, b), None, accumulator)
    assert abs(kept.item() / 2.56e-34 - 1) < 0.1
    # the released clamp leaves nothing of them
    assert product(oracle.call(quantize, a), oracle.call(quantize, b), None, accumulator) == 0


def relative_errors(kind, accumulator, promote_every, depths=(256, 4096)):
    """max |error| / max |C| at each K, for operands that E4M3 holds exactly."""
    errors = []
    for depth in depths:
        a, b = numbers(kind, 12, depth, 2), numbers(kind, 12, depth, 3)
        got = product(plain(a), plain(b), promote_every, accumulator)
        exact = a.astype(np.float64) @ b.T.astype(np.float64)
        errors.append(np.abs(got - exact).max() / np.abs(exact).max())
    return np.array(errors)


def check_promotion(kind, accumulator):
    """Without promotion the error grows with K; with it, it stays, and is at least five times smaller at 4096."""
    without, promoted = (relative_errors(kind, accumulator, every) for every in (None, 128))
    assert without[1] > 3 * without[0], without
    assert promoted.max() < 3 * promoted.min(), promoted
    assert without[1] > 5 * promoted[1], (without, promoted)


@pytest.mark.parametrize("accumulator", ["hopper_fp22", "fp22_register"])
@pytest.mark.parametrize("kind", ["normal", "uniform"])
def test_error_grows_with_depth_unless_promoted(kind, accumulator):
    check_promotion(kind, accumulator)


def test_promotion_left_out_is_caught():
    right = reference.matmul

    def without(a, b, accumulation, out_dtype):
        return right(a, b, Accumulation(None, accumulation.accumulator), out_dtype)

    with (
        oracle.planted(
            api, "MATMUL", dataclasses.replace(api.MATMUL, implementations={"xla": (without, lambda *_: None)})
        ),
        pytest.raises(AssertionError),
    ):
        check_promotion("uniform", "hopper_fp22")


def test_float32_is_near_float64_however_often_it_is_promoted():
    a, b = numbers("uniform", 8, 4096, 0), numbers("uniform", 8, 4096, 1)
    exact = a.astype(np.float64) @ b.T.astype(np.float64)
    for promote_every in (32, 128, None):
        got = product(plain(a), plain(b), promote_every)
        np.testing.assert_allclose(got, exact, rtol=3e-6)


def test_a_step_cut_off_counts_its_zeros_as_nothing():
    a, b = numbers("normal", 3, 70, 0), numbers("normal", 3, 70, 1)
    padded = [np.pad(x, ((0, 0), (0, 26))) for x in (a, b)]
    for accumulator in ("hopper_fp22", "fp22_register"):
        cut_off, whole = (oracle.call(partial_product, *pair, accumulator=accumulator) for pair in ((a, b), padded))
        np.testing.assert_array_equal(cut_off, whole)


@pytest.mark.parametrize("promote_every", [256, None])
def test_scales_finer_than_the_promotion_do_not_promote(promote_every):
    """Fine scales multiply the numbers before they are summed. They are powers of two here, so that E4M3 holds the
    scaled numbers as well."""
    rng = np.random.default_rng(0)
    tiled = [
        QTensor(
            jnp.asarray(rng.integers(8, 16, size=(3, 512)) / 8, jnp.float8_e4m3fn),
            2.0 ** rng.integers(-2, 3, size=(3, 4)),
            (1, 128),
        )
        for _ in range(2)
    ]
    scaled = [plain(oracle.exact(q)) for q in tiled]
    got = product(*tiled, promote_every, "fp22_register")
    np.testing.assert_array_equal(got, product(*scaled, promote_every, "fp22_register"))
    assert np.any(got != product(*tiled, 128, "fp22_register"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(accumulator="fp16"), "one of float32"),
        (dict(promote_every=100), "a multiple of 32"),
        (dict(promote_every=0), "multiple"),
    ],
)
def test_an_accumulation_that_is_none_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Accumulation(**fields)

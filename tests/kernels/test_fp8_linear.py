"""Linears in FP8 and their gradients against float64."""

import dataclasses
import traceback

import fp8_oracles as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import (
    Accumulation,
    LinearQuantization,
    QTensor,
    Quantizer,
    Unsupported,
    fp8_grouped_linear,
    fp8_grouped_swiglu_linear,
    fp8_linear,
    fp8_swiglu_linear,
    prequantize,
    prequantize_weight,
    quantize_block,
    requantize_transposed,
)
from kernels_pallas.grouped import reference as grouped_reference
from kernels_pallas.linear import vjp
from kernels_pallas.linear.quantization import PRODUCTS
from kernels_pallas.matmul import reference

SHAPES = {"aligned": (128, 256, 128), "ragged": (37, 200, 130), "one row": (1, 130, 70), "K cut off": (33, 576, 96)}
SMALL = SHAPES["ragged"]
RAGGED, GROUPED_SHAPE = [[50, 0, 57, 23], [0, 0, 1, 149], [0, 0, 0, 0], [150, 0, 0, 0]], (150, 200, 130)
E5M6 = Quantizer(dtype="e5m6", power_of_two=True)  # what V3 keeps of the attention's output

# E4M3 rounds an evenly spread number with a relative error of 2.6% rms, so that each rounding adds 3.4e-4 to
# `calc_diff`: forward and input gradient have two. x is rounded a second time, along rows, for the weight gradient:
# three are 1.02e-3, and a few per cent are left for chance.
TWO_ROUNDINGS, THREE_ROUNDINGS = 1e-3, 1.15e-3
# SwiGLU: gate and up are kept rounded, the gradients are products of what depends on both; W's has hidden and dy
# rounded as well.
SWIGLU_GRADIENT, SWIGLU_WEIGHT_GRADIENT = 2e-3, 2.2e-3


def operands(shape, groups=None, seed=0):
    """x [N, D], W [D, F] or [G, D, F], dy [N, F]; dy as small as gradients of a mean over many tokens are."""
    rows, width, features = shape
    x, dy = (
        oracle.matrix("normal", rows, width, seed),
        oracle.matrix("normal", rows, features, seed + 2) * np.float32(1e-9),
    )
    w = oracle.matrix("normal", (groups or 1) * width, features, seed + 1).reshape(
        *([groups] if groups else []), width, features
    )
    return x, w, dy


def gradients(x, w, dy, sizes=None, **static):
    """y, dx and dW of a Linear."""

    def call(x, w):
        return fp8_linear(x, w, **static) if sizes is None else fp8_grouped_linear(x, w, sizes, **static)

    y, pull = jax.vjp(call, x, w)
    return y, *pull(dy)


def swiglu_gradients(gate, up, w, dy, sizes=None, **static):
    """y, dgate, dup and dW of a SwiGLU Linear."""

    def call(gate, up, w):
        return (
            fp8_swiglu_linear(gate, up, w, **static)
            if sizes is None
            else fp8_grouped_swiglu_linear(gate, up, w, sizes, **static)
        )

    y, pull = jax.vjp(call, gate, up, w)
    return y, *pull(dy)


def as_float64(arrays):
    return [np.asarray(x).astype(np.float64) for x in arrays]


def exact_gradients(x, w, dy, sizes=None):
    """float64 y, dx, dW; zero for rows past the last group and for empty groups."""
    x, w, dy = as_float64((x, w, dy))
    if sizes is None:
        return x @ w, dy @ w.T, x.T @ dy
    y, dx, dw = np.zeros(dy.shape), np.zeros(x.shape), np.zeros(w.shape)
    for group, rows in enumerate(oracle.slices(sizes)):
        y[rows], dx[rows], dw[group] = exact_gradients(x[rows], w[group], dy[rows])
    return y, dx, dw


def exact_swiglu_gradients(gate, up, w, dy, sizes=None):
    gate, up, w, dy = as_float64((gate, up, w, dy))
    sigmoid = 1 / (1 + np.exp(-gate))
    y, dhidden, dw = exact_gradients(gate * sigmoid * up, w, dy, sizes)
    return y, dhidden * up * sigmoid * (1 + gate * (1 - sigmoid)), dhidden * gate * sigmoid, dw


def check(got, expected, bounds):
    for name, array, exact, bound in zip(
        ("y", "first gradient", "second gradient", "third gradient"), got, expected, bounds, strict=False
    ):
        assert array.shape == exact.shape and np.all(np.isfinite(array))
        assert oracle.calc_diff(array, exact) < bound, name


def check_linear(shape, sizes=None, quantization=LinearQuantization(), alignment=1):
    """Checks y, dx and dW by `calc_diff`, each number of them within six standard deviations, and each group's dW on
    its own."""
    x, w, dy = operands(shape, None if sizes is None else len(sizes))
    static = {"quantization": quantization} | ({} if sizes is None else {"alignment": alignment})
    got = oracle.call(gradients, x, w, dy, None if sizes is None else jnp.asarray(sizes), **static)
    expected = exact_gradients(x, w, dy, sizes)
    check(got, expected, (TWO_ROUNDINGS, TWO_ROUNDINGS, THREE_ROUNDINGS))
    x, w, dy, y, dx, dw = as_float64((x, w, dy, *got))
    groups = (
        [(np.s_[:], w, dw, expected[2])]
        if sizes is None
        else zip(oracle.slices(sizes), w, dw, expected[2], strict=True)
    )
    for rows, weight, gradient, exact in groups:
        assert np.all(np.abs(y[rows] - expected[0][rows]) <= oracle.six_deviations(x[rows], weight.T, 2))
        assert np.all(np.abs(dx[rows] - expected[1][rows]) <= oracle.six_deviations(dy[rows], weight, 2))
        assert np.all(np.abs(gradient - exact) <= oracle.six_deviations(x[rows].T, dy[rows].T, 3))
    if sizes is not None:
        used = sum(sizes)
        assert not y[used:].any() and not dx[used:].any() and not dw[np.array(sizes) == 0].any()


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_of_a_linear(shape):
    check_linear(SHAPES[shape])


@pytest.mark.parametrize("sizes", RAGGED, ids=str)
def test_gradients_of_ragged_groups(sizes):
    check_linear(GROUPED_SHAPE, sizes)


@pytest.mark.parametrize(
    ("shape", "sizes", "alignment"),
    [((384, 256, 64), [128, 0, 256], 128), ((1, 130, 70), [0, 1], 1), ((24, 576, 40), [8, 0, 16], 8)],
    ids=str,
)
def test_gradients_of_aligned_groups_of_one_row_and_of_cut_off_tiles(shape, sizes, alignment):
    check_linear(shape, sizes, alignment=alignment)


def test_gradients_of_groups_with_coarse_scales():
    """The rows of a group are moved with the scales they share with others."""
    check_linear(
        GROUPED_SHAPE,
        RAGGED[0],
        LinearQuantization(input=Quantizer("block"), gradient=Quantizer("tensor", min_amax=1e-30)),
    )


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        (SHAPES["aligned"], None),
        (SMALL, None),
        (SHAPES["one row"], None),
        (GROUPED_SHAPE, RAGGED[0]),
        (GROUPED_SHAPE, RAGGED[1]),
    ],
)
def test_gradients_of_swiglu(shape, sizes):
    gate, w, dy = operands(shape, sizes and len(sizes))
    up = oracle.matrix("normal", *gate.shape, 9)
    got = oracle.call(swiglu_gradients, gate, up, w, dy, sizes and jnp.asarray(sizes))
    expected = exact_swiglu_gradients(gate, up, w, dy, sizes)
    few = 1.5 if len(gate) == 1 else 1  # rows: the largest of a handful of numbers decides, and may be rounded badly
    check(
        got,
        expected,
        [few * bound for bound in (TWO_ROUNDINGS, SWIGLU_GRADIENT, SWIGLU_GRADIENT, SWIGLU_WEIGHT_GRADIENT)],
    )


SUBSETS = [tuple(product for i, product in enumerate(PRODUCTS) if chosen >> i & 1) for chosen in range(8)]


@pytest.mark.parametrize(
    ("sizes", "products"), [(None, p) for p in SUBSETS] + [([9, 0, 20], p) for p in SUBSETS if len(p) < 2], ids=str
)
def test_each_product_runs_in_the_precision_that_is_asked_for(sizes, products):
    x, w, dy = operands((37, 130, 40), sizes and len(sizes))
    got = oracle.call(
        gradients, x, w, dy, sizes and jnp.asarray(sizes), quantization=LinearQuantization(products=products)
    )
    for product, array, exact in zip(PRODUCTS, got, exact_gradients(x, w, dy, sizes), strict=True):
        diff = oracle.calc_diff(array, exact)
        assert (1e-4 < diff < THREE_ROUNDINGS) if product in products else diff < 1e-10


@pytest.mark.parametrize("products", [("forward",), PRODUCTS[1:]], ids=str)
def test_swiglu_runs_its_products_in_the_precision_that_is_asked_for(products):
    gate, w, dy = operands((37, 130, 40))
    got = oracle.call(
        swiglu_gradients, gate, gate[::-1].copy(), w, dy, quantization=LinearQuantization(products=products)
    )
    expected = exact_swiglu_gradients(gate, gate[::-1], w, dy)
    check(got, expected, (TWO_ROUNDINGS, SWIGLU_GRADIENT, SWIGLU_GRADIENT, SWIGLU_WEIGHT_GRADIENT))
    assert ("forward" in products) == (oracle.calc_diff(got[0], expected[0]) > 1e-4)


# x is rounded once more for the weight gradient, beyond E4M3 along rows and dy: E5M6's rounding has a variance 64 times
# smaller, E5M2's 4 times larger.
@pytest.mark.parametrize(
    ("residual", "least", "most"),
    [
        (Quantizer(power_of_two=True), 0.9e-3, 1.15e-3),
        (E5M6, 0.6e-3, 0.8e-3),
        (Quantizer(dtype="float8_e5m2"), 1.7e-3, 2.4e-3),
    ],
    ids=lambda value: getattr(value, "dtype", ""),
)
def test_the_residual_for_the_weight_gradient_may_have_another_format(residual, least, most):
    x, w, dy = operands(SMALL)
    y, dx, dw = oracle.call(gradients, x, w, dy, quantization=LinearQuantization(residual=residual))
    plain = oracle.call(gradients, x, w, dy)
    np.testing.assert_array_equal(y, plain[0])
    np.testing.assert_array_equal(dx, plain[1])
    assert least < oracle.calc_diff(dw, exact_gradients(x, w, dy)[2]) < most
    assert np.any(np.asarray(dw) != np.asarray(plain[2]))


def kept(function, *args):
    """(shape, dtype) of every array that the backward pass holds."""
    leaves = jax.eval_shape(lambda *args: jax.tree.leaves(jax.vjp(function, *args)[1]), *args)
    return sorted((leaf.shape, leaf.dtype.name) for leaf in leaves)


def test_the_backward_pass_holds_x_in_eight_bits():
    x, w, _ = operands((48, 256, 96))
    x = jnp.asarray(x, jnp.bfloat16)
    in_e4m3 = [((48, 2), "float32"), ((48, 256), "float8_e4m3fn"), ((256, 96), "float32")]
    assert kept(fp8_linear, x, jnp.asarray(w)) == in_e4m3
    sizes = jnp.array([48])
    assert kept(lambda x, w: fp8_grouped_linear(x, w, sizes), x, jnp.asarray(w[None])) == sorted(
        [((1,), "int32"), *in_e4m3[:2], ((1, 256, 96), "float32")]
    )
    for quantization, dtype in (
        (LinearQuantization(residual=E5M6), "bfloat16"),
        (LinearQuantization(residual=Quantizer(dtype="float8_e5m2")), "float8_e5m2"),
    ):
        assert kept(
            lambda x, w, quantization=quantization: fp8_linear(x, w, quantization=quantization), x, jnp.asarray(w)
        ) == [in_e4m3[0], ((48, 256), dtype), in_e4m3[2]]
    without = LinearQuantization(products=PRODUCTS[:2])  # the weight gradient wants x as it was
    assert kept(lambda x, w: fp8_linear(x, w, quantization=without), x, jnp.asarray(w)) == [
        ((48, 256), "bfloat16"),
        in_e4m3[2],
    ]


def test_the_backward_pass_of_swiglu_holds_its_inputs_in_eight_bits():
    gate, w, _ = operands((48, 256, 96))
    gate = jnp.asarray(gate, jnp.bfloat16)
    for quantization, dtype in (
        (LinearQuantization(), "float8_e4m3fn"),
        (LinearQuantization(residual=E5M6), "bfloat16"),
    ):
        held = kept(
            lambda *args, quantization=quantization: fp8_swiglu_linear(*args, quantization=quantization),
            gate,
            gate,
            jnp.asarray(w),
        )
        assert held == [*[((48, 2), "float32")] * 2, *[((48, 256), dtype)] * 2, ((256, 96), "float32")]


@pytest.mark.parametrize("sizes", [None, [33, 0]], ids=str)
def test_each_product_sums_as_it_is_asked_to(sizes):
    """Numbers of one sign, so that a sum which is never promoted comes out smaller than one in float32."""
    x, w, dy = (np.abs(z) for z in operands((37, 130, 40), sizes and len(sizes)))
    narrow = LinearQuantization(accumulation=Accumulation(None, "fp22_register"))
    got, exact = (
        oracle.call(gradients, x, w, dy, sizes and jnp.asarray(sizes), quantization=quantization)
        for quantization in (narrow, LinearQuantization())
    )
    for product, cut, whole in zip(PRODUCTS, got, exact, strict=True):
        assert 1e-5 < 1 - np.sum(cut) / np.sum(whole) < 1e-3, product


def test_results_have_the_dtype_of_x_and_weight_gradients_that_of_the_weights():
    x, w, dy = operands(SMALL)
    x, dy = jnp.asarray(x, jnp.bfloat16), jnp.asarray(dy, jnp.bfloat16)
    y, dx, dw = oracle.call(gradients, x, w, dy)
    assert (y.dtype, dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    check((y, dx, dw), exact_gradients(x, w, dy), (TWO_ROUNDINGS, TWO_ROUNDINGS, THREE_ROUNDINGS))


@pytest.mark.parametrize(
    "quantization", [LinearQuantization(), LinearQuantization(products=())], ids=["FP8", "dequantized"]
)
@pytest.mark.parametrize("forward", [fp8_linear, fp8_grouped_linear, fp8_swiglu_linear])
def test_weights_may_come_quantized(forward, quantization):
    x, w, _ = operands((37, 130, 140), 3 if forward is fp8_grouped_linear else None)
    more = (jnp.array([9, 0, 20]),) if forward is fp8_grouped_linear else ()
    inputs = (x, x) if forward is fp8_swiglu_linear else (x,)
    q = oracle.call(quantize_block, w)
    same = w if quantization.products else np.float32(oracle.exact(q))
    np.testing.assert_array_equal(
        oracle.call(forward, *inputs, q, *more, quantization=quantization),
        oracle.call(forward, *inputs, same, *more, quantization=quantization),
    )


@pytest.mark.parametrize(
    "quantization",
    [LinearQuantization(), LinearQuantization(products=("forward", "weight_gradient"))],
    ids=["FP8", "plain input gradient"],
)
@pytest.mark.parametrize("forward", [fp8_linear, fp8_grouped_linear, fp8_swiglu_linear])
def test_weights_may_be_prequantized(forward, quantization):
    """Gives the same numbers, forward and backward, and the residuals do not hold the master copy."""
    x, w, dy = operands((37, 130, 140), 3 if forward is fp8_grouped_linear else None)
    more = (jnp.array([9, 0, 20]),) if forward is fp8_grouped_linear else ()

    def call(x, w, dy, early):
        def product(x, w):
            w = prequantize_weight(w) if early else w
            return forward(*((x, 2 * x) if forward is fp8_swiglu_linear else (x,)), w, *more, quantization=quantization)

        y, pull_back = jax.vjp(product, x, w)
        kept = jax.tree.leaves(pull_back)
        return (y, *pull_back(dy)), jnp.array([any(leaf.shape == w.shape and leaf.dtype == w.dtype for leaf in kept)])

    (prequantized, keeps), (plain, _) = (oracle.call(call, x, w, dy, early=early) for early in (True, False))
    jax.tree.map(np.testing.assert_array_equal, prequantized, plain)
    assert keeps == ("input_gradient" not in quantization.products)


@pytest.mark.parametrize(
    "products", [PRODUCTS, ("forward",), ("weight_gradient",)], ids=["FP8", "forward", "weight gradient"]
)
@pytest.mark.parametrize("forward", [fp8_linear, fp8_grouped_linear])
def test_rows_may_be_prequantized_and_then_moved(forward, products):
    """Quantizing each token once and copying it then gives the same numbers as copying first, forward and backward."""
    quantization = LinearQuantization(products=products)
    x, w, dy = operands((37, 130, 140), 3 if forward is fp8_grouped_linear else None)
    rows = np.random.default_rng(1).integers(0, 25, 37)
    rows[[3, 30]] = 25  # no row
    more = (jnp.array([9, 0, 20]),) if forward is fp8_grouped_linear else ()

    def take(x):
        return jnp.take(x, rows, axis=0, mode="fill", fill_value=0)

    def call(x, w, dy, first):
        def product(x, w):
            return forward(
                jax.tree.map(take, prequantize(x)) if first else take(x), w, *more, quantization=quantization
            )

        y, pull_back = jax.vjp(product, x, w)
        return y, *pull_back(dy)

    first, last = (oracle.call(call, x[:25], w, dy, first=first) for first in (True, False))
    assert first[1].shape == (25, 130) and np.any(first[1])
    jax.tree.map(np.testing.assert_array_equal, first, last)


@pytest.mark.parametrize("forward", [fp8_linear, fp8_swiglu_linear])
def test_inputs_have_a_gradient_where_weights_come_quantized(forward):
    """The gradient equals that with the same weights quantized on the way, and the residuals hold no x, since W has no
    gradient."""
    x, w, dy = operands((37, 130, 140))
    inputs = (x, x[::-1].copy()) if forward is fp8_swiglu_linear else (x,)

    def call(inputs, w, dy):
        y, pull_back = jax.vjp(lambda *inputs: forward(*inputs, w), *inputs)
        return y, *pull_back(dy)

    q = oracle.call(quantize_block, w)
    jax.tree.map(np.testing.assert_array_equal, oracle.call(call, inputs, q, dy), oracle.call(call, inputs, w, dy))
    if forward is fp8_linear:
        assert all(shape != x.shape for shape, _ in kept(lambda x: fp8_linear(x, q), jnp.asarray(x)))


def test_a_linear_is_four_calls_from_its_product(monkeypatch):
    """Frames of the package between the caller and `fp8_matmul`, with and without gradients."""
    frames, product = [], vjp.fp8_matmul

    def recorded(*args, **fields):
        stack = traceback.extract_stack()
        frames.append([frame.name for frame in stack if "/kernels_pallas/" in frame.filename])
        return product(*args, **fields)

    monkeypatch.setattr(vjp, "fp8_matmul", recorded)
    x, w = jnp.ones((8, 128)), jnp.ones((128, 128))
    jax.eval_shape(fp8_linear, x, w)
    jax.eval_shape(lambda x, w: jax.vjp(fp8_linear, x, w)[0], x, w)
    assert frames[0] == ["fp8_linear", "linear", "forward", "matmul"]
    assert all(len(calls) <= 4 for calls in frames)


def test_zeros_give_zeros_and_a_nan_stays_in_its_row():
    x, w, dy = operands(SMALL)
    y, dx, dw = oracle.call(gradients, 0 * x, w, 0 * dy)
    assert not np.any(y) and not np.any(dx) and not np.any(dw)
    x[3, 7] = dy[5, 2] = np.nan
    y, dx, dw = (np.isnan(z) for z in oracle.call(gradients, x, w, dy))
    assert y[3].all() and y.sum() == y.shape[1] and dx[5].all() and dx.sum() == dx.shape[1]
    assert dw[:128].all() and dw[:, 2].all() and not np.delete(dw[128:], 2, axis=1).any()  # x was kept in tiles of 128


@pytest.mark.parametrize(
    "planted",
    ["scales off by one tile", "groups off by one block", "released clamp of gradients", "x not scaled again"],
)
def test_planted_errors_are_caught(planted):
    spread, group_of, quantize = reference.spread, grouped_reference.group_of, vjp.quantize

    def not_again(q, quantizer, **how):  # the tiles of the other axis, with the largest scale there is
        return QTensor(
            requantize_transposed(q, quantizer, **how).values,
            jnp.full((q.shape[1], -(-q.shape[0] // 128)), jnp.max(q.scales)),
            (1, 128),
        )

    wrong = {
        "scales off by one tile": (
            reference,
            "spread",
            lambda scales, *tile: spread(jnp.roll(scales, 1, axis=-1), *tile),
        ),
        "groups off by one block": (grouped_reference, "group_of", lambda rows, sizes: group_of(rows + 16, sizes)),
        "released clamp of gradients": (
            vjp,
            "quantize",
            lambda x, q, **how: quantize(x, dataclasses.replace(q, min_amax=1e-4), **how),
        ),
        "x not scaled again": (vjp, "requantize_transposed", not_again),
    }[planted]
    with oracle.planted(*wrong), pytest.raises(AssertionError):
        check_linear(GROUPED_SHAPE, RAGGED[0] if "groups" in planted else None)


def test_requests_that_do_not_fit_are_refused():
    x, w = jnp.ones((4, 128)), jnp.ones((2, 64, 8))
    with pytest.raises(ValueError, match=r"fp8_linear: x \(4, 128\) and w \(64, 8\) must be \[N, D\] and \[D, F\]"):
        fp8_linear(x, w[0])
    with pytest.raises(ValueError, match=r"\[R, D\], \[G, D, F\], \[G\]"):
        fp8_grouped_linear(x, w, jnp.array([2, 2]))
    with pytest.raises(ValueError, match="alignment=3 does not divide the 4 rows"):
        fp8_grouped_linear(x[:, :64], w, jnp.array([3, 0]), alignment=3)
    with pytest.raises(ValueError, match="must be alike"):
        fp8_grouped_swiglu_linear(x[:, :64], x, w, jnp.array([2, 2]))
    with pytest.raises(ValueError, match=r"must be \[N, F\], \[N, F\] and \[F, D\]"):
        fp8_swiglu_linear(x, x[:2], w[0])
    with pytest.raises(ValueError, match="is none of forward, input_gradient, weight_gradient"):
        LinearQuantization(products=("backward",))
    with pytest.raises(Unsupported, match="'triton' is not one of its implementations"):
        fp8_linear(x[:, :64], w[0], implementation="triton")

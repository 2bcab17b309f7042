"""Linears of groups in bfloat16: against a loop in float64 on numbers whose sums are exact, XLA's and Hopper's; and
Hopper's machine code."""

import functools

import hopper
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import Unsupported, grouped_linear, targets
from kernels_pallas.grouped_linear import mosaic_gpu_sm90

SIZES = [
    pytest.param([30, 0, 5], 40, 1, id="any-sizes-rows-left-over"),
    pytest.param([128, 0, 128], 384, 128, id="aligned"),
    pytest.param([0, 0], 5, 1, id="all-empty"),
]
D, F = 72, 40  # neither a multiple of a tile nor of a step


def integers(*shape, seed):
    """Integers so small that bfloat16 holds the sums of their products too."""
    return jnp.asarray(np.random.default_rng(seed).integers(-1, 2, shape), jnp.bfloat16)


def operands(sizes, rows, d=D, f=F):
    return integers(rows, d, seed=0), integers(len(sizes), d, f, seed=1), integers(rows, f, seed=2)


def forward_and_backward(x, w, dy, sizes, alignment, implementation):
    """y, dx and dw in float64."""

    def call(x, w, dy):
        y, pull = jax.vjp(
            lambda x, w: grouped_linear(
                x, w, jnp.asarray(sizes, jnp.int32), alignment=alignment, implementation=implementation
            ),
            x,
            w,
        )
        return y, *pull(dy)

    return [np.asarray(result, np.float64) for result in jax.jit(call)(x, w, dy)]


def loop(x, w, dy, sizes):
    x, w, dy = (np.asarray(a, np.float64) for a in (x, w, dy))
    y, dx, dw = np.zeros(dy.shape), np.zeros(x.shape), np.zeros(w.shape)
    for g, end in enumerate(np.cumsum(sizes)):
        rows = slice(end - sizes[g], end)
        y[rows], dx[rows], dw[g] = x[rows] @ w[g], dy[rows] @ w[g].T, x[rows].T @ dy[rows]
    return y, dx, dw


@pytest.mark.parametrize("sizes, rows, alignment", SIZES)
def test_xla(sizes, rows, alignment):
    given = operands(sizes, rows)
    for got, expected in zip(forward_and_backward(*given, sizes, alignment, "xla"), loop(*given, sizes), strict=True):
        np.testing.assert_array_equal(got, expected)


@hopper.interprets
@pytest.mark.parametrize("sizes, rows, alignment", SIZES)
def test_hopper(sizes, rows, alignment):
    given = operands(sizes, rows)
    with hopper.interpreted():
        results = forward_and_backward(*given, sizes, alignment, hopper.SM90)
    for got, expected in zip(results, loop(*given, sizes), strict=True):
        np.testing.assert_array_equal(got, expected)


@hopper.interprets
def test_hopper_with_several_tiles_each_way():
    sizes = [130, 0, 200]
    given = operands(sizes, 330, d=136, f=264)
    with hopper.interpreted():
        results = forward_and_backward(*given, sizes, 1, hopper.SM90)
    for got, expected in zip(results, loop(*given, sizes), strict=True):
        np.testing.assert_array_equal(got, np.asarray(jnp.asarray(expected, jnp.bfloat16), np.float64))


@hopper.interprets
@pytest.mark.parametrize("error", ["a_group_boundary_off_by_one", "steps_of_another_group"])
def test_planted_errors_are_seen(error, monkeypatch):
    sizes, rows = [17, 23], 40
    given = operands(sizes, rows)
    if error == "a_group_boundary_off_by_one":
        pad = mosaic_gpu_sm90.pad_groups
        monkeypatch.setattr(
            mosaic_gpu_sm90, "pad_groups", lambda sizes, *rest: pad(sizes + jnp.array([1, -1], sizes.dtype), *rest)
        )
    else:
        tile = mosaic_gpu_sm90.Tile
        monkeypatch.setattr(
            mosaic_gpu_sm90,
            "Tile",
            lambda *place, first=0, **rest: tile(*place, first=jnp.maximum(first - 1, 0), **rest),
        )
    with hopper.interpreted():
        results = forward_and_backward(*given, sizes, 1, hopper.SM90)
    wrong = [not np.array_equal(got, expected) for got, expected in zip(results, loop(*given, sizes), strict=True)]
    assert wrong == ([True, True, True] if error == "a_group_boundary_off_by_one" else [False, False, True])


@hopper.interprets
def test_race_detector_sees_a_missing_fence(monkeypatch):
    monkeypatch.setattr(mosaic_gpu_sm90.plgpu, "commit_smem", lambda: None)
    x, w, _ = operands([8], 8)
    with hopper.interpreted(races=True):
        jax.block_until_ready(
            jax.jit(functools.partial(grouped_linear, implementation=hopper.SM90))(x, w, jnp.asarray([8], jnp.int32))
        )


@hopper.compiles
@pytest.mark.parametrize("name", ["forward", "input gradient", "weight gradient"])
def test_machine_code(name):
    """A step of 64 takes four tensor-core instructions of the widest kind, which read the operands without a
    transpose."""
    struct = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    sizes, w = jax.ShapeDtypeStruct((8,), jnp.int32), struct(8, 7168, 2048)
    function, *operands = {
        "forward": (functools.partial(mosaic_gpu_sm90.grouped_product, transposed=False), struct(32768, 7168), w),
        "input gradient": (functools.partial(mosaic_gpu_sm90.grouped_product, transposed=True), struct(32768, 2048), w),
        "weight gradient": (mosaic_gpu_sm90.grouped_weight_gradient, struct(32768, 7168), struct(32768, 2048)),
    }[name]
    kernel = hopper.compiled(targets.H200, functools.partial(function, alignment=128), *operands, sizes)
    assert kernel.ptx.count("wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16") == 4
    if kernel.instructions is not None:
        assert kernel.instructions["HGMMA"] == 4 and kernel.instructions["LDL"] == kernel.instructions["STL"] == 0


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (
            dict(w=jnp.zeros((2, 5, 8), jnp.bfloat16)),
            ValueError,
            r"x bfloat16\[8, 16\], w bfloat16\[2, 5, 8\], group_sizes \[2\] must be",
        ),
        (dict(w=jnp.zeros((2, 16, 8))), ValueError, "x and w of one dtype"),
        (dict(alignment=3), ValueError, "alignment=3 does not divide the 8 rows"),
        (
            dict(x=jnp.zeros((8, 16)), w=jnp.zeros((2, 16, 8))),
            Unsupported,
            "multiplies bfloat16, not float32 and float32.*These would do it: xla",
        ),
        (dict(x=jnp.zeros((0, 16), jnp.bfloat16)), Unsupported, "needs arrays that are not empty"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, error, message):
    given = dict(x=jnp.zeros((8, 16), jnp.bfloat16), w=jnp.zeros((2, 16, 8), jnp.bfloat16), alignment=1) | arguments
    with pytest.raises(error, match=message):
        grouped_linear(
            given["x"], given["w"], jnp.array([4, 4]), alignment=given["alignment"], implementation=hopper.SM90
        )

"""The Hopper products of groups: equal to the reference bit for bit on exact inputs for any sizes, and their machine
code."""

import functools

import hopper
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import Unsupported, fp8_grouped_matmul, fp8_grouped_weight_gradient, targets
from kernels_pallas.grouped import mosaic_gpu_sm90
from kernels_pallas.hopper_tuning import Config

BLOCK, ROW = (128, 128), (1, 128)


def both(function, a, b, sizes, **fields):
    """The kernel's result and the reference's."""
    run = lambda implementation: np.asarray(
        jax.jit(functools.partial(function, implementation=implementation, **fields))(
            a, b, jnp.asarray(sizes, jnp.int32)
        )
    )
    with hopper.interpreted():
        y = run(hopper.SM90)
    return y, run("xla")


@pytest.fixture
def few_tiles(monkeypatch):
    """Makes tiles large, since the interpreter's time grows with their number."""
    monkeypatch.setattr(mosaic_gpu_sm90, "choose_config", lambda *_: Config(128, "n", 2))


@hopper.interprets
@pytest.mark.usefixtures("few_tiles")
@pytest.mark.parametrize(
    "sizes, rows, n, k, alignment, b_tile",
    [
        pytest.param([30, 0, 1], 40, 72, 256, 1, BLOCK, id="any-sizes-rows-left-over"),
        pytest.param([128, 0, 128], 384, 64, 128, 128, BLOCK, id="aligned"),
        pytest.param([0, 0], 5, 64, 128, 1, ROW, id="all-empty"),
        pytest.param([3, 130], 133, 200, 384, 1, (1, 384), id="one-scale-for-all-of-K"),
    ],
)
def test_grouped_matmul_bit_equal(sizes, rows, n, k, alignment, b_tile):
    a, b = hopper.integers((rows, k), ROW), hopper.integers((len(sizes), n, k), b_tile, seed=1)
    y, reference = both(fp8_grouped_matmul, a, b, sizes, alignment=alignment, out_dtype=jnp.float32)
    np.testing.assert_array_equal(y, reference)


@hopper.interprets
@pytest.mark.usefixtures("few_tiles")
@pytest.mark.parametrize(
    "sizes, columns, d, f, tile",
    [
        pytest.param([256, 0, 128], 512, 72, 80, ROW, id="empty-group-columns-left-over"),
        pytest.param([256, 512], 768, 8, 200, (1, 256), id="scales-of-256"),
        pytest.param([0, 0], 128, 8, 64, ROW, id="all-empty"),
    ],
)
def test_grouped_weight_gradient_bit_equal(sizes, columns, d, f, tile):
    x, dy = hopper.integers((d, columns), tile), hopper.integers((f, columns), tile, seed=1)
    y, reference = both(fp8_grouped_weight_gradient, x, dy, sizes, alignment=tile[1])
    np.testing.assert_array_equal(y, reference)
    assert not np.any(y[np.asarray(sizes) == 0])


@hopper.interprets
@pytest.mark.usefixtures("few_tiles")
def test_a_group_boundary_off_by_one_is_seen(monkeypatch):
    """For rows, the first of a group goes to the previous group; for columns, a group begins one step early."""
    moved = lambda sizes, *rest, pad=mosaic_gpu_sm90.pad_groups: pad(sizes + jnp.array([1, -1], sizes.dtype), *rest)
    a, b = hopper.integers((40, 128), ROW), hopper.integers((2, 64, 128), BLOCK, seed=1)
    with monkeypatch.context() as patch:
        patch.setattr(mosaic_gpu_sm90, "pad_groups", moved)
        y, reference = both(fp8_grouped_matmul, a, b, [17, 23])
    assert np.argwhere(np.any(y != reference, axis=1)).tolist() == [[17]]

    x, dy = hopper.integers((8, 384), ROW), hopper.integers((64, 384), ROW, seed=1)
    tile = mosaic_gpu_sm90.Tile
    with monkeypatch.context() as patch:
        patch.setattr(
            mosaic_gpu_sm90, "Tile", lambda *place, first, **rest: tile(*place, first=jnp.maximum(first - 1, 0), **rest)
        )
        y, reference = both(fp8_grouped_weight_gradient, x, dy, [128, 256])
    assert np.array_equal(y[0], reference[0]) and not np.array_equal(y[1], reference[1])


SIZES = jax.ShapeDtypeStruct((8,), jnp.int32)


@hopper.compiles
@pytest.mark.parametrize("target", [targets.H100, targets.H200], ids=lambda target: target.kind)
def test_machine_code_of_grouped_matmul(target):
    function = functools.partial(fp8_grouped_matmul, alignment=128, implementation=hopper.SM90)
    kernel = hopper.compiled(
        target, function, hopper.struct((8 * 4096, 7168), ROW), hopper.struct((8, 4096, 7168), BLOCK), SIZES
    )
    assert kernel.fp8_products == 4
    if kernel.instructions is not None:
        assert (
            kernel.instructions["QGMMA"] == 4 and kernel.instructions["FFMA"] == 64 and kernel.instructions["LDL"] == 0
        )


@hopper.compiles
def test_machine_code_of_few_rows_for_each_group():
    function = functools.partial(fp8_grouped_matmul, implementation=hopper.SM90)
    kernel = hopper.compiled(
        targets.H200, function, hopper.struct((192, 2048), ROW), hopper.struct((8, 7168, 2048), BLOCK), SIZES
    )
    assert kernel.fp8_products == 4


@hopper.compiles
def test_machine_code_of_the_weight_gradient():
    function = functools.partial(fp8_grouped_weight_gradient, implementation=hopper.SM90)
    kernel = hopper.compiled(
        targets.H200, function, hopper.struct((7168, 32768), ROW), hopper.struct((4096, 32768), ROW), SIZES
    )
    assert kernel.fp8_products == 4
    if kernel.instructions is not None:
        assert kernel.instructions["QGMMA"] == 4 and kernel.instructions["FFMA"] == kernel.instructions["FMUL"] == 64


@pytest.mark.parametrize(
    "function, arguments, message",
    [
        (
            fp8_grouped_weight_gradient,
            dict(alignment=64),
            "fp8_grouped_weight_gradient: .* groups of multiples of 128 columns, not of alignment=64",
        ),
        (fp8_grouped_weight_gradient, dict(out_dtype=jnp.float16), "writes bfloat16 or float32, not float16"),
        (
            fp8_grouped_matmul,
            dict(out_dtype=jnp.float16),
            "fp8_grouped_matmul: .* writes bfloat16 or float32, not float16",
        ),
    ],
)
def test_unsupported(function, arguments, message):
    b_shape = (2, 64, 128) if function is fp8_grouped_matmul else (64, 128)
    with pytest.raises(Unsupported, match=message):
        function(
            hopper.integers((8, 128), ROW),
            hopper.integers(b_shape, ROW),
            jnp.array([0, 0]),
            implementation=hopper.SM90,
            **arguments,
        )

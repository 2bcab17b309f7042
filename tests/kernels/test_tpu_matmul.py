"""fp8_matmul's TPU kernel: interpreted against the definition, and compiled for each generation of TPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tpu_cases import MULTIPLIED, SIMULATED, described, lower, multiplied, normal, on_every_chip, run, whole_numbers

from kernels_pallas import Accumulation, QTensor, Unsupported, fp8_matmul, quantize_block, quantize_tile
from kernels_pallas.matmul import mosaic_tpu

TILE, BLOCK, TILE_256, BLOCK_256 = (1, 128), (128, 128), (1, 256), (256, 256)


def kernel(a: QTensor, b: QTensor, out_dtype=jnp.float32, **options) -> np.ndarray:
    return run(lambda a, b: fp8_matmul(a, b, out_dtype=out_dtype, implementation="mosaic_tpu"), a, b, **options)


def reference(a: QTensor, b: QTensor, out_dtype=jnp.float32) -> np.ndarray:
    return np.asarray(fp8_matmul(a, b, out_dtype=out_dtype, implementation="xla"))


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks along each axis of a small product."""
    for name in ("SMALL", "LARGE"):
        monkeypatch.setattr(mosaic_tpu, name, mosaic_tpu.Blocks(m=32, n=128, k=256))


@pytest.mark.parametrize(
    "shape, a_tile, b_tile",
    [
        ((1, 40, 128), TILE, BLOCK),
        ((70, 300, 1024), TILE, BLOCK),  # ragged M, and a last scale block of N that is cut off
        ((33, 130, 576), TILE, BLOCK),  # the same along K
        ((70, 300, 1024), TILE_256, BLOCK_256),
        ((40, 300, 384), TILE, TILE),  # the weight gradient
        ((40, 72, 700), TILE_256, TILE_256),
        ((40, 72, 512), TILE_256, BLOCK),
        ((40, 72, 256), (40, 256), BLOCK),  # one scale for a
        ((5, 7, 30), TILE, BLOCK),
    ],
)
def test_whole_numbers_are_multiplied_exactly(small_blocks, shape, a_tile, b_tile):
    rows, columns, depth = shape
    a, b = whole_numbers(0, (rows, depth), a_tile), whole_numbers(1, (columns, depth), b_tile)
    np.testing.assert_array_equal(kernel(a, b), reference(a, b))


def test_exact_in_a_simulated_tpu(small_blocks):
    a, b = whole_numbers(0, (70, 640), TILE), whole_numbers(1, (200, 640), BLOCK)
    np.testing.assert_array_equal(kernel(a, b, interpreter=SIMULATED), reference(a, b))


def test_exact_where_e4m3_is_multiplied(small_blocks, monkeypatch):
    monkeypatch.setattr(mosaic_tpu, "multiplied", lambda a, b: (a.values.dtype, b.values.dtype))
    a, b = whole_numbers(0, (70, 640), TILE), whole_numbers(1, (200, 640), BLOCK)
    np.testing.assert_array_equal(kernel(a, b), reference(a, b))


@pytest.mark.parametrize("rows", [3, 600])
def test_exact_with_the_blocks_that_run(rows):
    """SMALL and LARGE as they are: nine tiles of K in three steps, and two blocks of N."""
    a, b = whole_numbers(0, (rows, 1152), TILE), whole_numbers(1, (1100, 1152), BLOCK)
    np.testing.assert_array_equal(kernel(a, b, jnp.bfloat16), reference(a, b, jnp.bfloat16))


def test_many_tiles_of_k():
    """More than 128 scales to a row: their second block of columns is read."""
    a, b = whole_numbers(0, (2, 130 * 128), TILE), whole_numbers(1, (8, 130 * 128), TILE)
    np.testing.assert_array_equal(kernel(a, b), reference(a, b))


def test_random_numbers_differ_by_the_order_of_sums(small_blocks):
    """Any two orders of a float32 sum of K products differ by at most 2 K 2⁻²⁴ Σ|a b|; and the quantized product is
    close to the exact one."""
    x, w = normal(0, (70, 1024)), normal(1, (300, 1024))
    a, b = quantize_tile(x), quantize_block(w)
    y, absolute = kernel(a, b), QTensor(jnp.abs(a.values.astype(jnp.float32)), a.scales, a.tile)
    sums = reference(absolute, QTensor(jnp.abs(b.values.astype(jnp.float32)), b.scales, b.tile))
    assert np.all(np.abs(y - reference(a, b)) <= 2 * 1024 * 2.0**-24 * sums)
    exact = np.asarray(x, np.float64) @ np.asarray(w, np.float64).T
    assert 1 - 2 * np.vdot(y, exact) / (np.vdot(y, y) + np.vdot(exact, exact)) < 1e-3


def test_a_scale_off_by_one_tile_is_caught(small_blocks, monkeypatch):
    a, b = whole_numbers(0, (70, 1024), TILE), whole_numbers(1, (300, 1024), BLOCK)
    operands = mosaic_tpu.operands

    def wrong(a, b, tile):
        *others, scales = operands(a, b, tile)
        return *others, jnp.roll(scales, 1, axis=0)

    monkeypatch.setattr(mosaic_tpu, "operands", wrong)
    assert np.mean(kernel(a, b) != reference(a, b)) > 0.9


def test_nan_stays_in_its_row():
    x = normal(0, (40, 256)).at[3, 200].set(jnp.nan)
    y = kernel(quantize_tile(x), quantize_block(normal(1, (72, 256))))
    assert np.isnan(y[3]).all() and np.isfinite(np.delete(y, 3, axis=0)).all()


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(accumulation=Accumulation(accumulator="hopper_fp22")), "adds in float32, not in hopper_fp22"),
        (dict(out_dtype=jnp.float16), "writes bfloat16 or float32, not float16"),
        (dict(a=whole_numbers(0, (8, 256), (1, 64))), "takes scales for multiples of 128 numbers of K"),
        (dict(a=whole_numbers(0, (0, 256), TILE)), "needs matrices that are not empty"),
    ],
)
def test_unsupported_says_why(changes, message):
    arguments = dict(a=whole_numbers(0, (8, 256), TILE), b=whole_numbers(1, (16, 256), BLOCK)) | changes
    with pytest.raises(Unsupported, match=f"fp8_matmul: mosaic_tpu {message}.*would do it: xla"):
        fp8_matmul(**arguments, implementation="mosaic_tpu")


@on_every_chip
@pytest.mark.parametrize(
    "shape, a_tile, b_tile",
    [
        ((4096, 2112, 7168), TILE, BLOCK),
        ((1, 576, 7168), TILE, BLOCK),
        ((2112, 7168, 4096), TILE, TILE),
        ((4096, 7168, 2048), TILE_256, BLOCK_256),
    ],
)
def test_compiles_and_multiplies_what_the_chip_does(topology, shape, a_tile, b_tile):
    """Of a shape in V3, its rows split over the mesh; the compiler refuses kernels that need more VMEM than there
    is."""
    rows, columns, depth = shape
    program = lower(
        topology,
        lambda a, b: fp8_matmul(a, b, implementation="mosaic_tpu"),
        described((rows, depth), a_tile),
        described((columns, depth), b_tile),
        sharded=1,
    )
    assert multiplied(program) == {MULTIPLIED[topology]}
    program.compile()


@pytest.mark.aot(chip="tpu7x")
def test_too_large_blocks_are_refused(monkeypatch):
    monkeypatch.setattr(mosaic_tpu, "SMALL", mosaic_tpu.Blocks(m=32, n=40960, k=1024))  # 40 MiB of b, twice
    a, b = described((8, 1024), TILE_256), described((40960, 1024), TILE_256)
    program = lower("tpu7x:2x2x1", lambda a, b: fp8_matmul(a, b, implementation="mosaic_tpu"), a, b, sharded=1)
    with pytest.raises(jax.errors.JaxRuntimeError, match="vmem"):
        program.compile()

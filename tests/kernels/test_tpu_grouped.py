"""The TPU kernels of grouped products: interpreted against the definition, and compiled for each generation of TPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tpu_cases import MULTIPLIED, SIMULATED, described, lower, multiplied, on_every_chip, run, whole_numbers

from kernels_pallas import Accumulation, QTensor, Unsupported, fp8_grouped_matmul, fp8_grouped_weight_gradient
from kernels_pallas.grouped import mosaic_tpu
from kernels_pallas.matmul import mosaic_tpu as dense

TILE, BLOCK, TILE_256, BLOCK_256 = (1, 128), (128, 128), (1, 256), (256, 256)
PRODUCTS = {"matmul": fp8_grouped_matmul, "weight gradient": fp8_grouped_weight_gradient}


def both(product: str, a: QTensor, b: QTensor, sizes: list[int], alignment: int, **options) -> list[np.ndarray]:
    """The kernel's result and the definition's."""

    def multiply(name):
        return lambda a, b, sizes: PRODUCTS[product](
            a, b, sizes, alignment=alignment, out_dtype=jnp.float32, implementation=name
        )

    return [run(multiply(name), a, b, jnp.array(sizes, jnp.int32), **options) for name in ("mosaic_tpu", "xla")]


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks along each axis of a small product."""
    for name in ("SMALL", "LARGE"):
        monkeypatch.setattr(dense, name, dense.Blocks(m=32, n=128, k=256))


@pytest.mark.parametrize(
    "sizes, alignment, shape, a_tile, b_tile",
    [
        ([3, 0, 40, 1], 1, (50, 200, 640), TILE, BLOCK),  # empty, and rows past the last group
        ([0, 1], 1, (1, 40, 128), TILE, BLOCK),
        ([32, 0, 64], 32, (128, 72, 512), TILE_256, BLOCK_256),  # aligned: nothing is moved
        ([16, 48, 0], 16, (64, 40, 384), TILE, TILE),
    ],
)
def test_rows_by_their_groups_matrices_are_exact(small_blocks, sizes, alignment, shape, a_tile, b_tile):
    rows, columns, depth = shape
    a, b = whole_numbers(0, (rows, depth), a_tile), whole_numbers(1, (len(sizes), columns, depth), b_tile)
    np.testing.assert_array_equal(*both("matmul", a, b, sizes, alignment))


@pytest.mark.parametrize(
    "sizes, alignment, shape, tile",
    [
        # empty ones first, between and last; rows past the last group
        ([0, 128, 0, 256, 0], 128, (40, 200, 640), TILE),
        ([512, 512], 512, (72, 40, 1024), TILE_256),
        ([0, 0], 128, (8, 8, 256), TILE),
    ],
)
def test_weight_gradients_are_exact(small_blocks, sizes, alignment, shape, tile):
    rows, columns, depth = shape
    x, dy = whole_numbers(0, (rows, depth), tile), whole_numbers(1, (columns, depth), tile)
    result, expected = both("weight gradient", x, dy, sizes, alignment)
    np.testing.assert_array_equal(result, expected)
    assert not result[np.array(sizes) == 0].any()


def test_exact_in_a_simulated_tpu(small_blocks):
    """A result that no step writes would be NaN here."""
    a, b = whole_numbers(0, (40, 256), TILE), whole_numbers(1, (3, 72, 256), BLOCK)
    np.testing.assert_array_equal(*both("matmul", a, b, [5, 0, 30], 1, interpreter=SIMULATED))
    x, dy = whole_numbers(0, (40, 512), TILE), whole_numbers(1, (72, 512), TILE)
    np.testing.assert_array_equal(*both("weight gradient", x, dy, [0, 256, 0, 128], 128, interpreter=SIMULATED))


def random_numbers(seed: int, shape: tuple[int, ...], tile: tuple[int, int]) -> QTensor:
    whole, random = whole_numbers(seed, shape, tile), np.random.default_rng(seed)
    values = random.standard_normal(shape) * 100
    return QTensor(
        jnp.asarray(values, whole.values.dtype),
        jnp.asarray(random.uniform(0.5, 2, whole.scales.shape), jnp.float32),
        tile,
    )


@pytest.mark.parametrize(
    "product, a_shape, b_shape, b_tile, sizes, alignment",
    [
        ("matmul", (60, 512), (3, 72, 512), BLOCK, [20, 0, 40], 1),
        ("weight gradient", (40, 512), (72, 512), TILE, [128, 0, 384], 128),
    ],
)
def test_random_numbers_differ_by_the_order_of_sums(small_blocks, product, a_shape, b_shape, b_tile, sizes, alignment):
    """Any two orders of a float32 sum of K products differ by at most 2 K 2⁻²⁴ Σ|a b|."""
    operands = random_numbers(0, a_shape, TILE), random_numbers(1, b_shape, b_tile)
    y, expected = both(product, *operands, sizes, alignment)
    absolute = (QTensor(jnp.abs(q.values.astype(jnp.float32)), q.scales, q.tile) for q in operands)
    sums = both(product, *absolute, sizes, alignment)[1]
    assert np.all(np.abs(y - expected) <= 2 * 512 * 2.0**-24 * sums)


def test_a_group_boundary_off_by_one_is_caught(small_blocks, monkeypatch):
    """One row, or one block of K, goes to the next group."""
    pad_groups, steps = mosaic_tpu.pad_groups, mosaic_tpu._steps
    monkeypatch.setattr(
        mosaic_tpu, "pad_groups", lambda sizes, *others: pad_groups(sizes + jnp.array([-1, 1, 0]), *others)
    )
    a, b = whole_numbers(0, (50, 256), TILE), whole_numbers(1, (3, 72, 256), BLOCK)
    y, expected = both("matmul", a, b, [10, 0, 40], 1)
    assert np.flatnonzero(np.any(y != expected, axis=1)).tolist() == [9]
    monkeypatch.setattr(
        mosaic_tpu, "_steps", lambda sizes, depth, block: steps(sizes + jnp.array([-block, block, 0]), depth, block)
    )
    x, dy = whole_numbers(0, (40, 1024), TILE), whole_numbers(1, (72, 1024), TILE)
    y, expected = both("weight gradient", x, dy, [512, 0, 512], 128)
    assert np.any(y != expected, axis=(1, 2)).tolist() == [True, True, False]


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda a, b, sizes, **name: fp8_grouped_matmul(
                a, b, sizes, accumulation=Accumulation(accumulator="hopper_fp22"), **name
            ),
            "fp8_grouped_matmul: mosaic_tpu adds in float32, not in hopper_fp22",
        ),
        (
            lambda a, b, sizes, **name: fp8_grouped_weight_gradient(a, a, sizes, alignment=64, **name),
            "fp8_grouped_weight_gradient: mosaic_tpu takes groups of multiples of 128 rows, not of alignment=64",
        ),
        (
            lambda a, b, sizes, **name: fp8_grouped_weight_gradient(a, a, sizes[:0], **name),
            "fp8_grouped_weight_gradient: mosaic_tpu needs a group",
        ),
    ],
)
def test_unsupported_says_why(call, message):
    operands = whole_numbers(0, (8, 256), TILE), whole_numbers(1, (2, 16, 256), BLOCK), jnp.array([3, 5])
    with pytest.raises(Unsupported, match=f"{message}.*would do it: xla"):
        call(*operands, implementation="mosaic_tpu")


SIZES = jax.ShapeDtypeStruct((8,), jnp.int32)


@on_every_chip
@pytest.mark.parametrize(
    "function, args",
    [
        (
            lambda a, sizes, b, **name: fp8_grouped_matmul(a, b, sizes, alignment=128, **name),
            [described((4096, 7168), TILE), SIZES, described((8, 4096, 7168), BLOCK)],
        ),
        (
            lambda x, sizes, dy, **name: fp8_grouped_weight_gradient(x, dy, sizes, **name),
            [described((7168, 4096), TILE), SIZES, described((2048, 4096), TILE)],
        ),
    ],
    ids=["matmul", "weight gradient"],
)
def test_compiles_and_multiplies_what_the_chip_does(topology, function, args):
    """Compiles for eight experts of V3 on each device, with their tokens split over the mesh, within the chip's
    VMEM."""
    program = lower(topology, lambda *args: function(*args, implementation="mosaic_tpu"), *args, sharded=2)
    assert multiplied(program) == {MULTIPLIED[topology]}
    program.compile()


@pytest.mark.aot(chip="tpu7x")
def test_compiles_where_groups_are_moved_apart():
    """Padding and its undoing belong to the program, which compiles inside a `shard_map` that checks what varies."""

    def multiply(a, sizes, b):
        return fp8_grouped_matmul(a, b, sizes, implementation="mosaic_tpu")

    lower(
        "tpu7x:2x2x1", multiply, described((256, 512), TILE), SIZES, described((8, 576, 512), BLOCK), sharded=2
    ).compile()

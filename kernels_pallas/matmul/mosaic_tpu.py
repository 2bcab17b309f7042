"""The product of two quantized matrices on TPUs, through Pallas Mosaic. It was compiled and interpreted; no TPU has run
it.

    y[m, n] = Σ_t (Σ_{k in tile t} a[m, k] · b[n, k]) · a_scale[m, t] · b_scale[n, t]

The inner sum is one pass through the matrix unit, which adds in float32. The vector unit scales it and adds it to the
total; tiles of 256 need half as much of that as tiles of 128. Every layout of scales becomes one of two: a's [M, T], a
column for each tile, and b's transposed, [T, N], a row for each tile. A step needs fewer columns of T than a block in
VMEM must have, so that a block holds 128 columns or 8 rows of scales, and the kernel picks those of the step.

The copies to and from VMEM cut off the blocks at the ends of M and N: numbers beyond an end reach only results that are
not written. K is padded with zeros to whole tiles.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas._compat import output, priced
from kernels_pallas.matmul.accumulation import Accumulation
from kernels_pallas.qtensor import QTensor, retile, round_up
from kernels_pallas.tpu import LANES, ROWS, SUBLANES, block_of, from_column


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Rows of a, rows of b and numbers of K in VMEM at a time. `k` is at most eight tiles of scales."""

    m: int
    n: int
    k: int


SMALL = Blocks(m=128, n=512, k=1024)  # reading b takes most of the time: long stretches of it
LARGE = Blocks(m=512, n=1024, k=512)  # each number that is read is multiplied many times


def choose_blocks(rows: int, columns: int, depth: int, tile: int) -> Blocks:
    """Blocks for a product of this size; they divide `depth` in whole tiles."""
    blocks = SMALL if rows <= SMALL.m else LARGE
    tiles = math.gcd(blocks.k // tile, pl.cdiv(depth, tile))
    return Blocks(min(blocks.m, round_up(rows, ROWS)), min(blocks.n, round_up(columns, LANES)), tiles * tile)


def multiplied(a: QTensor, b: QTensor) -> tuple[jnp.dtype, jnp.dtype]:
    """The dtypes that the matrix unit multiplies: the operands' own if it can (E4M3 from TPU7x on), else bfloat16,
    which holds them exactly."""
    try:
        native = pltpu.get_tpu_info().is_matmul_supported(a.values.dtype, b.values.dtype)
    except ValueError:  # not a TPU: interpreted
        native = False
    return (a.values.dtype, b.values.dtype) if native else (jnp.bfloat16, jnp.bfloat16)


def scale_tile(a: QTensor, b: QTensor) -> int:
    """The numbers of K that share a scale in both operands, at most 256."""
    changes = [q.tile[1] for q in (a, b) if q.tile[1] < q.shape[-1]]
    return math.gcd(256, *changes) if changes else LANES


def reason(a: QTensor, b: QTensor, accumulation: Accumulation, out_dtype: jnp.dtype) -> str | None:
    if accumulation.accumulator != "float32":
        return f"adds in float32, not in {accumulation.accumulator}"
    if jnp.dtype(out_dtype) not in (jnp.bfloat16, jnp.float32):
        return f"writes bfloat16 or float32, not {jnp.dtype(out_dtype)}"
    if scale_tile(a, b) < LANES:
        return f"takes scales for multiples of 128 numbers of K, not tiles {a.tile} and {b.tile}"
    if 0 in (*a.shape, *b.shape):
        return f"needs matrices that are not empty, not {a.shape} and {b.shape}"
    return None


def operands(a: QTensor, b: QTensor, tile: int) -> tuple[jax.Array, ...]:
    """Values and scales of a [M, K] and of b [..., N, K] as the kernels read them: K in whole tiles, b's scales as
    [..., T, N]."""
    a, b = retile(a, tile), retile(b, tile)
    return _whole_tiles(a.values, tile), a.scales, _whole_tiles(b.values, tile), b.scales.mT


def matmul(a_MK: QTensor, b_NK: QTensor, accumulation: Accumulation, out_dtype: jnp.dtype) -> jax.Array:
    """a bᵀ [M, N]. Every sum is in float32, so that `accumulation` changes nothing."""
    tile, rows, columns = scale_tile(a_MK, b_NK), a_MK.shape[0], b_NK.shape[0]
    blocks = choose_blocks(rows, columns, a_MK.shape[1], tile)
    arrays = operands(a_MK, b_NK, tile)
    grid = (pl.cdiv(rows, blocks.m), pl.cdiv(columns, blocks.n), arrays[0].shape[1] // blocks.k)
    dtypes = multiplied(a_MK, b_NK)
    product = pl.pallas_call(
        functools.partial(kernel, tile=tile, dtypes=dtypes),
        out_shape=output((rows, columns), out_dtype, *arrays),
        grid=grid,
        in_specs=[
            pl.BlockSpec((blocks.m, blocks.k), lambda i, j, k: (i, k)),
            pl.BlockSpec((blocks.m, LANES), lambda i, j, k: (i, block_of(k * (blocks.k // tile), LANES))),
            pl.BlockSpec((blocks.n, blocks.k), lambda i, j, k: (j, k)),
            pl.BlockSpec((SUBLANES, blocks.n), lambda i, j, k: (block_of(k * (blocks.k // tile), SUBLANES), j)),
        ],
        out_specs=pl.BlockSpec((blocks.m, blocks.n), lambda i, j, k: (i, j)),
        scratch_shapes=[pltpu.VMEM((blocks.m, blocks.n), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        name="fp8_matmul",
    )
    with priced(2 * rows * columns * a_MK.shape[1], dtypes[0], grid):
        return product(*arrays)


def kernel(a_ref, a_scales_ref, b_ref, b_scales_ref, y_ref, total_ref, *, tile, dtypes, wanted=True):
    """Computes one step of the grid (M, N, K); the product is zero unless it is `wanted`."""
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _():
        total_ref[...] = jnp.zeros_like(total_ref)

    @pl.when(wanted)
    def _():
        add_product(total_ref, a_ref, a_scales_ref, b_ref, b_scales_ref, step, tile=tile, dtypes=dtypes)

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        y_ref[...] = total_ref[...].astype(y_ref.dtype)


def add_product(total_ref, a_ref, a_scales_ref, b_ref, b_scales_ref, step, *, tile, dtypes):
    """Adds the product of the blocks of a and b at `step` along K, tile by tile, each with its scales."""
    tiles = a_ref.shape[1] // tile
    a_scales = from_column(a_scales_ref, step * tiles)
    for t in range(tiles):
        k = slice(t * tile, (t + 1) * tile)
        partial = jax.lax.dot_general(
            a_ref[:, k].astype(dtypes[0]),
            b_ref[:, k].astype(dtypes[1]),
            (((1,), (1,)), ((), ())),
            preferred_element_type=jnp.float32,
        )
        row = pl.ds((step * tiles & (SUBLANES - 1)) + t, 1)
        total_ref[...] += partial * a_scales[:, t : t + 1] * b_scales_ref[row, :]  # FP8: promotion


def _whole_tiles(values_RK: jax.Array, tile: int) -> jax.Array:
    missing = -values_RK.shape[-1] % tile
    return jnp.pad(values_RK, [(0, 0)] * (values_RK.ndim - 1) + [(0, missing)]) if missing else values_RK

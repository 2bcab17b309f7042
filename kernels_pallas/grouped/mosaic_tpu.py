"""Products of contiguous groups on TPUs, through Pallas Mosaic. They were compiled and interpreted; no TPU has run
them.

grouped_matmul is the dense kernel. Every block of rows belongs to one group, whose number is known before the kernel
starts and chooses the matrix. Groups that do not begin at a multiple of a block are moved apart first, and their
results together again afterwards.

In grouped_weight_gradient K runs over the rows of all groups, and a group's blocks of K add to its own result. Each
group is visited at least once, so that an empty one gives zeros. The grid has the steps of the worst case; those left
over do nothing.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas._compat import output, priced
from kernels_pallas.grouped.layout import choose_block, group_of, pad_groups, take_rows
from kernels_pallas.matmul import mosaic_tpu as dense
from kernels_pallas.matmul.accumulation import Accumulation
from kernels_pallas.qtensor import QTensor
from kernels_pallas.tpu import LANES, ROWS, SUBLANES, block_of

SEMANTICS = pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"))


def grouped_matmul_reason(
    a: QTensor, b: QTensor, sizes_G: jax.Array, alignment: int, accumulation: Accumulation, out_dtype: jnp.dtype
) -> str | None:
    return dense.reason(a, b, accumulation, out_dtype)


def grouped_weight_gradient_reason(
    x: QTensor, dy: QTensor, sizes_G: jax.Array, alignment: int, accumulation: Accumulation, out_dtype: jnp.dtype
) -> str | None:
    if alignment % LANES:
        return f"takes groups of multiples of 128 rows, not of alignment={alignment}"
    if sizes_G.size == 0:
        return "needs a group"
    return dense.reason(x, dy, accumulation, out_dtype)


def grouped_matmul(
    a_RK: QTensor, b_GNK: QTensor, sizes_G: jax.Array, alignment: int, accumulation: Accumulation, out_dtype: jnp.dtype
) -> jax.Array:
    """Rows of group g times b[g] transposed: [R, N]; zero past the last group."""
    (num_rows, depth), (num_groups, columns, _) = a_RK.shape, b_GNK.shape
    tile, dtypes = dense.scale_tile(a_RK, b_GNK), dense.multiplied(a_RK, b_GNK)
    a_PK, a_scales_PT, b_GNK, b_scales_GTN = dense.operands(a_RK, b_GNK, tile)
    block, padding = math.gcd(alignment, dense.LARGE.m), None
    if block < ROWS:
        block = choose_block(num_rows, num_groups, smallest=ROWS, largest=dense.LARGE.m)
        padding = pad_groups(sizes_G, num_rows, block)
        a_PK, a_scales_PT, sizes_G = (
            take_rows(a_PK, padding.source_P),
            take_rows(a_scales_PT, padding.source_P),
            padding.sizes_G,
        )
    blocks = dense.choose_blocks(block, columns, depth, tile)
    group_J = group_of(jnp.arange(0, a_PK.shape[0], block), sizes_G)
    arrays, tiles = (group_J, a_PK, a_scales_PT, b_GNK, b_scales_GTN), blocks.k // tile
    grid = (group_J.size, pl.cdiv(columns, blocks.n), a_PK.shape[1] // blocks.k)
    product = pl.pallas_call(
        functools.partial(_kernel, num_groups=num_groups, tile=tile, dtypes=dtypes),
        out_shape=output((a_PK.shape[0], columns), out_dtype, *arrays),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=grid,
            in_specs=[
                pl.BlockSpec((block, blocks.k), lambda i, j, k, group: (i, k)),
                pl.BlockSpec((block, LANES), lambda i, j, k, group: (i, block_of(k * tiles, LANES))),
                pl.BlockSpec(
                    (None, blocks.n, blocks.k), lambda i, j, k, group: (jnp.minimum(group[i], num_groups - 1), j, k)
                ),
                pl.BlockSpec(
                    (None, SUBLANES, blocks.n),
                    lambda i, j, k, group: (jnp.minimum(group[i], num_groups - 1), block_of(k * tiles, SUBLANES), j),
                ),
            ],
            out_specs=pl.BlockSpec((block, blocks.n), lambda i, j, k, group: (i, j)),
            scratch_shapes=[pltpu.VMEM((block, blocks.n), jnp.float32)],
        ),
        compiler_params=SEMANTICS,
        name="fp8_grouped_matmul",
    )
    with priced(2 * num_rows * columns * depth, dtypes[0], grid, ragged=True):
        y_PN = product(*arrays)
    return y_PN if padding is None else take_rows(y_PN, padding.target_R)


def _kernel(group_ref, *refs, num_groups, tile, dtypes):
    dense.kernel(*refs, tile=tile, dtypes=dtypes, wanted=group_ref[pl.program_id(0)] < num_groups)


def grouped_weight_gradient(
    x_DP: QTensor, dy_FP: QTensor, sizes_G: jax.Array, alignment: int, accumulation: Accumulation, out_dtype: jnp.dtype
) -> jax.Array:
    """x[:, group g] times dy[:, group g] transposed: [G, D, F]; zero for an empty group. Sizes are multiples of
    `alignment`."""
    rows, columns, num_groups = x_DP.shape[0], dy_FP.shape[0], sizes_G.shape[0]
    tile, dtypes = math.gcd(dense.scale_tile(x_DP, dy_FP), alignment), dense.multiplied(x_DP, dy_FP)
    blocks = dense.choose_blocks(rows, columns, alignment, tile)
    tiles = blocks.k // tile
    arrays = (*_steps(sizes_G, x_DP.shape[1], blocks.k), *dense.operands(x_DP, dy_FP, tile))
    grid = (pl.cdiv(rows, blocks.m), pl.cdiv(columns, blocks.n), arrays[0].size)
    product = pl.pallas_call(
        functools.partial(_weight_gradient_kernel, tile=tile, dtypes=dtypes),
        out_shape=output((num_groups, rows, columns), out_dtype, *arrays),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=grid,
            in_specs=[
                pl.BlockSpec((blocks.m, blocks.k), lambda i, j, s, group, k, visit: (i, k[s])),
                pl.BlockSpec((blocks.m, LANES), lambda i, j, s, group, k, visit: (i, block_of(k[s] * tiles, LANES))),
                pl.BlockSpec((blocks.n, blocks.k), lambda i, j, s, group, k, visit: (j, k[s])),
                pl.BlockSpec(
                    (SUBLANES, blocks.n), lambda i, j, s, group, k, visit: (block_of(k[s] * tiles, SUBLANES), j)
                ),
            ],
            out_specs=pl.BlockSpec((None, blocks.m, blocks.n), lambda i, j, s, group, k, visit: (group[s], i, j)),
            scratch_shapes=[pltpu.VMEM((blocks.m, blocks.n), jnp.float32)],
        ),
        compiler_params=SEMANTICS,
        name="fp8_grouped_weight_gradient",
    )
    with priced(2 * rows * columns * x_DP.shape[1], dtypes[0], grid, ragged=True):
        return product(*arrays)


FIRST, ADD, LAST = 1, 2, 4  # flags of a step: the first of its group, one that adds a block, the last of its group


def _steps(sizes_G: jax.Array, depth: int, block: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The group, the block of K and the flags (a sum of FIRST, ADD and LAST) of each step along K: int32 [S] each."""
    blocks_G = sizes_G // block
    visits_G = jnp.maximum(blocks_G, 1)
    step_S = jnp.arange(depth // block + sizes_G.size, dtype=jnp.int32)
    group_S = jnp.minimum(group_of(step_S, visits_G), sizes_G.size - 1)
    visit_S = step_S - (jnp.cumsum(visits_G) - visits_G)[group_S]
    block_S = jnp.clip((jnp.cumsum(blocks_G) - blocks_G)[group_S] + visit_S, 0, depth // block - 1)
    flags_S = FIRST * (visit_S == 0) + ADD * (visit_S < blocks_G[group_S]) + LAST * (visit_S == visits_G[group_S] - 1)
    return group_S, block_S.astype(jnp.int32), flags_S.astype(jnp.int32)


def _weight_gradient_kernel(
    group_ref, block_ref, flags_ref, x_ref, x_scales_ref, dy_ref, dy_scales_ref, dw_ref, total_ref, *, tile, dtypes
):
    step = pl.program_id(2)

    @pl.when(flags_ref[step] & FIRST != 0)
    def _():
        total_ref[...] = jnp.zeros_like(total_ref)

    @pl.when(flags_ref[step] & ADD != 0)
    def _():
        dense.add_product(
            total_ref, x_ref, x_scales_ref, dy_ref, dy_scales_ref, block_ref[step], tile=tile, dtypes=dtypes
        )

    @pl.when(flags_ref[step] & LAST != 0)
    def _():
        dw_ref[...] = total_ref[...].astype(dw_ref.dtype)

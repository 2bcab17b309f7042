"""Products of groups of rows in bfloat16 on NVIDIA Hopper, through Pallas Mosaic GPU. They were compiled and
interpreted; no GPU has run them.

    forward            y[r] = x[r] w[g], g the group of row r
    input gradient     dx[r] = dy[r] w[g]ᵀ
    weight gradient    dw[g] = x[group g]ᵀ dy[group g]

One warpgroup copies the next steps of K into shared memory; two others multiply, each its own half of the tile, into an
accumulator that stays in registers until the tile is written. Matrix instructions read bfloat16 with either axis last,
so that x, w and dy are never transposed. The tiles are those of `grouped.mosaic_gpu_sm90`: a tile lies in one group,
tiles past the last group and those of an empty group sum over no steps and write zeros, and groups that may begin
within a tile are moved apart first.

Copies read zeros beyond an end and write nothing there. The last axis must be a multiple of 8: else it is padded first,
at the cost of a copy. Tiles are as large as registers and shared memory allow, since reading the operands takes most of
the time; this rule was not measured.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas._compat import plgpu
from kernels_pallas.grouped.layout import group_of, pad_groups, take_rows
from kernels_pallas.hopper import FREE_SHARED_MEMORY, ROWS, Tile, launch, pad, tiled, unavailable

STEP = 64  # numbers of K at a time: the widest swizzle, 128 bytes; four instructions
TILE_M = 2 * ROWS  # rows of a tile of the output
BF16 = jnp.dtype(jnp.bfloat16)
STRIP = 8  # tiles of m between one column of tiles and the next, so that what they read stays in the L2 cache


def reason(x: jax.Array, w: jax.Array) -> str | None:
    if missing := unavailable():
        return missing
    if x.dtype != BF16 or w.dtype != BF16:
        return f"multiplies bfloat16, not {x.dtype} and {w.dtype}"
    if 0 in (*x.shape, *w.shape):
        return f"needs arrays that are not empty, not {x.shape} and {w.shape}"
    return None


@dataclasses.dataclass(frozen=True)
class Side:
    """One operand of a product, [rows, K] or, if `across`, [K, rows]: an array outside the kernel, a reference inside
    it."""

    values: jax.Array
    across: bool

    @property
    def depth(self) -> int:
        return self.values.shape[-2 if self.across else -1]

    def at(self, ref) -> "Side":
        return dataclasses.replace(self, values=ref)

    def spec(self, size: int, index: jax.Array, first: jax.Array | int):
        """The block of `size` rows and one step of K that a pipeline copies."""
        if self.across:
            return plgpu.BlockSpec(
                (STEP, size), lambda k: (first + k, index), transforms=tiled(size, BF16), memory_space=plgpu.SMEM
            )
        return plgpu.BlockSpec(
            (size, STEP), lambda k: (index, first + k), transforms=tiled(STEP, BF16), memory_space=plgpu.SMEM
        )


def grouped_product(x_RK: jax.Array, w: jax.Array, sizes_G: jax.Array, alignment: int, transposed: bool) -> jax.Array:
    """Rows of group g times w[g], w [G, K, N], or times w[g] transposed, w [G, N, K]: [R, N]; zero past the last
    group."""
    num_rows, num_groups, n = x_RK.shape[0], w.shape[0], w.shape[1 if transposed else 2]
    padding = pad_groups(sizes_G, num_rows, TILE_M) if alignment % TILE_M else None
    if padding is not None:
        x_RK, sizes_G = take_rows(x_RK, padding.source_P), padding.sizes_G
    missing = (-w.shape[1] % 8, -w.shape[2] % 8)
    a, b = Side(pad(x_RK, 0, -x_RK.shape[1] % 8), across=False), Side(pad(w, *missing), across=not transposed)
    shape = x_RK.shape[0], n + -n % 8
    columns = tile_columns(shape[1])
    tiles = shape[0] // TILE_M, pl.cdiv(shape[1], columns)
    group_J = group_of(jnp.arange(0, shape[0], TILE_M), sizes_G)

    def body(x_ref, w_ref, group_J, y_ref):
        def locate(index):
            m, row_of_tiles = plgpu.planar_snake(index, tiles, 0, STRIP)
            group = group_J[m]
            steps = jnp.where(group < num_groups, pl.cdiv(a.depth, STEP), 0)
            return Tile(m, row_of_tiles, b_group=lax.min(group, jnp.int32(num_groups - 1)), steps=steps)

        product_tiles(a.at(x_ref), b.at(w_ref), y_ref, columns, tiles[0] * tiles[1], locate)

    y_PN = launch(
        body, shape, BF16, 2 * num_rows * n * a.depth, a.values, b.values, group_J, operand_dtype=BF16, ragged=True
    )
    return (y_PN if padding is None else take_rows(y_PN, padding.target_R))[:, :n]


def grouped_weight_gradient(x_RD: jax.Array, dy_RF: jax.Array, sizes_G: jax.Array, alignment: int) -> jax.Array:
    """x[group g] transposed times dy[group g]: [G, D, F]; zero for an empty group."""
    (num_rows, d), f, num_groups = x_RD.shape, dy_RF.shape[1], sizes_G.shape[0]
    if alignment % STEP:
        padding = pad_groups(sizes_G, num_rows, STEP)
        x_RD, dy_RF, sizes_G = take_rows(x_RD, padding.source_P), take_rows(dy_RF, padding.source_P), padding.sizes_G
    a, b = Side(pad(x_RD, 0, -d % 8), across=True), Side(pad(dy_RF, 0, -f % 8), across=True)
    shape = num_groups, a.values.shape[1], b.values.shape[1]
    columns = tile_columns(shape[2])
    tiles = pl.cdiv(shape[1], TILE_M), pl.cdiv(shape[2], columns)
    steps_G = (sizes_G // STEP).astype(jnp.int32)
    first_G = jnp.cumsum(steps_G) - steps_G

    def body(x_ref, dy_ref, first_G, steps_G, y_ref):
        def locate(index):
            group, index = (
                lax.div(index, jnp.int32(tiles[0] * tiles[1])),
                lax.rem(index, jnp.int32(tiles[0] * tiles[1])),
            )
            return Tile(
                *plgpu.planar_snake(index, tiles, 0, STRIP), y_group=group, first=first_G[group], steps=steps_G[group]
            )

        product_tiles(a.at(x_ref), b.at(dy_ref), y_ref, columns, num_groups * tiles[0] * tiles[1], locate)

    flops = 2 * d * f * num_rows
    return launch(body, shape, BF16, flops, a.values, b.values, first_G, steps_G, operand_dtype=BF16, ragged=True)[
        :, :d, :f
    ]


def tile_columns(n: int) -> int:
    """The columns of a tile of the output: up to 256, which fill a warpgroup's registers."""
    return next(columns for columns in (64, 128, 256) if n <= columns or columns == 256)


def stages(columns: int) -> int:
    """The steps of K that shared memory holds next to a tile of the output, at most six."""
    stage = (TILE_M + columns) * STEP * BF16.itemsize
    return min(6, (FREE_SHARED_MEMORY - TILE_M * columns * BF16.itemsize) // stage)


def product_tiles(a: Side, b: Side, y_ref, columns: int, num_tiles: int, locate: Callable[[jax.Array], Tile]) -> None:
    """Computes and writes this core's tiles of the output; locate(i) is the i-th of all `num_tiles`."""
    shape = ROWS, columns

    def pipeline(tile: Tile, body=None, context=lambda _: None):
        return plgpu.emit_pipeline_warp_specialized(
            body,
            grid=(pl.cdiv(a.depth, STEP) if tile.steps is None else tile.steps,),
            in_specs=[a.spec(TILE_M, tile.m, tile.first), b.spec(columns, tile.n, tile.first)],
            max_concurrent_steps=stages(columns),
            memory_registers=40,
            wg_axis="warpgroup",
            num_compute_wgs=2,
            compute_context=context,
        )

    def in_scope(slots, staging):
        warpgroup = lax.axis_index("warpgroup")
        rows = pl.ds(warpgroup * ROWS, ROWS)  # of this warpgroup in the tile

        @plgpu.nd_loop((num_tiles,), collective_axes="core")
        def _(loop):
            tile = locate(loop.index[0])

            def step(_, a_slot, b_slot, accumulator):
                left, right = a_slot.at[:, rows].T if a.across else a_slot.at[rows], b_slot if b.across else b_slot.T
                plgpu.wgmma(accumulator, left, right)
                plgpu.wgmma_wait(0)
                return accumulator

            def compute(run):
                def accumulate(accumulator):
                    run(accumulator)
                    return accumulator[...]

                total = pl.run_scoped(accumulate, plgpu.ACC(shape, jnp.float32))
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the previous tile has left the staging area
                staging[warpgroup] = total.astype(y_ref.dtype)
                plgpu.commit_smem()
                y = y_ref if tile.y_group is None else y_ref.at[tile.y_group]
                block = pl.ds(tile.m * TILE_M + warpgroup * ROWS, ROWS), pl.ds(tile.n * columns, columns)
                plgpu.copy_smem_to_gmem(staging.at[warpgroup], y.at[block])

            values = b.values if tile.b_group is None else b.values.at[tile.b_group]
            pipeline(tile, step, compute)(a.values, values, allocations=slots)

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    pl.run_scoped(
        in_scope,
        slots=pipeline(Tile(0, 0)).get_allocations(a.values, b.values if len(b.values.shape) == 2 else b.values.at[0]),
        staging=plgpu.SMEM((2, *shape), y_ref.dtype, transforms=tiled(columns, y_ref.dtype)),
        collective_axes="warpgroup",
    )

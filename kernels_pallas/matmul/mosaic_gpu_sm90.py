"""The product of two quantized matrices on NVIDIA Hopper, through Pallas Mosaic GPU. It was compiled and interpreted;
no GPU has run it.

    y[m, n] = Σ_t (Σ_{k in tile t} a[m, k] · b[n, k]) · a_scale[m, t] · b_scale[n, t]          tiles of 128

The inner sum is four FP8 warpgroup instructions (wgmma m64nNk32) into a fresh accumulator, which keeps some 14 bits;
multiplying it with the scales and adding it to a float32 total in registers is the promotion of V3 §3.3.2, one FFMA for
each number. Blocks of threads stay for the whole kernel and take output tiles in turn. One warpgroup copies the next
steps of K into shared memory; the two others compute, each its own half of the tile: while one promotes, the tensor
cores work for the other.

Layouts. FP8 instructions read both operands with K last: a [M, K], b [N, K]. A scale for each row and tile is stored
transposed, [K/128, M], since copies to shared memory take 16 contiguous bytes or more; one for 128 rows stays [N/128,
K/128] and is read as a single number. The copies read zeros beyond an end and write nothing there, so that the last
tiles need not be full. But M must be a multiple of 8, N of 64 and K of 128: else operands are padded first, at the cost
of a copy.

The scales are read with ordinary loads from a slot that the next copy fills: `commit_smem` orders the two. Rejected:
128 × 128 or 64 × 256 numbers for each warpgroup, whose total and partial sums do not fit its registers (compiled:
spills of 456 and 384 bytes); scales in shared memory for blocks of b, one number at a time being too small for a copy.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas._compat import load, plgpu
from kernels_pallas.hopper import ROWS, STEP, Tile, launch, pad, tiled, unavailable
from kernels_pallas.hopper_tuning import Config, choose_config
from kernels_pallas.matmul.accumulation import Accumulation
from kernels_pallas.qtensor import E4M3, QTensor, retile


def reason(a: QTensor, b: QTensor, accumulation: Accumulation, out_dtype: jnp.dtype) -> str | None:
    if missing := unavailable():
        return missing
    for q in (a, b):
        if q.values.dtype != jnp.dtype(E4M3):
            return f"multiplies {E4M3}, not {q.values.dtype}"
        if q.tile[1] < q.shape[-1] and q.tile[1] % STEP:
            return f"takes scales for multiples of {STEP} numbers of K, not tiles {q.tile}"
    if accumulation != Accumulation():
        return f"adds as the tensor cores do and promotes every {STEP} numbers, not {accumulation}"
    if jnp.dtype(out_dtype) not in (jnp.bfloat16, jnp.float32):
        return f"writes bfloat16 or float32, not {jnp.dtype(out_dtype)}"
    if 0 in (*a.shape, *b.shape):
        return f"needs matrices that are not empty, not {a.shape} and {b.shape}"
    return None


def matmul(
    a_MK: QTensor, b_NK: QTensor, accumulation: Accumulation, out_dtype: jnp.dtype, config: Config | None = None
) -> jax.Array:
    """a bᵀ [M, N]; `accumulation` is that of the hardware."""
    (m, k), n = a_MK.shape, b_NK.shape[0]
    config = config or choose_config("fp8_matmul", m, n, k, out_dtype)
    a, b = operand(a_MK, 8), operand(b_NK, 64)
    rows, columns = a.values.shape[0], b.values.shape[0]
    tiles = pl.cdiv(rows, config.tile_m), pl.cdiv(columns, config.tile_n)

    def body(*refs):
        a_refs, b_refs, y_ref = refs[:2], refs[2:4], refs[4]
        product_tiles(
            a.at(a_refs), b.at(b_refs), y_ref, config, tiles[0] * tiles[1], lambda i: Tile(*tile_at(i, tiles, config))
        )

    return launch(body, (rows, columns), out_dtype, 2 * m * n * k, *a.arrays, *b.arrays)[:m, :n]


@dataclasses.dataclass(frozen=True)
class Operand:
    """One operand of a product: arrays outside the kernel, references inside it."""

    values: jax.Array  # [..., R, K]
    scales: jax.Array  # [..., T, R], or [..., R/block, T]
    block: int | None  # rows that share a scale; None if each has its own
    steps_per_scale: int  # steps of K that share a scale

    @property
    def arrays(self) -> tuple[jax.Array, jax.Array]:
        return self.values, self.scales

    def at(self, refs) -> "Operand":
        return dataclasses.replace(self, values=refs[0], scales=refs[1])

    def group(self, index) -> "Operand":
        return self if index is None else self.at((self.values.at[index], self.scales.at[index]))


def operand(q: QTensor, multiple: int) -> Operand:
    """The arrays of q with rows padded to a `multiple` and K to whole steps."""
    rows, depth = q.shape[-2:]
    missing = (-rows % multiple, -depth % STEP)
    values = pad(q.values, *missing)
    steps_per_scale = (min(q.tile[1], values.shape[-1]) if q.tile[1] < depth else values.shape[-1]) // STEP
    block = min(q.tile[0], rows)
    if multiple == 64 and (block % STEP == 0 or block == rows):  # the right operand: every tile lies in one block
        return Operand(values, q.scales, block, steps_per_scale)
    scales = retile(q, steps_per_scale * STEP).scales if q.tile[0] > 1 else q.scales
    return Operand(values, pad(scales, missing[0], 0).mT, None, steps_per_scale)


def tile_at(index: jax.Array, tiles: tuple[int, int], config: Config) -> tuple[jax.Array, jax.Array]:
    return plgpu.planar_snake(index, tiles, config.minor, config.width)


def product_tiles(
    a: Operand, b: Operand, y_ref, config: Config, num_tiles, locate: Callable[[jax.Array], Tile]
) -> None:
    """Computes and writes this core's tiles of the output; locate(i) is the i-th of all `num_tiles`."""
    shape = ROWS, config.columns

    def pipeline(b: Operand, tile: Tile, body=None, context=lambda _: None):
        per_row = lambda q, size, index: plgpu.BlockSpec(
            (1, size), lambda k: ((tile.first + k) // q.steps_per_scale, index), memory_space=plgpu.SMEM
        )
        values = lambda size, index: plgpu.BlockSpec(
            (size, STEP), lambda k: (index, tile.first + k), transforms=tiled(STEP, E4M3), memory_space=plgpu.SMEM
        )
        specs = [values(config.tile_m, tile.m), per_row(a, config.tile_m, tile.m), values(config.tile_n, tile.n)]
        return plgpu.emit_pipeline_warp_specialized(
            body,
            grid=(a.values.shape[1] // STEP if tile.steps is None else tile.steps,),
            in_specs=specs if b.block else [*specs, per_row(b, config.tile_n, tile.n)],
            max_concurrent_steps=config.stages,
            memory_registers=40,
            wg_axis="warpgroup",
            num_compute_wgs=2,
            compute_context=context,
        )

    def references(b: Operand):
        return (a.values, a.scales, b.values) if b.block else (a.values, a.scales, b.values, b.scales)

    def in_scope(slots, staging):
        warpgroup = lax.axis_index("warpgroup")
        down, right = (warpgroup * ROWS, 0) if config.split == "m" else (0, warpgroup * config.columns)
        rows, columns = pl.ds(down, ROWS), pl.ds(right, config.columns)  # of this warpgroup in the tile

        @plgpu.nd_loop((num_tiles,), collective_axes="core")
        def _(loop):
            tile = locate(loop.index[0])
            b_group = b.group(tile.b_group)
            row, column = tile.m * config.tile_m + down, tile.n * config.tile_n + right

            def step(indices, a_values, a_scales, b_values, *rest):
                *b_scales, total = rest
                # Scales are read before the instructions are issued, so that they arrive while these run.
                scale = load(a_scales.at[0, rows], plgpu.Layout.WGMMA.reduce(1))
                if b.block:
                    block = lax.min(lax.div(column, jnp.int32(b.block)), jnp.int32(b_group.scales.shape[0] - 1))
                    b_scale = b_group.scales[block, (tile.first + indices[0]) // b.steps_per_scale]
                    scale = lax.broadcast_in_dim(scale * b_scale, shape, [0])
                else:
                    b_scale = load(b_scales[0].at[0, columns], plgpu.Layout.WGMMA.reduce(0))
                    scale = lax.broadcast_in_dim(scale, shape, [0]) * lax.broadcast_in_dim(b_scale, shape, [1])

                def multiply(accumulator):
                    plgpu.wgmma(accumulator, a_values.at[rows], b_values.at[columns].T)
                    return accumulator[...]

                partial = pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))
                plgpu.commit_smem()
                return total + partial * scale  # FP8: promotion

            def compute(run):
                total = run(plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA))
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the previous tile has left the staging area
                staging[warpgroup] = total.astype(y_ref.dtype)
                plgpu.commit_smem()
                y = y_ref if tile.y_group is None else y_ref.at[tile.y_group]
                plgpu.copy_smem_to_gmem(staging.at[warpgroup], y.at[pl.ds(row, ROWS), pl.ds(column, config.columns)])

            pipeline(b_group, tile, step, compute)(*references(b_group), allocations=slots)

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    whole = Tile(0, 0, *((0, None) if len(b.values.shape) == 3 else ()))
    pl.run_scoped(
        in_scope,
        slots=pipeline(b, whole).get_allocations(*references(b.group(whole.b_group))),
        staging=plgpu.SMEM((2, *shape), y_ref.dtype, transforms=tiled(config.columns, y_ref.dtype)),
        collective_axes="warpgroup",
    )

"""Products of groups of rows on NVIDIA Hopper, through Pallas Mosaic GPU. They were compiled and interpreted; no GPU
has run them.

    grouped_matmul             y[r] = a[r] b[g]ᵀ, g the group of row r
    grouped_weight_gradient    y[g] = x[:, group g] dy[:, group g]ᵀ

Both are the dense kernel, `product_tiles`, with other tiles. In the first each tile of the output lies in one group and
reads that group's matrix; in the second each group has its own output, whose tiles sum over that group's steps of K.

A tile past the last group, and every tile of an empty group, sums over no steps and writes zeros. Groups that may begin
within a tile are moved apart first (`layout.pad_groups`), which costs a copy of a and of y; an `alignment` that is a
multiple of 128 avoids it. Rejected: masks at group boundaries inside the kernel, which every tile would pay for.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas.grouped.layout import group_of, pad_groups, take_quantized, take_rows
from kernels_pallas.hopper import STEP, Tile, launch
from kernels_pallas.hopper_tuning import Config, choose_config
from kernels_pallas.matmul import mosaic_gpu_sm90 as dense
from kernels_pallas.matmul.accumulation import Accumulation
from kernels_pallas.matmul.mosaic_gpu_sm90 import operand, product_tiles, tile_at
from kernels_pallas.qtensor import QTensor, retile


def grouped_matmul_reason(
    a: QTensor, b: QTensor, sizes: jax.Array, alignment: int, accumulation: Accumulation, out_dtype: jnp.dtype
) -> str | None:
    return dense.reason(a, b, accumulation, out_dtype)


def grouped_matmul(
    a_RK: QTensor,
    b_GNK: QTensor,
    sizes_G: jax.Array,
    alignment: int,
    accumulation: Accumulation,
    out_dtype: jnp.dtype,
    config: Config | None = None,
) -> jax.Array:
    """Rows of group g times b[g] transposed: [R, N]; zero past the last group."""
    num_rows, (num_groups, n, k) = a_RK.shape[0], b_GNK.shape
    config = config or choose_config("fp8_grouped_matmul", pl.cdiv(num_rows, num_groups), n, k, out_dtype, num_groups)
    padding = pad_groups(sizes_G, num_rows, config.tile_m) if alignment % config.tile_m else None
    if padding is not None:
        a_RK, sizes_G = take_quantized(retile(a_RK, a_RK.tile[1]), padding.source_P), padding.sizes_G
    a, b = operand(a_RK, 8), operand(b_GNK, 64)
    shape = a.values.shape[0], b.values.shape[1]
    tiles = shape[0] // config.tile_m, pl.cdiv(shape[1], config.tile_n)
    group_J = group_of(jnp.arange(0, shape[0], config.tile_m), sizes_G)

    def body(a_values, a_scales, b_values, b_scales, group_J, y_ref):
        def locate(index):
            m, n = tile_at(index, tiles, config)
            group = group_J[m]
            steps = jnp.where(group < num_groups, a.values.shape[1] // STEP, 0)
            return Tile(m, n, b_group=lax.min(group, jnp.int32(num_groups - 1)), steps=steps)

        product_tiles(
            a.at((a_values, a_scales)), b.at((b_values, b_scales)), y_ref, config, tiles[0] * tiles[1], locate
        )

    y_PN = launch(body, shape, out_dtype, 2 * num_rows * n * k, *a.arrays, *b.arrays, group_J, ragged=True)
    return (y_PN if padding is None else take_rows(y_PN, padding.target_R))[:, :n]


def grouped_weight_gradient_reason(
    x: QTensor, dy: QTensor, sizes: jax.Array, alignment: int, accumulation: Accumulation, out_dtype: jnp.dtype
) -> str | None:
    if alignment % STEP:
        return (
            f"takes groups of multiples of {STEP} columns, not of alignment={alignment} (layout.pad_groups makes them)"
        )
    return dense.reason(x, dy, accumulation, out_dtype)


def grouped_weight_gradient(
    x_DP: QTensor,
    dy_FP: QTensor,
    sizes_G: jax.Array,
    alignment: int,
    accumulation: Accumulation,
    out_dtype: jnp.dtype,
    config: Config | None = None,
) -> jax.Array:
    """x[:, group g] times dy[:, group g] transposed: [G, D, F]; zero for an empty group. Sizes are multiples of
    `alignment`."""
    (d, p), f, num_groups = x_DP.shape, dy_FP.shape[0], sizes_G.shape[0]
    config = config or choose_config("fp8_grouped_weight_gradient", d, f, p // num_groups, out_dtype, num_groups)
    x, dy = operand(x_DP, 8), operand(dy_FP, 64)
    shape = num_groups, x.values.shape[0], dy.values.shape[0]
    tiles = pl.cdiv(shape[1], config.tile_m), pl.cdiv(shape[2], config.tile_n)
    steps_G = (sizes_G // STEP).astype(jnp.int32)
    first_G = jnp.cumsum(steps_G) - steps_G

    def body(x_values, x_scales, dy_values, dy_scales, first_G, steps_G, y_ref):
        def locate(index):
            group, index = (
                lax.div(index, jnp.int32(tiles[0] * tiles[1])),
                lax.rem(index, jnp.int32(tiles[0] * tiles[1])),
            )
            return Tile(*tile_at(index, tiles, config), y_group=group, first=first_G[group], steps=steps_G[group])

        product_tiles(
            x.at((x_values, x_scales)),
            dy.at((dy_values, dy_scales)),
            y_ref,
            config,
            num_groups * tiles[0] * tiles[1],
            locate,
        )

    return launch(body, shape, out_dtype, 2 * d * f * p, *x.arrays, *dy.arrays, first_G, steps_G, ragged=True)[
        :, :d, :f
    ]

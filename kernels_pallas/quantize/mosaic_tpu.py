"""Quantization on TPUs, through Pallas Mosaic. It was compiled and interpreted; no TPU has run it.

    scale = max(amax, min_amax) / largest,   values = clip(x / scale, ±largest), for each tile of x [R, C]

x is read once and written in eight bits. With tiles along columns, or square blocks, a step writes a lane of scales for
each of its tiles into [steps along R, steps along C, rows, tiles], and XLA arranges them as [R, T] afterwards: a step
has too few to be a block of [R, T]. With tiles along rows, the scales of a tile are a row of [T, C], transposed
afterwards, and the values are transposed in VMEM. Numbers beyond the end of a tile that is cut off count as zero.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas._compat import output
from kernels_pallas.qtensor import FORMATS, QTensor, Quantizer, retile, round_up
from kernels_pallas.quantize.reference import scale_of, swiglu
from kernels_pallas.tpu import LANES, ROWS, SUBLANES, block_of, from_column

# Of a step: numbers where tiles have one row (2 MiB in float32), tiles next to each other, and columns where tiles run
# along 128 rows.
ELEMENTS = 1 << 19
TILES = {"tile": 64, "block": 16}
COLUMNS = 512


def reason(x: jax.Array, quantizer: Quantizer) -> str | None:
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        return f"reads bfloat16 or float32, not {x.dtype}"
    if quantizer.scope == "tensor":
        return "scales tiles and blocks, not whole tensors"
    if quantizer.dtype == "e5m6":
        return "rounds to the formats of eight bits, not to e5m6"
    if 0 in x.shape:
        return f"needs arrays that are not empty, not {x.shape}"
    return None


def transposed_reason(x: jax.Array, quantizer: Quantizer) -> str | None:
    if quantizer.scope == "block":
        return "scales tiles where it transposes, not blocks"
    return reason(x, quantizer)


def requantize_reason(q: QTensor, quantizer: Quantizer) -> str | None:
    if q.tile[1] % LANES and q.tile[1] < q.shape[-1]:
        return f"takes scales for multiples of 128 columns, not tiles {q.tile}"
    return transposed_reason(jax.ShapeDtypeStruct(q.shape, jnp.float32), quantizer)


def quantize(x: jax.Array, quantizer: Quantizer) -> QTensor:
    """[..., R, C] -> QTensor [..., R, C] in tiles 1 × size or blocks size × size."""
    return quantize_rows(lambda x: x, (x,), quantizer)


def quantize_transposed(x: jax.Array, quantizer: Quantizer) -> QTensor:
    """[..., R, C] -> QTensor [..., C, R] in tiles along R."""
    return _quantize_columns((x,), LANES, quantizer)


def requantize_transposed(q: QTensor, quantizer: Quantizer) -> QTensor:
    """QTensor [..., R, C] -> QTensor [..., C, R] in tiles along R."""
    width = 256 if q.tile[1] % 256 == 0 else LANES
    q = retile(q, width)
    return _quantize_columns((q.values, q.scales), width, quantizer)


def swiglu_quantize(gate: jax.Array, up: jax.Array, quantizer: Quantizer) -> QTensor:
    """silu(gate) · up [..., R, F], rounded to the dtype of `gate`, in tiles or blocks; gate and up are read once."""
    return quantize_rows(swiglu, (gate, up), quantizer)


def swiglu_reason(gate: jax.Array, up: jax.Array, quantizer: Quantizer) -> str | None:
    return reason(gate, quantizer)


def quantize_rows(function: Callable[..., jax.Array], arrays: tuple[jax.Array, ...], quantizer: Quantizer) -> QTensor:
    """function(*arrays), elementwise on [..., R, C], quantized in tiles or blocks along C."""
    *batch, rows, columns = arrays[0].shape
    arrays, size = tuple(x.reshape(-1, rows, columns) for x in arrays), quantizer.size
    all_tiles = pl.cdiv(columns, size)
    tiles = min(all_tiles, TILES[quantizer.scope])
    height = max(ROWS, min(ELEMENTS // (tiles * size), 512, rows) // ROWS * ROWS) if quantizer.scope == "tile" else size
    scale_rows = height if quantizer.scope == "tile" else 1
    grid = (arrays[0].shape[0], pl.cdiv(rows, height), pl.cdiv(all_tiles, tiles))
    block = pl.BlockSpec((None, height, tiles * size), lambda b, i, j: (b, i, j))
    values, scales = pl.pallas_call(
        functools.partial(_rows_kernel, function=function, quantizer=quantizer, shape=(rows, columns)),
        out_shape=(
            output(arrays[0].shape, FORMATS[quantizer.dtype][1], *arrays),
            output((*grid, scale_rows, tiles), jnp.float32, *arrays),
        ),
        grid=grid,
        in_specs=[block] * len(arrays),
        out_specs=(block, pl.BlockSpec((None, None, None, scale_rows, tiles), lambda b, i, j: (b, i, j, 0, 0))),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 3),
        name="quantize",
    )(*arrays)
    scales = scales.swapaxes(2, 3).reshape(*batch, grid[1] * scale_rows, grid[2] * tiles)
    tile = quantizer.tile((rows, columns))
    return QTensor(values.reshape(*batch, rows, columns), scales[..., : pl.cdiv(rows, tile[0]), :all_tiles], tile)


def _rows_kernel(*refs, function, quantizer, shape):
    *x_refs, values_ref, scales_ref = refs
    size, axes = quantizer.size, 1 if quantizer.scope == "tile" else (0, 1)
    scales = jnp.zeros(scales_ref.shape, jnp.float32)
    lane = jax.lax.broadcasted_iota(jnp.int32, scales.shape, 1)
    for t in range(scales.shape[1]):
        columns = slice(t * size, (t + 1) * size)
        x = function(*(ref[:, columns] for ref in x_refs)).astype(jnp.float32)
        if shape[1] % size:
            x = _zero_beyond(x, 1, pl.program_id(2) * x_refs[0].shape[1] + t * size, shape[1])
        if quantizer.scope == "block" and shape[0] % size:
            x = _zero_beyond(x, 0, pl.program_id(1) * size, shape[0])
        values, scale = _quantized(x, axes, quantizer)
        values_ref[:, columns] = values.astype(values_ref.dtype)
        scales = jnp.where(lane == t, scale, scales)
    scales_ref[...] = scales


def _quantize_columns(arrays: tuple[jax.Array, ...], width: int, quantizer: Quantizer) -> QTensor:
    """Quantizes an array [..., R, C], or values with a scale for `width` columns each, -> QTensor [..., C, R]."""
    *batch, rows, columns = arrays[0].shape
    arrays, size = tuple(x.reshape(-1, *x.shape[-2:]) for x in arrays), quantizer.size
    tiles = min(pl.cdiv(rows, size), SUBLANES)
    height, columns_at_once = tiles * size, min(max(COLUMNS * LANES // size, width), round_up(columns, width))
    grid = (arrays[0].shape[0], pl.cdiv(rows, height), pl.cdiv(columns, columns_at_once))
    values, scales = pl.pallas_call(
        functools.partial(_columns_kernel, width=width, quantizer=quantizer, rows=rows),
        out_shape=(
            output((grid[0], columns, rows), FORMATS[quantizer.dtype][1], *arrays),
            output((grid[0], pl.cdiv(rows, size), columns), jnp.float32, *arrays),
        ),
        grid=grid,
        in_specs=[
            pl.BlockSpec((None, height, columns_at_once), lambda b, i, j: (b, i, j)),
            pl.BlockSpec(
                (None, height, LANES), lambda b, i, j: (b, i, block_of(j * (columns_at_once // width), LANES))
            ),
        ][: len(arrays)],
        out_specs=(
            pl.BlockSpec((None, columns_at_once, height), lambda b, i, j: (b, j, i)),
            pl.BlockSpec((None, tiles, columns_at_once), lambda b, i, j: (b, i, j)),
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 3),
        name="quantize_transposed",
    )(*arrays)
    return QTensor(values.reshape(*batch, columns, rows), scales.mT.reshape(*batch, columns, -1), (1, size))


def _columns_kernel(x_ref, *refs, width, quantizer, rows):
    *x_scales_ref, values_ref, scales_ref = refs
    size, strips = quantizer.size, x_ref.shape[1] // width
    x_scales = from_column(x_scales_ref[0], pl.program_id(2) * strips) if x_scales_ref else None
    for t in range(scales_ref.shape[0]):
        in_tile = slice(t * size, (t + 1) * size)
        for strip in range(strips):
            columns = slice(strip * width, (strip + 1) * width)
            x = x_ref[in_tile, columns].astype(jnp.float32)
            if x_scales is not None:
                x *= x_scales[in_tile, strip : strip + 1]
            if rows % size:
                x = _zero_beyond(x, 0, pl.program_id(1) * x_ref.shape[0] + t * size, rows)
            values, scale = _quantized(x, 0, quantizer)
            values_ref[columns, in_tile] = values.T.astype(values_ref.dtype)
            scales_ref[t : t + 1, columns] = scale


def _quantized(x: jax.Array, axes: int | tuple[int, ...], quantizer: Quantizer) -> tuple[jax.Array, jax.Array]:
    """The values of a tile in float32, and its scale. Magnitudes are compared as integers, which order alike, with NaN
    above infinity."""
    largest = FORMATS[quantizer.dtype][0]
    amax = jnp.max(jax.lax.bitcast_convert_type(jnp.abs(x), jnp.int32), axis=axes, keepdims=True)
    scale = scale_of(jax.lax.bitcast_convert_type(amax, jnp.float32), quantizer)
    return jnp.clip(x / scale, -largest, largest), scale


def _zero_beyond(x: jax.Array, axis: int, start: jax.Array, end: int) -> jax.Array:
    return jnp.where(start + jax.lax.broadcasted_iota(jnp.int32, x.shape, axis) < end, x, 0)

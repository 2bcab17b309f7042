"""Quantization on NVIDIA Hopper, through Pallas Mosaic GPU. It was compiled and interpreted; no GPU has run it.

    scale = max(amax of the tile, min_amax) / 448          values = clip(x / scale, ±448) in E4M3

A block of threads, one warpgroup, makes 64 rows of 1 × 128 tiles or one 128 × 128 block: it copies its numbers into
shared memory, reduces them in registers, and copies the results out. It needs no pipeline: several blocks of threads
share a core, and while one waits the others work. Tiles along rows differ only in how shared memory is read, across
rather than along (ldmatrix.trans for bfloat16), so that nothing is transposed in memory.

Scales are written as [C/128, R], as the products read them, and the QTensor shows the transpose. The scale of a block
is written 64 times, because one number is too small for a copy, and read once. R must be a multiple of 8 (64 for a
transpose) and C of the tile: else they are padded first, at the cost of a copy. Division on the GPU is `div.full`, off
by up to two units in the last place, so that a number close to the middle between two of E4M3 may be rounded either
way. Scales that are powers of two are made from bits; they and their quotients are exact.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas._compat import load, output, plgpu, vary_alike
from kernels_pallas.hopper import ROWS, STEP, pad, tiled, unavailable
from kernels_pallas.qtensor import E4M3, FORMATS, QTensor, Quantizer, retile
from kernels_pallas.quantize.reference import swiglu

LARGEST, DTYPE = FORMATS[E4M3]
FRACTION = 0x7FFFFF  # of a float32's bits


def reason(x: jax.Array, quantizer: Quantizer) -> str | None:
    if missing := unavailable():
        return missing
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        return f"quantizes bfloat16 or float32, not {x.dtype}"
    if quantizer.dtype != E4M3:
        return f"makes {E4M3}, not {quantizer.dtype}"
    if quantizer.scope == "tensor":
        return 'takes the scopes "tile" and "block", not "tensor"'
    if quantizer.scope == "block" and quantizer.size > STEP:
        return f"makes blocks of {STEP}, not of {quantizer.size}, which do not fit its registers"
    if 0 in x.shape:
        return f"needs arrays that are not empty, not {x.shape}"
    return None


def requantize_reason(q: QTensor, quantizer: Quantizer) -> str | None:
    if q.values.dtype != jnp.dtype(E4M3):
        return f"requantizes {E4M3}, not {q.values.dtype}"
    if q.tile[1] < q.shape[-1] and q.tile[1] % STEP:
        return f"takes scales for multiples of {STEP} columns, not tiles {q.tile}"
    return reason(jax.ShapeDtypeStruct(q.shape, jnp.bfloat16), quantizer)


def quantize(x: jax.Array, quantizer: Quantizer) -> QTensor:
    """[..., R, C] -> QTensor of the same shape."""
    if x.ndim > 2:
        return jax.vmap(lambda x: quantize(x, quantizer))(x)
    return quantized_tiles(load_strip, [(along, x)], x.shape, quantizer)


def quantize_transposed(x: jax.Array, quantizer: Quantizer) -> QTensor:
    """[..., R, C] -> QTensor [..., C, R]."""
    if x.ndim > 2:
        return jax.vmap(lambda x: quantize_transposed(x, quantizer))(x)
    return quantized_tiles(load_strip_across, [(across, x)], x.shape[::-1], quantizer)


def requantize_transposed(q: QTensor, quantizer: Quantizer) -> QTensor:
    """QTensor [..., R, C] -> QTensor [..., C, R]."""
    if len(q.shape) > 2:
        return jax.vmap(lambda q: requantize_transposed(q, quantizer))(q)
    q = retile(q, STEP)
    return quantized_tiles(
        load_scaled_strip_across, [(across, q.values), (scales_across, q.scales.T)], q.shape[::-1], quantizer
    )


def along(i, j, height, width):
    """The start and the shape of the block of [R, C] that tile (i, j) is made of."""
    return (i * height, j * width), (height, width)


def across(i, j, height, width):
    """The start and the shape of that block in [C, R]."""
    return (j * width, i * height), (width, height)


def scales_across(i, j, height, width):
    """The start and the shape of its scales in [R/128, C]."""
    return (i * height // STEP, j * width), (1, width)


def load_strip(rows, x) -> jax.Array:
    return load(x.at[rows], plgpu.Layout.WGMMA).astype(jnp.float32)


def load_strip_across(rows, x) -> jax.Array:
    """Loads rows from a transposed block. 8-bit numbers are widened before they change places between threads."""
    layout = plgpu.Layout.WGMMA if x.dtype.itemsize > 1 else plgpu.Layout.WGMMA_TRANSPOSED
    return plgpu.layout_cast(load(x.at[:, rows].T, layout, optimized=False).astype(jnp.float32), plgpu.Layout.WGMMA)


def load_scaled_strip_across(rows, values, scales) -> jax.Array:
    scale = load(scales.at[0], plgpu.Layout.WGMMA.reduce(0))
    x = load_strip_across(rows, values)
    return x * lax.broadcast_in_dim(scale, x.shape, [1])


def swiglu_reason(gate: jax.Array, up: jax.Array, quantizer: Quantizer) -> str | None:
    return reason(gate, quantizer)


def swiglu_quantize(gate: jax.Array, up: jax.Array, quantizer: Quantizer) -> QTensor:
    """silu(gate) · up of arrays [..., R, F], in float32, rounded to the dtype of `gate` and quantized: QTensor [..., R,
    F].

    It reads gate and up once and writes one byte for each number. The exponential is that of the GPU, so the rounded
    product may differ from the reference's by one unit in the last place.
    """
    if gate.ndim > 2:
        return jax.vmap(lambda gate, up: swiglu_quantize(gate, up, quantizer))(gate, up)

    def strip(rows, gate_slot, up_slot):
        return swiglu(load_strip(rows, gate_slot), load_strip(rows, up_slot)).astype(gate.dtype).astype(jnp.float32)

    return quantized_tiles(strip, [(along, gate), (along, up)], gate.shape, quantizer, approx_math=True)


def quantized_tiles(
    strip: Callable,
    sources: list[tuple[Callable, jax.Array]],
    shape: tuple[int, int],
    quantizer: Quantizer,
    approx_math: bool = False,
) -> QTensor:
    """Quantizes the numbers that strip(rows, *references to shared memory) returns, float32 [64, size], 64 rows of a
    tile at a time.

    Each of `sources` is a function and an array: function(i, j, height, width) is the start and the shape of the
    array's block for tile (i, j).
    """
    rows, columns = shape
    size = quantizer.size
    height = ROWS if quantizer.scope == "tile" else size
    strips = [pl.ds(start, ROWS) for start in range(0, height, ROWS)]
    padded = tuple(
        -(-length // multiple) * multiple
        for length, multiple in zip(shape, (64 if sources[0][0] is across else 8, size), strict=True)
    )
    grid = pl.cdiv(padded[0], height), padded[1] // size
    arrays = [_whole(array, at(0, 0, *padded)[1]) for at, array in sources]

    def body(*refs):
        *source_refs, values_ref, scales_ref = refs
        i, j = lax.axis_index("row"), lax.axis_index("column")

        def in_scope(slots, values, scales, arrived):
            for (at, _), source_ref, slot in zip(sources, source_refs, slots, strict=True):
                start, block = at(i, j, height, size)
                plgpu.copy_gmem_to_smem(source_ref.at[tuple(map(pl.ds, start, block))], slot, arrived)
            plgpu.barrier_wait(arrived)
            amax = _amax([strip(rows, *slots) for rows in strips], per_row=quantizer.scope == "tile")
            scale = scale_of(amax, quantizer)
            spread = lambda s: lax.broadcast_in_dim(s, (ROWS, size), [0])
            for rows in strips:
                x = strip(rows, *slots)
                x = x * spread(inverse_of(scale)) if quantizer.power_of_two else x / spread(scale)
                values[rows] = jnp.clip(x, -LARGEST, LARGEST).astype(DTYPE)
            scales[0] = scale
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(values, values_ref.at[pl.ds(i * height, height), pl.ds(j * size, size)])
            plgpu.copy_smem_to_gmem(scales, scales_ref.at[pl.ds(j, 1), pl.ds(i * ROWS, ROWS)])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        blocks = [at(0, 0, height, size)[1] for at, _ in sources]
        pl.run_scoped(
            in_scope,
            slots=[
                plgpu.SMEM(b, a.dtype, transforms=tiled(b[1], a.dtype) if b[0] > 1 else ())
                for b, a in zip(blocks, arrays, strict=True)
            ],
            values=plgpu.SMEM((height, size), DTYPE, transforms=tiled(size, DTYPE)),
            scales=plgpu.SMEM((1, ROWS), jnp.float32),
            arrived=plgpu.Barrier(num_arrivals=len(sources)),
        )

    scales_shape = grid[1], padded[0] if quantizer.scope == "tile" else grid[0] * ROWS
    kernel = plgpu.kernel(
        body,
        out_type=[output(padded, DTYPE, *arrays), output(scales_shape, jnp.float32, *arrays)],
        grid=grid,
        grid_names=("row", "column"),
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup, reduction_scratch_bytes=2048, approx_math=approx_math
        ),
    )
    # jax 0.10 forgets along which mesh axes the outputs differ
    values, scales = vary_alike(kernel(*arrays), *arrays)[0]
    scales = scales.mT[:rows] if quantizer.scope == "tile" else scales.mT[::ROWS]
    return QTensor(values[:rows, :columns], scales, quantizer.tile(shape))


def _whole(x: jax.Array, shape: tuple[int, int]) -> jax.Array:
    return pad(x, max(shape[0] - x.shape[0], 0), max(shape[1] - x.shape[1], 0))


def _amax(strips: list[jax.Array], per_row: bool) -> jax.Array:
    """The largest magnitude of each row of the only strip, or of all strips, 64 times. Magnitudes are compared as
    integers, which order alike, with NaN above infinity."""
    magnitudes = [lax.bitcast_convert_type(jnp.abs(strip), jnp.int32) for strip in strips]
    amax = jnp.max(functools.reduce(jnp.maximum, magnitudes), axis=1)
    if not per_row:
        amax = plgpu.layout_cast(lax.broadcast_in_dim(jnp.max(amax), (ROWS,), []), plgpu.Layout.WGMMA.reduce(1))
    return lax.bitcast_convert_type(amax, jnp.float32)


def scale_of(amax: jax.Array, quantizer: Quantizer) -> jax.Array:
    """The scales of tiles with these largest magnitudes. Rounded up to a power of two, amax / 448 is 2^(e - 8), or
    2^(e - 7) if amax exceeds 1.75 · 2^e, because 448 is 1.75 · 2^8."""
    amax = jnp.maximum(amax, quantizer.min_amax)
    if not quantizer.power_of_two:
        return amax * (1 / LARGEST)
    bits = lax.bitcast_convert_type(amax, jnp.int32)
    rounded = ((bits + (FRACTION - 0x600000)) & ~FRACTION) - (8 << 23)
    return jnp.where(amax < jnp.inf, lax.bitcast_convert_type(rounded, jnp.float32), amax)


def inverse_of(power_of_two: jax.Array) -> jax.Array:
    """1 / scale, exactly: the exponent with the opposite sign."""
    inverse = lax.bitcast_convert_type((254 << 23) - lax.bitcast_convert_type(power_of_two, jnp.int32), jnp.float32)
    return jnp.where(power_of_two < jnp.inf, inverse, 1 / power_of_two)

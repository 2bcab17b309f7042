"""Scales and quantized values by their definition, in plain jnp. Source: V3 §3.3.2 and the released quantizer
(`inference/kernel.py`)."""

import math

import jax
import jax.numpy as jnp

from kernels_pallas.qtensor import FORMATS, QTensor, Quantizer


def quantize(x: jax.Array, quantizer: Quantizer, part: tuple[int, int] | None = None) -> QTensor:
    """[..., R, C] -> QTensor of the same shape; scale = max(amax, min_amax) / (largest magnitude of the format), values
    clipped before the cast.

    A NaN or an infinity in a tile makes the whole tile NaN. Where x is divided among devices in parts of rows × columns
    = `part`, which need not be whole tiles, all that has to leave a device is the largest magnitudes of the pieces of
    tiles.
    """
    x, tile = x.astype(jnp.float32), quantizer.tile(x.shape)
    largest, dtype = FORMATS[quantizer.format]
    piece = tile if part is None else (math.gcd(tile[0], part[0]), math.gcd(tile[1], part[1]))
    scales = scale_of(_amax(_amax(x, piece), (tile[0] // piece[0], tile[1] // piece[1])), quantizer)
    scaled = jnp.clip(x / spread(scales, tile, x.shape), -largest, largest)  # the cast itself overflows to NaN
    if quantizer.format == "e5m6":
        scaled = jax.lax.reduce_precision(scaled, exponent_bits=5, mantissa_bits=6)
    return QTensor(scaled.astype(dtype), scales, tile)


def scale_of(amax: jax.Array, quantizer: Quantizer) -> jax.Array:
    """float32 scales of tiles whose largest magnitudes are `amax`."""
    # what XLA makes of a division; so it is the same everywhere
    scale = jnp.maximum(amax, quantizer.min_amax) * (1 / FORMATS[quantizer.format][0])
    if not quantizer.power_of_two:
        return scale
    mantissa, exponent = jnp.frexp(scale)  # mantissa in [0.5, 1): exact, which exp2 and log2 are not
    rounded = jnp.ldexp(jnp.ones_like(scale), jnp.where(mantissa == 0.5, exponent - 1, exponent))
    return jnp.where(jnp.isfinite(scale), rounded, scale)


def dequantize(q: QTensor, dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """values · scales, [..., R, C]."""
    return (q.values.astype(jnp.float32) * spread(q.scales, q.tile, q.shape)).astype(dtype)


def requantize_transposed(q: QTensor, quantizer: Quantizer) -> QTensor:
    """[..., R, C] -> QTensor [..., C, R]: the same numbers scaled along the other axis, as the weight gradient's
    product needs them."""
    return quantize(dequantize(q).mT, quantizer)


def spread(scales: jax.Array, tile: tuple[int, int], shape: tuple[int, ...]) -> jax.Array:
    """Each tile's scale at each of its numbers: [..., R, C]."""
    for axis, size in ((-2, tile[0]), (-1, tile[1])):
        scales = jnp.repeat(scales, size, axis=axis) if size > 1 else scales
    return scales[..., : shape[-2], : shape[-1]]


def retile(q: QTensor, size: int) -> QTensor:
    """The same numbers with a scale for each row and `size` columns, which divide the tiles there are unless one covers
    all columns."""
    parts, shape = (q.tile[0], -(-q.tile[1] // size)), (*q.shape[:-1], -(-q.shape[-1] // size))
    return q if q.tile == (1, size) else QTensor(q.values, spread(q.scales, parts, shape), (1, size))


def _amax(x: jax.Array, tile: tuple[int, int]) -> jax.Array:
    """The largest magnitude in each tile, NaN if there is one. Compared as integers, which order alike: XLA's maximum
    loses a NaN now and then on CPU."""
    bits = jax.lax.bitcast_convert_type(jnp.abs(x), jnp.int32)
    return jax.lax.bitcast_convert_type(jnp.max(tiles(bits, tile), axis=(-3, -1)), jnp.float32)


def tiles(x: jax.Array, tile: tuple[int, int]) -> jax.Array:
    """[..., R, C] -> [..., R/r, r, C/c, c], padded with zeros."""
    rows, columns = (-size % part for size, part in zip(x.shape[-2:], tile, strict=True))
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, rows), (0, columns)])
    return x.reshape(*x.shape[:-2], x.shape[-2] // tile[0], tile[0], x.shape[-1] // tile[1], tile[1])

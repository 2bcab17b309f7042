"""Quantization by its definition, in plain jnp. Devices without a kernel run it too.

Source: V3 §3.3.2 and the released quantizer (`inference/kernel.py`).
"""

import math

import jax
import jax.numpy as jnp

from kernels_pallas.qtensor import FORMATS, QTensor, Quantizer, dequantize, spread, tiles


def quantize(x: jax.Array, quantizer: Quantizer, local_shape: tuple[int, int] | None = None) -> QTensor:
    """[..., R, C] -> QTensor of the same shape, with a scale for each tile of it (V3 §3.3.2).

    Values are clipped before the cast. A NaN or an infinity in a tile makes the whole tile NaN. If x is divided among
    devices that hold `local_shape` rows and columns each, a device sends no more than the largest magnitudes of its
    pieces of tiles; the pieces need not be whole tiles.
    """
    x, tile = x.astype(jnp.float32), quantizer.tile(x.shape)
    largest, dtype = FORMATS[quantizer.dtype]
    piece = tile if local_shape is None else (math.gcd(tile[0], local_shape[0]), math.gcd(tile[1], local_shape[1]))
    amax = _amax(_amax(x, piece), (tile[0] // piece[0], tile[1] // piece[1]))
    scales = scale_of(amax, quantizer)
    scaled = jnp.clip(x / spread(scales, tile, x.shape), -largest, largest)  # the cast itself overflows to NaN
    if quantizer.dtype == "e5m6":
        scaled = jax.lax.reduce_precision(scaled, exponent_bits=5, mantissa_bits=6)
    return QTensor(scaled.astype(dtype), scales, tile)


def scale_of(amax: jax.Array, quantizer: Quantizer) -> jax.Array:
    """float32 scales, max(amax, min_amax) / (largest magnitude of the format), of tiles whose largest magnitudes are
    `amax`."""
    # XLA turns a division by a constant into this product; written out, it is the same everywhere.
    scale = jnp.maximum(amax, quantizer.min_amax) * (1 / FORMATS[quantizer.dtype][0])
    if not quantizer.power_of_two:
        return scale
    mantissa, exponent = jnp.frexp(scale)  # mantissa in [0.5, 1): exact, which exp2 and log2 are not
    rounded = jnp.ldexp(jnp.ones_like(scale), jnp.where(mantissa == 0.5, exponent - 1, exponent))
    return jnp.where(jnp.isfinite(scale), rounded, scale)


def requantize_transposed(q: QTensor, quantizer: Quantizer) -> QTensor:
    """QTensor [..., R, C] -> QTensor [..., C, R]: the same numbers scaled along the other axis, for the product that is
    the weight gradient."""
    return quantize(dequantize(q).mT, quantizer)


def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """silu(gate) · up, computed in float32, in the dtype of `gate`."""
    return (jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)).astype(gate.dtype)


def swiglu_quantize(gate: jax.Array, up: jax.Array, quantizer: Quantizer) -> QTensor:
    """silu(gate) · up, rounded to the dtype of `gate` and quantized: [..., R, F]."""
    return quantize(swiglu(gate, up), quantizer)


def _amax(x: jax.Array, tile: tuple[int, int]) -> jax.Array:
    """The largest magnitude in each tile, or NaN if the tile has one. Magnitudes are compared as integers, which order
    alike: XLA's maximum loses a NaN now and then on CPU."""
    bits = jax.lax.bitcast_convert_type(jnp.abs(x), jnp.int32)
    return jax.lax.bitcast_convert_type(jnp.max(tiles(bits, tile), axis=(-3, -1)), jnp.float32)

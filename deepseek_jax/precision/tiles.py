"""1 x 128 tiles in E4M3 (V3 §3.3.2): one scale for 128 neighbouring numbers of the last axis."""

import jax
import jax.numpy as jnp

TILE = 128
E4M3_MAX = 448.0


def quantise_tiles(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[..., D] -> E4M3 values [..., D] and float32 scales [..., D/128]; D below 128 is one tile, else a multiple of 128.

    The scale is the power of two at or above max(amax, 1e-4) / 448, as V3 sends activations between devices (§3.3.3).
    """
    tile = min(TILE, x.shape[-1])
    tiles = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, tile)
    amax = jnp.maximum(jnp.max(jnp.abs(tiles), axis=-1), 1e-4)
    mantissa, exponent = jnp.frexp(amax / E4M3_MAX)  # in [0.5, 1): exact, which exp2 and log2 are not
    scales = jnp.ldexp(jnp.ones_like(amax), jnp.where(mantissa == 0.5, exponent - 1, exponent))
    values = jnp.clip(tiles / scales[..., None], -E4M3_MAX, E4M3_MAX).astype(jnp.float8_e4m3fn)  # the cast itself overflows to NaN
    return values.reshape(x.shape), scales


def dequantise_tiles(values: jax.Array, scales: jax.Array, dtype: jnp.dtype) -> jax.Array:
    tiles = values.astype(jnp.float32).reshape(*scales.shape, -1) * scales[..., None]
    return tiles.reshape(values.shape).astype(dtype)

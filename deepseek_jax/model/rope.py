"""Rotary position embedding and YaRN context extension."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.model.config import RopeConfig, YarnConfig


def yarn_mscale(factor: float, mscale: float) -> float:
    """0.1 · mscale · ln(factor) + 1: YaRN's √t (V3 §4.3: 1.368888 for factor 40, mscale 1)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0  # YaRN: temperature


def yarn_correction_range(yarn: YarnConfig, dim: int, theta: float) -> tuple[int, int]:
    """The dimension pairs between which YaRN goes from keeping a frequency to dividing it by `factor`."""

    def pair_with_rotations(rotations: float) -> float:
        angle = rotations * 2 * math.pi
        return dim * math.log(yarn.original_max_position_embeddings / angle) / (2 * math.log(theta))  # YaRN: range

    low = math.floor(pair_with_rotations(yarn.beta_fast))
    high = math.ceil(pair_with_rotations(yarn.beta_slow))
    return max(low, 0), min(high, dim - 1)


def inverse_frequencies(rope: RopeConfig, dim: int) -> np.ndarray:
    """Angular frequency of each of the dim/2 pairs, float64 [dim/2]; YaRN-interpolated where the config says so."""
    frequencies = rope.theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
    if rope.yarn is None:
        return frequencies
    low, high = yarn_correction_range(rope.yarn, dim, rope.theta)
    width = high - low if high > low else 0.001  # a step instead of a ramp, as in the released code
    ramp = np.clip((np.arange(dim // 2) - low) / width, 0.0, 1.0)  # YaRN: ramp
    return frequencies * (1.0 - ramp) + frequencies / rope.yarn.factor * ramp  # YaRN: frequencies


def softmax_scale(rope: RopeConfig, qk_head_dim: int) -> float:
    """1/√(qk_head_dim), times YaRN's mscale² where `mscale_all_dim` is set."""
    scale = qk_head_dim**-0.5
    if rope.yarn is not None and rope.yarn.mscale_all_dim:
        scale *= yarn_mscale(rope.yarn.factor, rope.yarn.mscale_all_dim) ** 2
    return scale


def rotary_angles(rope: RopeConfig, dim: int, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin, float32 [..., dim/2], for integer positions [...]; scaled by mscale / mscale_all_dim under YaRN."""
    magnitude = 1.0
    if rope.yarn is not None:
        yarn = rope.yarn
        magnitude = yarn_mscale(yarn.factor, yarn.mscale) / yarn_mscale(yarn.factor, yarn.mscale_all_dim)
    angles = positions[..., None].astype(jnp.float32) * jnp.asarray(inverse_frequencies(rope, dim), jnp.float32)
    return jnp.cos(angles) * magnitude, jnp.sin(angles) * magnitude


def apply_rotary(x: jax.Array, cos: jax.Array, sin: jax.Array, interleaved: bool) -> jax.Array:
    """Rotates pairs of the last axis by the angles of the token's position.

    x [..., dim]; cos, sin broadcast against [..., dim/2]. Pairs are (0, 1), (2, 3), … when interleaved, else (i, i +
    dim/2).
    """
    x32 = x.astype(jnp.float32)
    if interleaved:
        first, second = x32[..., 0::2], x32[..., 1::2]
    else:
        first, second = jnp.split(x32, 2, axis=-1)
    rotated = (first * cos - second * sin, second * cos + first * sin)
    out = jnp.stack(rotated, axis=-1).reshape(x.shape) if interleaved else jnp.concatenate(rotated, axis=-1)
    return out.astype(x.dtype)

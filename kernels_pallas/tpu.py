"""Parts that the kernels for TPUs share."""

import jax
from jax.experimental.pallas import tpu as pltpu

LANES, SUBLANES = 128, 8  # of a float32 register: blocks end at multiples of them, or where the array ends
ROWS = 32  # rows of 8-bit numbers in one tile of VMEM


def block_of(index: jax.Array, size: int) -> jax.Array:
    """index // size for index ≥ 0. The division for any index depends on the chip, which is known only inside a
    `shard_map`."""
    return jax.lax.div(index, size)


def from_column(scales_ref, first: jax.Array) -> jax.Array:
    """A block [R, 128] of scales, rotated so that column `first` % 128 comes first: the index of a column must be known
    when the kernel is compiled."""
    return pltpu.roll(scales_ref[...], -first & (LANES - 1), axis=1)

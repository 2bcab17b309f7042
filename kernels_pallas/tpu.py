"""What the kernels for TPUs have in common."""

import jax
from jax.experimental.pallas import tpu as pltpu

LANES, SUBLANES = 128, 8  # of a float32 register: blocks end at multiples of them, or with the array
ROWS = 32  # of numbers of eight bits in one tile of VMEM


def block_of(index: jax.Array, size: int) -> jax.Array:
    """index // size for index ≥ 0: for any index, compiling would have to know the chip, which it does in a `shard_map`
    only."""
    return jax.lax.div(index, size)


def from_column(scales_ref, first: jax.Array) -> jax.Array:
    """A block [R, 128] of scales turned so that column `first` % 128 is the first: where to find a column must be known
    when compiling."""
    return pltpu.roll(scales_ref[...], -first & (LANES - 1), axis=1)

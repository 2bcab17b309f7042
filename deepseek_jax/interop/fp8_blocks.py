"""Released FP8 weights: e4m3 values with one float32 scale for each block of 128 x 128 (V3 §3.3.2).

A matrix [out, in] comes with `<name>_scale_inv` [ceil(out/128), ceil(in/128)]; the weight is value · scale_inv. Blocks
at the lower and right edge may be smaller than 128.
"""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from kernels_pallas import QTensor, quantize_block

BLOCK = 128
# Looking a byte up is several times faster than converting it.
_VALUES = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)


def scale_shape(shape: tuple[int, int]) -> tuple[int, int]:
    """Shape of the scales of a matrix [out, in]; for instance 576 x 7168 -> 5 x 56."""
    return -(-shape[0] // BLOCK), -(-shape[1] // BLOCK)


def dequantize_rows(
    values: np.ndarray, scale_inv: np.ndarray, corner: tuple[int, int] = (0, 0)
) -> Iterator[tuple[slice, np.ndarray]]:
    """values e4m3 [rows, columns] -> (rows, float32 [at most 128, columns]), one row of blocks at a time.

    `corner` is where the values start in their matrix; scale_inv, float32, has the scales of the blocks that they
    touch.
    """
    columns = (corner[1] % BLOCK + np.arange(values.shape[1])) // BLOCK
    start = -(corner[0] % BLOCK)
    for scales in scale_inv:
        rows = slice(max(start, 0), min(start + BLOCK, values.shape[0]))
        yield rows, _VALUES[values[rows].view(np.uint8)] * scales[columns]
        start += BLOCK


@functools.partial(jax.jit, static_argnames="power_of_two")
def _quantize(w: jax.Array, power_of_two: bool) -> QTensor:
    return quantize_block(w, power_of_two=power_of_two, implementation="xla")


def quantize(w: np.ndarray, power_of_two: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """w [out, in] -> values e4m3 [out, in], scale_inv float32 [ceil(out/128), ceil(in/128)], as training quantizes
    weights (`kernels_pallas.quantize_block`): scale_inv = max(max|block|, 1e-4) / 448, rounded up to a power of two
    with `power_of_two`.

    A block with a NaN or an infinity becomes NaN.
    """
    q = _quantize(jnp.asarray(w), power_of_two)
    return np.asarray(q.values), np.asarray(q.scales)

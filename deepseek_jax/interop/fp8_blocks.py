"""The released FP8 weights: e4m3 values with one float32 scale for each block of 128 x 128 (V3 §3.3.2).

A matrix [out, in] comes with `<name>_scale_inv` [ceil(out/128), ceil(in/128)]; the weight is value · scale_inv. Blocks at
the lower and right edge may be smaller than 128.
"""

from collections.abc import Iterator

import ml_dtypes
import numpy as np

BLOCK = 128
_FP8 = ml_dtypes.float8_e4m3fn
_FP8_MAX = float(ml_dtypes.finfo(_FP8).max)  # 448
# Looking a byte up is several times faster than converting it.
_VALUES = np.arange(256, dtype=np.uint8).view(_FP8).astype(np.float32)


def scale_shape(shape: tuple[int, int]) -> tuple[int, int]:
    """Shape of the scales of a matrix [out, in]; for instance 576 x 7168 -> 5 x 56."""
    return -(-shape[0] // BLOCK), -(-shape[1] // BLOCK)


def dequantise_rows(values: np.ndarray, scale_inv: np.ndarray, corner: tuple[int, int] = (0, 0)) -> Iterator[tuple[slice, np.ndarray]]:
    """values e4m3 [rows, columns] -> (rows, float32 [at most 128, columns]), one row of blocks at a time.

    `corner` is where the values start in their matrix; scale_inv, float32, has the scales of the blocks that they touch.
    """
    columns = (corner[1] % BLOCK + np.arange(values.shape[1])) // BLOCK
    start = -(corner[0] % BLOCK)
    for scales in scale_inv:
        rows = slice(max(start, 0), min(start + BLOCK, values.shape[0]))
        yield rows, _VALUES[values[rows].view(np.uint8)] * scales[columns]
        start += BLOCK


def quantise(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """w [out, in] -> values e4m3 [out, in], scale_inv float32 [ceil(out/128), ceil(in/128)], with scale_inv = max|block| / 448.

    Relative error of an element at most 2^-4 (three mantissa bits) unless it is below the block's subnormal range.
    A block of zeros gets scale 1.
    """
    values = np.empty(w.shape, _FP8)
    scale_inv = np.ones(scale_shape(w.shape), np.float32)
    columns = np.arange(w.shape[1]) // BLOCK
    starts = np.arange(0, w.shape[1], BLOCK)
    for block_row in range(scale_inv.shape[0]):
        rows = slice(block_row * BLOCK, (block_row + 1) * BLOCK)
        w_rows = w[rows].astype(np.float32)
        largest = np.maximum.reduceat(np.abs(w_rows).max(axis=0), starts)
        scale_inv[block_row] = np.where(largest > 0, largest / _FP8_MAX, 1.0)
        values[rows] = np.clip(w_rows / scale_inv[block_row][columns], -_FP8_MAX, _FP8_MAX).astype(_FP8)
    return values, scale_inv

"""Reads any rectangular slice of one of our variables, and of the stored tensors only the bytes that it needs.

A slice is one range (step 1) for each axis of the variable; layers and experts are leading axes.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import ml_dtypes
import numpy as np

from deepseek_jax.interop.fp8_blocks import BLOCK, dequantize_rows
from deepseek_jax.interop.safetensors_io import StoredTensor, read_tensor
from deepseek_jax.interop.tensors import TensorSpec

Slice = tuple[range, ...]


def slice_of(index: Sequence[slice], shape: Sequence[int]) -> Slice:
    """The ranges of `index`, whose slices have step 1, as shardings give them."""
    return tuple(range(*axis.indices(size)) for axis, size in zip(index, shape, strict=True))


def whole(shape: Sequence[int]) -> Slice:
    return tuple(map(range, shape))


def overlaps(spec: TensorSpec, ranges: Slice) -> bool:
    """True if the slice of the variable holds the layer and expert that the stored tensor is of."""
    return all(i in axis for i, axis in zip(spec.index, ranges, strict=False))


def fill(spec: TensorSpec, stored: Mapping[str, StoredTensor], ranges: Slice, target: np.ndarray) -> Counter[str]:
    """Reads what a stored tensor holds of the slice `ranges` and writes it, converted, into `target`.

    The tensor must overlap the slice. `target` has the slice's shape and the variable's dtype. Returns, by name of the
    stored tensor, how many numbers are unusable: NaN, infinite once they are converted, or a scale that is not above 0.
    """
    section = target[tuple(i - axis.start for i, axis in zip(spec.index, ranges, strict=False))]
    within = ranges[len(spec.index) :]
    if spec.transposed:
        section, within = section.T, within[::-1]  # a view in the stored orientation
    bad: Counter[str] = Counter()
    with np.errstate(invalid="ignore", over="ignore"):  # they are counted instead
        for rows, values in _converted_rows(spec, stored, within, section.dtype, bad):
            section[rows] = values
            bad[spec.name] += bad_scales(section[rows]) if spec.is_scale else not_finite(section[rows])
    return +bad


def not_finite(values: np.ndarray) -> int:
    """Counts the numbers that are NaN or infinite."""
    if values.dtype == ml_dtypes.float8_e4m3fn:  # NaN is one pattern of bits, infinity does not exist
        return int(np.count_nonzero((values.view(np.uint8) & 0x7F) == 0x7F))
    return int(values.size - np.count_nonzero(np.isfinite(values)))


def bad_scales(scales: np.ndarray) -> int:
    """Counts the scales of blocks that are NaN, infinite, 0 or negative."""
    return int(scales.size - np.count_nonzero((scales > 0) & np.isfinite(scales)))


def _converted_rows(
    spec: TensorSpec, stored: Mapping[str, StoredTensor], within: Slice, dtype: np.dtype, bad: Counter[str]
) -> Iterator[tuple[slice, np.ndarray]]:
    """Yields (rows, their values) of the slice `within` of the stored tensor, at most 128 rows at a time; dequantized
    unless `dtype` is E4M3."""
    values = read_tensor(stored[spec.name], within)
    if stored[spec.name].dtype == "F8_E4M3" and values.dtype != dtype:
        blocks = tuple(range(axis.start // BLOCK, -(-axis.stop // BLOCK)) for axis in within)
        scales = read_tensor(stored[spec.scale_name], blocks)
        bad[spec.scale_name] += bad_scales(scales)
        yield from dequantize_rows(values, scales, corner=(within[0].start, within[1].start))
        return
    for start in range(0, len(values), BLOCK):
        rows = slice(start, start + BLOCK)
        yield rows, values[rows]

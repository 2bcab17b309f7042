"""Any rectangular part of one of our variables, from the bytes of the stored tensors that it overlaps and no others.

A part is one range (step 1) for each axis of the variable; layers and experts are leading axes.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import ml_dtypes
import numpy as np

from deepseek_jax.interop.fp8_blocks import BLOCK, dequantize_rows
from deepseek_jax.interop.safetensors_io import StoredTensor, read_tensor
from deepseek_jax.interop.tensors import TensorSpec

Part = tuple[range, ...]


def part_of(index: Sequence[slice], shape: Sequence[int]) -> Part:
    """The part that `index` selects, in slices of step 1, as shardings give them."""
    return tuple(range(*axis.indices(size)) for axis, size in zip(index, shape, strict=True))


def whole(shape: Sequence[int]) -> Part:
    return tuple(map(range, shape))


def overlaps(spec: TensorSpec, part: Part) -> bool:
    """Whether the stored tensor holds anything of this part of its variable: whether its layer and expert are in it."""
    return all(i in axis for i, axis in zip(spec.index, part))


def fill(spec: TensorSpec, stored: Mapping[str, StoredTensor], part: Part, target: np.ndarray) -> Counter[str]:
    """Reads what the tensor holds of `part`, which it overlaps, and converts it in slices of rows into its place in
    `target`.

    `target` has the shape of the part and the dtype of the variable. Returns how many numbers of which stored tensor
    are none: NaN, infinite once they are converted, or a scale that is not above 0.
    """
    place = target[tuple(i - axis.start for i, axis in zip(spec.index, part))]
    within = part[len(spec.index) :]
    if spec.transposed:
        place, within = place.T, within[::-1]  # a view in the stored orientation
    bad: Counter[str] = Counter()
    with np.errstate(invalid="ignore", over="ignore"):  # they are counted instead
        for rows, values in _converted_rows(spec, stored, within, place.dtype, bad):
            place[rows] = values
            bad[spec.name] += bad_scales(place[rows]) if spec.is_scale else not_finite(place[rows])
    return +bad


def not_finite(values: np.ndarray) -> int:
    """How many of the numbers are NaN or infinite."""
    if values.dtype == ml_dtypes.float8_e4m3fn:  # NaN is one pattern of bits, and there is no infinity
        return int(np.count_nonzero((values.view(np.uint8) & 0x7F) == 0x7F))
    return int(values.size - np.count_nonzero(np.isfinite(values)))


def bad_scales(scales: np.ndarray) -> int:
    """How many scales of blocks are NaN, infinite, 0 or negative."""
    return int(scales.size - np.count_nonzero((scales > 0) & np.isfinite(scales)))


def _converted_rows(
    spec: TensorSpec, stored: Mapping[str, StoredTensor], within: Part, dtype: np.dtype, bad: Counter[str]
) -> Iterator[tuple[slice, np.ndarray]]:
    """The part `within` of the stored tensor -> (rows of the part, their values), at most 128 rows at a time;
    dequantized unless `dtype` is E4M3."""
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

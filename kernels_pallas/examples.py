"""Small inputs on which a kernel is compared with its reference.

They are NumPy arrays with the dtypes, formats and widths of a call, but few rows.
"""

import numpy as np

from kernels_pallas.qtensor import QTensor

FEW, COLUMNS = 512, 2048
PERIOD = 65521  # a prime: no two tiles hold the same numbers
_NORMAL = np.random.default_rng(0).standard_normal(PERIOD).astype(np.float32)


def few(size: int, most: int = FEW) -> int:
    """`size`, or, if it exceeds `most`, `most` and the rest that a last tile of `size` would hold."""
    return size if size <= most else most + size % 128


def normal(seed: int, shape: tuple[int, ...], dtype, uneven: bool = True) -> np.ndarray:
    """Normal numbers of `shape` and `dtype`. `uneven` gives rows and stretches of 128 columns different magnitudes, so
    that a wrong scale is seen."""
    x = np.resize(np.roll(_NORMAL, 101 * seed), shape)
    if not uneven:
        return x.astype(dtype)
    rows, columns = (
        np.exp2(np.arange(size) // stretch % 5 - 2).astype(np.float32)
        for size, stretch in zip(shape[-2:], (1, 128), strict=True)
    )
    return (x * rows[:, None] * columns).astype(dtype)


def quantized(seed: int, like: QTensor, shape: tuple[int, ...]) -> QTensor:
    """A QTensor of `shape` with the format and tiles of `like`."""
    scales = (*shape[:-2], *(-(-size // each) for size, each in zip(shape[-2:], like.tile, strict=True)))
    values = np.clip(64 * np.resize(np.roll(_NORMAL, 101 * seed), shape), -448, 448).astype(like.values.dtype)
    return QTensor(values, np.resize(np.exp2(np.linspace(-3, 3, 97)).astype(np.float32), scales), like.tile)


def few_rows(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape [..., R, C] with at most 2 matrices of few rows."""
    return (*(min(size, 2) for size in shape[:-2]), few(shape[-2]), shape[-1])


def groups(count: int, rows: int, alignment: int) -> tuple[np.ndarray, int]:
    """Sizes of at most 3 groups, and the number of rows that they lie in. All are multiples of `alignment`; one group
    is empty, and some rows lie past the last group."""
    units = max(few(rows) // alignment, 1)
    sizes = {1: [units], 2: [units - units // 3, 0]}.get(count, [units // 2, 0, units - units // 2 - (units > 2)])
    return np.asarray(sizes, np.int32) * alignment, units * alignment

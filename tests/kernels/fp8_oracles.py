"""Oracles of the FP8 operations: float64 in NumPy, exact integers, and bounds that follow from the formats."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import QTensor
from kernels_pallas.qtensor import FORMATS

ROUNDOFF = 2.0**-24  # of float32
# Half a unit in the last place of a normal number, relative; and the largest error of a number below the smallest
# normal one.
STEPS = {"float8_e4m3fn": (2.0**-4, 2.0**-10), "float8_e5m2": (2.0**-3, 2.0**-17), "e5m6": (2.0**-7, 2.0**-14)}
KINDS = ("normal", "uniform", "outlier_channels", "outlier_rows", "zeros", "denormals", "above_448", "mixed_magnitudes")


def matrix(kind, rows, columns, seed=0):
    """float32 [rows, columns] of one of the KINDS."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, columns))
    if kind == "uniform":
        x = rng.uniform(size=(rows, columns))
    elif kind == "outlier_channels":
        x[:, ::97] *= 300
    elif kind == "outlier_rows":
        x[::3] *= 1000
    elif kind == "zeros":
        x[:] = 0
    elif kind == "denormals":
        x *= 1e-40
    elif kind == "above_448":
        x = rng.choice([-448.0, 448, 449, -464, 465, 480, 1e4, -6e4], size=(rows, columns))
    elif kind == "mixed_magnitudes":
        x *= 10.0 ** rng.uniform(-6, 3, size=(rows, columns))
    return x.astype(np.float32)


def calc_diff(x, y) -> float:
    """DeepGEMM's distance of two arrays: 0 for equal arrays, and about half the relative squared error for near
    ones."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    norms = (x * x).sum() + (y * y).sum()
    return 0.0 if norms == 0 else 1 - 2 * (x * y).sum() / norms


def scale_at(q: QTensor) -> np.ndarray:
    """The scale at every number, float64."""
    rows, columns = q.shape[-2:]
    return np.asarray(q.scales, np.float64)[..., np.arange(rows)[:, None] // q.tile[0], np.arange(columns) // q.tile[1]]


def exact(q: QTensor) -> np.ndarray:
    """values · scales in float64, which holds the product of an 8-bit and a float32 number exactly."""
    with np.errstate(invalid="ignore"):  # zero times infinity
        return np.asarray(q.values).astype(np.float64) * scale_at(q)


def quantization_bound(x, q: QTensor, format="float8_e4m3fn") -> np.ndarray:
    """The bound of each number's quantization error: half a unit in its last place."""
    relative, absolute = STEPS[format]
    return (np.abs(np.asarray(x, np.float64)) * relative + scale_at(q) * absolute) * (1 + 2.0**-20)


def summation_bound(a, b, parts=1) -> np.ndarray:
    """The bound of the error of a bᵀ with sums of at most 128 in float32, scaled twice, and `parts` of them added in
    float32."""
    # below which float32 may be flushed to zero
    return (128 + parts + 4) * ROUNDOFF * (np.abs(a) @ np.abs(b).T) + 1e-37


def quantized_product_bound(a, bound_a, b, bound_b) -> np.ndarray:
    """The bound of the error of a bᵀ if each number of a and b is off by at most its bound."""
    a, b = np.abs(a), np.abs(b)
    return a @ bound_b.T + bound_a @ b.T + bound_a @ bound_b.T


def small_integers(rows, columns, seed, tile=(1, 128), groups=()) -> QTensor:
    """Integers between -2 and 2 with scales between 1/4 and 4: products of a few thousand of them are exact in float32,
    in any order."""
    rng = np.random.default_rng(seed)
    values = rng.integers(-2, 3, size=(*groups, rows, columns))
    scales = 2.0 ** rng.integers(-2, 3, size=(*groups, -(-rows // tile[0]), -(-columns // tile[1])))
    return QTensor(jnp.asarray(values, FORMATS["float8_e4m3fn"][1]), jnp.asarray(scales, jnp.float32), tile)


def slices(sizes):
    """The rows of each group."""
    ends = np.cumsum(sizes)
    return [slice(int(end - size), int(end)) for size, end in zip(sizes, ends, strict=True)]


def call(function, *args, **static):
    """Calls function(*args, **static), compiled once for each `static`, without optimizing the code."""
    return _compiled(function, tuple(static.items()))(*args)


@functools.cache
def _compiled(function, static):
    return jax.jit(functools.partial(function, **dict(static)), compiler_options={"xla_backend_optimization_level": 0})


@contextlib.contextmanager
def planted(target, name, wrong):
    """Replaces a function of the package by a wrong one, in compiled programs too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target, name, wrong)
        _compiled.cache_clear()
        yield
    _compiled.cache_clear()


def six_deviations(a, b, roundings) -> np.ndarray:
    """Six standard deviations of a bᵀ if each product carries `roundings` independent errors to E4M3, evenly spread
    over half a step, at most 2^-4, to either side."""
    return 6 * 2.0**-4 * np.sqrt(roundings / 3) * np.sqrt(np.square(a) @ np.square(b).T) + 1e-37

"""Hugging Face folder -> our variables, tensor by tensor.

The result is allocated once; every stored tensor is read on its own, converted in slices of rows straight into its
place, and forgotten. Peak host memory is the result plus about one tensor.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from flax import traverse_util

from deepseek_jax.errors import CheckpointError, nearest
from deepseek_jax.interop.folder import Folder, open_folder
from deepseek_jax.interop.fp8_blocks import dequantise_rows
from deepseek_jax.interop.safetensors_io import StoredTensor, read_tensor
from deepseek_jax.interop.tensors import TensorSpec
from deepseek_jax.model.config import ModelConfig

PARAM_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
_ROWS = 128


def import_folder(
    folder: str | Path, dtype: str = "float32", progress: Callable[[int, int], None] | None = None
) -> tuple[ModelConfig, dict[str, Any]]:
    """Reads a DeepSeek checkpoint in Hugging Face's layout.

    Returns its ModelConfig and {"params": …, "router_bias": …} as numpy arrays: parameters in `dtype` ("float32" or "bfloat16"), the
    routers' correction biases in float32. FP8 weights are dequantised by their block scales. `progress(done, total)` is
    called after every tensor. Raises CheckpointError naming every tensor that is missing, extra, of another shape or
    dtype, or cut off, before anything is allocated.
    """
    opened = open_folder(folder)
    opened.raise_problems()
    return opened.config, read_variables(opened, dtype, progress)


def read_variables(folder: Folder, dtype: str = "float32", progress: Callable[[int, int], None] | None = None) -> dict[str, Any]:
    """The variables of a folder without problems (see `import_folder`)."""
    if dtype not in PARAM_DTYPES:
        raise CheckpointError(f"dtype={dtype!r}: {nearest(dtype, PARAM_DTYPES)}")
    leaves: dict[tuple[str, ...], np.ndarray] = {}
    present = [spec for spec in folder.table if spec.name in folder.stored]
    for done, spec in enumerate(present, start=1):
        if spec.path not in leaves:
            leaf_dtype = np.dtype(np.float32) if spec.is_router_bias else PARAM_DTYPES[dtype]
            leaves[spec.path] = _aligned_empty(spec.leaf_shape, leaf_dtype)
        place = leaves[spec.path][spec.index]
        target = place.T if spec.transposed else place  # a view in the stored orientation
        for rows, values in _converted_rows(spec, folder.stored):
            if spec.duplicate:
                _check_duplicate(spec, target[rows], values)
            else:
                target[rows] = values
        if progress:
            progress(done, len(present))
    return traverse_util.unflatten_dict(leaves)


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """np.empty on a 64-byte boundary: there jax on CPU takes an array over without copying it."""
    nbytes = math.prod(shape) * dtype.itemsize
    raw = np.empty(nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + nbytes].view(dtype).reshape(shape)


def _converted_rows(spec: TensorSpec, stored: dict[str, StoredTensor]) -> Iterator[tuple[slice, np.ndarray]]:
    values = read_tensor(stored[spec.name])
    if stored[spec.name].dtype == "F8_E4M3":
        yield from dequantise_rows(values, read_tensor(stored[spec.scale_name]))
        return
    for start in range(0, values.shape[0], _ROWS):
        rows = slice(start, min(start + _ROWS, values.shape[0]))
        yield rows, values[rows]


def _check_duplicate(spec: TensorSpec, ours: np.ndarray, values: np.ndarray) -> None:
    if not np.array_equal(ours, values.astype(ours.dtype)):
        raise CheckpointError(
            f"{spec.name}: expected a copy of the tensor stored as {'/'.join(spec.path)}, found other values; embedding and head are "
            "shared between the main model and its MTP modules here"
        )

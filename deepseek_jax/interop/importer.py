"""Import: a Hugging Face folder to our variables, one after the other, each from the stored tensors that it stacks.

A stored tensor is read on its own, converted in slices of rows straight into its section of the variable, and freed. As
numpy arrays, peak host memory is the result plus about one tensor. As sharded jax arrays, each device's slice of a
variable is read on its own: peak host memory is about one such slice, and a host reads only what its devices hold.
"""

import itertools
import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from flax import traverse_util

from deepseek_jax.errors import CheckpointError, nearest
from deepseek_jax.interop.folder import SHOWN, Folder, shown, usable_folder
from deepseek_jax.interop.fp8_blocks import BLOCK
from deepseek_jax.interop.safetensors_io import StoredTensor
from deepseek_jax.interop.slices import Slice, fill, overlaps, slice_of, whole
from deepseek_jax.interop.tensors import SCALE_SUFFIX, TensorSpec
from deepseek_jax.model.config import ModelConfig
from kernels_pallas import QTensor

log = logging.getLogger(__name__)
PARAM_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
_KEPT = "fp8"  # matrices that are stored in E4M3 stay so
_E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)


def import_folder(
    folder: str | Path,
    dtype: str = "float32",
    progress: Callable[[int, int], None] | None = None,
    shardings: Callable[[ModelConfig], Mapping[str, Any]] | None = None,
) -> tuple[ModelConfig, dict[str, Any]]:
    """Reads a DeepSeek checkpoint in Hugging Face's layout.

    Returns its ModelConfig and {"params": …, "router_bias": …}: parameters in `dtype` ("float32" or "bfloat16"), the
    routers' correction biases in float32. FP8 weights are dequantized by their block scales; with `dtype` "fp8" they
    stay as they are, a QTensor of E4M3 values [in, out] and their scales, which the policy `fp8_deepseek` multiplies
    with, and the others are bfloat16. They are numpy arrays, or with `shardings` jax arrays: `shardings(config)` is a
    tree of the same structure with a `jax.sharding.Sharding` for each. `progress(done, total)` is called after every
    tensor, or slice of one, that is read. What is left out is logged as a warning.

    Raises CheckpointError naming every tensor that is missing, extra, of another shape or dtype, or cut off, before
    anything is allocated; and, once they are read, those with numbers that are NaN or infinite or with scales that are
    not above 0.
    """
    opened = usable_folder(folder)
    for note in opened.notes:
        log.warning("%s: %s", folder, note)
    return opened.config, read_variables(opened, dtype, progress, shardings(opened.config) if shardings else None)


def read_variables(
    folder: Folder,
    dtype: str = "float32",
    progress: Callable[[int, int], None] | None = None,
    shardings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The variables of a `usable_folder` (see `import_folder`; here `shardings` is the tree itself)."""
    if dtype not in (*PARAM_DTYPES, _KEPT):
        raise CheckpointError(f"dtype={dtype!r}: {nearest(dtype, (*PARAM_DTYPES, _KEPT))}")
    specs = specs_by_path(folder)
    if shardings is not None:
        shardings = traverse_util.flatten_dict(shardings)
        _check_paths(shardings, specs)
    kept = {
        path
        for path, tensors in specs.items()
        if dtype == _KEPT and all(folder.stored[spec.name].dtype == "F8_E4M3" for spec in tensors)
    }
    for path in kept:  # values and scales are two arrays
        tensors = specs.pop(path)
        specs[*path, "values"], specs[*path, "scales"] = tensors, [spec.scales for spec in tensors]
        if shardings is not None:
            shardings[*path, "values"] = sharding = shardings.pop(path)
            shardings[*path, "scales"] = _sharding_of_scales(sharding, len(tensors[0].stack))
    shapes = {path: tensors[0].leaf_shape for path, tensors in specs.items()}
    if shardings is None:
        slices = {path: {whole(shape): []} for path, shape in shapes.items()}
    else:
        slices = {path: _devices_by_slice(shardings[path], shape) for path, shape in shapes.items()}
    total = sum(
        overlaps(spec, ranges) for path, tensors in specs.items() for ranges in slices[path] for spec in tensors
    )
    count, bad = itertools.count(1), Counter()

    def done(found: Counter[str]) -> None:
        bad.update(found)
        if len(bad) >= SHOWN:
            _refuse_numbers(folder, bad)
        if progress:
            progress(next(count), total)

    leaves = {}
    for path, tensors in specs.items():
        leaf_dtype = PARAM_DTYPES.get(dtype, PARAM_DTYPES["bfloat16"])
        if tensors[0].is_router_bias or path[:-1] in kept:
            leaf_dtype = _E4M3 if path[-1] == "values" else PARAM_DTYPES["float32"]
        if shardings is None:
            leaves[path] = read_slice(tensors, folder.stored, whole(shapes[path]), leaf_dtype, done)
            continue
        arrays = []
        for ranges, devices in slices[path].items():
            # Waiting frees this slice before the next is read, unless the device shares the host's memory.
            arrays += _put(read_slice(tensors, folder.stored, ranges, leaf_dtype, done), devices)
        leaves[path] = jax.make_array_from_single_device_arrays(shapes[path], shardings[path], arrays, dtype=leaf_dtype)
    if bad:
        _refuse_numbers(folder, bad)
    for path in kept:
        leaves[path] = QTensor(leaves.pop((*path, "values")), leaves.pop((*path, "scales")), (BLOCK, BLOCK))
    return traverse_util.unflatten_dict(leaves)


def _refuse_numbers(folder: Folder, bad: Mapping[str, int]) -> None:
    what = {name: "not above 0 or not finite" if name.endswith(SCALE_SUFFIX) else "NaN or infinite" for name in bad}
    lines = [
        f"{name}: {count:,} of {math.prod(folder.stored[name].shape):,} numbers {what[name]}"
        for name, count in bad.items()
    ]
    raise CheckpointError(f"{folder.path} holds numbers that no network can use:\n  {shown(lines)}")


def _sharding_of_scales(sharding: jax.sharding.Sharding, stacked: int) -> jax.sharding.Sharding:
    """Divides the scales like the values by layer and expert, and not inside a matrix, where cuts need not meet the
    blocks."""
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return sharding
    return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*sharding.spec[:stacked]))


def specs_by_path(folder: Folder) -> dict[tuple[str, ...], list[TensorSpec]]:
    """The tensors that fill each variable."""
    specs: dict[tuple[str, ...], list[TensorSpec]] = {}
    for spec in folder.table:
        if not spec.duplicate:
            specs.setdefault(spec.path, []).append(spec)
    return specs


def read_slice(
    specs: Sequence[TensorSpec],
    stored: Mapping[str, StoredTensor],
    ranges: Slice,
    dtype: np.dtype,
    done: Callable[[Counter[str]], None] = lambda bad: None,
) -> np.ndarray:
    """Reads one slice of the variable that `specs` fill. After each tensor, `done` is called with the count of its
    unusable numbers, by tensor."""
    target = _aligned_empty([len(axis) for axis in ranges], dtype)
    for spec in specs:
        if overlaps(spec, ranges):
            done(fill(spec, stored, ranges, target))
    return target


def _aligned_empty(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """np.empty on a 64-byte boundary: there jax on CPU takes an array over without copying it."""
    nbytes = math.prod(shape) * dtype.itemsize
    raw = np.empty(nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + nbytes].view(dtype).reshape(shape)


def _devices_by_slice(sharding: jax.sharding.Sharding, shape: tuple[int, ...]) -> dict[Slice, list[jax.Device]]:
    """This process's devices by the slice that they hold."""
    devices: dict[Slice, list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        devices.setdefault(slice_of(index, shape), []).append(device)
    return devices


def _put(values: np.ndarray, devices: Sequence[jax.Device]) -> list[jax.Array]:
    return jax.block_until_ready([jax.device_put(values, device) for device in devices])


def _check_paths(shardings: Mapping[tuple[str, ...], Any], specs: Mapping[tuple[str, ...], Any]) -> None:
    for path in sorted(set(specs) ^ set(shardings)):
        has, lacks = ("folder", "tree of shardings") if path in specs else ("tree of shardings", "folder")
        raise CheckpointError(
            f"{'/'.join(path)}: in the {has} and not in the {lacks}; make the shardings for the folder's own config"
        )

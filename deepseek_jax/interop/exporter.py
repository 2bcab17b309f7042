"""Export: our variables to a Hugging Face folder that transformers loads, tensor by tensor."""

import logging
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from deepseek_jax.atomic import atomic_folder
from deepseek_jax.data.tokenizers import Tokenizer
from deepseek_jax.errors import CheckpointError, nearest
from deepseek_jax.interop.folder import shown
from deepseek_jax.interop.fp8_blocks import BLOCK, dequantize_rows, quantize
from deepseek_jax.interop.hf_config import QUANTISATION, config_to_hf, scale_format
from deepseek_jax.interop.hf_fields import CONFIG_NAME
from deepseek_jax.interop.safetensors_io import DTYPES, INDEX_NAME, SINGLE_NAME, ShardWriter
from deepseek_jax.interop.slices import not_finite, overlaps, slice_of
from deepseek_jax.interop.tensors import TensorSpec, tensor_table
from deepseek_jax.json_io import to_json
from deepseek_jax.model.config import ModelConfig
from kernels_pallas import QTensor

log = logging.getLogger(__name__)
EXPORT_DTYPES = ("bfloat16", "float32", "fp8")
_Entries = dict[str, tuple[str, tuple[int, ...]]]  # name -> safetensors dtype, shape


def export_folder(
    config: ModelConfig,
    variables: Mapping[str, Any],
    folder: str | Path,
    dtype: str = "bfloat16",
    max_shard_bytes: int = 5_000_000_000,
    carried: Mapping[str, Any] | None = None,
    companions: Sequence[Path] = (),
    tokenizer: Tokenizer | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Writes `variables` (numpy arrays, or jax arrays with any sharding over this process's devices) as config.json and
    safetensors, split into shards of at most `max_shard_bytes` each.

    `dtype` is "bfloat16", "float32", or "fp8": the released layout, with e4m3 linear weights, their block scales in
    float32, and everything else in bfloat16. Weights that an import left in FP8 (QTensor) are then written as they are,
    byte for byte; the other two dequantize them. Correction biases are always float32. `carried` is an imported
    config.json whose token ids and `scale_fmt` are kept; `companions` are files to copy along. `tokenizer` is saved
    with the weights, its files and chat template, and gives the token ids that `carried` does not; ids that nobody
    gives are null, since transformers would take 0 and 1 for them. At most one tensor is held in memory.

    The folder appears complete or not at all. Weights that are NaN or infinite are written as they are, and logged as a
    warning. Raises CheckpointError if it exists, the disk is too small, the variables are not those of `config` or
    partly on other hosts, or no config.json can express the network.
    """
    if dtype not in EXPORT_DTYPES:
        raise CheckpointError(f"dtype={dtype!r}: {nearest(dtype, EXPORT_DTYPES)}")
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_id", None) for name in ("bos", "eos", "pad")}
    hf = ids | config_to_hf(config, carried) | {"torch_dtype": "float32" if dtype == "float32" else "bfloat16"}
    scale_fmt = scale_format((carried or {}).get("quantization_config"))
    if dtype == "fp8":
        hf["quantization_config"] = QUANTISATION | ({"scale_fmt": scale_fmt} if scale_fmt else {})
    table = tensor_table(config)
    leaves = _checked_leaves(table, variables)
    shards = _plan(table, leaves, dtype, max_shard_bytes)
    total_bytes = sum(_nbytes(entry) for _, entries in shards for entry in entries.values())
    with atomic_folder(Path(folder), total_bytes) as building:
        done, weight_map, bad = 0, {}, {}
        for number, (specs, entries) in enumerate(shards, start=1):
            name = SINGLE_NAME if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            weight_map |= dict.fromkeys(entries, name)
            with ShardWriter(building / name, entries) as writer:
                for spec in specs:
                    bad |= _write_tensor(writer, spec, entries, leaves, power_of_two=scale_fmt == "ue8m0")
                    done += 1
                    if progress:
                        progress(done, len(table))
        if len(shards) > 1:
            index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
            (building / INDEX_NAME).write_text(to_json(index, indent=2) + "\n", encoding="utf-8")
        (building / CONFIG_NAME).write_text(to_json(hf, indent=2) + "\n", encoding="utf-8")
        for file in companions:
            shutil.copyfile(file, building / file.name)
        if tokenizer is not None:
            tokenizer.save(building)
    if bad:
        lines = [f"{name}: {count:,} numbers NaN or infinite" for name, count in bad.items()]
        log.warning("%s was written with numbers that no network can use:\n  %s", folder, shown(lines))


def _checked_leaves(table: Sequence[TensorSpec], variables: Mapping[str, Any]) -> dict[tuple[str, ...], Any]:
    leaves = traverse_util.flatten_dict(variables, is_leaf=lambda _, value: isinstance(value, QTensor))
    expected = {spec.path: spec.leaf_shape for spec in table}
    for path in sorted(set(leaves) - set(expected)):
        found = list(leaves[path].shape)
        raise CheckpointError(
            f"{'/'.join(path)}: expected no such variable in a model of this config, found shape {found}"
        )
    for path, shape in expected.items():
        found = list(leaves[path].shape) if path in leaves else "no such variable"
        if found != list(shape):
            raise CheckpointError(
                f"{'/'.join(path)}: expected shape {list(shape)} for a model of this config, found {found}"
            )
        if isinstance(leaves[path], QTensor) and leaves[path].tile != (BLOCK, BLOCK):
            raise CheckpointError(
                f"{'/'.join(path)} has a scale for each {leaves[path].tile}; the released layout has one for each "
                f"{(BLOCK, BLOCK)}: dequantize it first"
            )
        if not all(getattr(array, "is_fully_addressable", True) for array in jax.tree.leaves(leaves[path])):
            raise CheckpointError(
                f"{'/'.join(path)} lies partly on other hosts: save a checkpoint, and export that on one host"
            )
    return leaves


def _plan(
    table: Sequence[TensorSpec], leaves: Mapping[tuple[str, ...], Any], dtype: str, max_shard_bytes: int
) -> list[tuple[list[TensorSpec], _Entries]]:
    """Fills shards in the table's order; a tensor larger than `max_shard_bytes` gets a shard of its own."""
    shards: list[tuple[list[TensorSpec], _Entries]] = []
    room = 0
    for spec in table:
        entries = _entries(spec, dtype, kept=isinstance(leaves[spec.path], QTensor))
        size = sum(_nbytes(entry) for entry in entries.values())
        if size > room or not shards:
            shards.append(([], {}))
            room = max_shard_bytes
        shards[-1][0].append(spec)
        shards[-1][1].update(entries)
        room -= size
    return shards


def _entries(spec: TensorSpec, dtype: str, kept: bool) -> _Entries:
    if spec.is_router_bias or dtype == "float32":
        return {spec.name: ("F32", spec.shape)}
    if dtype == "fp8" and (spec.quantized or kept):
        return {spec.name: ("F8_E4M3", spec.shape), spec.scale_name: ("F32", spec.scale_shape)}
    return {spec.name: ("BF16", spec.shape)}


def _nbytes(entry: tuple[str, tuple[int, ...]]) -> int:
    return math.prod(entry[1]) * DTYPES[entry[0]].itemsize


def _write_tensor(
    writer: ShardWriter, spec: TensorSpec, entries: _Entries, leaves: Mapping[tuple[str, ...], Any], power_of_two: bool
) -> dict[str, int]:
    """Writes one tensor, with its scales if it is quantized. Returns its name and how many of the numbers written are
    NaN or infinite, if any."""
    leaf, scale_inv = leaves[spec.path], None
    if isinstance(leaf, QTensor):
        value, scale_inv = _stored(leaf.values, spec), _stored(leaf.scales, spec.scales)
        if spec.scale_name not in entries:
            value, scale_inv = np.concatenate([rows for _, rows in dequantize_rows(value, scale_inv)]), None
    else:
        value = _stored(leaf, spec)
        if spec.scale_name in entries:
            value, scale_inv = quantize(value, power_of_two)
    if scale_inv is not None:
        writer.write(spec.scale_name, scale_inv)
    value = value.astype(DTYPES[entries[spec.name][0]], copy=False)
    writer.write(spec.name, value)
    count = not_finite(value)
    return {spec.name: count} if count else {}


def _stored(leaf: Any, spec: TensorSpec) -> np.ndarray:
    """One tensor out of a variable, in the files' orientation."""
    value = _gathered(leaf, spec)
    return value.T if spec.transposed else value


def _gathered(leaf: Any, spec: TensorSpec) -> np.ndarray:
    """One tensor out of a variable, in our orientation. Of a jax array, only the devices' shares of this tensor are
    moved."""
    if not isinstance(leaf, jax.Array):
        return leaf[spec.index]
    value = np.empty(leaf.shape[len(spec.index) :], leaf.dtype)
    for shard in leaf.addressable_shards:
        ranges = slice_of(shard.index, leaf.shape)
        if shard.replica_id == 0 and overlaps(spec, ranges):
            index = tuple(i - axis.start for i, axis in zip(spec.index, ranges, strict=False))
            value[tuple(slice(axis.start, axis.stop) for axis in ranges[len(spec.index) :])] = np.asarray(
                shard.data[index]
            )
    return value

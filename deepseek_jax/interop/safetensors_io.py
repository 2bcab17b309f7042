"""The safetensors format, one tensor at a time.

A file is 8 bytes of header length, a JSON header {name: {dtype, shape, data_offsets}}, and the raw little-endian data.
The `safetensors` package checks the header; it reads FP8 only through torch, and its writer wants a whole shard in
memory at once, so data is read and written here, one tensor at a time. Nothing is ever unpickled.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
import safetensors

from deepseek_jax.errors import CheckpointError
from deepseek_jax.json_io import read_json

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
}


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: `shape` elements of the safetensors `dtype` at byte `offset` of `file`."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_header(file: Path) -> dict[str, StoredTensor]:
    """All tensors of one file, by name. Raises CheckpointError if the file is cut off or its header is damaged.

    The `safetensors` library checks that the header is well formed and that the tensors cover the file's bytes without
    gaps or overlaps, each with as many as its dtype and shape take.
    """
    try:
        with safetensors.safe_open(file, framework="np"), open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        size = file.stat().st_size if file.is_file() else 0
        raise CheckpointError(
            f"{file}: damaged or cut off after {size:,} bytes ({error}); download the file again"
        ) from error
    header.pop("__metadata__", None)
    return {
        name: StoredTensor(file, entry["dtype"], tuple(entry["shape"]), 8 + length + begin, end - begin)
        for name, entry in header.items()
        for begin, end in [entry["data_offsets"]]
    }


def read_tensor(tensor: StoredTensor, ranges: Sequence[range] | None = None) -> np.ndarray:
    """Reads a tensor, or the slice `ranges` of it (for each axis a range of step 1), in its stored dtype.

    Of a slice only its own bytes are read: whole rows in one piece, cut rows one by one. The array owns its memory.
    Raises CheckpointError if the file has become shorter.
    """
    ranges = [range(size) for size in tensor.shape] if ranges is None else ranges
    values = np.empty([len(axis) for axis in ranges], DTYPES[tensor.dtype])
    if not values.size:
        return values
    runs = values.reshape(1, -1) if values.shape[1:] == tensor.shape[1:] else values
    first = int(np.ravel_multi_index([axis.start for axis in ranges], tensor.shape))
    row = math.prod(tensor.shape[1:])
    with open(tensor.file, "rb", buffering=0) as stream:
        for i, run in enumerate(runs):
            stream.seek(tensor.offset + (first + i * row) * values.itemsize)
            missing = memoryview(run.view(np.uint8))
            while missing:
                count = stream.readinto(missing)
                if not count:
                    raise CheckpointError(
                        f"{tensor.file}: ends {len(missing)} bytes too early; it is truncated: download it again"
                    )
                missing = missing[count:]
    return values


def read_folder(folder: Path) -> tuple[dict[str, StoredTensor], list[str]]:
    """All tensors of a Hugging Face folder by name, and the problems of its files, in sentences.

    Reads headers only. Where there is a model.safetensors, it is read instead of the index, as transformers does.
    Raises CheckpointError if there is nothing to read: no folder, no safetensors, a damaged index.
    """
    if (folder / SINGLE_NAME).is_file():
        return read_header(folder / SINGLE_NAME), []
    index_file = folder / INDEX_NAME
    if not index_file.is_file():
        raise CheckpointError(_nothing_to_read(folder))
    weight_map = read_json(index_file, "download it again", CheckpointError).get("weight_map")
    if not isinstance(weight_map, dict) or not all(map(_is_file_name, weight_map.values())):
        raise CheckpointError(
            f"{index_file}: no readable weight_map, which names a file of the folder for each tensor; download the "
            "file again"
        )
    shards = sorted(set(weight_map.values()))
    tensors: dict[str, StoredTensor] = {}
    problems = []
    for shard in shards:
        promised = [name for name, where in weight_map.items() if where == shard]
        if not (folder / shard).is_file():
            problems.append(
                f"the index puts {len(promised)} tensors, {promised[0]!r} among them, into {shard}, which is not in "
                f"{folder}"
            )
            continue
        header = read_header(folder / shard)
        problems += [
            f"the index puts tensor {name!r} into {shard}, but it is not there"
            for name in promised
            if name not in header
        ]
        tensors.update({name: tensor for name, tensor in header.items() if weight_map.get(name, shard) == shard})
    return tensors, problems


def _is_file_name(name: object) -> bool:
    return isinstance(name, str) and name.isprintable() and name == Path(name).name


def _nothing_to_read(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder} is not a folder; give a Hugging Face folder with config.json and *.safetensors"
    pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
    if pickled:
        return (
            f"{folder} holds {pickled[0]} but no safetensors. Such files are pickles, which can run any code when "
            "opened, so they are not read; save the model with safe_serialization=True first"
        )
    loose = sorted(p.name for p in folder.glob("*.safetensors"))
    if loose:
        return (
            f"{folder} holds {len(loose)} safetensors file(s), such as {loose[0]}, but neither {SINGLE_NAME} nor "
            f"{INDEX_NAME}"
        )
    return f"{folder} holds neither {SINGLE_NAME} nor {INDEX_NAME}"


class ShardWriter:
    """Writes one safetensors file tensor by tensor, in any order; the header is complete from the start.

    `tensors` maps names to (safetensors dtype, shape). Wide dtypes come first in the file, so that every tensor is
    aligned to its own item size, which torch's memory mapping requires.
    """

    def __init__(self, file: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]]):
        header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
        position = 0
        for name in sorted(tensors, key=lambda name: -DTYPES[tensors[name][0]].itemsize):
            dtype, shape = tensors[name]
            end = position + math.prod(shape) * DTYPES[dtype].itemsize
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
            position = end
        raw = json.dumps(header, separators=(",", ":")).encode()
        raw += b" " * (-len(raw) % 8)
        self._header = header
        self._missing = set(tensors)
        self._data_start = 8 + len(raw)
        self._stream = open(file, "wb")  # noqa: SIM115, __exit__ closes it
        self._stream.write(len(raw).to_bytes(8, "little") + raw)

    def write(self, name: str, array: np.ndarray) -> None:
        """Writes `array`, already of the declared dtype and shape."""
        entry = self._header[name]
        if array.dtype != DTYPES[entry["dtype"]] or list(array.shape) != entry["shape"]:
            raise ValueError(
                f"{name}: declared {entry['dtype']} {entry['shape']}, got {array.dtype} {list(array.shape)}"
            )
        self._stream.seek(self._data_start + entry["data_offsets"][0])
        self._stream.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        self._missing.remove(name)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, exception_type, *_) -> None:
        self._stream.close()
        if exception_type is None and self._missing:
            raise ValueError(f"declared but not written: {sorted(self._missing)[:3]}")

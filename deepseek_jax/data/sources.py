"""Opens a source: a sequence of records (dictionaries) with random access, checked before training starts."""

import difflib
import glob
import hashlib
import json
import mmap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import tensorflow_datasets as tfds

from deepseek_jax.data import stdlib_text
from deepseek_jax.data.config import SourceConfig
from deepseek_jax.data.documents import check_record, required_fields, split_key
from deepseek_jax.errors import DataError, nearest

Records = Sequence[Mapping[str, Any]]
InMemory = Mapping[str, Mapping[str, Records]]  # source name -> split -> records


def open_source(source: SourceConfig, split: str, data_dir: str | None = None, in_memory: InMemory | None = None) -> Records:
    """Records of one split ('train' or 'validation'). Raises DataError for what is missing, unreadable or empty."""
    in_memory = in_memory or {}
    if source.name in in_memory:
        records = _named(in_memory[source.name], split, f"in-memory source {source.name!r}: no split")
    elif source.name == "stdlib":
        records = TfdsRecords(stdlib_text.prepare(data_dir, source.max_bytes), split, source)
    elif source.name.startswith("tfds:"):
        wanted = source.train_split if split == "train" else source.validation_split
        records = TfdsRecords(_prepare_tfds(source.name.removeprefix("tfds:"), data_dir), wanted, source)
    elif Path(source.name).suffix in _READERS:
        records = FileRecords(source, split)
    else:
        forms = ["stdlib", "tfds:NAME", *(f"PATH{suffix}" for suffix in _READERS), *in_memory]
        raise DataError(f"unknown dataset {source.name!r}: {nearest(source.name, forms)}")
    if len(records) == 0:
        raise DataError(f"source {source.name!r} has no documents in its {split} split")
    return records


def _named(splits: Mapping[str, Any], split: str, problem: str) -> Any:
    if split not in splits:
        raise DataError(f"{problem} {split!r}: {nearest(split, splits)}")
    return splits[split]


def _prepare_tfds(name: str, data_dir: str | None) -> tfds.core.DatasetBuilder:
    try:
        builder = tfds.builder(name, data_dir=data_dir, try_gcs=False)
    except tfds.core.DatasetNotFoundError as error:
        close = difflib.get_close_matches(name, tfds.list_builders(with_community_datasets=False), n=3)
        hint = f"did you mean {' or '.join(close)}? " if close else ""
        raise DataError(f"unknown TFDS dataset {name!r}: {hint}tfds.list_builders() names all of them") from error
    if not builder.is_prepared():
        try:
            builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
            builder.download_and_prepare()
        except Exception as error:  # download, checksum, disk and missing-package errors of any dataset's own script
            raise DataError(f"TFDS could not prepare {name!r} in {builder.data_dir}: {error}") from error
    return builder


class TfdsRecords:
    """Records of one TFDS split."""

    def __init__(self, builder: tfds.core.DatasetBuilder, split: str, source: SourceConfig):
        where = f"source {source.name!r}"
        if split.split("[")[0] not in builder.info.splits:
            raise DataError(
                f"{where} has no split {split!r}: {nearest(split, builder.info.splits)}; "
                "set train_split / validation_split, for example 'train[:95%]' and 'train[95%:]'"
            )
        features = builder.info.features
        for field in required_fields(source):
            if field not in features:
                raise DataError(
                    f"{where}: no field {field!r}; the fields are: {', '.join(features)}; set text_field to the one with the text"
                )
        try:
            self._data = builder.as_data_source(split=split)
        except NotImplementedError as error:
            raise DataError(
                f"{where} was prepared as {builder.info.file_format}, which needs TensorFlow to read; only array_record does not: "
                "set data.data_dir to another folder, where it will be prepared anew"
            ) from error

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {k: v.decode("utf-8", errors="replace") if isinstance(v, bytes) else v for k, v in self._data[index].items()}


class FileRecords:
    """Records of local files; each file is read through once, so that a bad line is found now and not in an hour."""

    def __init__(self, source: SourceConfig, split: str):
        held_out = source.validation_path is not None
        pattern = source.validation_path if held_out and split == "validation" else source.name
        paths = sorted(glob.glob(str(Path(pattern).expanduser()), recursive=True))
        if not paths:
            raise DataError(f"no file matches {pattern!r}")
        self._records: list[tuple[Records, int]] = []
        total = 0
        for path in paths:
            records = _read(path, source)
            for index in range(len(records)):
                record, total = records[index], total + 1
                check_record(record, source, records.where(index))
                if held_out or (_unit_hash(split_key(record, source)) < source.validation_fraction) == (split == "validation"):
                    self._records.append((records, index))
        if total and not self._records:
            raise DataError(
                f"source {source.name!r}: none of its {total} documents falls into the {split} split (validation_fraction="
                f"{source.validation_fraction}); change validation_fraction, or set validation_path to held-out files"
            )

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        records, inner = self._records[index]
        return records[inner]


def _unit_hash(key: bytes) -> float:
    """A number in [0, 1) that depends on the bytes alone."""
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") / 2**64


class _Jsonl:
    """One JSON object per line; lines are found once and parsed when asked for."""

    def __init__(self, path: str, source: SourceConfig):
        self._path = path
        with open(path, "rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if Path(path).stat().st_size else b""
        self._lines = list(self._find_lines())

    def _find_lines(self) -> Iterator[tuple[int, int, int]]:
        start, number = 0, 0
        while start < len(self._bytes):
            end, number = self._bytes.find(b"\n", start), number + 1
            end = len(self._bytes) if end < 0 else end
            if self._bytes[start:end].strip():
                yield start, end, number
            start = end + 1

    def where(self, index: int) -> str:
        return f"{self._path} line {self._lines[index][2]}"

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> Any:
        start, end, _ = self._lines[index]
        try:
            return json.loads(self._bytes[start:end])
        except ValueError as error:
            raise DataError(f"{self.where(index)}: not valid JSON ({error})") from error


class _Parquet:
    """The needed columns of one file, held in memory as Arrow data."""

    def __init__(self, path: str, source: SourceConfig):
        self._path = path
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            wanted = {*required_fields(source), "loss_mask"}
            # Without any wanted column one other is read, so that the error about the missing field can name what is there.
            self._table = file.read(columns=[name for name in names if name in wanted] if wanted & set(names) else names)

    def where(self, index: int) -> str:
        return f"{self._path} row {index}"

    def __len__(self) -> int:
        return self._table.num_rows

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: self._table[name][index].as_py() for name in self._table.column_names}


class _Text:
    """One file, one document."""

    def __init__(self, path: str, source: SourceConfig):
        self._path, self._field = path, source.text_field
        self[0]

    def where(self, index: int) -> str:
        return self._path

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> dict[str, str]:
        try:
            return {self._field: Path(self._path).read_text(encoding="utf-8")}
        except UnicodeDecodeError as error:
            raise DataError(f"{self._path} is not UTF-8 text (byte {error.start}); convert it first") from error


_READERS: dict[str, Callable[[str, SourceConfig], Any]] = {".jsonl": _Jsonl, ".parquet": _Parquet, ".txt": _Text}


def _read(path: str, source: SourceConfig) -> Any:
    suffix = Path(path).suffix
    if suffix not in _READERS:
        raise DataError(f"{path}: {nearest(suffix, _READERS)}")
    if suffix == ".txt" and source.format != "text":
        raise DataError(f"{path}: a .txt file holds plain text; format {source.format!r} needs .jsonl or .parquet")
    try:
        return _READERS[suffix](path, source)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} is not a parquet file that can be read: {error}") from error

"""Sources: sequences of records (dictionaries) with random access, checked before training starts."""

import array
import difflib
import glob
import hashlib
import inspect
import os
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tensorflow_datasets as tfds

from deepseek_jax.data import stdlib_text
from deepseek_jax.data.config import SourceConfig
from deepseek_jax.data.documents import check_record, required_fields, shape, split_key
from deepseek_jax.data.files import is_packed, read_file, suffixes
from deepseek_jax.errors import ConfigError, DataError, nearest
from deepseek_jax.registry import resolve

InMemory = Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]  # source name -> split -> records
OTHER_DATA = (
    "data from the Hugging Face Hub has to be downloaded first (hf download NAME --repo-type dataset) and named as "
    "PATH/*.parquet"
)


class Records(Protocol):
    """Records of one split. `where(i)` names record i's place; `examples()` are indices of records that show if all can
    be tokenized."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Mapping[str, Any]: ...
    def where(self, index: int) -> str: ...
    def examples(self) -> Sequence[int]: ...


def open_source(
    source: SourceConfig,
    split: str,
    data_dir: str | None = None,
    in_memory: InMemory | None = None,
    vocab_size: int | None = None,
) -> Records:
    """Records of one split ('train' or 'validation'). Raises DataError for what is missing, unreadable or empty.

    Every record of a local file, and of a user's own function, is checked here, token ids against `vocab_size`; others
    when they are tokenized.
    """
    in_memory = in_memory or {}
    if source.name in in_memory:
        records = MemoryRecords(
            _named(in_memory[source.name], split, f"in-memory source {source.name!r}: no split"), source
        )
    elif source.name == "stdlib":
        records = TfdsRecords(stdlib_text.prepare(data_dir, source.max_bytes), split, source)
    elif source.name.startswith("tfds:"):
        wanted = source.train_split if split == "train" else source.validation_split
        records = TfdsRecords(_prepare_tfds(source.name.removeprefix("tfds:"), data_dir), wanted, source)
    elif is_own(source):
        records = _own_records(source, split, vocab_size)
    elif _looks_like_a_path(source.name):
        records = _file_records(source, split, vocab_size)
    else:
        forms = [
            "stdlib",
            "tfds:NAME",
            *(f"PATH{suffix}" for suffix in suffixes()),
            "package.module:function",
            *in_memory,
        ]
        raise DataError(f"unknown dataset {source.name!r}: {nearest(source.name, forms)}")
    if len(records) == 0:
        raise DataError(f"source {source.name!r} has no documents in its {split} split")
    return records


def is_own(source: SourceConfig) -> bool:
    """True if a source is named as package.module:function."""
    name = source.name
    return ":" in name and not name.startswith("tfds:") and not _looks_like_a_path(name)


def _looks_like_a_path(name: str) -> bool:
    return (
        Path(name).suffix.lower() in suffixes()
        or is_packed(name)
        or "/" in name
        or glob.has_magic(name)
        or Path(name).expanduser().exists()
    )


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
        raise DataError(
            f"unknown TFDS dataset {name!r}: {hint}tfds.list_builders() names all of them; {OTHER_DATA}"
        ) from error
    except Exception as error:  # of the dataset's name, version, options or script: TFDS has no one kind of error
        raise DataError(
            f"TFDS cannot open {name!r}: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from error
    if not builder.is_prepared():
        try:
            builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
            builder.download_and_prepare()
        except Exception as error:  # download, checksum, disk and missing-package errors of any dataset's own script
            raise DataError(f"TFDS could not prepare {name!r} in {builder.data_dir}: {error}") from error
    return builder


class MemoryRecords:
    """Records that the caller holds."""

    def __init__(self, data: Sequence[Mapping[str, Any]], source: SourceConfig):
        self._data, self._name = data, source.name

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> Any:
        return self._data[index]

    def where(self, index: int) -> str:
        return f"source {self._name!r} record {index}"

    def examples(self) -> Sequence[int]:
        """None: records that a person wrote by hand are in files."""
        return ()


class TfdsRecords(MemoryRecords):
    """Records of one TFDS split."""

    def __init__(self, builder: tfds.core.DatasetBuilder, split: str, source: SourceConfig):
        self._name = source.name
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
                    f"{where}: no field {field!r}; the fields are: {', '.join(features)}; set text_field to the one "
                    "with the text"
                )
        try:
            self._data = builder.as_data_source(split=split)
        except NotImplementedError as error:
            raise DataError(
                f"{where} was prepared as {builder.info.file_format}, which needs TensorFlow to read; only "
                "array_record does not: "
                "set data.data_dir to another folder, where it will be prepared anew"
            ) from error

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {
            k: v.decode("utf-8", errors="replace") if isinstance(v, bytes) else v for k, v in self._data[index].items()
        }


class NothingHeldOut(DataError):
    """Raised where no document of a local source falls into its held-out share."""


def holds_out(source: SourceConfig, data_dir: str | None = None, vocab_size: int | None = None) -> bool:
    """True if held-out documents can be read from a source. A share of few local files may be empty; those are opened
    to find out."""
    if (
        source.holds_out
        and source.validation_path is None
        and source.name != "stdlib"
        and not source.name.startswith("tfds:")
    ):
        try:
            open_source(source, "validation", data_dir, vocab_size=vocab_size)
        except NothingHeldOut:
            return False
    return source.holds_out


class Reader(Protocol):
    """Records in a file, or of a user's own function; `where(i)` says where record i stands."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Mapping[str, Any]: ...
    def where(self, index: int) -> str: ...


class CheckedRecords:
    """All records of a reader, each read and checked once: its side of a split, and its shape."""

    def __init__(self, reader: Reader, source: SourceConfig, vocab_size: int | None):
        self.reader = reader
        self.sides = array.array("d")  # in [0, 1): below validation_fraction is held out
        self.examples: dict[Hashable, int] = {}  # shape -> first record
        for index in range(len(self.reader)):
            record = self.reader[index]
            check_record(record, source, self.reader.where(index), vocab_size)
            self.sides.append(_unit_hash(split_key(record, source)))
            self.examples.setdefault(shape(record, source), index)


_opened: weakref.WeakValueDictionary[Hashable, CheckedRecords] = weakref.WeakValueDictionary()


def _open_file(path: str, source: SourceConfig, vocab_size: int | None) -> CheckedRecords:
    """The file as it is now; training and held-out data from one file share it."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    key = (
        path,
        status.st_dev,
        status.st_ino,
        status.st_size,
        status.st_mtime_ns,
        source.format,
        source.text_field,
        vocab_size,
    )
    file = _opened.get(key)
    if file is None:
        file = _opened[key] = CheckedRecords(read_file(path, source), source, vocab_size)
    return file


class SplitRecords:
    """One split of checked records: of a share decided by each record's content, or all of them where files or a user's
    function are already divided."""

    def __init__(self, parts: Sequence[CheckedRecords], source: SourceConfig, split: str, divided: bool):
        self._parts = parts
        self._numbers, self._indices = array.array("L"), array.array("Q")
        for number, part in enumerate(parts):
            sides = np.asarray(part.sides)
            mine = (
                np.ones(len(sides), bool)
                if divided
                else (sides < source.validation_fraction) == (split == "validation")
            )
            self._indices.extend(np.flatnonzero(mine).tolist())
            self._numbers.extend([number] * int(mine.sum()))
        total = sum(len(part.sides) for part in parts)
        if total and not len(self):
            kind = NothingHeldOut if split == "validation" else DataError
            raise kind(
                f"source {source.name!r}: none of its {total} documents falls into the {split} split "
                "(validation_fraction="
                f"{source.validation_fraction}); change validation_fraction (0 holds nothing out), or set "
                "validation_path to held-out files"
            )

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return self._parts[self._numbers[index]].reader[self._indices[index]]

    def where(self, index: int) -> str:
        return self._parts[self._numbers[index]].reader.where(self._indices[index])

    def examples(self) -> list[int]:
        """One record of each shape."""
        shapes = {(number, index) for number, part in enumerate(self._parts) for index in part.examples.values()}
        return [i for i, place in enumerate(zip(self._numbers, self._indices, strict=True)) if place in shapes]


def _file_records(source: SourceConfig, split: str, vocab_size: int | None) -> SplitRecords:
    """Records of local files; each file is read through once, so that a bad line is found before training."""
    divided = source.validation_path is not None
    paths = find_files(source.validation_path if divided and split == "validation" else source.name)
    return SplitRecords([_open_file(path, source, vocab_size) for path in paths], source, split, divided)


def own_function(source: SourceConfig) -> Callable[..., Sequence[Mapping[str, Any]]]:
    """The function of a source called package.module:function. Raises ConfigError if it can't be imported."""
    function = resolve({}, source.name, "source")
    if not callable(function):
        raise ConfigError(
            f"source {source.name!r} is a {type(function).__name__}: must be a function that returns records"
        )
    if source.validation_path is not None:
        raise ConfigError(
            f"source {source.name!r}: validation_path belongs to local files; a function with a parameter `split` "
            "returns its held-out records for split='validation'"
        )
    return function


def _own_records(source: SourceConfig, split: str, vocab_size: int | None) -> SplitRecords:
    """Records that a user's function returns: function(split) those of a split, or function() all of them, of which
    `validation_fraction` is held out, as of local files."""
    function = own_function(source)
    divided = "split" in inspect.signature(function).parameters
    key = (source.name, split if divided else None, source.format, source.text_field, vocab_size)
    part = _opened.get(key)
    if part is None:
        try:
            records = function(split) if divided else function()
            reader = MemoryRecords(records if hasattr(records, "__getitem__") else list(records), source)
        except Exception as error:  # of the user's code
            raise DataError(f"source {source.name!r} raised {type(error).__name__}: {error}") from error
        part = _opened[key] = CheckedRecords(reader, source, vocab_size)
    if divided and split == "validation" and not len(part.sides):
        raise NothingHeldOut(f"source {source.name!r} returns no records for split='validation'")
    return SplitRecords([part], source, split, divided)


def find_files(name: str) -> list[str]:
    """The files of a path or pattern; a path that exists is that file, with any characters in its name. Raises
    DataError if nothing is found."""
    path = Path(name).expanduser()
    if path.is_dir():
        raise DataError(
            f"cannot read {name}: Is a directory; name its files, for example {path}/*.jsonl or {path}/**/*.parquet"
        )
    paths = (
        [str(path)]
        if path.exists()
        else sorted(found for found in glob.glob(str(path), recursive=True) if not Path(found).is_dir())
    )
    if not paths:
        raise DataError(f"no file matches {name!r}" + ("" if Path(name).suffix else f"; {OTHER_DATA}"))
    return paths


def _unit_hash(key: bytes) -> float:
    """A number in [0, 1) that depends on the bytes alone."""
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") / 2**64

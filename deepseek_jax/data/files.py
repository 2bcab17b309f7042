"""Local files of records with random access: JSON lines, JSON arrays, tables, Parquet and plain text, compressed or
not.

A file of lines stays on disk: its lines are located once, and a line is read and parsed when it is asked for. The other
text formats, and compressed files, lack cheap random access; their records are written once to a temporary file of
lines, which disappears with the process. A record that is read is compared with a checksum from when the file was
opened, so that a file that changes meanwhile gives an error and never another text.
"""

import array
import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import pyarrow
import pyarrow.parquet

from deepseek_jax.data.config import SourceConfig
from deepseek_jax.data.documents import required_fields
from deepseek_jax.errors import DataError, nearest
from deepseek_jax.json_io import parse_json

CHANGED = "the file has changed since it was opened; leave data alone while a run reads it, and start the run again"
UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


class Reader(Protocol):
    """The records of one file. `where(i)` names record i so that a person can find it."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Any: ...
    def where(self, index: int) -> str: ...


def read_file(path: str, source: SourceConfig) -> Reader:
    """Opens a file by its suffix. Raises DataError where the file or one of its lines cannot be read, naming it."""
    packed = Path(path).suffix.lower() if is_packed(path) else ""
    suffix = (Path(path).with_suffix("") if packed else Path(path)).suffix.lower()
    if suffix not in READERS:
        raise DataError(f"{path}: {nearest(suffix, suffixes())}")
    if source.format not in FORMATS.get(suffix, (source.format,)):
        raise DataError(f"{path}: a {suffix} file holds plain text; format {source.format!r} needs .jsonl or .parquet")
    try:
        return READERS[suffix](path, source)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        if packed and not (isinstance(error, OSError) and error.errno):
            raise DataError(f"{path} is not a complete {packed} file ({error}); copy it again") from error
        raise DataError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not a parquet file that can be read: {error}") from error


def suffixes() -> list[str]:
    """The suffixes that `read_file` reads."""
    return [*READERS, *(suffix + packed for suffix in READERS for packed in PACKED)]


def is_packed(path: str) -> bool:
    return Path(path).suffix.lower() in PACKED


class JsonRecords:
    """Records as lines of JSON in a file, from `start` to `start + size` each; `unit` is what the lines are called in
    messages."""

    def __init__(self, path: str, file: BinaryIO, unit: str = "line"):
        self._path, self._file, self._unit = path, file, unit
        self._starts, self._sizes, self._numbers, self._checksums = (array.array(kind) for kind in "QQQI")

    @classmethod
    def of_lines(cls, path: str, source: SourceConfig) -> "JsonRecords":
        """The lines of a file as they are; blank ones are left out."""
        records = cls(path, _unpacked(path))
        start = 0
        for number, line in enumerate(records._file, start=1):
            if number == 1:
                _refuse_utf_16(line, path)
            if line.strip():
                records._add(start, line, number)
            start += len(line)
        return records

    @classmethod
    def of_records(cls, path: str, records: Iterator[tuple[int, Any]], unit: str = "line") -> "JsonRecords":
        """Records with their line numbers, moved to a temporary file."""
        moved, start = cls(path, tempfile.TemporaryFile(), unit), 0  # noqa: SIM115, it lives as long as the records
        for number, record in records:
            line = json.dumps(record).encode()
            moved._file.write(line)
            moved._add(start, line, number)
            start += len(line)
        moved._file.flush()
        return moved

    def _add(self, start: int, line: bytes, number: int) -> None:
        columns = self._starts, self._sizes, self._numbers, self._checksums
        for column, value in zip(columns, (start, len(line), number, zlib.crc32(line)), strict=True):
            column.append(value)

    def where(self, index: int) -> str:
        return f"{self._path} {self._unit} {self._numbers[index]}"

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Any:
        try:
            line = os.pread(self._file.fileno(), self._sizes[index], self._starts[index])
        except OSError as error:
            raise DataError(f"{self.where(index)}: {error.strerror}") from error
        if zlib.crc32(line) != self._checksums[index]:
            raise DataError(f"{self.where(index)}: {CHANGED}")
        try:
            return parse_json(line)
        except ValueError as error:
            torn = index == len(self) - 1 and not line.endswith(b"\n")
            advice = "; the file ends in the middle of this line: copy it again, or remove the line" if torn else ""
            raise DataError(f"{self.where(index)}: not valid JSON ({error}){advice}") from error


def _json(path: str, source: SourceConfig) -> Reader:
    """The records of one JSON array, or of lines of JSON, which many tools write to a .json file."""
    with _unpacked(path) as file:
        lines = file.read(4096).lstrip(codecs.BOM_UTF8).lstrip()[:1] != b"["
    return JsonRecords.of_lines(path, source) if lines else JsonRecords.of_records(path, _array(_text(path), path))


def _array(text: str, path: str) -> Iterator[tuple[int, Any]]:
    """The elements of a JSON array with the numbers of the lines on which they begin, one at a time."""
    decoder, gap = json.JSONDecoder(parse_constant=lambda _: None), re.compile(r"[ \t\n\r]*")
    at, line, counted = text.index("[") + 1, 1, 0
    separator = "]"  # an array may end before its first element
    while True:
        at = gap.match(text, at).end()
        line, counted = line + text.count("\n", counted, at), at
        if text[at : at + 1] == "]" and separator == "]":
            break
        try:
            record, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            reason = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
            number = error.lineno if isinstance(error, json.JSONDecodeError) else line
            raise DataError(f"{path} line {number}: not valid JSON ({reason})") from error
        yield line, record
        at = gap.match(text, at).end()
        separator = text[at : at + 1]
        if separator not in (",", "]") or not separator:
            line += text.count("\n", counted, at)
            ending = (
                "the file ends before the array does: copy it again"
                if not separator
                else f"',' or ']' expected, found {separator!r}"
            )
            raise DataError(f"{path} line {line}: not valid JSON ({ending})")
        if separator == "]":
            break
        at += 1
        separator = ","
    rest = gap.match(text, at + 1).end()
    if rest < len(text):
        raise DataError(f"{path} line {text.count(chr(10), 0, rest) + 1}: text behind the end of the array")


def _table(delimiter: str) -> Callable[[str, SourceConfig], Reader]:
    """Comma- or tab-separated values, quoted where needed; the first line names the columns."""
    return lambda path, source: JsonRecords.of_records(path, _rows(_text(path), path, delimiter))


def _rows(text: str, path: str, delimiter: str) -> Iterator[tuple[int, dict[str, str]]]:
    csv.field_size_limit(2**31 - 1)  # a text may be longer than the 131,072 characters that are the default
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    names: list[str] | None = None
    number = 1
    try:
        for cells in reader:
            if names is None:
                names = cells
                if len(set(names)) < len(names) or not all(names):
                    raise DataError(
                        f"{path} line 1: every column needs a name of its own; found {', '.join(map(repr, names))}"
                    )
            elif cells:
                if len(cells) != len(names):
                    raise DataError(
                        f"{path} line {number}: {len(cells)} columns, and the first line names {len(names)}"
                    )
                yield number, dict(zip(names, cells, strict=True))
            number = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path} line {number}: not a table that can be read ({error})") from error


class _Parquet:
    """The needed columns of one file, held in memory as Arrow data."""

    def __init__(self, path: str, source: SourceConfig):
        self._path = path
        with pyarrow.parquet.ParquetFile(_unpacked(path) if is_packed(path) else path) as file:
            names = file.schema_arrow.names
            wanted = {*required_fields(source), "loss_mask"}
            # Without any wanted column one other is read, so that the error about the missing field can name what is
            # there.
            self._table = file.read(
                columns=[name for name in names if name in wanted] if wanted & set(names) else names
            )

    def where(self, index: int) -> str:
        return f"{self._path} row {index}"

    def __len__(self) -> int:
        return self._table.num_rows

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            return {name: self._table[name][index].as_py() for name in self._table.column_names}
        # text that is not UTF-8, times that Python has no type for
        except (ValueError, pyarrow.ArrowException) as error:
            raise DataError(f"{self.where(index)}: {error}") from error


class _PlainText:
    """One file, one document."""

    def __init__(self, path: str, source: SourceConfig):
        self._path, self._field = path, source.text_field
        self._checksum = zlib.crc32(_text(path).encode())

    def where(self, index: int) -> str:
        return self._path

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> dict[str, str]:
        try:
            text = _text(self._path)
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            raise DataError(f"cannot read {self._path}: {error}") from error
        if zlib.crc32(text.encode()) != self._checksum:
            raise DataError(f"{self._path}: {CHANGED}")
        return {self._field: io.StringIO(text, newline=None).read()}


def _zstandard(path: str) -> BinaryIO:
    return pyarrow.input_stream(path, compression="zstd")


PACKED: Mapping[str, Callable[[str], BinaryIO]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _zstandard,
}
READERS: Mapping[str, Callable[[str, SourceConfig], Reader]] = {
    ".jsonl": JsonRecords.of_lines,
    ".ndjson": JsonRecords.of_lines,
    ".json": _json,
    ".csv": _table(","),
    ".tsv": _table("\t"),
    ".parquet": _Parquet,
    ".txt": _PlainText,
}
# the others hold records of every format
FORMATS = {".csv": ("text", "completion"), ".tsv": ("text", "completion"), ".txt": ("text",)}


def _unpacked(path: str) -> BinaryIO:
    """The bytes of a file; a compressed one is unpacked to a temporary file first."""
    if not is_packed(path):
        return open(path, "rb")
    unpacked = tempfile.TemporaryFile()  # noqa: SIM115, the caller closes it
    with PACKED[Path(path).suffix.lower()](path) as file:
        shutil.copyfileobj(file, unpacked)
    unpacked.seek(0)
    return unpacked


def _text(path: str) -> str:
    """The text of a whole file. Raises DataError, with the line, for bytes that are not UTF-8."""
    with _unpacked(path) as file:
        raw = file.read()
    _refuse_utf_16(raw, path)
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path} is not UTF-8 text (byte {error.start}) on line {line}; convert it first: iconv -f latin1 -t utf-8"
        ) from error


def _refuse_utf_16(raw: bytes, path: str) -> None:
    if raw.startswith(UTF_16):
        raise DataError(f"{path} line 1: this is UTF-16; convert it first: iconv -f utf-16 -t utf-8")

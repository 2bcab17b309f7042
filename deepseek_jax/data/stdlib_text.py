"""The Python standard library's own source as a TFDS dataset: real text on any machine, with no download and no TensorFlow."""

import contextlib
import functools
import hashlib
import io
import platform
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import absl.logging
import tensorflow_datasets as tfds

from deepseek_jax.errors import DataError

VALIDATION_PERCENT = 5
# Other people's packages, tests, help texts and character tables; _sysconfigdata holds the paths of one machine.
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "pydoc_data", "encodings", "lib2to3", "__pycache__"}
_SKIPPED_PREFIX = "_sysconfigdata"


class StdlibText(tfds.core.GeneratorBasedBuilder):
    """Features `path` and `text`. Which of the two splits a file is in, and the order of files, depend on the hash of its path alone."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, files: Sequence[Path] = (), **kwargs):
        self._files = files
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Source files of the Python standard library of the running interpreter.",
            features=tfds.features.FeaturesDict({"path": tfds.features.Text(), "text": tfds.features.Text()}),
        )

    def _split_generators(self, dl_manager) -> dict[str, Any]:
        splits: dict[str, list[Path]] = {"train": [], "validation": []}
        for file in self._files:
            splits["validation" if _path_hash(file) % 100 < VALIDATION_PERCENT else "train"].append(file)
        return {name: self._generate_examples(files) for name, files in splits.items()}

    def _generate_examples(self, files: Sequence[Path]) -> Iterator[tuple[str, dict[str, str]]]:
        for file in files:
            name = file.relative_to(_root()).as_posix()
            yield name, {"path": name, "text": file.read_text(encoding="utf-8", errors="replace")}


def prepare(data_dir: str | None, max_bytes: int | None) -> tfds.core.DatasetBuilder:
    """The prepared dataset, from the cache where it is there.

    The cache key holds the interpreter's version and a hash of the chosen files' names and sizes, so another interpreter or
    another `max_bytes` never reads the wrong text. Preparation writes to a temporary folder and renames it.
    """
    files = _choose(max_bytes)
    listing = "\n".join(f"{file.relative_to(_root()).as_posix()} {file.stat().st_size}" for file in files)
    config = tfds.core.BuilderConfig(
        name=f"py{platform.python_version()}-{hashlib.blake2b(listing.encode(), digest_size=6).hexdigest()}",
        description=f"{len(files)} files",
    )
    make = functools.partial(StdlibText, files=files, config=config, data_dir=data_dir, file_format="array_record")
    with _quiet():
        builder = make()
        if builder.is_prepared():
            return builder
        try:
            builder.download_and_prepare()
        except OSError as error:
            builder = make()  # another process may have put the same dataset in place meanwhile
            if not builder.is_prepared():
                raise DataError(
                    f"cannot prepare the stdlib dataset in {builder.data_dir}: {error}; set data.data_dir to a folder that can be written"
                ) from error
    return builder


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Half a second's preparation is not worth TFDS's dozen progress lines and warnings."""
    verbosity = absl.logging.get_verbosity()
    absl.logging.set_verbosity(absl.logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        absl.logging.set_verbosity(verbosity)


def _root() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _path_hash(file: Path) -> int:
    return int.from_bytes(hashlib.blake2b(file.relative_to(_root()).as_posix().encode(), digest_size=8).digest(), "big")


def _choose(max_bytes: int | None) -> list[Path]:
    """The files that count, in hash order (a fair sample whatever the cap), up to `max_bytes` in total."""
    chosen, total = [], 0
    for file in sorted(_python_files(_root()), key=_path_hash):
        size = file.stat().st_size
        if size == 0 or (max_bytes is not None and total + size > max_bytes):
            continue
        chosen.append(file)
        total += size
    return chosen


def _python_files(folder: Path) -> Iterator[Path]:
    for entry in folder.iterdir():
        if entry.is_dir():
            if entry.name not in _SKIPPED_FOLDERS:
                yield from _python_files(entry)
        elif entry.suffix == ".py" and not entry.name.startswith(_SKIPPED_PREFIX):
            yield entry

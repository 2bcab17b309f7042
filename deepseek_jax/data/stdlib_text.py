"""The Python standard library's own source as a TFDS dataset: real text on any machine, without a download or
TensorFlow."""

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
# Other people's packages, tests, help texts and character tables.
SKIPPED_FOLDERS = frozenset(
    (
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "idle_test",
        "idlelib",
        "pydoc_data",
        "encodings",
        "lib2to3",
        "__pycache__",
    )
)


class StdlibText(tfds.core.GeneratorBasedBuilder):
    """Features `path` and `text`. A file's split and place in the order depend on the hash of its path alone."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, root: Path = Path(), paths: Sequence[str] = (), **kwargs):
        self._root = root
        self._paths = paths  # relative to root
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Source files of the Python standard library of the running interpreter.",
            features=tfds.features.FeaturesDict({"path": tfds.features.Text(), "text": tfds.features.Text()}),
        )

    def _split_generators(self, dl_manager) -> dict[str, Any]:
        splits: dict[str, list[str]] = {"train": [], "validation": []}
        for path in self._paths:
            splits["validation" if _hash(path) % 100 < VALIDATION_PERCENT else "train"].append(path)
        return {name: self._generate_examples(paths) for name, paths in splits.items()}

    def _generate_examples(self, paths: Sequence[str]) -> Iterator[tuple[str, dict[str, str]]]:
        for path in paths:
            yield path, {"path": path, "text": (self._root / path).read_text(encoding="utf-8", errors="replace")}


def prepare(data_dir: str | None, max_bytes: int | None) -> tfds.core.DatasetBuilder:
    """The prepared dataset, from the cache if it is there.

    The cache key holds the interpreter's version and a hash of the chosen files' names and sizes, so another
    interpreter or another `max_bytes` never reads the wrong text. Preparation writes to a temporary folder and renames
    it.

    Raises DataError if the folder cannot be written.
    """
    root = Path(sysconfig.get_path("stdlib"))
    sizes = _choose(root, max_bytes)
    listing = hashlib.blake2b(repr(sizes).encode(), digest_size=6).hexdigest()
    config = tfds.core.BuilderConfig(name=f"py{platform.python_version()}-{listing}", description=f"{len(sizes)} files")
    make = functools.partial(
        StdlibText, root=root, paths=list(sizes), config=config, data_dir=data_dir, file_format="array_record"
    )
    with _quiet():
        builder = make()
        try:
            builder.download_and_prepare()  # returns at once where the dataset is there
        except OSError as error:
            builder = make()  # another process may have put the same dataset in place meanwhile
            if not builder.is_prepared():
                raise DataError(
                    f"cannot prepare the stdlib dataset in {builder.data_dir}: {error}; set data.data_dir to a folder "
                    "that can be written"
                ) from error
    return builder


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences TFDS, whose dozen progress lines and warnings are too much for half a second's preparation."""
    verbosity = absl.logging.get_verbosity()
    absl.logging.set_verbosity(absl.logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        absl.logging.set_verbosity(verbosity)


def _hash(path: str) -> int:
    return int.from_bytes(hashlib.blake2b(path.encode(), digest_size=8).digest(), "big")


def _choose(root: Path, max_bytes: int | None) -> dict[str, int]:
    """Path -> size, in hash order (a fair sample for any cap), up to `max_bytes` in total."""
    sizes = {file.relative_to(root).as_posix(): file.stat().st_size for file in _python_files(root)}
    chosen, total = {}, 0
    for path in sorted(sizes, key=_hash):
        if sizes[path] and (max_bytes is None or total + sizes[path] <= max_bytes):
            chosen[path] = sizes[path]
            total += sizes[path]
    return chosen


def _python_files(folder: Path) -> Iterator[Path]:
    for entry in folder.iterdir():
        if entry.is_dir():
            if entry.name not in SKIPPED_FOLDERS:
                yield from _python_files(entry)
        elif entry.suffix == ".py" and not entry.name.startswith("_sysconfigdata"):  # the paths of one machine
            yield entry

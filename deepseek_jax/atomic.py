"""Writes files and folders that appear complete or not at all.

Everything is written under a name of its own in the same folder and renamed at the end. So a reader never meets half a
file, two writers never write into the same file, and an exception leaves the old file, or none, as it was.
"""

import contextlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

from deepseek_jax.errors import CheckpointError


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a temporary path in the folder of `path`, which is made if needed, and renames it to `path` at the end.

    The bytes are on the disk before the name is, so that after a crash of the machine `path` is the old file or the new
    one. On an exception the temporary file is removed. Raises OSError where nothing can be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.partial")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def atomic_write(path: Path, content: str | bytes) -> None:
    """Replaces the file `path` by `content`; text as UTF-8. As `atomic_path` otherwise."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def check_absent(folder: Path) -> None:
    """Raises CheckpointError if `folder` exists."""
    if folder.exists():
        raise CheckpointError(f"{folder} already exists and is not overwritten; remove it or choose another name")


@contextlib.contextmanager
def atomic_folder(folder: Path, needed_bytes: int = 0) -> Iterator[Path]:
    """Yields a temporary folder in the parent of `folder` and renames it to `folder` at the end, or removes it on an
    exception.

    Raises CheckpointError if `folder` exists, if the disk has less than `needed_bytes` free, or if writing fails.
    """
    check_absent(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder.parent).free
        if free < needed_bytes:
            raise CheckpointError(
                f"{folder} needs {needed_bytes:,} bytes, its disk has {free:,} free; free some or choose another place"
            )
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".partial", dir=folder.parent))
    except OSError as error:
        raise CheckpointError(f"can't write {folder}: {error.strerror}; choose another place") from error
    try:
        yield temporary
        os.chmod(temporary, 0o755)  # mkdtemp's is private
        os.rename(temporary, folder)
    except OSError as error:
        raise CheckpointError(f"can't write {folder}: {error.strerror}; nothing was left behind") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)

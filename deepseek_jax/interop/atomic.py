"""Output folders that appear complete or not at all."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from deepseek_jax.errors import CheckpointError


def check_absent(folder: Path) -> None:
    """Raises CheckpointError if `folder` is already there."""
    if folder.exists():
        raise CheckpointError(f"{folder} already exists and is not overwritten; remove it or choose another name")


@contextlib.contextmanager
def new_folder(folder: Path, needed_bytes: int = 0) -> Iterator[Path]:
    """Yields a hidden folder beside `folder` to build in; renames it to `folder` at the end, or removes it on any
    error.

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
        building = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".partial", dir=folder.parent))
    except OSError as error:
        raise CheckpointError(f"can't write {folder}: {error.strerror}; choose another place") from error
    try:
        yield building
        os.chmod(building, 0o755)  # mkdtemp's is private
        os.rename(building, folder)
    except OSError as error:
        raise CheckpointError(f"can't write {folder}: {error.strerror}; nothing was left behind") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)

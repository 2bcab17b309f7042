"""Files and folders appear complete or not at all, also with other writers and after failures."""

import os
import threading

import pytest

from deepseek_jax.atomic import atomic_folder, atomic_path, atomic_write
from deepseek_jax.errors import CheckpointError


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_and_its_folder_made(tmp_path):
    path = tmp_path / "new" / "file.json"
    atomic_write(path, "naïve")
    assert path.read_bytes() == "naïve".encode() and names(path.parent) == ["file.json"]
    atomic_write(path, b"\xff")
    assert path.read_bytes() == b"\xff" and names(path.parent) == ["file.json"]
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()


def test_an_exception_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "table.csv"
    atomic_write(path, "old")
    with pytest.raises(RuntimeError, match="half"), atomic_path(path) as temporary:
        temporary.write_text("ne")
        assert path.read_text() == "old"  # a reader meanwhile
        raise RuntimeError("half way")
    assert path.read_text() == "old" and names(tmp_path) == ["table.csv"]
    with pytest.raises(FileNotFoundError), atomic_path(path):
        pass  # nothing was written
    assert path.read_text() == "old" and names(tmp_path) == ["table.csv"]


def test_two_writers_do_not_meet(tmp_path):
    path, barrier = tmp_path / "file", threading.Barrier(2, timeout=20)

    def write(text):
        with atomic_path(path) as temporary, temporary.open("w") as file:
            barrier.wait()
            file.write(text[:1000])
            barrier.wait()
            file.write(text[1000:])

    writers = [threading.Thread(target=write, args=(letter * 2000,)) for letter in "ab"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert path.read_text() in ("a" * 2000, "b" * 2000) and names(tmp_path) == ["file"]


def test_the_bytes_reach_the_disk_before_the_name(tmp_path, monkeypatch):
    path, synced = tmp_path / "file", []

    def fsync(descriptor):
        synced.append((os.readlink(f"/proc/self/fd/{descriptor}"), path.exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    atomic_write(path, "text")
    assert [(name.endswith(".partial"), exists) for name, exists in synced] == [(True, False)]


def test_a_folder_appears_at_the_end(tmp_path):
    with atomic_folder(tmp_path / "new") as building:
        (building / "file").write_text("text")
        assert not (tmp_path / "new").exists()
    assert names(tmp_path) == ["new"] and names(tmp_path / "new") == ["file"]
    with pytest.raises(CheckpointError, match="already exists"), atomic_folder(tmp_path / "new"):
        pass
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "other") as building:
        (building / "file").write_text("text")
        raise RuntimeError
    assert names(tmp_path) == ["new"]


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask

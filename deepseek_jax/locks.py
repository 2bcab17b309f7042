"""Locks: one process at a time holds a file; the lock is free as soon as the process ends, even when it is killed."""

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from deepseek_jax.errors import ConfigError


@contextlib.contextmanager
def lock(path: Path, in_use: str) -> Iterator[int | None]:
    """Holds the file `path` and yields its descriptor for child processes to inherit: the lock is free once all that
    hold it have ended. Yields None where the file system has no locks (a mounted bucket).

    Raises ConfigError if it is held, saying what is `in_use`, and by which process.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{in_use} ({os.read(descriptor, 200).decode(errors='replace').strip() or 'by another process'})"
            ) from None
        except OSError:
            yield None
            return
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield descriptor
    finally:
        os.close(descriptor)

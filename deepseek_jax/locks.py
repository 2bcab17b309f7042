"""One process at a time, by a lock that its process holds: whoever dies lets go of it, however it dies."""

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from deepseek_jax.errors import ConfigError


@contextlib.contextmanager
def lock(path: Path, in_use: str) -> Iterator[int | None]:
    """Holds the file `path` and gives its descriptor, for child processes to inherit: it is free once all that hold it
    have ended. None where the file system has no locks (a mounted bucket).

    Raises ConfigError saying what is `in_use`, and by whom, if it is held.
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

"""State of a run, in its folder: `status.json`, which `execute` writes, and the lock that it holds meanwhile."""

import contextlib
import dataclasses
import math
import re
import signal
from pathlib import Path

from deepseek_jax import locks
from deepseek_jax.atomic import atomic_write
from deepseek_jax.errors import ConfigError
from deepseek_jax.fields import build
from deepseek_jax.json_io import read_json, to_json
from deepseek_jax.ranges import at_least, check, one_of

LOG = "output.log"
STATES = ("missing", "running", "done", "stopped", "failed")
# What `python -m deepseek_jax` exits with when it should be started again: it was asked to stop and has saved, or lost
# another host (75).
STOPPED = (128 + signal.SIGTERM, 128 + signal.SIGINT, 75)


@dataclasses.dataclass(frozen=True)
class Status:
    """`state` is "missing", "running", "done", "stopped" (resumes when it is started again) or "failed"; `seconds` adds
    up over restarts."""

    state: str = "missing"
    exit_status: int | None = None
    seconds: float = 0.0

    def __post_init__(self):
        check(self, "status.", state=one_of(STATES), seconds=at_least(0, below=math.inf))


def read_status(folder: Path) -> Status:
    """The status in `folder`. A run that was killed while it ran counts as stopped. Raises ConfigError for a damaged
    file."""
    path = folder / "status.json"
    if not path.exists():
        return Status()
    fields = read_json(path, f"remove it to run {folder.name} again", ConfigError)
    try:
        status = build(Status, fields, "status")
    except ConfigError as error:
        raise ConfigError(f"{path} is damaged ({error}); remove it to run {folder.name} again") from None
    if status.state == "running" and not is_locked(folder):
        return dataclasses.replace(status, state="stopped")
    return status


def write_status(folder: Path, status: Status) -> None:
    atomic_write(folder / "status.json", to_json(dataclasses.asdict(status)) + "\n")


def lock(folder: Path) -> contextlib.AbstractContextManager[int | None]:
    """Holds the folder for one run at a time and gives the descriptor, see `locks.lock`. Raises ConfigError if it is
    held."""
    return locks.lock(folder / "lock", f"{folder} is in use: the run is still going on")


def is_locked(folder: Path) -> bool:
    if not (folder / "lock").exists():
        return False
    try:
        with lock(folder):
            return False
    except ConfigError:
        return True


def last_lines(folder: Path, count: int = 12) -> str:
    """The end of a run's output; "" without any."""
    path = folder / LOG
    if not path.exists():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 16_384))
        return "\n".join(file.read().decode(errors="replace").splitlines()[-count:])


def progress_line(folder: Path) -> str:
    """The newest line of a run's output that shows its progress ("pretrain 20/60 …"); "" without one."""
    lines = (line.strip() for line in reversed(last_lines(folder, 50).splitlines()))
    return next((line for line in lines if re.search(r"(?<![\d/])\d+/\d+(?![\d/])", line)), "")

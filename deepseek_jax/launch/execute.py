"""python -m deepseek_jax.launch.execute --folder=F [--rank=0] -- COMMAND …

Runs a command, appends its output to F/output.log and records in F/status.json how it ended. Exits with the command's
status. Every launcher starts its runs through this. To stop a run, signal its process group: the command saves and
exits, and this process waits for it. Of a run on several hosts, only the process of rank 0 writes the status.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from deepseek_jax import cli
from deepseek_jax.launch.state import LOG, STOPPED, Status, lock, read_status, write_status
from deepseek_jax.signals import catch_signals


def execute(command: Sequence[str], folder: Path) -> int:
    """Runs `command` to its end and returns its exit status, 128 + n if signal n ended it. Raises ConfigError if it
    runs already."""
    folder.mkdir(parents=True, exist_ok=True)
    with lock(folder) as descriptor:
        if descriptor is None:
            print(
                f"{folder} is on a file system without locks: see to it that no other launcher runs {folder.name} at "
                "the same time",
                flush=True,
            )
        before, begin = read_status(folder).seconds, time.time()
        write_status(folder, Status("running", seconds=before))
        status = _run(command, folder / LOG, () if descriptor is None else (descriptor,))
        state = "done" if status == 0 else "stopped" if status in STOPPED else "failed"
        write_status(folder, Status(state, status, before + time.time() - begin))
    return status


def _run(command: Sequence[str], log: Path, descriptors: Sequence[int] = ()) -> int:
    log.parent.mkdir(parents=True, exist_ok=True)
    # A signal to the process group is for the command to act on; this process goes on to wait for it.
    with log.open("ab") as file, catch_signals(lambda _: None):
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, pass_fds=descriptors
        )
        status = process.wait()
    return status if status >= 0 else 128 - status


def start(command: Sequence[str], folder: Path, environment: Mapping[str, str] = {}, rank: int = 0) -> subprocess.Popen:
    """Starts this module on `command` in a process group of its own, with `environment` on top of this process's
    own."""
    return subprocess.Popen(
        [sys.executable, "-m", "deepseek_jax.launch.execute", f"--folder={folder}", f"--rank={rank}", "--", *command],
        env=os.environ | environment,
        start_new_session=True,
    )


def stop(process: subprocess.Popen) -> None:
    """Asks a run that `start` started to save and exit."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m deepseek_jax.launch.execute", allow_abbrev=False)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("command", nargs="+")
    flags = parser.parse_args(argv)
    # for the command too: SLURM sends it to every process of a job that is about to end
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    if flags.rank:
        return _run(flags.command, flags.folder / f"output.{flags.rank}.log")
    return execute(flags.command, flags.folder)


if __name__ == "__main__":
    cli.run(main)

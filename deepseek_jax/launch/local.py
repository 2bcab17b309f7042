"""The local launcher: runs on this machine, a given number of them at a time."""

import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence

from deepseek_jax.launch.execute import start, stop
from deepseek_jax.launch.jobs import Job
from deepseek_jax.launch.state import LOG, STOPPED, last_lines, progress_line, read_status
from deepseek_jax.signals import catch_signals

PROGRAM = (sys.executable, "-m", "deepseek_jax")


class LocalLauncher:
    """Runs `slots` jobs at a time, each in a process of its own.

    `environment` is set for them; "{slot}" in a value is the slot's number, from 0: {"CUDA_VISIBLE_DEVICES": "{slot}"}.
    Where there are as many cores as slots, each slot has its share of them. Every `report_seconds` the progress of each
    run is printed, if it has advanced.
    """

    def __init__(
        self,
        slots: int = 1,
        environment: Mapping[str, str] | None = None,
        program: Sequence[str] = PROGRAM,
        poll_seconds: float = 0.2,
        report_seconds: float = 30.0,
    ):
        self.report_seconds = report_seconds
        self.slots, self.environment, self.program, self.poll_seconds = (
            slots,
            dict(environment or {}),
            program,
            poll_seconds,
        )
        # Linux alone can divide them
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        self.cores = [cores[slot::slots] for slot in range(slots)] if slots <= len(cores) else None

    def launch(self, jobs: Sequence[Job]) -> int:
        """Runs all jobs and returns how many failed.

        After SIGTERM or Ctrl-C it starts no more jobs, passes SIGTERM on so that the runs save, waits for them and
        raises KeyboardInterrupt; a second signal, passed on too, ends them at once.
        """
        waiting, running, failed, passed_on = deque(enumerate(jobs, start=1)), {}, 0, 0
        if self.cores is None:
            print(
                f"{self.slots} slots and fewer cores, or cores that cannot be divided here: all runs share them",
                flush=True,
            )
        received: list[signal.Signals] = []
        begin, shown = time.monotonic(), {}
        reported = begin
        with catch_signals(received.append):
            while running or (waiting and not received):
                for slot in range(self.slots):
                    if slot not in running and waiting and not received:
                        number, job = waiting.popleft()
                        print(f"[{number}/{len(jobs)}] {job.name} starts in slot {slot}", flush=True)
                        running[slot] = (f"[{number}/{len(jobs)}]", job, self._start(job, slot))
                time.sleep(self.poll_seconds)
                if len(received) > passed_on:
                    passed_on = len(received)
                    for _, _, process in running.values():
                        stop(process)
                for slot, (label, job, process) in list(running.items()):
                    if process.poll() is not None:
                        del running[slot]
                        failed += self._report(label, job, process.returncode)
                        self._time_left(begin, len(jobs) - len(waiting) - len(running), len(waiting) + len(running))
                if time.monotonic() - reported >= self.report_seconds:
                    reported = time.monotonic()
                    for label, job, _ in running.values():
                        if (line := progress_line(job.folder)) and shown.get(job.name) != line:
                            shown[job.name] = line
                            print(f"{label} {job.name}: {line}", flush=True)
        if received:
            raise KeyboardInterrupt
        return failed

    def _start(self, job: Job, slot: int) -> subprocess.Popen:
        environment = {name: value.replace("{slot}", str(slot)) for name, value in self.environment.items()}
        process = start([*self.program, *job.arguments], job.folder, environment)
        if self.cores is not None:
            os.sched_setaffinity(process.pid, self.cores[slot])
        return process

    @staticmethod
    def _time_left(begin: float, ended: int, left: int) -> None:
        """Prints how long the remaining runs will take if they take as long as those that have ended."""
        if left:
            seconds = (time.monotonic() - begin) / ended * left
            time_left = f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
            print(f"{ended} of {ended + left} runs have ended, about {time_left} left", flush=True)

    @staticmethod
    def _report(label: str, job: Job, exit_status: int) -> bool:
        """Prints how a run ended, with its last lines if it failed. Returns whether it did."""
        status = read_status(job.folder)
        print(f"{label} {job.name} {status.state} after {status.seconds:.0f} s", flush=True)
        if exit_status in (0, *STOPPED):
            return False
        print(f"    exit status {exit_status}; the last lines of {job.folder / LOG}:")
        print("\n".join(f"    | {line}" for line in last_lines(job.folder).splitlines()), flush=True)
        return True

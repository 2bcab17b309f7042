"""The process that a SLURM job starts on each of its nodes. It is unpickled there, so this module imports little."""

import contextlib
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import submitit

from deepseek_jax.launch.execute import start, stop


class RunOnNode:
    """Starts one process on a node, which drives all of the node's devices.

    submitit calls `checkpoint` when the job is preempted or its time is up; the run saves, and the job is queued again.
    """

    def __init__(self, command: Sequence[str], folder: Path):
        self.command, self.folder = list(command), folder
        self.process: subprocess.Popen | None = None

    def __call__(self) -> int:
        rank = submitit.JobEnvironment().global_rank
        self.process = start(self.command, self.folder, rank=rank)
        return self.process.wait()

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        if self.process is not None:
            stop(self.process)
            # not `process.wait`: this may interrupt one, which holds its lock
            with contextlib.suppress(ChildProcessError):
                os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)
        return submitit.helpers.DelayedSubmission(RunOnNode(self.command, self.folder))

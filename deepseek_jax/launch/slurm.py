"""The SLURM launcher, through submitit: an array of jobs for all runs on the same kind of machine."""

import re
import sys
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import submitit

from deepseek_jax.atomic import atomic_write
from deepseek_jax.errors import ConfigError
from deepseek_jax.launch.jobs import Job
from deepseek_jax.launch.node import RunOnNode
from deepseek_jax.launch.resources import job_parameters

PROGRAM = (sys.executable, "-m", "deepseek_jax")


class SlurmLauncher:
    """Submits jobs and returns.

    `parameters` are submitit's own (slurm_partition, slurm_account, cpus_per_task, …) and override those that follow
    from a run's resources. `cluster` "local" is submitit's executor for a machine without SLURM.
    """

    def __init__(
        self,
        workdir: Path,
        parameters: Mapping[str, Any] | None = None,
        cluster: str = "slurm",
        program: Sequence[str] = PROGRAM,
    ):
        self.folder, self.parameters, self.cluster, self.program = (
            workdir / "slurm",
            dict(parameters or {}),
            cluster,
            program,
        )
        if cluster == "slurm" and submitit.SlurmExecutor.affinity() < 0:
            raise ConfigError("--launcher=slurm: this machine has no sbatch; start it on the cluster's login node")

    def launch(self, jobs: Sequence[Job]) -> int:
        """Submits those of `jobs` that are not queued yet. Returns 0: nothing has failed yet.

        Raises ConfigError, before the first is submitted, for a run that SLURM has no machines for.
        """
        for job in jobs:
            job_parameters(job.run.resources)
        jobs = [job for job in jobs if not self._queued(job)]
        key = lambda job: (job.run.resources.topology, job.run.resources.hours)
        for _, group in groupby(sorted(jobs, key=key), key=key):
            self._submit(list(group))
        return 0

    def _queued(self, job: Job) -> bool:
        path = job.folder / "slurm_job"
        if not path.exists():
            return False
        number = path.read_text(encoding="utf-8", errors="replace").strip()
        if not re.fullmatch(r"\d+(_\d+)?", number):
            raise ConfigError(
                f"{path} is damaged ({number[:20]!r} is not the number of a job): look for {job.name} in "
                "`squeue`, then write its number there or remove the file"
            )
        submitted = _job_class(self.cluster)(self.folder, number)
        if submitted.done():
            return False
        print(f"{job.name} is job {submitted.job_id}, {submitted.state.lower()}: left alone")
        return True

    def _submit(self, jobs: Sequence[Job]) -> list[submitit.Job]:
        # how often a job may use up its time and resume
        limits = {"slurm_max_num_timeout": 10_000} if self.cluster == "slurm" else {}
        executor = submitit.AutoExecutor(self.folder, cluster=self.cluster, **limits)
        resources = jobs[0].run.resources
        executor.update_parameters(**job_parameters(resources, self.cluster) | self.parameters)
        tasks = [RunOnNode([*self.program, *job.arguments], job.folder.absolute()) for job in jobs]
        with executor.batch():
            submitted = [executor.submit(task) for task in tasks]
        for job, at in zip(jobs, submitted, strict=True):
            atomic_write(job.folder / "slurm_job", at.job_id)
            print(f"{job.name} is job {at.job_id}: {resources.num_nodes} × {resources.gpus_on_a_node or 'no'} GPUs")
        return submitted


def _job_class(cluster: str) -> type[submitit.Job]:
    return submitit.SlurmJob if cluster == "slurm" else submitit.LocalJob

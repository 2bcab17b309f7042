"""The cloud launcher, through SkyPilot: one task file per run, launched as a managed job.

A managed job whose machines are taken away gets new ones, anywhere, and starts again. The run's folder is on a bucket
that is mounted there too, so it resumes from its newest checkpoint.
"""

import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from deepseek_jax.atomic import atomic_write
from deepseek_jax.errors import ConfigError
from deepseek_jax.launch.jobs import Job, arguments
from deepseek_jax.launch.resources import Resources
from deepseek_jax.launch.state import STOPPED

MOUNT = PurePosixPath("/runs")  # where the bucket is on the machines
ENVIRONMENT = "~/deepseek_jax_env"
PORT = 8476
BUCKETS = {"gs://": "gcloud storage rsync -r", "s3://": "aws s3 sync"}
UNFINISHED = ("PENDING", "SUBMITTED", "STARTING", "RUNNING", "WINDING_DOWN", "RECOVERING")


class SkyPilotLauncher:
    """Launches managed jobs.

    `bucket` is "gs://NAME" or "s3://NAME" and holds a folder for the sweep; `infra` is SkyPilot's, "gcp/us-east5", or
    None for any place that has machines. `install` is the pip target on the machines, None for the extra that suits
    them.
    """

    def __init__(
        self, sweep: str, workdir: Path, bucket: str | None, infra: str | None = None, install: str | None = None
    ):
        if bucket is None or not bucket.startswith(tuple(BUCKETS)):
            raise ConfigError(
                f"--launcher=skypilot keeps the runs on a bucket: pass --bucket=gs://NAME or s3://NAME, not {bucket!r}"
            )
        self.sweep, self.workdir, self.bucket, self.infra, self.install = (
            sweep,
            workdir,
            bucket.rstrip("/"),
            infra,
            install,
        )

    def launch(self, jobs: Sequence[Job]) -> int:
        """Writes every task file, then launches the jobs that are neither running nor finished at SkyPilot. Returns how
        many it refused.

        Raises ConfigError without SkyPilot, naming the files.
        """
        files = [(job, self._write(job)) for job in jobs]
        fetch = next(command for scheme, command in BUCKETS.items() if self.bucket.startswith(scheme))
        if shutil.which("sky") is None:
            raise ConfigError(
                "SkyPilot is not installed: pip install 'skypilot[gcp]' (or [aws], [kubernetes], …), then `sky check` "
                "and this command again. "
                f"The {len(files)} task files are in {self.workdir}/*/skypilot.yaml; each can also be launched by `sky "
                "jobs launch FILE`"
            )
        states, refused = _queue(), 0
        for job, path in files:
            name = f"{self.sweep}-{job.name}"
            if states.get(name) in (*UNFINISHED, "SUCCEEDED"):
                print(f"{name} is {states[name].lower()} at SkyPilot: left alone")
                continue
            print(f"{name}: {job.run.resources.topology}, {path}", flush=True)
            refused += (
                subprocess.run(["sky", "jobs", "launch", "--yes", "--detach-run", "--name", name, str(path)]).returncode
                != 0
            )
        print(f"results: {fetch} {self.bucket}/{self.sweep} {self.workdir}, then this command with --results")
        return refused

    def _write(self, job: Job) -> Path:
        path = job.folder / "skypilot.yaml"
        fields = task(job, self.sweep, self.bucket, self.infra, self.install)
        atomic_write(path, yaml.dump(fields, Dumper=_Dumper, sort_keys=False, width=1000))
        return path


def task(job: Job, sweep: str, bucket: str, infra: str | None = None, install: str | None = None) -> dict[str, Any]:
    """The fields of a run's SkyPilot task. Raises ConfigError for a topology that SkyPilot does not offer and for an
    experiment file outside the working directory, which is the folder that is copied to the machines."""
    resources, folder = job.run.resources, MOUNT / sweep / job.name
    experiment = os.path.relpath(job.experiment)
    if experiment.startswith(".."):
        raise ConfigError(
            f"{job.experiment} is outside the working directory, which is all that SkyPilot copies: start from the "
            "folder that holds it"
        )
    wanted: dict[str, Any] = {
        "infra": infra,
        "accelerators": resources.accelerators,
        "accelerator_args": {"runtime_version": resources.runtime_version} if resources.runtime_version else None,
        "cpus": None if resources.accelerators else "4+",
        "use_spot": resources.spot,
        "job_recovery": {"max_restarts_on_errors": 0, "recover_on_exit_codes": list(STOPPED)},
    }
    extra = "cuda" if resources.is_gpu else "tpu" if resources.accelerators else None
    return {
        "name": f"{sweep}-{job.name}",
        "workdir": ".",
        "num_nodes": resources.num_nodes,
        "resources": {name: value for name, value in wanted.items() if value is not None},
        "file_mounts": {str(MOUNT): {"source": bucket, "mode": "MOUNT"}},
        "setup": _setup(install or (f".[{extra}]" if extra else ".")),
        "run": _run(resources, arguments(experiment, job.run, folder), folder),
    }


def _setup(install: str) -> str:
    return (
        "set -e\n"
        'export PATH="$HOME/.local/bin:$PATH"\n'
        "command -v uv || pip install uv\n"
        f"test -d {ENVIRONMENT} || uv venv --python 3.12 {ENVIRONMENT}\n"
        f"uv pip install --python {ENVIRONMENT}/bin/python -e {shlex.quote(install)}\n"
    )


def _run(resources: Resources, flags: Sequence[str], folder: PurePosixPath) -> str:
    """The script that SkyPilot runs on every host. TPU hosts find each other; GPU nodes get the coordinator's address
    and their ranks."""
    lines = ["set -e"]
    hosts = ""
    if resources.num_nodes > 1:
        lines.append('HEAD="$(echo "$SKYPILOT_NODE_IPS" | head -n1)"')
        hosts = (
            f' --coordinator="$HEAD:{PORT}" --num_processes="$SKYPILOT_NUM_NODES" --process_id="$SKYPILOT_NODE_RANK"'
        )
    python = f"{ENVIRONMENT}/bin/python"
    lines.append(
        f'exec {python} -m deepseek_jax.launch.execute --folder={folder} --rank="$SKYPILOT_NODE_RANK" -- '
        f"{python} -m deepseek_jax {shlex.join(flags)}{hosts}"
    )
    return "\n".join(lines) + "\n"


def _queue() -> dict[str, str]:
    """Managed jobs by name, with the status of the newest of each. Raises ConfigError if SkyPilot can't say."""
    command = ["sky", "jobs", "queue", "--all", "--output", "json"]
    answer = subprocess.run(command, capture_output=True, text=True)
    try:
        jobs = json.loads(answer.stdout)
        return {job["job_name"]: job["status"] for job in sorted(jobs, key=lambda job: job["job_id"])}
    except (ValueError, KeyError, TypeError):
        raise ConfigError(
            f"`{' '.join(command)}` did not list the jobs, so none was "
            f"launched:\n{(answer.stderr or answer.stdout)[-1000:]}"
        ) from None


class _Dumper(yaml.SafeDumper):
    """Writes scripts as literal blocks."""


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None),
)

"""SLURM through submitit: its local executor runs the jobs here, and its own code writes the batch file."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest
from launch_cases import ROOT, jobs_of, stand_in

from deepseek_jax.errors import ConfigError
from deepseek_jax.launch import Resources
from deepseek_jax.launch.state import read_status

submitit = pytest.importorskip("submitit")

from deepseek_jax.launch.node import RunOnNode  # noqa: E402
from deepseek_jax.launch.slurm import SlurmLauncher, job_parameters  # noqa: E402


@pytest.fixture
def launcher(tmp_path, monkeypatch):
    """With the handles of submitted jobs, which submitit's local executor needs to find its processes again."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    launcher = SlurmLauncher(tmp_path, cluster="local", program=stand_in(tmp_path))
    submit, launcher.submitted = launcher._submit, []
    launcher._submit = lambda jobs: launcher.submitted.extend(submit(jobs))
    return launcher


def test_jobs_run_and_leave_their_status(launcher, tmp_path):
    jobs = jobs_of(tmp_path, "a", "bad")
    assert launcher.launch(jobs) == 0
    assert [job.result() for job in launcher.submitted] == [0, 3]
    assert [read_status(job.folder).state for job in jobs] == ["done", "failed"]
    assert "argument: --config.seed=1" in (jobs[1].folder / "output.log").read_text()


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the job's process in /proc")
def test_a_preempted_job_saves_and_is_queued_again(launcher, tmp_path):
    (job,) = jobs_of(tmp_path, "slow")
    launcher.launch([job])
    end = time.monotonic() + 60
    while not (job.folder / "ready").exists():
        assert time.monotonic() < end
        time.sleep(0.05)
    controller = launcher.submitted[0].job_id
    (task,) = Path(f"/proc/{controller}/task/{controller}/children").read_text().split()
    os.kill(int(task), signal.SIGUSR2)  # what SLURM sends before it takes the machine away
    assert launcher.submitted[0].result() == 0
    assert (job.folder / "saved").exists() and len((job.folder / "starts").read_text().splitlines()) == 2
    assert read_status(job.folder).state == "done"


def test_a_job_in_the_queue_is_left_alone(tmp_path, capsys, monkeypatch):
    (job,) = jobs_of(tmp_path, "a")
    launcher = SlurmLauncher(tmp_path, cluster="local", program=stand_in(tmp_path))
    job.folder.mkdir()
    (job.folder / "slurm_job").write_text("17")
    monkeypatch.setattr(submitit.LocalJob, "get_info", lambda self, mode="force": {"jobState": "RUNNING"})
    launcher.launch([job])
    assert "a is job 17, running: left alone" in capsys.readouterr().out
    assert (job.folder / "slurm_job").read_text() == "17" and not (job.folder / "starts").exists()


@pytest.mark.parametrize("text", ["", "17\n18", "job", "\ufffd"])
def test_a_torn_job_number_is_refused_in_words(text, tmp_path):
    """A run in the queue must not be submitted twice, and whether it is there the file does not say."""
    (job,) = jobs_of(tmp_path, "a")
    job.folder.mkdir()
    (job.folder / "slurm_job").write_text(text)
    with pytest.raises(ConfigError, match="slurm_job is damaged.*squeue"):
        SlurmLauncher(tmp_path, cluster="local", program=stand_in(tmp_path)).launch([job])
    assert not (job.folder / "starts").exists()


def test_what_slurm_is_asked_for(tmp_path, monkeypatch):
    """With an sbatch that keeps what it is given: an array for the runs that want the same machines."""
    commands = tmp_path / "commands"
    commands.mkdir()
    for name, script in {
        "sbatch": f'n=$(ls {commands} | wc -l); cp "$1" {commands}/batch$n; echo "Submitted batch job $n"',
        "srun": "",
        "sacct": "",
    }.items():
        (commands / name).write_text(f"#!/bin/sh\n{script}\n")
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    large, small = (
        jobs_of(tmp_path, *names, resources=r)
        for names, r in ((("a", "b"), Resources("h100:64", hours=12)), (("c",), Resources()))
    )
    SlurmLauncher(tmp_path, {"slurm_partition": "gpu"}).launch([*large, *small])
    on_cpu, on_gpus = (path.read_text() for path in sorted(commands.glob("batch*")))
    for line in (
        "nodes=8",
        "ntasks-per-node=1",
        "gpus-per-node=8",
        "time=720",
        "requeue",
        "signal=USR2@300",
        "array=0-1%2",
        "partition=gpu",
    ):
        assert f"#SBATCH --{line}\n" in on_gpus
    assert "#SBATCH --nodes=1\n" in on_cpu and "array" not in on_cpu and "gpus" not in on_cpu
    assert [(job.folder / "slurm_job").read_text() for job in (*large, *small)] == ["4_0", "4_1", "3"]


def test_no_gpus_are_asked_for_on_a_cpu_and_no_tpus_at_all(tmp_path):
    assert "gpus_per_node" not in job_parameters(Resources())
    launcher = SlurmLauncher(tmp_path, cluster="local", program=stand_in(tmp_path))
    jobs = [*jobs_of(tmp_path, "a"), *jobs_of(tmp_path, "b", resources=Resources("v5p:4x4x4"))]
    with pytest.raises(ConfigError, match="not offered by SLURM"):
        launcher.launch(jobs)
    assert not jobs[0].folder.exists()  # refused before the first was submitted


def test_no_slurm_here(tmp_path):
    if submitit.SlurmExecutor.affinity() >= 0:
        pytest.skip("this machine has SLURM")
    with pytest.raises(ConfigError, match="no sbatch"):
        SlurmLauncher(tmp_path)


def test_one_process_a_node_and_only_the_first_keeps_the_status(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for name, value in {"SUBMITIT_EXECUTOR": "local", "SUBMITIT_LOCAL_GLOBALID": "1"}.items():
        monkeypatch.setenv(name, value)
    assert RunOnNode([sys.executable, "-c", "print('second')"], tmp_path)() == 0
    assert (tmp_path / "output.1.log").read_text() == "second\n" and not (tmp_path / "status.json").exists()

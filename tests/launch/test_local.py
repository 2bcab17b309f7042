"""Local slots, with a stand-in for the program: how many at a time, failures, starting again, being told to stop."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
from launch_cases import ROOT, jobs_of, stand_in

from deepseek_jax.errors import ConfigError
from deepseek_jax.launch.execute import execute, start, stop
from deepseek_jax.launch.local import LocalLauncher
from deepseek_jax.launch.state import last_lines, lock, read_status


def states(jobs):
    return [read_status(job.folder).state for job in jobs]


def spans(jobs):
    return [
        (float((job.folder / "starts").read_text().split()[0]), float((job.folder / "ends").read_text()))
        for job in jobs
    ]


@pytest.mark.parametrize("slots", [1, 2])
def test_as_many_at_a_time_as_there_are_slots(slots, tmp_path):
    jobs = jobs_of(tmp_path, "while_a", "while_b", "while_c", "while_d")
    assert LocalLauncher(slots, {"SLOT": "slot {slot}"}, stand_in(tmp_path), poll_seconds=0.02).launch(jobs) == 0
    times = spans(jobs)
    together = max(sum(begin <= at < end for begin, end in times) for at, _ in times)
    assert together == slots
    assert {(job.folder / "starts").read_text().split(maxsplit=1)[1].strip() for job in jobs} == {
        f"slot {i}" for i in range(slots)
    }


@pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2,
    reason="needs two cores that can be divided",
)
def test_slots_share_the_cores(tmp_path):
    jobs = jobs_of(tmp_path, "while_a", "while_b")
    LocalLauncher(2, program=stand_in(tmp_path), poll_seconds=0.02).launch(jobs)
    shares = [set((job.folder / "cores").read_text().split()) for job in jobs]
    assert not shares[0] & shares[1] and len(shares[0] | shares[1]) == len(os.sched_getaffinity(0))


def test_every_run_says_how_far_it_is(tmp_path, capsys):
    jobs = jobs_of(tmp_path, "while_a", "while_b", "c")
    LocalLauncher(2, program=stand_in(tmp_path), poll_seconds=0.02, report_seconds=0.05).launch(jobs)
    shown = capsys.readouterr().out.splitlines()
    for number, name in ((1, "while_a"), (2, "while_b")):
        steps = [
            int(found[1])
            for line in shown
            if (found := re.match(rf"\[{number}/3\] {name}: pretrain (\d)/7  loss 2.5  \d s, \d s left", line))
        ]
        assert steps and steps == sorted(set(steps))  # a line that has not changed is not shown again
    left = [line for line in shown if "runs have ended" in line]
    assert len(left) == 2 and left[0].startswith("1 of 3 runs have ended, about ") and left[1].startswith("2 of 3 ")


@pytest.mark.parametrize(
    "text",
    [
        '{"state": "do',
        "[]",
        "null",
        '{"state": "finished"}',
        '{"state": "done", "seconds": "x"}',
        '{"state": "done", "seconds": -1}',
        "\udcff",
    ],
)
def test_a_torn_status_is_refused_in_words(text, tmp_path):
    (tmp_path / "status.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ConfigError, match="status.json is damaged.*remove it"):
        read_status(tmp_path)


def test_a_failure_is_shown_and_stops_nothing(tmp_path, capsys):
    jobs = jobs_of(tmp_path, "a", "bad", "b")
    assert LocalLauncher(1, program=stand_in(tmp_path), poll_seconds=0.02).launch(jobs) == 1
    assert states(jobs) == ["done", "failed", "done"]
    shown = capsys.readouterr().out
    assert "bad failed" in shown and "exit status 3" in shown and "| the reason why" in shown
    assert read_status(jobs[1].folder).exit_status == 3
    assert "argument: --config.seed=2" in last_lines(jobs[2].folder)


LAUNCH = """
import sys; sys.path.insert(0, {tests!r})
from pathlib import Path
from launch_cases import jobs_of, stand_in
from deepseek_jax import cli
from deepseek_jax.launch.local import LocalLauncher
jobs = jobs_of(Path({folder!r}), "slow_a", "slow_b", "later")
cli.run(lambda _: LocalLauncher(2, program=stand_in(Path({folder!r}))).launch(jobs))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_told_to_stop_the_runs_save_and_go_on_the_next_time(number, tmp_path):
    code = LAUNCH.format(tests=str(ROOT / "tests" / "launch"), folder=str(tmp_path))
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE
    )
    jobs = jobs_of(tmp_path, "slow_a", "slow_b", "later")
    wait_for(lambda: all((job.folder / "ready").exists() for job in jobs[:2]), process)
    process.send_signal(number)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 130, error.decode()
    assert states(jobs) == ["stopped", "stopped", "missing"]
    assert all((job.folder / "saved").exists() for job in jobs[:2])
    assert LocalLauncher(2, program=stand_in(tmp_path), poll_seconds=0.02).launch(jobs) == 0
    assert states(jobs) == ["done", "done", "done"]


def test_a_killed_launcher_leaves_no_run_to_be_started_twice(tmp_path):
    (job,) = jobs_of(tmp_path, "slow")
    program = [*stand_in(tmp_path), *job.arguments]
    process = start(program, job.folder, {"PYTHONPATH": str(ROOT)})
    wait_for(lambda: (job.folder / "ready").exists(), process)
    os.kill(process.pid, signal.SIGKILL)  # what watches over the run is gone, the run itself goes on
    process.wait()
    assert read_status(job.folder).state == "running"
    with pytest.raises(ConfigError, match="in use"):
        execute(program, job.folder)
    stop(process)
    wait_for(lambda: read_status(job.folder).state == "stopped")
    assert execute(program, job.folder) == 0 and read_status(job.folder).state == "done"


def test_status_survives_and_adds_up(tmp_path):
    command = [sys.executable, "-c", "import time; time.sleep(0.2)"]
    assert execute(command, tmp_path) == 0
    first = read_status(tmp_path).seconds
    assert execute(command, tmp_path) == 0
    assert read_status(tmp_path).seconds >= first + 0.2
    assert execute([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], tmp_path) == 137
    assert read_status(tmp_path).state == "failed"
    (tmp_path / "status.json").write_text('{"state": "do')
    with pytest.raises(ConfigError, match="damaged"):
        read_status(tmp_path)


def test_other_ranks_keep_a_log_and_no_status(tmp_path):
    process = start([sys.executable, "-c", "print('hello')"], tmp_path, {"PYTHONPATH": str(ROOT)}, rank=3)
    assert process.wait() == 0
    assert (tmp_path / "output.3.log").read_text() == "hello\n" and not (tmp_path / "status.json").exists()


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, capsys):
    def flock(*_):
        raise OSError("no locks here")

    monkeypatch.setattr("deepseek_jax.locks.fcntl.flock", flock)
    assert execute([sys.executable, "-c", "pass"], tmp_path / "a") == 0
    assert (
        "is on a file system without locks" in capsys.readouterr().out and read_status(tmp_path / "a").state == "done"
    )


def test_a_lock_is_held_once(tmp_path):
    with lock(tmp_path), pytest.raises(ConfigError, match="in use"), lock(tmp_path):
        pass
    with lock(tmp_path) as again:
        assert again is not None


def wait_for(condition, process=None, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        assert process is None or process.poll() is None, "ended too early"
        time.sleep(0.02)

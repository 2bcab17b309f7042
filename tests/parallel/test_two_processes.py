"""Two real processes of four devices against one of eight: the same numbers, and what happens when one is killed or
told to stop."""

import contextlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from deepseek_jax.json_io import read_json_lines
from deepseek_jax.parallel.hosts import LOST
from deepseek_jax.training.checkpoints import load_variables
from deepseek_jax.training.metrics import read_metrics

HERE = pathlib.Path(__file__).parent
STEPS, EVERY = 60, 5  # as in hosts_experiment.py
MINUTES = 60


def free_port():
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with the data and with what the processes compile, each program once."""
    root = tmp_path_factory.mktemp("hosts")
    texts = ["".join(chr(97 + (7 * i + j * j) % 26) for j in range(40)) for i in range(200)]
    (root / "data.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return root


@pytest.fixture(scope="module")
def start(root):
    """start(devices, *arguments): a process with so many CPU devices, in the background; its stdout and stderr as
    files."""
    running = []

    def start(devices, *arguments):
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "JAX_COMPILATION_CACHE_DIR": str(root / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "HOSTS_TEST_DATA": str(root / "data.jsonl"),
        }
        number = len(running)
        with (root / f"{number}.out").open("w") as out, (root / f"{number}.err").open("w") as err:
            process = subprocess.Popen([sys.executable, *arguments], env=environment, stdout=out, stderr=err)
        process.out, process.err = (
            (lambda: (root / f"{number}.out").read_text()),
            (lambda: (root / f"{number}.err").read_text()),
        )
        running.append(process)
        return process

    yield start
    for process in running:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.wait()


def pair(start, *arguments):
    flags = [f"--coordinator=localhost:{free_port()}", "--num_processes=2"]
    return [start(4, *arguments, *flags, f"--process_id={i}") for i in range(2)]


def train(start, workdir, processes, *overrides):
    command = ["-m", "deepseek_jax", f"--config={HERE / 'hosts_experiment.py'}", f"--workdir={workdir}", *overrides]
    return [start(8, *command)] if processes == 1 else pair(start, *command)


def finish(processes, status=0, within=5 * MINUTES):
    deadline = time.monotonic() + within
    for process in processes:
        assert process.wait(max(deadline - time.monotonic(), 0)) == status, process.err()


def until_line(workdir, count, processes):
    """Waits for so many log lines."""
    deadline = time.monotonic() + 5 * MINUTES
    while len(read_metrics(workdir / "pretrain")) < count:
        for process in processes:
            assert process.poll() is None, process.err()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def losses(workdir):
    """{step: losses and held-out numbers}, without the timing."""
    lines = {}
    for line in read_metrics(workdir / "pretrain"):
        lines.setdefault(line["step"], {}).update(
            {name: line[name] for name in line if not name.endswith("per_second")}
        )
    return lines


@pytest.fixture(scope="module")
def alone(root, start):
    """The results of one process with eight devices."""
    finish(train(start, root / "alone", 1))
    return root / "alone"


def assert_same(workdir, alone, steps=STEPS):
    ours, theirs = losses(workdir), losses(alone)
    assert list(ours) == list(theirs) == list(range(1, steps + 1))
    for step, values in theirs.items():
        for name, value in values.items():
            np.testing.assert_allclose(ours[step][name], value, rtol=1e-5, err_msg=f"{name} of step {step}")
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        *(load_variables(w / "pretrain")[1] for w in (workdir, alone)),
    )


def test_killed_told_to_stop_and_at_last_one_process(root, start, alone):
    """Two processes; the second is killed. Both again; the second gets SIGTERM. One process with eight devices ends
    it."""
    workdir = root / "interrupted"
    first, second = train(start, workdir, 2)
    until_line(workdir, 12, (first, second))
    second.kill()
    finish([first], LOST, within=60)
    assert "another process of this run was killed" in first.err() and "Start all 2 processes again" in first.err()
    assert f"Checkpoints in {workdir} are complete and safe: steps pretrain" in first.err()
    assert "Traceback" not in first.err()
    reached = read_metrics(workdir / "pretrain")[-1]["step"]
    assert 12 <= reached < STEPS - 2 * EVERY

    first, second = train(start, workdir, 2)
    until_line(workdir, reached + EVERY, (first, second))
    second.send_signal(signal.SIGTERM)
    finish([first, second], 128 + signal.SIGTERM)
    stopped = max(int(folder.name) for folder in (workdir / "pretrain/checkpoints").iterdir())
    assert f"SIGTERM: saved step {stopped} of {STEPS}" in first.out() and reached < stopped < STEPS
    assert "going on from step" in first.out()
    # process 0 alone prints; Gloo has a voice of its own
    spoken = {line for line in first.out().splitlines() if line and "[Gloo]" not in line}
    assert len(spoken) > 2 and not spoken & set(second.out().splitlines())

    finish(train(start, workdir, 1))
    assert_same(workdir, alone)
    goodput = json.loads((workdir / "pretrain/goodput.json").read_text())
    lines = read_json_lines(workdir / "pretrain/goodput.jsonl")
    starts = [line["start"] for line in lines if "start" in line]
    assert (
        len(starts) == 3
        and starts[0] == 0
        and starts[1] % EVERY == 0
        and starts[2] == stopped
        and goodput["restarts"] == 2
    )
    assert goodput["wall_seconds"] == pytest.approx(lines[-1]["time"] - lines[0]["time"])
    assert goodput["seconds"]["down"] > 0 and (goodput["seconds"]["lost"] > 0) == (starts[1] < reached)


def test_two_processes_compute_what_one_does(root, start):
    """One expert on each device: tokens travel between the processes."""
    overrides = ["--config.mesh.fsdp=1", "--config.mesh.expert=8", "--config.pretrain.train.steps=20"]
    finish(train(start, root / "one", 1, *overrides))
    finish(train(start, root / "two", 2, *overrides))
    assert_same(root / "two", root / "one", steps=20)


def test_they_agree_and_the_loss_of_the_first_ends_the_second(root, start):
    """Process 0 holds the service by which the processes hear of each other, so that its loss takes another way."""
    folder = root / "met"
    folder.mkdir()
    first, second = pair(start, HERE / "hosts_worker.py", folder, "120")
    deadline = time.monotonic() + 2 * MINUTES
    while not all((folder / f"{i}.json").exists() for i in range(2)):
        assert time.monotonic() < deadline and first.poll() is None and second.poll() is None, (
            first.err() + second.err()
        )
        time.sleep(0.05)
    for i in range(2):
        assert json.loads((folder / f"{i}.json").read_text()) == ["from 0, é", True, False]
    assert (folder / "written.txt").read_text() == "by 0"
    assert "process 0 speaks" in first.out() and "speaks" not in second.out()
    first.kill()
    finish([second], LOST, within=60)
    assert (
        "process 1 of 2 stops because another process" in second.err()
        and "Step 7 is safe. Start all 2 processes again" in second.err()
    )


def test_nobody_at_the_coordinators_address(root, start):
    process = start(
        1,
        HERE / "hosts_worker.py",
        root,
        "3",
        f"--coordinator=localhost:{free_port()}",
        "--num_processes=2",
        "--process_id=1",
    )
    finish([process], 2)
    assert "process 1 of 2 could not join the others at localhost:" in process.err() and "within 3 s" in process.err()
    assert "Traceback" not in process.err()

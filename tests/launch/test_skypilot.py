"""SkyPilot task files: every field is a documented one, the scripts say what they should, and only what is missing is
launched."""

import json
import os
import subprocess

import pytest
import yaml
from launch_cases import jobs_of

from deepseek_jax.errors import ConfigError
from deepseek_jax.launch import Resources
from deepseek_jax.launch.skypilot import SkyPilotLauncher

# Of https://docs.skypilot.co/en/latest/reference/yaml-spec.html, with their types: those that a task file here may use.
DOCUMENTED = {
    "name": str,
    "workdir": str,
    "num_nodes": int,
    "resources": {
        "infra": str,
        "accelerators": str,
        "accelerator_args": {"runtime_version": str},
        "cpus": str,
        "use_spot": bool,
        "job_recovery": {"max_restarts_on_errors": int, "recover_on_exit_codes": list},
    },
    "file_mounts": {"/runs": {"source": str, "mode": str}},
    "setup": str,
    "run": str,
}
SOURCES = ({"name": "tfds:c4/en"},)


def check(fields, documented):
    for name, value in fields.items():
        assert name in documented, name
        if isinstance(documented[name], dict):
            check(value, documented[name])
        else:
            assert type(value) is documented[name], name


def write(tmp_path, topology, **options):
    (job,) = jobs_of(
        tmp_path, "run", overrides={"seed": 1, "pretrain.data.sources": SOURCES}, resources=Resources(topology)
    )
    return SkyPilotLauncher("ladder", tmp_path, "gs://bucket/", **options)._write(job)


@pytest.mark.parametrize(
    ("topology", "num_nodes", "accelerators", "extra"),
    [
        ("cpu", 1, None, "."),
        ("v5p:2x2x1", 1, "tpu-v5p-8", ".[tpu]"),
        ("v5p:4x4x4", 1, "tpu-v5p-128", ".[tpu]"),
        ("v6e:16x16", 1, "tpu-v6e-256", ".[tpu]"),
        ("h100:8", 1, "H100:8", ".[cuda]"),
        ("b200:64", 8, "B200:8", ".[cuda]"),
    ],
)
def test_the_task_file(topology, num_nodes, accelerators, extra, tmp_path):
    path = write(tmp_path, topology)
    task = yaml.safe_load(path.read_text())
    check(task, DOCUMENTED)
    assert (task["name"], task["num_nodes"], task["resources"].get("accelerators")) == (
        "ladder-run",
        num_nodes,
        accelerators,
    )
    assert task["resources"]["use_spot"] and 143 in task["resources"]["job_recovery"]["recover_on_exit_codes"]
    assert task["file_mounts"] == {"/runs": {"source": "gs://bucket", "mode": "MOUNT"}}
    assert f"-e '{extra}'" in task["setup"] or f"-e {extra}" in task["setup"]
    assert ("--coordinator" in task["run"]) == (num_nodes > 1)
    assert "setup: |\n" in path.read_text()  # as a person would write it


@pytest.mark.parametrize("topology", ["cpu", "v5p:4x4x4", "v5e:4x4", "h100:64"])
def test_skypilot_reads_it(topology, tmp_path, monkeypatch):
    sky = pytest.importorskip("sky")
    task = sky.Task.from_yaml(str(write(tmp_path, topology)))
    assert task.num_nodes == Resources(topology).num_nodes and next(iter(task.resources)).use_spot


def test_the_run_script_hands_every_flag_over(tmp_path):
    """Under a shell, with a python that writes down its arguments."""
    task = yaml.safe_load(write(tmp_path, "h100:16").read_text())
    python = tmp_path / "deepseek_jax_env" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\nfor a in "$@"; do echo "$a"; done\n')
    python.chmod(0o755)
    told = {
        "HOME": str(tmp_path),
        "SKYPILOT_NODE_IPS": "10.0.0.7\n10.0.0.8",
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NODE_RANK": "1",
    }
    shown = subprocess.run(
        ["bash", "-c", task["run"]], env=os.environ | told, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert shown[: shown.index("--")] == ["-m", "deepseek_jax.launch.execute", "--folder=/runs/ladder/run", "--rank=1"]
    assert shown[shown.index("--") + 2 :] == [
        *("-m", "deepseek_jax", "--config=experiment.py", "--workdir=/runs/ladder/run"),
        *("--config.seed=1", f"--config.pretrain.data.sources={SOURCES}"),
        *("--coordinator=10.0.0.7:8476", "--num_processes=2", "--process_id=1"),
    ]
    assert subprocess.run(["bash", "-n", "-c", task["setup"]]).returncode == 0


def test_where_and_what_can_be_chosen(tmp_path):
    task = yaml.safe_load(
        write(tmp_path, "v5e:4x4", infra="gcp/us-west4", install="git+https://example.org/x.git").read_text()
    )
    assert task["resources"]["infra"] == "gcp/us-west4" and "git+https://example.org/x.git" in task["setup"]


def test_only_the_missing_is_launched(tmp_path, monkeypatch, capsys):
    queue = [
        {"job_id": 1, "job_name": "ladder-a", "status": "SUCCEEDED"},
        {"job_id": 2, "job_name": "ladder-b", "status": "FAILED"},
        {"job_id": 3, "job_name": "ladder-c", "status": "FAILED"},
        {"job_id": 4, "job_name": "ladder-c", "status": "RECOVERING"},
    ]
    fake_sky(tmp_path, monkeypatch, json.dumps(queue))
    assert SkyPilotLauncher("ladder", tmp_path, "gs://bucket").launch(jobs_of(tmp_path, "a", "b", "c", "d")) == 1
    launched = (tmp_path / "launched").read_text().splitlines()
    assert launched == [
        f"jobs launch --yes --detach-run --name ladder-{name} {tmp_path}/{name}/skypilot.yaml" for name in "bd"
    ]
    shown = capsys.readouterr().out
    assert (
        "ladder-a is succeeded" in shown
        and "ladder-c is recovering" in shown
        and f"gs://bucket/ladder {tmp_path}" in shown
    )


def test_a_queue_that_cannot_be_read_launches_nothing(tmp_path, monkeypatch):
    fake_sky(tmp_path, monkeypatch, "no controller")
    with pytest.raises(ConfigError, match="none was launched:\nno controller"):
        SkyPilotLauncher("ladder", tmp_path, "gs://bucket").launch(jobs_of(tmp_path, "a"))
    assert not (tmp_path / "launched").exists()


def fake_sky(tmp_path, monkeypatch, queue):
    """A `sky` that shows `queue`, writes down what it launches, and refuses the run called d."""
    (tmp_path / "queue").write_text(queue)
    path = tmp_path / "bin" / "sky"
    path.parent.mkdir()
    path.write_text(
        f'#!/bin/sh\ncase "$2" in\nqueue) cat {tmp_path}/queue;;\nlaunch) echo "$@" >> {tmp_path}/launched; test "$6" '
        "!= ladder-d;;\nesac\n"
    )
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")


def test_without_skypilot_the_files_are_there(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"pip install 'skypilot\[gcp\]'.*skypilot.yaml"):
        SkyPilotLauncher("ladder", tmp_path, "s3://bucket").launch(jobs_of(tmp_path, "a"))
    assert (tmp_path / "a" / "skypilot.yaml").exists()


def test_what_skypilot_cannot_do(tmp_path):
    for bucket in (None, "bucket"):
        with pytest.raises(ConfigError, match="--bucket=gs://NAME"):
            SkyPilotLauncher("ladder", tmp_path, bucket)
    with pytest.raises(ConfigError, match="does not offer tpu7x"):
        write(tmp_path, "tpu7x:4x4x4")
    (job,) = jobs_of(tmp_path, "a")
    object.__setattr__(job, "experiment", "../x.py")
    with pytest.raises(ConfigError, match="outside the working directory"):
        SkyPilotLauncher("ladder", tmp_path, "gs://bucket")._write(job)

"""The command: a small sweep through the real program, started again, planned and collected; and what it refuses."""

import pyarrow.parquet
import pytest
from launch_cases import BASE, ROOT, jobs_of

from deepseek_jax.errors import ConfigError
from deepseek_jax.experiment import build_experiment, read_flags
from deepseek_jax.launch import Resources
from deepseek_jax.launch.__main__ import choose, main
from deepseek_jax.launch.metric_names import check_metric
from deepseek_jax.launch.state import read_status
from deepseek_jax.stages import build_stages

SWEEP = """
from deepseek_jax.launch import Run, Sweep

SMALL = {{
    "model.num_layers": 1, "model.first_k_dense": 0, "runtime.scan_unroll": 1, "model.moe.num_experts": 8,
    "model.moe.intermediate_size": 8,
    "pretrain.seq_len": 16, "pretrain.batch_size": 2, "pretrain.train.steps": 2, "pretrain.train.eval_batches": 1,
    "pretrain.train.optimizer.learning_rate.warmup_steps": 1, "pretrain.train.log_every": 1,
}}


def get_sweep():
    source = {{"name": "stdlib", "max_bytes": 200_000}}
    sources = {{"good": source, "bad": source | {{"name": {nowhere!r}}}}}
    runs = [Run(name, SMALL | {{"pretrain.data.sources": (each,)}}) for name, each in sources.items()]
    return Sweep({base!r}, runs)
"""


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    path = tmp_path / "mine.py"
    path.write_text(SWEEP.format(base=BASE, nowhere=str(tmp_path / "nowhere.txt")))
    return path


def test_a_sweep_and_again(sweep, tmp_path, capsys):
    """Its second run finds no data and fails; starting again starts that one alone."""
    command = [f"--sweep={sweep}", f"--workdir={tmp_path / 'runs'}", "--slots=2"]
    assert main(command) == 1
    shown = capsys.readouterr().out
    assert (
        "2 runs in" in shown
        and "good done" in shown
        and "bad failed" in shown
        and "nowhere.txt" in shown
        and "1 done, 1 failed" in shown
    )
    good = read_status(tmp_path / "runs" / "good")
    first = pyarrow.parquet.read_table(tmp_path / "runs" / "results.parquet").to_pylist()
    assert [row["status"] for row in first] == ["done", "failed"]
    assert (
        4 < first[0]["pretrain.bits_per_byte"] < 9
        and first[0]["pretrain.tokens_per_second"] > 0
        and first[0]["pretrain.step"] == 2
    )
    assert first[1]["pretrain.bits_per_byte"] is None
    stages = [
        stage
        for stage in build_stages(build_experiment(*read_flags([f"--config={BASE}"])[:2], tmp_path))
        if stage.name == "pretrain"
    ]
    logged = [
        name
        for name, value in first[0].items()
        if name.startswith("pretrain.") and isinstance(value, (int, float)) and "data.sources" not in name
    ]
    for name in (
        name
        for name in logged
        if name.removeprefix("pretrain.") not in ("seq_len", "batch_size") and not name.startswith("pretrain.train.")
    ):
        check_metric(name, stages)  # whatever a run logs may be drawn
    assert (tmp_path / "runs" / "results.png").stat().st_size > 5000

    assert main(command) == 1
    shown = capsys.readouterr().out
    assert "bad starts" in shown and "good starts" not in shown
    assert read_status(tmp_path / "runs" / "good") == good

    sweep.write_text(sweep.read_text().replace("200_000", "300_000"))
    with pytest.raises(ConfigError, match="good: .*holds a run of another configuration"):
        main(command)  # a finished run is never taken for another


def test_plan_and_results_start_nothing(sweep, tmp_path, capsys):
    workdir = tmp_path / "runs"
    assert main([f"--sweep={sweep}", f"--workdir={workdir}", "--plan"]) == 0
    assert "2 of 2 runs to do" in capsys.readouterr().out and not workdir.exists()
    assert main([f"--sweep={sweep}", f"--workdir={workdir}", "--results"]) == 0
    shown = capsys.readouterr().out
    assert (
        "2 missing" in shown
        and "pretrain.bits_per_byte, mean ± standard deviation" in shown
        and "1 missing" in shown
        and sorted(path.name for path in workdir.iterdir()) == ["results.csv", "results.parquet"]
    )


def test_the_plan_of_a_pod_asks_the_dry_run(tmp_path, capsys):
    path = tmp_path / "pod.py"
    path.write_text(
        f"from deepseek_jax.launch import *\ndef get_sweep():\n    return Sweep({BASE!r}, [Run('pod', {{'seed': 1}}, "
        "Resources('v5p:4x4x4'))])\n"
    )
    asked = []

    def dry_run(config, name, topology, **options):
        asked.append((config.seed, name, topology, options))
        return {
            "hours_lower_bound": 2.0,
            "dollars_lower_bound": 538.0,
            "fits": True,
            "memory_bytes_per_device": {"total": 10**10},
            "hbm_capacity": 95 * 10**9,
        }

    assert main([f"--sweep={path}", f"--workdir={tmp_path}", "--plan", "--dollars_per_chip_hour=4.2"], dry_run) == 0
    assert asked == [(1, "pod", "v5p:4x4x4", {"dollars_per_chip_hour": 4.2})]
    shown = capsys.readouterr().out
    assert "2.0 h" in shown and "$538" in shown and "10.0 of 95.0 GB" in shown


def test_which_runs(tmp_path, capsys):
    jobs = [*jobs_of(tmp_path, "a1", "a2", "b1"), *jobs_of(tmp_path, "pod", resources=Resources("v5p:4x4x4"))]

    def names(*arguments):
        return [job.name for job in choose(jobs, *arguments)]

    assert names(None, False) == ["a1", "a2", "b1", "pod"] and names("a*,pod", True) == ["a1", "a2", "pod"]
    assert names(None, True) == ["a1", "a2", "b1"] and "pod wants v5p:4x4x4 and is left out" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="no run is called 'b2': allowed: a1, a2, b1, pod"):
        names("a1,b2", True)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--slots=0"], "--slots: '0': must be a whole number, at least 1"),
        (["--slots=2", "--launcher=slurm"], "--slots is for --launcher=local"),
        (["--bucket=gs://mine"], "--bucket is for --launcher=skypilot"),
        (["--dollars_per_hour=2"], "is for --plan"),
        (["--slot_environment=CUDA"], "NAME=VALUE"),
        (["--launcher=slurm", "--slurm=gpu"], "a dictionary"),
        (["--launcher=skypilot"], "--bucket=gs://NAME"),
    ],
)
def test_flags_that_cannot_work(flags, message, sweep, tmp_path):
    with pytest.raises(ConfigError, match=message):
        main([f"--sweep={sweep}", f"--workdir={tmp_path / 'runs'}", *flags])
    assert not (tmp_path / "runs").exists()

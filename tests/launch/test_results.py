"""The plan, the table and the plot of a sweep, over folders that look as runs leave them."""

import json
import os
import subprocess
import sys

import numpy as np
import pyarrow.csv
import pyarrow.parquet
import pytest
from launch_cases import BASE, ROOT
from ml_collections import ConfigDict
from rich.console import Console

from deepseek_jax.accounting import count_parameters, decode_flops_per_token, forward_flops_per_token
from deepseek_jax.errors import ConfigError
from deepseek_jax.launch import Resources, Run, Sweep, grid, paired_seeds
from deepseek_jax.launch.jobs import Job, build_jobs
from deepseek_jax.launch.plan import plan, plan_table
from deepseek_jax.launch.plots import draw, group, plot
from deepseek_jax.launch.results import collect, stage_metrics, write_table
from deepseek_jax.launch.state import Status, read_status, write_status
from deepseek_jax.launch.variants import results_table, variants
from deepseek_jax.model.config import ModelConfig
from deepseek_jax.rl.tasks import build_task

PEAK = "pretrain.train.optimizer.learning_rate.peak"


def finish(job, seconds, records, stage="pretrain", state="done", exit_status=0):
    (job.folder / stage).mkdir(parents=True)
    write_status(job.folder, Status(state, exit_status, seconds))
    (job.folder / stage / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def statuses(jobs):
    return {job.name: read_status(job.folder) for job in jobs}


def test_tokens_and_flops_of_a_run(tmp_path):
    """By hand: 6 FLOPs for a parameter and token, and attention over half a sequence, for every head 2·(24 + 16)
    forward for a pair."""
    (job,) = build_jobs(Sweep(BASE, [Run("a", {"pretrain.train.steps": 100})]), tmp_path)
    assert job.tokens == 100 * 16 * 128
    active = count_parameters(ModelConfig.from_dict(job.config.model)).activated()
    assert job.flops == job.tokens * (6 * active + 3 * (3 * 2 * 2 * (24 + 16) * 64))


def test_tokens_with_a_growing_batch(tmp_path):
    ramp = {
        "pretrain.batch_size": 8,
        "pretrain.train.batch_size": {"kind": "ramp", "start": 4, "end": 8, "steps": 50},
        "pretrain.train.steps": 100,
        "pretrain.train.microbatch": 4,
    }
    (job,) = build_jobs(Sweep(BASE, [Run("a", ramp)]), tmp_path)
    sizes = [round(min(4 + 4 * step / 50, 8) / 4) * 4 for step in range(100)]
    assert job.tokens == sum(sizes) * 128


def test_tokens_of_a_batch_that_a_mesh_divides(tmp_path):
    """The training loop rounds to what the mesh's 64 parts and the microbatch divide; the run is for machines that are
    not here."""
    ramp = {
        "pretrain.batch_size": 256,
        "pretrain.train.batch_size": {"kind": "ramp", "start": 64, "end": 256, "steps": 50},
        "pretrain.train.steps": 100,
    }
    (job,) = build_jobs(Sweep(BASE, [Run("a", ramp | {"mesh.fsdp": 64}, Resources("v5p:4x4x4"))]), tmp_path)
    sizes = [max(64, round(min(64 + 192 * step / 50, 256) / 64) * 64) for step in range(100)]
    assert job.tokens == sum(sizes) * 128 and set(sizes) == {64, 128, 192, 256}


@pytest.mark.parametrize("kl, passes", [(0.0, 3), (0.01, 4)])
def test_reinforcement_learning_is_work_too(kl, passes, tmp_path):
    """By hand, two epochs: forward and backward over prompts and completions, the reference's forward pass where the KL
    counts, and drawing twice the groups that are trained on, each prompt read once for its group."""
    changes = {
        "steps": 6,
        "num_minibatches": 1,
        "inner_epochs": 2,
        "kl_coefficient": kl,
        "prompts_per_rollout": 4,
        "group_size": 8,
        "oversampling": 2,
    }
    overrides = {"stages": ("grpo",), **{f"grpo.{name}": value for name, value in changes.items()}}
    (job,) = build_jobs(
        Sweep(str(ROOT / "experiments" / "r1_tiny.py"), [Run("a", overrides)], metric="grpo.rollout_seconds"), tmp_path
    )
    config, rows = ModelConfig.from_dict(job.config.model), 4 * 8
    prompt, drawn = prompt_and_completion(job)
    assert job.tokens == 3 * rows * drawn  # two steps a rollout
    read = forward_flops_per_token(config, prompt + drawn) * (prompt + drawn) * passes * 2 * rows
    decoded = sum(decode_flops_per_token(config, context) for context in range(prompt, prompt + drawn)) * 2 * rows
    assert job.flops == 3 * (read + decoded + 2 * 4 * prompt * forward_flops_per_token(config, prompt))


def prompt_and_completion(job):
    task = build_task(job.config.task.to_dict())
    return task.prompt_length, task.completion_length


def test_the_last_value_of_every_metric(tmp_path):
    records = [
        {"step": 1, "loss": 3.0, "tokens_per_second": 10.0, "load": [1, 2], "grad_norm": 1.0},
        {"step": 2, "loss": 2.0, "tokens_per_second": 30.0, "grad_norm": None},
        {"step": 2, "bits_per_byte": 1.5},
        {"step": 3, "loss": 1.0, "tokens_per_second": 29.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "evaluation.json").write_text(json.dumps({"greedy_accuracy": 0.25, "samples": [1]}))
    found = stage_metrics(tmp_path)
    assert np.isnan(found.pop("grad_norm"))  # whatever it was before
    assert found == {"step": 3, "loss": 1.0, "tokens_per_second": 29.0, "bits_per_byte": 1.5, "greedy_accuracy": 0.25}
    assert stage_metrics(tmp_path / "nowhere") == {}


def test_the_table_has_a_row_for_every_run(tmp_path):
    runs = [
        Run("a", {PEAK: 1e-3, "seed": 0}),
        Run("b", {PEAK: 1e-3, "seed": 1}),
        Run("c", {"precision": "bfloat16", "seed": 2}),
        Run("d", {}),
    ]
    jobs = build_jobs(Sweep(BASE, runs), tmp_path)
    finish(jobs[0], 12.5, [{"step": 400, "bits_per_byte": 3.25}])
    finish(jobs[1], 7.0, [{"step": 10, "loss": 2.0}], state="failed", exit_status=1)
    paths = write_table(collect(jobs, statuses(jobs)), tmp_path)
    for table in (pyarrow.parquet.read_table(paths[0]), pyarrow.csv.read_csv(paths[1])):
        rows = table.to_pylist()
        assert [row["name"] for row in rows] == ["a", "b", "c", "d"]
        assert [row["status"] for row in rows] == ["done", "failed", "missing", "missing"]
        assert [row["seed"] for row in rows] == [0, 1, 2, 0]
        assert [row[PEAK] for row in rows] == [1e-3, 1e-3, None, None]
        assert [row["pretrain.bits_per_byte"] for row in rows] == [3.25, None, None, None]
        assert [row["exit_status"] for row in rows] == [0, 1, None, None]
        assert rows[0]["seconds"] == 12.5 and rows[0]["tokens"] == jobs[0].tokens and rows[0]["flops"] == jobs[0].flops
    assert pyarrow.parquet.read_table(paths[0])["precision"].to_pylist() == [None, None, "bfloat16", None]


def test_a_column_of_several_types_is_text(tmp_path):
    rows = [{"name": "a", "x": 1, "y": 1, "z": (1, 2)}, {"name": "b", "x": 1.5, "y": "one", "z": None}]
    table = pyarrow.parquet.read_table(write_table(rows, tmp_path)[0])
    assert (
        table["x"].to_pylist() == [1.0, 1.5]
        and table["y"].to_pylist() == ["1", "one"]
        and table["z"].to_pylist() == ["(1, 2)", None]
    )


def rows_of(sweep, value):
    """Rows as if every run had finished with `value(overrides)`."""
    return [
        {"name": r.name, "status": "done", "flops": 1e9, "seed": 0, **r.overrides, sweep.metric: value(r.overrides)}
        for r in sweep.runs
    ]


def drawn(tmp_path, sweep, rows):
    """The figure of `plot`."""
    assert plot(sweep, rows, tmp_path / "results.png", "title")
    assert (tmp_path / "results.png").stat().st_size > 5000
    return draw(sweep, rows, "title")


def test_seeds_are_a_mean_and_a_spread(tmp_path):
    sweep = Sweep("x.py", paired_seeds(grid({PEAK: (1e-3, 1e-2, 1e-1)}), (0, 1, 2)), x=PEAK)
    rows = rows_of(sweep, lambda o: -np.log10(o[PEAK]) + (0.0, 0.1, 0.5)[o["seed"]])
    rows[-1]["status"], rows[0][sweep.metric] = "failed", None  # neither is drawn
    assert {x: len(values) for (x, _), values in group(sweep, rows).items()} == {1e-3: 2, 1e-2: 3, 1e-1: 2}
    (panel,) = drawn(tmp_path, sweep, rows).axes
    (container,) = panel.containers
    line, _, (bars,) = container
    np.testing.assert_allclose(line.get_xydata(), [(1e-3, 3.3), (1e-2, 2.2), (1e-1, 1.05)])
    np.testing.assert_allclose([segment[:, 1] for segment in bars.get_segments()], [(3.1, 3.5), (2.0, 2.5), (1.0, 1.1)])
    assert panel.get_xscale() == "log" and "range of 2-3 seeds" in panel.get_ylabel()


def test_paired_seeds_show_the_spread_of_their_differences(tmp_path):
    """Seed 1 is worse by 10 everywhere, and the two seeds differ by 0.2 and -0.2 about the mean besides."""
    sweep = Sweep("x.py", paired_seeds(grid({PEAK: (1e-3, 1e-2)}), (0, 1)), x=PEAK)
    rows = rows_of(
        sweep,
        lambda o: 10 * o["seed"] + {(1e-3, 0): 1.1, (1e-3, 1): 0.9, (1e-2, 0): 1.9, (1e-2, 1): 2.1}[o[PEAK], o["seed"]],
    )
    (panel,) = drawn(tmp_path, sweep, rows).axes
    line, _, (bars,) = panel.containers[0]
    np.testing.assert_allclose(line.get_xydata(), [(1e-3, 6.0), (1e-2, 7.0)])
    np.testing.assert_allclose([segment[:, 1] for segment in bars.get_segments()], [(5.9, 6.1), (6.9, 7.1)])
    assert "range of 2 paired seeds" in panel.get_ylabel()


@pytest.mark.parametrize(("best", "framed"), [("lowest", (0, 1)), ("highest", (1, 0))])
def test_two_fields_are_curves_and_a_map(best, framed, tmp_path):
    sweep = Sweep(
        "x.py",
        paired_seeds(grid({PEAK: (1e-3, 1e-2), "pretrain.batch_size": (8, 16)}), (0, 1)),
        x=PEAK,
        by="pretrain.batch_size",
        best=best,
    )
    figure = drawn(tmp_path, sweep, rows_of(sweep, lambda o: o["pretrain.batch_size"] - np.log10(o[PEAK]) * 2))
    curves, heat, _ = figure.axes
    assert [text.get_text() for text in curves.get_legend().get_texts()] == ["batch size 8", "batch size 16"]
    np.testing.assert_allclose(heat.images[0].get_array(), [[14, 12], [22, 20]])
    (frame,) = heat.patches
    assert (frame.get_y() + 0.5, frame.get_x() + 0.5) == framed


def test_a_ladder_is_drawn_over_compute_with_its_names(tmp_path):
    sweep = Sweep("x.py", [Run("small", {"a": 1}), Run("large", {"a": 2})])
    rows = [
        {"name": n, "status": "done", "flops": f, "seed": 0, "pretrain.bits_per_byte": v}
        for n, f, v in (("small", 1e12, 3.0), ("large", 1e14, 2.0))
    ]
    (panel,) = drawn(tmp_path, sweep, rows).axes
    np.testing.assert_allclose(panel.containers[0][0].get_xydata(), [(1e12, 3.0), (1e14, 2.0)])
    assert [text.get_text() for text in panel.texts] == ["small", "large"] and panel.get_xlabel() == "training FLOPs"


def test_runs_that_differ_in_a_third_field_are_not_one_point(tmp_path):
    """Twelve runs: two sizes and two losses at one x each with three seeds; without `by` the curves are told apart all
    the same, in words."""
    losses, experts = "pretrain.train.objective.balance", "model.moe.num_experts"
    runs = paired_seeds(grid({experts: (8, 16), losses: ("none", "batch")}), (0, 1, 2))
    value = lambda o: o[experts] + (o[losses] == "batch") + o["seed"] / 10
    for by, names in ((None, ["balance: none", "balance: batch"]), (losses, ["balance: none", "balance: batch"])):
        sweep = Sweep("x.py", runs, x=experts, by=by)
        rows = rows_of(sweep, value)
        assert sorted(len(values) for values in group(sweep, rows).values()) == [3, 3, 3, 3]
        curves = drawn(tmp_path, sweep, rows).axes[0]
        assert [text.get_text() for text in curves.get_legend().get_texts()] == names
        np.testing.assert_allclose([c[0].get_ydata() for c in curves.containers], [[8.1, 16.1], [9.1, 17.1]])
    by_flops = Sweep("x.py", runs)
    curves = drawn(tmp_path, by_flops, rows_of(by_flops, value)).axes[0]
    assert [text.get_text() for text in curves.get_legend().get_texts()] == [
        f"num experts {n}, balance: {loss}" for n in (8, 16) for loss in ("none", "batch")
    ]
    twins = Sweep("x.py", [Run("one", {"a": 1}), Run("two", {"a": 1})])
    assert {curve for _, curve in group(twins, rows_of(twins, lambda o: 1.0))} == {"one", "two"}


def test_runs_that_diverged_or_lack_the_metric_are_counted_and_not_averaged(tmp_path):
    sweep = Sweep("x.py", paired_seeds([Run("base", {"a": 1}), Run("mine", {"a": 2})], (0, 1, 2, 3)), x="a")
    rows = rows_of(sweep, lambda o: o["a"] + o["seed"] / 10)
    rows[1][sweep.metric], rows[2][sweep.metric], rows[3]["status"] = float("nan"), None, "failed"
    rows[5][sweep.metric] = float("inf")
    assert group(sweep, rows) == {(1, None): {0: 1.0}, (2, None): {0: 2.0, 2: 2.2, 3: 2.3}}
    base, mine = variants(sweep, rows)
    assert (base.name, base.values, base.mean, base.deviation) == ("base", (1.0,), 1.0, None)
    assert base.left_out == {"diverged": 1, "without the metric": 1, "failed": 1}
    assert (mine.name, mine.mean) == ("mine", pytest.approx(6.5 / 3)) and mine.deviation == pytest.approx(
        np.std([2.0, 2.2, 2.3], ddof=1)
    )
    shown = text(results_table(sweep, rows, "title"))
    for part in (
        "base",
        "1.0000",
        "1 diverged, 1 without the metric, 1 failed",
        "mine",
        "2.1667 ± 0.1528",
        "1 diverged",
    ):
        assert part in shown
    assert "left out: 2 diverged, 1 without the metric, 1 failed" in drawn(tmp_path, sweep, rows).get_suptitle()


@pytest.mark.parametrize(("best", "bold"), [("lowest", "a"), ("highest", "b")])
def test_the_best_variant_is_bold(best, bold):
    sweep = Sweep("x.py", [Run("a", {"x": 1}), Run("b", {"x": 2}), Run("c", {"x": 3})], x="x", best=best)
    rows = rows_of(sweep, lambda o: float(o["x"]))
    rows[2]["status"] = "failed"
    view = results_table(sweep, rows, "title")
    assert [name for name, row in zip("abc", view.rows, strict=True) if row.style == "bold"] == [bold]


def test_variants_with_names_that_hold_no_seed():
    runs = [Run("a", {"x": 1, "seed": 0}), Run("b", {"x": 1, "seed": 1}), Run("c", {"x": 2, "seed": 0})]
    sweep = Sweep("x.py", runs, x="x")
    assert [(v.name, len(v.values)) for v in variants(sweep, rows_of(sweep, lambda o: 1.0))] == [("a", 2), ("c", 1)]


def test_a_damaged_evaluation_is_refused_in_words(tmp_path):
    (tmp_path / "evaluation.json").write_text('{"greedy_accuracy": 0.2')
    with pytest.raises(ConfigError, match="evaluation.json is damaged.*remove it"):
        stage_metrics(tmp_path)


def test_plots_leave_matplotlibs_backend_alone():
    code = (
        "import matplotlib; matplotlib.use('pdf'); import deepseek_jax.launch.plots; "
        "assert matplotlib.get_backend() == 'pdf', matplotlib.get_backend()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})


def test_nothing_finished_nothing_drawn(tmp_path):
    sweep = Sweep("x.py", [Run("a", {"seed": 0})])
    assert not plot(
        sweep, [{"name": "a", "status": "missing", "flops": 1.0, "seed": 0}], tmp_path / "results.png", "title"
    )
    assert not list(tmp_path.iterdir())


def job(name, topology, flops=1e15, seed=0, **config):
    return Job(
        Run(name, {}, Resources(topology)),
        None,
        "x.py",
        ConfigDict({"seed": seed, **config}),
        ("pretrain",),
        int(1e9),
        flops,
    )


def test_the_plan_asks_the_dry_run_once_for_runs_that_differ_in_seed_alone():
    calls = []

    def dry_run(config, name, topology, *, dollars_per_chip_hour):
        calls.append((name, topology, dollars_per_chip_hour))
        if topology == "v4:4x4x4":
            raise ConfigError("no such slice")
        big = config.get("size") == 2
        return {
            "hours_lower_bound": 30.0 if big else 0.4,
            "dollars_lower_bound": None if big else 1234.5,
            "fits": not big,
            "memory_bytes_per_device": {"temporaries": 1, "total": int(20e9)},
            "hbm_capacity": int(16e9) if big else int(95e9),
        }

    jobs = [
        job("a0", "v5p:2x2x1"),
        job("a1", "v5p:2x2x1", seed=1),
        job("big", "v5e:4x4", size=2),
        job("odd", "v4:4x4x4"),
        job("done", "v5p:2x2x1", seed=2),
    ]
    states = {j.name: Status("done" if j.name == "done" else "missing") for j in jobs}
    estimates = plan(jobs, states, dry_run, dollars_per_chip_hour=4.2)
    assert calls == [("a0", "v5p:2x2x1", 4.2), ("big", "v5e:4x4", 4.2), ("odd", "v4:4x4x4", 4.2)]
    assert [e.hours for e in estimates] == [0.4, 0.4, 30.0, None, 0.4]
    shown = text(plan_table("sweep", estimates))
    for part in (
        "4 of 5 runs to do",
        "24 min",
        "$1,234",
        "30.0 h",
        "20.0 of 16.0 GB: does not fit",
        "20.0 of 95.0 GB",
        "no dry run: no such slice",
    ):
        assert part in shown
    assert "30.8 h + unknown" in shown and "$2,469 + unknown" in shown  # what is done costs nothing more
    assert "no price known for v5e: pass --dollars_per_hour" in shown
    slurm, sky = (text(plan_table("sweep", estimates, launcher)) for launcher in ("slurm", "skypilot"))
    assert "is not offered by SLURM" in slurm and "v5p:2x2x1: SkyPilot, 1 × tpu-v5p-8, spot" in sky


def test_the_plan_says_what_a_launcher_asks_for():
    jobs = [job("gpus", "h100:16"), job("cpu", "cpu")]
    estimates = plan(jobs, {j.name: Status() for j in jobs}, lambda *_, **__: BIG_DRY_RUN)
    assert "h100:16: SLURM, 2 nodes × 8 GPUs, 24 h a job" in text(plan_table("sweep", estimates, "slurm"))
    assert "cpu: SLURM, 1 node, 24 h a job" in text(plan_table("sweep", estimates, "slurm"))
    sky = text(plan_table("sweep", estimates, "skypilot"))
    assert (
        "h100:16: SkyPilot, 2 × H100:8, spot" in sky and "prices: h100: AWS (on demand; spot machines cost less)" in sky
    )
    assert "this machine's" in text(plan_table("sweep", estimates)) and "this machine's" not in sky


BIG_DRY_RUN = {
    "hours_lower_bound": 2.0,
    "dollars_lower_bound": 10.0,
    "price_source": "AWS",
    "fits": True,
    "memory_bytes_per_device": {"total": 1},
    "hbm_capacity": 2,
}


def test_on_a_cpu_the_plan_goes_by_the_runs_that_have_finished():
    jobs = [job("done", "cpu", 1e12), job("larger", "cpu", 1e14), job("a", "cpu", 2e12), job("b", "cpu", 5e13)]
    none = {j.name: Status() for j in jobs}
    assert [e.hours for e in plan(jobs, none, None)] == [None] * 4
    assert "unknown until a run has finished" in text(plan_table("sweep", plan(jobs, none, None)))
    some = none | {"done": Status("done", 0, 36.0), "larger": Status("done", 0, 7200.0)}
    assert [e.hours for e in plan(jobs, some, None)] == pytest.approx([0.01, 2.0, 0.02, 1.0])
    assert "measured" in text(plan_table("sweep", plan(jobs, some, None)))


def text(table):
    console = Console(width=260)
    with console.capture() as capture:
        console.print(table)
    return capture.get()

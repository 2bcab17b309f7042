"""Sweeps: grids, paired seeds, ladders, resources, and refusals before anything starts."""

import importlib

import pytest
from launch_cases import BASE, ROOT

from deepseek_jax.errors import ConfigError
from deepseek_jax.launch import Resources, Run, Rung, Sweep, cross, grid, ladder, paired_seeds
from deepseek_jax.launch.jobs import build_jobs
from deepseek_jax.launch.sweep import load_sweep
from deepseek_jax.model.config import ModelConfig

PEAK = "pretrain.train.optimizer.learning_rate.peak"


def test_grid_is_the_product():
    runs = grid({PEAK: (1e-3, 3e-3), "pretrain.batch_size": (4, 8, 16)})
    assert [run.name for run in runs[:3]] == [
        "peak_0.001-batch_size_4",
        "peak_0.001-batch_size_8",
        "peak_0.001-batch_size_16",
    ]
    assert [tuple(run.overrides.values()) for run in runs] == [
        (peak, size) for peak in (1e-3, 3e-3) for size in (4, 8, 16)
    ]


def test_grid_over_fields_with_the_same_last_part():
    (run,) = grid({"pretrain.seq_len": (8,), "sft.seq_len": (9,)})
    assert run.name == "pretrain.seq_len_8-sft.seq_len_9"


def test_names_of_values_that_are_no_words():
    """Values of several parts, and those that would be called the same, go by their number."""
    schedules = ({"kind": "constant", "value": 1e-3}, 1e-3)
    assert [run.name for run in grid({"a.rate": schedules})] == ["rate_0", "rate_1"]
    assert [run.overrides["a.rate"] for run in grid({"a.rate": schedules})] == list(schedules)
    names = [run.name for run in grid({"x": (-0.5, None, True, "fp8_deepseek", "my_rewards:brevity", "a/b", "..")})]
    assert names == ["x_0", "x_1", "x_2", "x_3", "x_4", "x_5", "x_6"]  # the last one has no letter
    names = [run.name for run in grid({"x": (-0.5, None, True, "fp8_deepseek", "my_rewards:brevity", "a/b")})]
    assert names == ["x_-0.5", "x_None", "x_True", "x_fp8_deepseek", "x_my_rewards-brevity", "x_a-b"]
    assert [run.name for run in grid({"x": ("a/b", "a:b")})] == ["x_0", "x_1"]


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("pretrain.bits_per_bite", "stage pretrain logs no 'bits_per_bite'; did you mean 'bits_per_byte'"),
        ("pretrian.loss", "did you mean 'pretrain'"),
        ("loss", "a stage and one of its metrics"),
        ("pretrain.max_violation_per_layer", "logs no 'max_violation_per_layer'"),  # a list
    ],
)
def test_a_metric_that_no_run_will_have_is_refused_before_the_first_one(metric, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        build_jobs(Sweep(BASE, [Run("a", {"seed": 1})], metric=metric), tmp_path)


@pytest.mark.parametrize(
    "metric", ["pretrain.loss", "pretrain.max_violation_mean", "pretrain.tokens_per_second", "pretrain.grad_norm"]
)
def test_metrics_that_a_run_has(metric, tmp_path):
    assert len(build_jobs(Sweep(BASE, [Run("a", {"seed": 1})], metric=metric), tmp_path)) == 1


def test_seeds_are_the_same_for_every_variant():
    runs = paired_seeds(grid({PEAK: (1e-3, 3e-3)}), (0, 1, 2))
    seeds = {peak: [run.overrides["seed"] for run in runs if run.overrides[PEAK] == peak] for peak in (1e-3, 3e-3)}
    assert seeds == {1e-3: [0, 1, 2], 3e-3: [0, 1, 2]}
    assert runs[-1].name == "peak_0.003-seed_2"


def test_crossed_runs_must_agree():
    slice_ = Resources("v5e:2x2")
    (run,) = cross([Run("a", {"x": 1, "y": 2}, slice_)], [Run("b", {"y": 2, "z": 3})])
    assert run == Run("a-b", {"x": 1, "y": 2, "z": 3}, slice_)
    with pytest.raises(ConfigError, match="disagree about y: 2 and 3"):
        cross([Run("a", {"y": 2})], [Run("b", {"y": 3})])
    with pytest.raises(ConfigError, match="different resources: v5e:2x2, v5p:2x2x2"):
        cross([Run("a", {}, slice_)], [Run("b", {}, Resources("v5p:2x2x2"))])


def test_a_rung_becomes_the_model_it_names(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    tiny = importlib.import_module("v3_style_tiny").tiny
    rungs = [
        Rung(f"d{d}", tiny(2, d, 16, 2), 64, 4, 10, 1e-2, 2, overrides={"precision": "bfloat16"}) for d in (24, 48)
    ]
    for rung, job in zip(rungs, build_jobs(Sweep(BASE, ladder(rungs)), tmp_path), strict=True):
        assert ModelConfig.from_dict(job.config.model) == rung.model
        assert (job.config.precision, job.config.pretrain.train.steps, job.tokens) == ("bfloat16", 10, 10 * 4 * 64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"runs": []}, "at least one run"),
        ({"runs": [Run("a", {}), Run("a", {})]}, "several runs are called 'a'"),
        ({"runs": [Run("a", {"seed": 1})], "x": "sead"}, "'sead' is not a field that the runs override: seed"),
        (
            {"runs": [Run("a", {"p": {"kind": "constant"}})], "by": "p"},
            "'p' has compound values, such as {'kind': 'constant'}",
        ),
        ({"runs": [Run("a", {"p": 1}), Run("b", {"p": (1, 2)})], "x": "p"}, "'p' has compound values"),
        ({"runs": [Run("a", {"seed": 1})], "best": "smallest"}, "best='smallest': allowed: highest, lowest"),
    ],
)
def test_a_sweep_that_makes_no_sense(arguments, message):
    with pytest.raises(ConfigError, match=message):
        Sweep("x.py", **arguments)


@pytest.mark.parametrize("name", ["a/b", "", "../x", "a b", "-a"])
def test_a_run_is_named_like_a_folder(name):
    with pytest.raises(ConfigError, match="letters and digits"):
        Run(name, {})


def test_resources_count_devices_and_nodes():
    assert (Resources().num_devices, Resources().num_nodes, Resources().accelerators) == (1, 1, None)
    pod, gpus, one = Resources("v5p:4x4x4"), Resources("h100:64"), Resources("h100:2")
    assert (pod.num_devices, pod.num_nodes, pod.accelerators) == (64, 1, "tpu-v5p-128")  # named by its cores
    assert (gpus.num_devices, gpus.num_nodes, gpus.accelerators) == (64, 8, "H100:8")
    assert (one.num_nodes, one.gpus_on_a_node, one.accelerators) == (1, 2, "H100:2")
    assert Resources("v5e:4x4").accelerators == "tpu-v5litepod-16"
    assert Resources("v6e:4x4*2").num_devices == 32
    for topology, message in (("v6e:4x4*2", "one slice"), ("tpu7x:4x4x4", "does not offer tpu7x")):
        with pytest.raises(ConfigError, match=message):
            print(Resources(topology).accelerators)


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ("v5x:2x2", "did you mean 'v5"),
        ("cpu:2", "takes no shape"),
        *((topology, "come sizes") for topology in ("v5p:", "v5p:4xx4", "v5p:64", "h100:8x8")),
        ("h100:12", "12 GPUs is not a multiple of the node's 8"),
    ],
)
def test_resources_that_do_not_exist(topology, message):
    with pytest.raises(ConfigError, match=message):
        Resources(topology)


def test_every_run_is_checked_before_anything_starts(tmp_path):
    runs = [
        Run("good", {"pretrain.train.steps": 300}),
        Run("typo", {"pretrain.train.step": 3}),
        Run("value", {"model.moe.top_k": 65}),
        Run("type", {"model.hidden_size": "wide"}),
    ]
    with pytest.raises(ConfigError) as error:
        build_jobs(Sweep(BASE, runs), tmp_path)
    for part in (
        "3 of 4 runs",
        "typo: config.pretrain: unknown field train.step: did you mean 'steps'",
        "value: ",
        "top_k=65 exceeds",
        "type: ",
        "nothing was started",
    ):
        assert part in str(error.value)
    assert "good" not in str(error.value) and not list(tmp_path.iterdir())


def test_a_mesh_of_other_machines_is_not_built_here(tmp_path):
    run = Run("pod", {"mesh.fsdp": 64, "pretrain.batch_size": 64}, Resources("v5p:4x4x4"))
    (job,) = build_jobs(Sweep(BASE, [run]), tmp_path)
    assert job.config.mesh.fsdp == 64 and "--config.mesh.fsdp=64" in job.arguments


@pytest.mark.parametrize(
    ("overrides", "topology", "message"),
    [
        ({"mesh.fsdp": 32}, "v5p:4x4x4", "fsdp 32 does not make up 64 devices"),
        ({"mesh.fsdp": 64}, "v5p:4x4x4", "does not divide|do not divide"),
        ({"mesh.fdsp": 2}, "cpu", "unknown field mesh.fdsp: did you mean 'fsdp'"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused_here_all_the_same(overrides, topology, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        build_jobs(Sweep(BASE, [Run("pod", overrides, Resources(topology))]), tmp_path)


def test_none_overrides_and_is_overridden(tmp_path):
    tuned = [Run("rank", {"model.attention.q_lora_rank": 8}), Run("none", {"model.attention.q_lora_rank": None})]
    assert [job.config.model.attention.q_lora_rank for job in build_jobs(Sweep(BASE, tuned), tmp_path)] == [8, None]


def test_a_folder_of_another_run_is_refused(tmp_path):
    (job,) = build_jobs(Sweep(BASE, [Run("a", {"seed": 1})]), tmp_path)
    job.folder.mkdir()
    (job.folder / "config.json").write_text(job.config.to_json())
    # a folder that holds no results may become another run's
    (job.folder / job.stages[0] / "checkpoints" / "1").mkdir(parents=True)
    build_jobs(Sweep(BASE, [Run("a", {"seed": 1})]), tmp_path)
    with pytest.raises(ConfigError, match=r"config.seed \(1 -> 2\)"):
        build_jobs(Sweep(BASE, [Run("a", {"seed": 2})]), tmp_path)


def test_sweep_files(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        load_sweep(str(tmp_path / "nowhere.py"))
    path = tmp_path / "mine.py"
    path.write_text("def get_sweep():\n    return [1, 2]\n")
    with pytest.raises(ConfigError, match="get_sweep"):
        load_sweep(str(path))

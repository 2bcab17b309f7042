"""The sweeps that come with the project: valid as a whole, and at the published sizes where there are any."""

import math

import numpy as np
import pytest
from launch_cases import ROOT

from deepseek_jax.accounting import count_parameters
from deepseek_jax.launch.jobs import build_jobs
from deepseek_jax.launch.sweep import load_sweep
from deepseek_jax.model.config import ModelConfig
from deepseek_jax.training.config import TrainConfig

FILES = sorted((ROOT / "experiments" / "sweeps").glob("*.py"))


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_run_is_valid(path, tmp_path):
    sweep = load_sweep(str(path))
    assert len(build_jobs(sweep, tmp_path)) == len(sweep.runs)
    assert f"--sweep=experiments/sweeps/{path.name}" in path.read_text()  # the docstring gives the command


@pytest.fixture(scope="module")
def ladder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        jobs = build_jobs(load_sweep("experiments/sweeps/v3_ladder.py"), tmp_path_factory.mktemp("ladder"))
    return {job.name: job for job in jobs}


# mHC, appendix A.1: total and active parameters, tokens, sequences a step, steps, learning rate
PUBLISHED = {
    "3b": (2.97e9, 612e6, 39.3e9, 320, 30_000, 8.6e-4),
    "9b": (9.18e9, 1.66e9, 105e9, 512, 50_000, 5.9e-4),
    "27b": (27.0e9, 4.14e9, 262e9, 1280, 50_000, 4.0e-4),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_recipes(name, ladder):
    total, active, tokens, batch_size, steps, peak = PUBLISHED[name]
    job, counts = ladder[name], count_parameters(ModelConfig.from_dict(ladder[name].config.model))
    assert float(f"{counts.total:.3g}") == total
    assert counts.activated() == pytest.approx(active, rel=2e-3)  # the head counted, the embedding not
    # the other conventions are far off
    assert counts.activated(embedding=True) > 1.05 * active > counts.activated(head=False) * 1.1
    assert job.tokens == pytest.approx(tokens, rel=3e-3)
    pretrain = job.config.pretrain
    train = TrainConfig.from_dict(pretrain.train.to_dict())
    assert (pretrain.seq_len, pretrain.batch_size, train.steps) == (4096, batch_size, steps)
    optimizer = train.optimizer
    assert (optimizer.b1, optimizer.b2, optimizer.eps, optimizer.weight_decay) == (0.9, 0.95, 1e-20, 0.1)
    rates = [
        float(optimizer.learning_rate(step)) for step in (2000, 0.79 * steps, 0.81 * steps, 0.89 * steps, 0.91 * steps)
    ]
    np.testing.assert_allclose(rates, np.array([1, 1, 0.316, 0.316, 0.1]) * peak, rtol=2e-3)


def test_every_rung_divides_over_its_topology(ladder):
    for job in ladder.values():
        mesh, pretrain, experts = job.config.mesh.to_dict(), job.config.pretrain, job.config.model.moe.num_experts
        assert math.prod(mesh.values()) == job.run.resources.num_devices, job.name
        rows = math.prod(mesh.get(axis, 1) for axis in ("data", "fsdp", "expert"))
        step = pretrain.train.microbatch or pretrain.batch_size
        assert step % rows == 0 and pretrain.batch_size % step == 0, job.name
        assert (
            experts % mesh.get("expert", 1) == 0 and job.config.model.attention.num_heads % mesh.get("tensor", 1) == 0
        ), job.name


def test_rungs_grow_in_compute(ladder):
    flops = [job.flops for job in ladder.values()]
    assert flops == sorted(flops) and {job.run.resources.kind for job in ladder.values()} == {"cpu", "v5e", "v5p"}

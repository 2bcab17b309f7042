"""A stage that a config names: built, refused, and its mean of checkpoints against numpy."""

import contextlib
from pathlib import Path

import jax
import numpy as np
import pytest

from deepseek_jax.errors import ConfigError
from deepseek_jax.experiment import build_experiment, read_config
from deepseek_jax.model.transformer import init_variables
from deepseek_jax.stages import build_stages
from deepseek_jax.training.checkpoints import Checkpoints
from deepseek_jax.training.optimizer import OptimizerConfig, build_optimizer
from deepseek_jax.training.state import state_from_variables

FILE = str(Path(__file__).parents[2] / "experiments" / "ablations" / "own_stage.py")
SMALL = [(f"model.{name}", "8") for name in ("hidden_size", "intermediate_size")] + [("model.num_layers", "2")]
SMALL += [("runtime.scan_unroll", "1"), ("model.moe.intermediate_size", "4")]


def stages_of(workdir, *overrides):
    return build_stages(build_experiment(read_config(FILE, [*SMALL, *overrides]), "own_stage", workdir))


def test_the_weights_are_the_mean_of_the_last_checkpoints(tmp_path):
    stages = stages_of(tmp_path, ("soup.count", "2"))
    soup, model = stages[2], stages[2].experiment.model
    saved = [init_variables(model, jax.random.key(seed)) for seed in range(3)]
    optimizer = build_optimizer(OptimizerConfig())
    with contextlib.closing(Checkpoints(tmp_path / "pretrain" / "checkpoints", model.config, keep_last=3)) as store:
        for step, variables in enumerate(saved):
            state = state_from_variables(model, jax.tree.map(np.copy, variables), optimizer, jax.random.key(0))
            store.save(state.replace(step=state.step + step + 1))
        store.wait()
    found = soup.run(None)
    for leaf, *two in zip(*map(jax.tree.leaves, (found["params"], *(v["params"] for v in saved[1:]))), strict=True):
        np.testing.assert_allclose(leaf, (np.asarray(two[0], np.float64) + two[1]) / 2, rtol=1e-6, atol=1e-8)
    assert soup.summary() == "mean of the last 2 checkpoints of pretrain" and soup.work() is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (("soup.count", "0"), "config.soup: count=0: at least 1"),
        (("soup.of", "sft"), "config.soup: of='sft': no stage of this experiment, pretrain, before, soup, after"),
        (("soup.cuont", "2"), "config.soup: unknown field cuont: did you mean 'count'"),
        (("soup.kind", "own_stage:Averag"), "own_stage has no 'Averag': did you mean 'Average'"),
        (("soup.kind", "own_stage:get_config"), "soup.kind='own_stage:get_config' is a function: must be a class"),
        (("soup.kind", "own_stgae:Average"), "importing 'own_stgae' failed .*the folder that holds the module is"),
        (("soup.kind", "avrage"), "config.soup.kind='avrage': allowed: eval, .* or your own as package.module"),
    ],
)
def test_what_it_cannot_be_is_one_sentence(override, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        stages_of(tmp_path, override)

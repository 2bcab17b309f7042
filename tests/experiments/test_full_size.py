"""The full-size experiments say what the reports say: sizes, token counts, and the schedules at the published
boundaries."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from deepseek_jax.accounting import count_parameters
from deepseek_jax.data.config import DataConfig
from deepseek_jax.model.config import ModelConfig
from deepseek_jax.training.config import TrainConfig
from deepseek_jax.training.muon import MuonConfig
from deepseek_jax.training.optimizer import updated_by

FOLDER = Path(__file__).parents[2] / "experiments"


def load(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config().to_dict()


def tokens_after(config, train):
    """Tokens seen after every step, [steps]: the batch is what the loop takes, a multiple of the microbatch."""
    stage = config["pretrain"]
    if train.batch_size is None:
        sequences = np.full(train.steps, stage["batch_size"])
    else:
        sequences = (
            np.round(np.asarray(train.batch_size(np.arange(train.steps)), np.float64) / train.microbatch)
            * train.microbatch
        )
    return np.cumsum(sequences) * stage["seq_len"]


# name: total parameters, tokens, peak, final learning rate
PUBLISHED = {
    "deepseek_v3_671b": (671_026_419_200, 14.8e12, 2.2e-4, 7.3e-6),
    "deepseek_v2_lite_16b": (15_706_484_224, 5.7e12, 4.2e-4, 4.2e-4 * 0.316**2),
    "moonlight_16b": (15_960_110_208, 5.7e12, 4.2e-4, 0.0),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_figures(name):
    total, tokens, peak, final = PUBLISHED[name]
    config = load(name)
    train = TrainConfig.from_dict(config["pretrain"]["train"])
    streams = DataConfig.from_dict(config["pretrain"]["data"]).streams
    optimizer = train.optimizer
    assert count_parameters(ModelConfig.from_dict(config["model"])).total == total
    assert (optimizer.b1, optimizer.b2, optimizer.weight_decay, optimizer.clip_norm) == (0.9, 0.95, 0.1, 1.0)
    assert float(optimizer.learning_rate(2000)) == pytest.approx(peak, rel=1e-6)
    assert float(optimizer.learning_rate(train.steps)) == pytest.approx(final, rel=1e-5, abs=1e-9)
    assert config["pretrain"]["batch_size"] % train.microbatch == 0
    assert streams > 1 and train.microbatch % streams == 0, "batches of a ramp are multiples of the microbatch"


@pytest.mark.parametrize("name", PUBLISHED)
def test_tokens(name):
    config = load(name)
    tokens = tokens_after(config, TrainConfig.from_dict(config["pretrain"]["train"]))
    assert tokens[-1] == pytest.approx(PUBLISHED[name][1], rel=1e-3)


# name: (tokens, learning rate there); half a percent of the run away from each published boundary
LEARNING_RATES = {
    "deepseek_v3_671b": [
        (9.9e12, 2.2e-4),
        (12.15e12, 1.21e-4),
        (14.4e12, 2.2e-5),
        (14.6e12, 2.2e-5),
        (14.7e12, 7.3e-6),
    ],
    "deepseek_v2_lite_16b": [
        (4.5e12, 4.2e-4),
        (4.6e12, 4.2e-4 * 0.316),
        (5.1e12, 4.2e-4 * 0.316),
        (5.2e12, 4.2e-4 * 0.316**2),
    ],
    "moonlight_16b": [(34e9, 4.2e-4), (5.199e12, 4.2e-5), (5.21e12, 9.8e-5), (5.45e12, 5e-5)],
}


@pytest.mark.parametrize("name", LEARNING_RATES)
def test_learning_rate_at_token_counts(name):
    config = load(name)
    train = TrainConfig.from_dict(config["pretrain"]["train"])
    tokens = tokens_after(config, train)
    for count, rate in LEARNING_RATES[name]:
        assert float(train.optimizer.learning_rate(np.searchsorted(tokens, count))) == pytest.approx(rate, rel=0.01), (
            count
        )


def test_v3_mtp_weight_bias_rate_and_ramp():
    config = load("deepseek_v3_671b")
    train = TrainConfig.from_dict(config["pretrain"]["train"])
    steps = np.arange(train.steps)
    tokens = tokens_after(config, train)

    def changes(schedule):
        values = np.asarray(schedule(steps))
        (at,) = np.nonzero(np.diff(values))
        return tokens[at], values[0], values[-1]

    at, before, after = changes(train.objective.mtp_weight)
    assert at == pytest.approx([10e12], rel=1e-3) and (before, after) == (np.float32(0.3), np.float32(0.1))
    at, before, after = changes(train.bias_update_speed)
    assert at == pytest.approx([14.3e12], rel=1e-3) and (before, after) == (np.float32(0.001), 0)
    wanted = np.asarray(train.batch_size(steps))
    sizes = np.round(wanted / train.microbatch) * train.microbatch
    assert sizes[0] == 3072 and sizes[-1] == 15_360 and len(np.unique(sizes)) == 13
    assert tokens[np.argmax(wanted == 15_360)] == pytest.approx(469e9, rel=1e-3)


def test_moonlight_batch_and_bias_rate():
    config = load("moonlight_16b")
    train = TrainConfig.from_dict(config["pretrain"]["train"])
    tokens, steps = tokens_after(config, train), np.arange(train.steps)
    sizes, rates = np.asarray(train.batch_size(steps)), np.asarray(train.bias_update_speed(steps))
    assert set(sizes) == {2048, 4096} and tokens[np.argmax(sizes == 4096)] == pytest.approx(200e9, rel=1e-3)
    assert (
        rates[0] == np.float32(1e-3)
        and rates[-1] == 0
        and tokens[np.argmax(rates == 0)] == pytest.approx(5.2e12, rel=1e-3)
    )
    assert train.bias_update_zero_sum


def test_moonlight_is_trained_by_muon():
    """With the constants of the report's §2.2; all of the 15.29B parameters that it counts but norms and router biases
    are matrices of its own."""
    config = load("moonlight_16b")
    optimizer = TrainConfig.from_dict(config["pretrain"]["train"]).optimizer
    assert optimizer.name == "muon" and optimizer.muon == MuonConfig(0.95, 0.2, "moonlight")
    rules = updated_by(optimizer.name, ModelConfig.from_dict(config["model"]))
    assert (
        sum(rules["muon"].values())
        == 15_289_021_568 - sum(size for name, size in rules["adamw"].items() if name.endswith("norm/scale")) - 26 * 64
    )


def test_routing_balance_is_the_reports():
    v3, lite, moonlight = (load(name)["pretrain"]["train"]["objective"] for name in PUBLISHED)
    assert (v3["balance"], v3["balance_alpha"]) == ("sequence", 1e-4)
    assert (lite["balance"], lite["balance_alpha"], lite["mtp_weight"]) == ("expert", 0.001, 0.0)
    assert (moonlight["balance"], moonlight["balance_alpha"], moonlight["mtp_weight"]) == ("sequence", 0.001, 0.0)

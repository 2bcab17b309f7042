"""Names of one's own in a config: a whole run whose data, tokenizer, schedule, precision and task are in one module."""

import json
import subprocess
import sys

import pytest

from deepseek_jax.__main__ import main
from deepseek_jax.data.tokenizer_files import find_tokenizer
from deepseek_jax.data.tokenizers import load_tokenizer
from deepseek_jax.errors import ConfigError, UserError
from deepseek_jax.experiment import build_experiment, read_config
from deepseek_jax.launch.jobs import build_jobs
from deepseek_jax.launch.sweep import Run, Sweep
from deepseek_jax.stages import build_stages

MODULE = """
import dataclasses

import jax.numpy as jnp

from deepseek_jax.data.byte_tokenizer import ByteTokenizer
from deepseek_jax.precision import PRECISIONS
from deepseek_jax.rl.tasks.parity import ParityTask
from deepseek_jax.training.schedules import constant

NOTES = [{"text": f"note {i}: some words, and some more of them"} for i in range(40)]
HALF = dataclasses.replace(PRECISIONS["float32"], name="mine")


class Upper(ByteTokenizer):
    def encode(self, text, **options):
        return super().encode(text.upper(), **options)


class LongTask(ParityTask):
    @property
    def completion_length(self):
        return super().completion_length + 2


class Half(ParityTask.__mro__[1]):
    pass


def notes():
    return NOTES


def divided(split):
    return NOTES[:30] if split == "train" else NOTES[30:]


def triangle(peak: float, steps: int):
    return lambda step: peak * jnp.maximum(0.0, 1.0 - jnp.abs(2.0 * step / steps - 1.0))


def steady(value):
    return constant(value)


def crooked(value):
    return lambda step: jnp.stack([step, step])


def empty():
    raise OSError("the archive is closed")
"""
FILE = """
from ml_collections import ConfigDict
from deepseek_jax.model.config import GQAConfig, ModelConfig


def get_config():
    model = ModelConfig(
        vocab_size=272, hidden_size=8, num_layers=1, intermediate_size=8, first_k_dense=1, moe=None, mtp_depth=0,
        attention=GQAConfig(num_heads=2, num_kv_heads=1, head_dim=4),
    )
    train = {"steps": 4, "optimizer": {"learning_rate": {"kind": "own_parts:triangle", "peak": 0.01}}}
    data = {"sources": ({"name": "own_parts:notes", "validation_fraction": 0.3},)}
    stage = {"kind": "pretrain", "data": data, "seq_len": 16, "batch_size": 2, "train": train}
    return ConfigDict({
        "model": model.to_dict(), "stages": ("pretrain",), "pretrain": stage, "precision": "own_parts:HALF",
        "tokenizer": "own_parts:Upper", "task": {"name": "own_parts:LongTask", "bits": 8},
    })
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    """An experiment whose module is importable while the test runs."""
    monkeypatch.setattr("sys.path", list(sys.path))
    (tmp_path / "lab").mkdir()
    (tmp_path / "lab" / "own_parts.py").write_text(MODULE)
    (tmp_path / "lab" / "mine.py").write_text(FILE)
    yield str(tmp_path / "lab" / "mine.py")
    sys.modules.pop("own_parts", None)


def built(file, tmp_path, *overrides):
    experiment = build_experiment(read_config(file, overrides), "mine", tmp_path / "run")
    return experiment, build_stages(experiment)


def test_they_are_used_survive_a_restart_and_are_noted(file, tmp_path, capsys):
    command = [f"--config={file}", f"--workdir={tmp_path / 'run'}"]
    assert main([*command, "--dry"]) == 0
    assert "The experiment is valid" in capsys.readouterr().out
    assert main(command) == 0
    lines = [json.loads(line) for line in (tmp_path / "run/pretrain/metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 4 and any("bits_per_byte" in line for line in lines)  # a share of notes() is held out
    capsys.readouterr()
    assert main(command) == 0  # kept, not trained again
    assert "pretrain 4/4" not in capsys.readouterr().out
    for folder in ("run", "run/pretrain", "run/pretrain/checkpoints"):
        assert find_tokenizer(tmp_path / folder) == "own_parts:Upper"
    assert load_tokenizer(find_tokenizer(tmp_path / "run/pretrain")).encode("a") == [ord("A")]
    (job,) = build_jobs(Sweep(file, [Run("a", {"seed": 1})]), tmp_path / "sweep")
    assert job.tokens == 4 * 2 * 16
    # where the module is not, the message says where it is looked for
    program = "import sys; from deepseek_jax.data.tokenizers import load_tokenizer as load; load(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", program, "own_parts:Upper"], capture_output=True, text=True)
    assert "importing 'own_parts' failed" in done.stderr and "one on PYTHONPATH" in done.stderr


def test_each_is_what_the_config_says(file, tmp_path):
    experiment, (stage,) = built(file, tmp_path)
    assert experiment.task.completion_length == 8 + 6 + 2
    assert experiment.tokenizer.encode("abc") == [ord(c) for c in "ABC"]
    rate = stage.train.optimizer.learning_rate
    assert [round(float(rate(step)), 6) for step in range(5)] == [0.0, 0.005, 0.01, 0.005, 0.0]
    assert rate.values == (0.0, 0.0, pytest.approx(0.01), 0.0)
    again = built(file, tmp_path)[1][0].train.optimizer.learning_rate
    other = built(file, tmp_path, ("pretrain.train.optimizer.learning_rate.peak", "0.02"))[1][0]
    assert again == rate and hash(again) == hash(rate) and other.train.optimizer.learning_rate != rate
    held_out = ("pretrain.data.sources", "[{'name': 'own_parts:divided'}]")
    assert len(built(file, tmp_path, held_out)[1][0]._held_out()) == 1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (("task.name", "own_parts:Half"), "task.name='own_parts:Half': Half lacks accuracy, .*see Task"),
        (("task.name", "own_parts:notes"), "is a function: must be a class derived from deepseek_jax.rl.tasks.Task"),
        (("task.bitz", "9"), "unknown field task.own_parts:LongTask.bitz: did you mean 'bits'"),
        (("precision", "own_parts:NOTES"), "precision='own_parts:NOTES' is a list: must be a .*Precision"),
        (("tokenizer", "own_parts:notes"), "tokenizer 'own_parts:notes' is a list without vocab_size, pad_id"),
        (("tokenizer", "own_parts:Uper"), "has no 'Uper': did you mean 'Upper'"),
        (("pretrain.train.bias_update_speed", "{'kind': 'own_parts:crooked', 'value': 1}"), r"value has shape \(2,\)"),
        (("pretrain.train.bias_update_speed", "{'kind': 'own_parts:steady'}"), "'own_parts:steady' needs 'value'"),
        (("pretrain.train.bias_update_speed", "{'kind': 'own_parts:NOTES'}"), "is a list: must be a function that"),
        (("pretrain.train.bias_update_speed", "{'kind': 'own_parts:notes'}"), "own_parts:notes makes no schedule"),
    ],
)
def test_what_cannot_be_used_is_one_sentence(file, tmp_path, override, message):
    with pytest.raises(UserError, match=message):
        built(file, tmp_path, override)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{'name': 'own_parts:empty'}", "source 'own_parts:empty' raised OSError: the archive is closed"),
        ("{'name': 'own_parts:NOTES'}", "is a list: must be a function that returns records"),
        ("{'name': 'own_parts:notes', 'format': 'messages'}", "record 0: no field 'messages'"),
        ("{'name': 'own_parts:divided', 'validation_path': 'x.jsonl'}", "validation_path belongs to local files"),
    ],
)
def test_data_of_ones_own_that_cannot_be_read(file, tmp_path, source, message):
    (stage,) = built(file, tmp_path, ("pretrain.data.sources", f"[{source}]"))[1]
    with pytest.raises(UserError, match=message):
        stage.check_data(prepare=True)


def test_a_share_of_notes_is_held_out_once_and_for_all(file, tmp_path):
    from deepseek_jax.data.config import SourceConfig
    from deepseek_jax.data.sources import open_source

    built(file, tmp_path)
    for name, fraction, train in (("notes", 0.3, None), ("divided", 0.05, 30)):
        source = SourceConfig(f"own_parts:{name}", validation_fraction=fraction)
        sides = [[record["text"] for record in open_source(source, split)] for split in ("train", "validation")]
        assert not set(sides[0]) & set(sides[1]) and len(sides[0]) + len(sides[1]) == 40 and sides[1]
        assert train is None or len(sides[0]) == train
    with pytest.raises(ConfigError, match="importing 'own_prats' failed"):
        open_source(SourceConfig("own_prats:notes"), "train")

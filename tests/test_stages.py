"""Stages: the arguments that they hand to the loop, and the data they open before anything runs. Nothing is trained
here."""

import dataclasses
import json
import types
from pathlib import Path

import jax
import pytest

from deepseek_jax import stages
from deepseek_jax.__main__ import main
from deepseek_jax.errors import ConfigError, UserError
from deepseek_jax.experiment import build_experiment, read_flags
from deepseek_jax.model.ops import Ops
from deepseek_jax.stages.train import matmul_peak_flops
from deepseek_jax.training import batches

FILE = """
from ml_collections import ConfigDict
from deepseek_jax.model.config import GQAConfig, ModelConfig, MoEConfig


def get_config():
    model = ModelConfig(
        vocab_size=272, hidden_size=8, num_layers=2, intermediate_size=12, first_k_dense=1, mtp_depth=1,
        attention=GQAConfig(num_heads=2, num_kv_heads=1, head_dim=4),
        moe=MoEConfig(num_experts=4, top_k=2, intermediate_size=6),
    )
    stage = {"kind": "pretrain", "data": {"sources": SOURCES}, "seq_len": 16, "batch_size": 2, "train": {"steps": 3}}
    last = {"kind": "eval", "data": {"sources": HELD_OUT}, "seq_len": 16, "batch_size": 2}
    return ConfigDict({"model": model.to_dict(), "stages": ("pretrain", "last"), "pretrain": stage, "last": last})
"""


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": f"note {i}: some words " * 4}) + "\n" for i in range(30)))
    return str(path)


def experiment_file(tmp_path, sources, held_out):
    path = tmp_path / "e.py"
    path.write_text(f"SOURCES, HELD_OUT = {sources!r}, {held_out!r}\n{FILE}")
    return f"--config={path}"


def handed_to_train(monkeypatch, experiment):
    """The arguments with which a stage's run calls the loop."""
    found = {}

    def train(model, config, open_loader, workdir, **arguments):
        found.update(arguments, open_loader=open_loader)
        return types.SimpleNamespace(state=types.SimpleNamespace(variables={}))

    monkeypatch.setattr("deepseek_jax.stages.train.train", train)
    stages.build_stages(experiment)[0].run(None)
    return found


def test_an_evaluation_of_broken_weights_is_valid_json_and_says_so(tmp_path, text, capsys):
    """A run from the command line: a stage of one's own breaks the weights, the next measures them, and a second start
    reads what is there."""
    (tmp_path / "broken_stage.py").write_text(
        "import jax\nfrom deepseek_jax.stages.base import Stage\n\n\nclass Broken(Stage):\n"
        "    leaves_results = False\n\n    def summary(self):\n        return 'NaN'\n\n    def run(self, variables):\n"
        "        return jax.tree.map(lambda w: w * float('nan'), self.initial_weights(variables))\n"
    )
    flags = [experiment_file(tmp_path, [{"name": text}], [{"name": text, "validation_fraction": 0.5}])]
    with (tmp_path / "e.py").open("a") as file:
        file.write(
            "\n\nplain = get_config\n\n\ndef get_config():\n    config = plain()\n"
            "    config.broken, config.stages = {'kind': 'broken_stage:Broken'}, ('broken', 'last')\n"
            "    config.last.eval_batches = 1\n    return config\n"
        )
    flags += [f"--workdir={tmp_path / 'run'}"]
    assert main(flags) == 0
    said = capsys.readouterr().out
    assert "last: not a finite number, so null in evaluation.json: bits_per_byte; these weights give logits" in said

    def refuse(constant):
        raise ValueError(f"{constant} is no JSON")

    for name in ("evaluation.json", "metrics.jsonl"):
        stored = (tmp_path / "run/last" / name).read_text()
        assert json.loads(stored, parse_constant=refuse)["bits_per_byte"] is None
    assert main(flags) == 0 and "nan" not in (tmp_path / "run/results.txt").read_text().lower()


@pytest.mark.parametrize("held_out", [False, True])
def test_without_held_out_data_training_says_so_once(tmp_path, text, monkeypatch, capsys, held_out):
    sources = [{"name": text, "validation_fraction": 0.0}, {"name": "task"}][:1]
    if held_out:
        # of several sources those that hold something out count
        sources = [*sources, {"name": text, "validation_path": text}]
    config = read_flags([experiment_file(tmp_path, sources, sources)])[0]
    found = handed_to_train(monkeypatch, build_experiment(config, "e", tmp_path / "run"))
    assert (found["held_out"] is not None) == held_out
    assert not capsys.readouterr().out
    found["open_loader"]().close()
    assert ("pretrain: nothing is held out" in capsys.readouterr().out) != held_out
    if held_out:
        batches = list(found["held_out"]())
        lines = Path(text).read_text().splitlines()
        assert sum(int(batch["num_bytes"].sum()) for batch in batches) == sum(
            len(json.loads(line)["text"]) for line in lines
        )


def test_a_held_out_share_of_no_document_is_said_and_trained_without(tmp_path, text, monkeypatch, capsys):
    sources = [{"name": text, "validation_fraction": 1e-9}]
    config = read_flags([experiment_file(tmp_path, sources, [{"name": text, "validation_fraction": 0.5}])])[0]
    experiment = build_experiment(config, "e", tmp_path / "run")
    stages.build_stages(experiment)[0].check_data(prepare=False)
    found = handed_to_train(monkeypatch, experiment)
    assert found["held_out"] is None
    found["open_loader"]().close()
    printed = capsys.readouterr().out
    assert (
        f"no document of {text} falls into its held-out share (validation_fraction=1e-09)" in printed
        and "no held-out loss is measured" in printed
    )
    with config.unlocked():
        config.last.data.sources = sources  # an evaluation has nothing else to do
    with pytest.raises(UserError, match="none of its 30 documents falls into the validation split"):
        stages.build_stages(build_experiment(config, "e", tmp_path / "run"))[1].check_data(prepare=False)


@pytest.mark.parametrize(
    ("held_out", "message"),
    [
        ([{"name": "TEXT", "validation_path": "TEXT.typo.jsonl"}], r"no file matches .*TEXT.typo.jsonl"),
        ([{"name": "nowhere/*.jsonl"}], r"no file matches 'nowhere/\*.jsonl'"),
        ([{"name": "stdlb"}], "unknown dataset 'stdlb'"),
    ],
)
@pytest.mark.parametrize("flags", [["--dry"], []])
def test_the_last_stages_data_is_opened_before_the_first_stage_and_the_folder_stays_free(
    tmp_path, text, held_out, message, flags
):
    held_out = [{name: value.replace("TEXT", text) for name, value in source.items()} for source in held_out]
    arguments = [experiment_file(tmp_path, [{"name": text}], held_out), f"--workdir={tmp_path / 'run'}", *flags]
    with pytest.raises(UserError, match=message.replace("TEXT", text)):
        main(arguments)
    assert not (tmp_path / "run").exists()


def test_flops_count_the_mtp_module(tmp_path, text, monkeypatch):
    """By hand: twice the activated weights and the attention's pairs, forward; three times that with the backward
    pass."""
    config = read_flags([experiment_file(tmp_path, [{"name": text}], [{"name": text}])])[0]
    found = handed_to_train(monkeypatch, build_experiment(config, "e", tmp_path / "run"))
    attention = 8 * (2 * 4) + 2 * 8 * (1 * 4) + (2 * 4) * 8  # q, k and v, output
    # two experts; a router has its biases, as in published counts
    dense, experts = attention + 3 * 8 * 12, attention + 2 * 3 * 8 * 6 + 4 * (8 + 1)
    norms = 2 * 8
    head = 272 * 8
    main_model = dense + experts + 2 * norms + 8 + head
    mtp = 2 * 8 * 8 + experts + norms + 3 * 8 + head  # projection, block, its three norms, the shared head once more
    pairs = 3 * 2 * (2 * 2 * 4) * 16 // 2  # three layers, QK and PV of two heads of 4, half of 16 positions
    assert found["flops_per_token"] == 3 * (2 * (main_model + mtp) + pairs)
    with config.unlocked():
        config.pretrain.train.objective = {"mtp_weight": 0.0}
    found = handed_to_train(monkeypatch, build_experiment(config, "e", tmp_path / "run"))
    assert found["flops_per_token"] == 3 * (2 * main_model + pairs * 2 // 3)


def test_work_sums_a_ramp_of_batch_sizes_step_by_step(tmp_path, text):
    """Four to sixteen sequences over 7 of 50 steps, in multiples of 3 shards; and sizes that nothing can hold."""
    config = read_flags([experiment_file(tmp_path, [{"name": text}], [{"name": text}])])[0]
    ramp = {"kind": "ramp", "start": 4, "end": 16, "steps": 7}
    with config.unlocked():
        config.pretrain.train = {"steps": 50, "batch_size": ramp}
        del config.pretrain["batch_size"]
    stage = stages.build_stages(build_experiment(config, "e", tmp_path / "run"))[0]
    each = [int(batches.batch_size_at(stage.train, step, 3)) for step in range(50)]
    assert set(each) >= {3, 9, 15} and each[7:] == 43 * [15]
    assert stage.work(shards=3).tokens == sum(each) * 16
    with config.unlocked():
        config.pretrain = {**config.pretrain.to_dict(), "train": {"steps": 2**31 - 1}, "batch_size": 2}
    stage = stages.build_stages(build_experiment(config, "e", tmp_path / "run"))[0]
    assert stage.work().tokens == (2**31 - 1) * 2 * 16
    for field, message in {"train.steps": "a step is an int32", "seq_len": "positions are int32"}.items():
        with pytest.raises(ConfigError, match=f"{field}=1000000000000: .*{message}"):
            flags = [experiment_file(tmp_path, [{"name": text}], []), f"--config.pretrain.{field}={10**12}"]
            stages.build_stages(build_experiment(read_flags(flags)[0], "e", tmp_path / "run"))


@pytest.mark.parametrize(
    ("precision", "expected"), [("bfloat16", 989.5e12), ("fp8_deepseek", 989.5e12), ("float32", None)]
)
def test_the_peak_is_that_of_the_precision_on_a_known_device(tmp_path, text, monkeypatch, precision, expected):
    experiment = build_experiment(
        read_flags([experiment_file(tmp_path, [{"name": text}], [{"name": text}])])[0], "e", tmp_path / "run"
    )
    experiment = dataclasses.replace(experiment, model=experiment.model.clone(ops=Ops(precision)))
    assert handed_to_train(monkeypatch, experiment)["peak_flops"] is None  # a CPU is not in the table
    card = types.SimpleNamespace(id=0, device_kind="NVIDIA H100 80GB HBM3", platform="gpu", process_index=0)
    monkeypatch.setattr(jax, "devices", lambda *_: [card])
    assert matmul_peak_flops(experiment.model) == expected

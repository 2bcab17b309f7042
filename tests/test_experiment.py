"""The main command: its refusals, a run through all stages, and resuming."""

import json
from pathlib import Path

import pytest

from deepseek_jax.__main__ import main
from deepseek_jax.data.tokenizers import load_tokenizer
from deepseek_jax.errors import ConfigError, UserError
from deepseek_jax.experiment import build_experiment, read_flags
from deepseek_jax.stages import build_stages

ROOT = Path(__file__).parents[1]
R1_TINY = str(ROOT / "experiments" / "r1_tiny.py")
SMALL = [
    "--config.model.hidden_size=16",
    "--config.model.num_layers=2",
    "--config.model.intermediate_size=16",
    "--config.runtime.scan_unroll=1",
    "--config.model.moe.intermediate_size=8",
    "--config.task.bits=8",
    "--config.pretrain.train.steps=3",
    "--config.pretrain.train.optimizer.learning_rate.warmup_steps=1",
    "--config.sft.train.optimizer.learning_rate.warmup_steps=1",
    "--config.pretrain.train.eval_batches=1",
    "--config.pretrain.train.log_every=1",
    "--config.pretrain.batch_size=4",
    "--config.pretrain.task_documents.count=256",
    "--config.sft.train.steps=2",
    "--config.sft.batch_size=4",
    "--config.sft.task_documents.count=256",
    "--config.before.eval.problems=8",
    "--config.before.eval.sampled_problems=4",
    "--config.before.eval.samples=4",
    "--config.before.batch_size=4",
    "--config.before.eval_batches=1",
    "--config.after.eval.problems=8",
    "--config.after.eval.sampled_problems=4",
    "--config.after.eval.samples=4",
    "--config.after.batch_size=4",
    "--config.after.eval_batches=1",
    "--config.grpo.prompts_per_rollout=4",
    "--config.grpo.group_size=4",
    "--config.grpo.steps=4",
    "--config.grpo.eval.problems=8",
    "--config.grpo.eval.sampled_problems=8",
]


@pytest.fixture(autouse=True)
def one_data_dir(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path_factory.getbasetemp() / "tfds"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--config.model.moe.num_expert=4", "unknown field model.moe.num_expert: did you mean 'num_experts'"),
        ("--config.sead=1", "unknown field config.sead: did you mean 'seed'"),
        ("--config.model.moe.top_k=9", "top_k=9 exceeds num_experts=8"),
        ("--config.model.moe.num_groups=3", "num_groups=3 must divide num_experts=8"),
        ("--config.model.vocab_size=200", "vocab"),
        ("--config.precision=fp16", "config.precision='fp16': allowed: bfloat16"),
        ("--config.grpo.group_size=1", "must be at least 2"),
        ("--config.grpo.num_minibatches=7", "num_minibatches=7 must divide"),
        ("--config.task.name=paritty", "did you mean 'parity'"),
        (
            "--config.stages=('pretrain','sft','before','grpoo','after')",
            "config.stages lists 'grpoo', but config.grpoo has no 'kind'",
        ),
        ("--config.grpo.kind=rl", "grpo.kind='rl'"),
        ("--config.pretrain.train.optimizer.b1=1.5", "optimizer.b1=1.5"),
        ("--config.pretrain.train.step=5", "unknown field train.step: did you mean 'steps'"),
        ("--config.seed.x=5", "has no fields"),
        ("--config.model.hidden_size=wide", "model.hidden_size='wide': must be a whole number"),
    ],
)
def test_a_mistake_is_one_clear_message_before_anything_runs(override, message, tmp_path, capsys):
    with pytest.raises(UserError, match="(?s).*") as error:
        main([f"--config={R1_TINY}", f"--workdir={tmp_path / 'run'}", override])
    assert message in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(extra=1), "unknown field config.extra"),
        (
            lambda c: c.pretrain.update(sequence_length=5),
            "config.pretrain: unknown field sequence_length: did you mean 'seq_len'",
        ),
        (lambda c: c.grpo.update(clip_eps=0.2), "config.grpo: unknown field clip_eps: did you mean 'clip_epsilon'"),
        (lambda c: c.grpo.update(rewards={"acuracy": 1.0}), "config.grpo: rewards='acuracy': did you mean 'accuracy'"),
        (lambda c: c.__delattr__("task"), "works on a task"),
        (
            lambda c: (c.update(mesh={"fsdp": 8}), c.grpo.update(prompts_per_rollout=3, group_size=4)),
            "num_minibatches=6; the nearest mesh that works is",
        ),
        (
            lambda c: c.update(mesh={"data": 3}),
            "data 3 does not make up 8 devices; the nearest mesh that works is data 8",
        ),
        (lambda c: c.pretrain.data.update(sources=({"name": "/nowhere/*.jsonl"},)), None),
    ],
)
def test_an_experiment_file_is_checked_as_a_whole(change, message, tmp_path):
    config = read_flags([f"--config={R1_TINY}"])[0]
    with config.unlocked():
        change(config)
    if message is None:  # data is opened when its stage starts
        stages = build_stages(build_experiment(config, "x", tmp_path))
        with pytest.raises(UserError, match="nowhere"):
            stages[0].run(None)
        return
    with pytest.raises(UserError) as error:
        build_stages(build_experiment(config, "x", tmp_path))
    assert message in str(error.value)


@pytest.mark.parametrize(
    "name",
    sorted(
        str(path.relative_to(ROOT))
        for folder in ("experiments", "experiments/ablations")
        for path in (ROOT / folder).glob("*.py")
    ),
)
def test_every_experiment_file_is_valid(name, capsys):
    assert main([f"--config={ROOT / name}", "--dry"]) == 0
    assert "The experiment is valid" in capsys.readouterr().out
    assert f"--config={name}" in (ROOT / name).read_text()  # the docstring gives the command


def test_the_whole_road_and_again(tmp_path, monkeypatch, capsys):
    command = [f"--config={R1_TINY}", f"--workdir={tmp_path}", *SMALL]
    assert main(command) == 0
    first = capsys.readouterr().out
    for part in (
        "[1/5] pretrain",
        "[5/5] after",
        "greedy accuracy",
        "maj@4",
        "pass@4",
        "response length",
        "bits per byte",
        "curves.png",
    ):
        assert part in first.replace("\n", "")  # a long path is broken over lines
    before, after = (json.loads((tmp_path / stage / "evaluation.json").read_text()) for stage in ("before", "after"))
    assert before["samples"][0]["prompt"] == after["samples"][0]["prompt"]  # the same held-out problems
    assert 0 <= before["greedy_accuracy"] <= 1 and before["bits_per_byte"] > 1
    records = [json.loads(line) for line in (tmp_path / "grpo" / "metrics.jsonl").read_text().splitlines()]
    assert [(r["step"], r["first_ratio_error"] < 1e-5) for r in records if "loss" in r] == [(2, True), (4, True)]
    assert [r["step"] for r in records if "held_out_accuracy" in r] == [0, 4]
    logged = [json.loads(line) for line in (tmp_path / "after" / "metrics.jsonl").read_text().splitlines()]
    assert (
        logged == [{"step": 0} | {name: value for name, value in after.items() if name != "samples"}]
        and "maj@4" in logged[0]
    )
    assert (tmp_path / "grpo" / "curves.png").stat().st_size > 5000
    assert (tmp_path / "results.txt").read_text().count("greedy accuracy") == 1

    for stage in ("pretrain", "sft", "grpo"):  # whoever takes the folder knows how to read and write its text
        assert (
            load_tokenizer(tmp_path / stage / "tokenizer").vocab_size
            == load_tokenizer(tmp_path / stage).vocab_size
            == 272
        )

    def refuse(*_, **__):
        raise AssertionError("opened data, or made some, for a stage that is finished")

    for name in ("train.build_loader", "held_out.build_loader", "held_out.check_sources", "train.TaskDocuments.write"):
        monkeypatch.setattr(f"deepseek_jax.stages.{name}", refuse)
    weights = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/checkpoints/**/*")}
    assert main(command) == 0  # everything is there: nothing is trained twice, and the same table comes out
    said = capsys.readouterr().out
    assert "pretrain 1/3" not in said and "grpo 1/2" not in said and "maj@4" in said
    assert json.loads((tmp_path / "after" / "evaluation.json").read_text()) == after
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/checkpoints/**/*")} == weights
    with pytest.raises(ConfigError, match="another configuration"):
        main([*command, "--config.seed=3"])

    # Killed between two stages, or before the last one: what is missing is made again from what is there, bit for bit.
    monkeypatch.undo()
    (tmp_path / "after" / "evaluation.json").unlink()
    assert main(command) == 0
    assert json.loads((tmp_path / "after" / "evaluation.json").read_text()) == after
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/checkpoints/**/*")} == weights

"""A run's folder: what is kept, continued and run again, and that it belongs to one run at a time. Nothing is trained
here."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from deepseek_jax.errors import ConfigError, UserError
from deepseek_jax.experiment import build_experiment, read_flags
from deepseek_jax.stages import build_stages
from deepseek_jax.workdir import claim, explained, hold, plan_run

ROOT = Path(__file__).parents[1]
R1_TINY = f"--config={ROOT / 'experiments' / 'r1_tiny.py'}"
CONSTANT = "--config.pretrain.train.optimizer.learning_rate={'kind':'constant','value':0.001}"
ALL = ("pretrain", "sft", "before", "grpo", "after")


def built(workdir, *overrides, change=None):
    config = read_flags([R1_TINY, *overrides])[0]
    if change is not None:
        with config.unlocked():
            change(config)
    experiment = build_experiment(config, "x", workdir)
    return experiment, build_stages(experiment)


def start(workdir, *overrides, change=None):
    """Plans and claims as the program does -> the actions by stage."""
    experiment, stages = built(workdir, *overrides, change=change)
    plan = plan_run(experiment, stages)
    workdir.mkdir(exist_ok=True)
    claim(experiment, stages, plan)
    return plan.actions


def finish(workdir, **made):
    """Leaves what finished stages would; numbers are the steps of checkpoints."""
    for name in ALL:
        folder = workdir / name
        if name in ("before", "after"):
            folder.mkdir(exist_ok=True, parents=True)
            (folder / "evaluation.json").write_text("{}")
        else:
            (folder / "checkpoints" / str(made.get(name, {"pretrain": 240, "sft": 60, "grpo": 80}[name]))).mkdir(
                parents=True, exist_ok=True
            )


def actions(**changed):
    return dict.fromkeys(ALL, "keep") | changed


@pytest.fixture
def finished(tmp_path):
    assert start(tmp_path / "run", CONSTANT) == dict.fromkeys(ALL, "run")
    finish(tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize(
    "override",
    [
        "--config.mesh={'fsdp':8}",
        "--config.runtime.remat=full",
        "--config.runtime.attention_chunk=32",
        "--config.runtime.experts=dense",
        "--config.pretrain.train.log_every=1",
        "--config.pretrain.train.eval_every=7",
        "--config.pretrain.train.eval_batches=3",
        "--config.pretrain.train.checkpoint_every=3",
        "--config.pretrain.train.keep_last=5",
        "--config.pretrain.train.keep_best=2",
        "--config.pretrain.train.objective.loss_chunk=64",
        "--config.pretrain.data.read_threads=3",
        "--config.pretrain.data.prefetch_sequences=0",
        "--config.pretrain.data.data_dir=/elsewhere",
        "--config.grpo.loop.log_every=2",
        "--config.grpo.loop.show=9",
        "--config.grpo.loop.keep_last=4",
        "--config.grpo.eval.problems=300",
        "--config.grpo.loss_chunk=64",
        "--config.after.eval.show=2",
    ],
)
def test_what_changes_no_result_is_let_through(finished, override):
    assert start(finished, CONSTANT, override) == actions()
    assert not list(finished.glob("*.old-*"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--config.seed=3", r"config.seed \(0 -> 3\)"),
        ("--config.model.hidden_size=32", r"config.model.hidden_size \(64 -> 32\)"),
        ("--config.model.moe.top_k=1", r"config.model.moe.top_k \(2 -> 1\)"),
        ("--config.task.bits=8", r"config.task.bits \(20 -> 8\)"),
        ("--config.precision=bfloat16", r"config.precision \('float32' -> 'bfloat16'\)"),
        ("--config.pretrain.train.optimizer.b1=0.5", r"config.pretrain.train.optimizer.b1 \(0.9 -> 0.5\)"),
        ("--config.pretrain.train.optimizer.name=muon", r"config.pretrain.train.optimizer.name \('adamw' -> 'muon'\)"),
        ("--config.pretrain.data.shuffle=False", r"config.pretrain.data.shuffle \(True -> False\)"),
        ("--config.pretrain.data.streams=2", r"config.pretrain.data.streams \(1 -> 2\)"),
        ("--config.pretrain.batch_size=32", r"config.pretrain.batch_size \(64 -> 32\)"),
        ("--config.pretrain.task_documents.count=99", r"config.pretrain.task_documents.count \(16384 -> 99\)"),
        (
            "--config.pretrain.train.steps=239",
            r"config.pretrain.train.steps \(240 -> 239, and 240 steps are made; there are checkpoints of 240\)",
        ),
        ("--config.stages=('sft','grpo')", r"config.stages \(\['pretrain', 'sft'\] -> \['sft'\]\)"),
    ],
)
def test_another_run_is_refused_by_its_first_fields(finished, override, message):
    before = sorted(finished.rglob("*"))
    with pytest.raises(
        ConfigError, match=f"holds a run of another configuration: {message}.*Pass another --workdir, or the settings"
    ):
        start(finished, CONSTANT, override)
    assert sorted(finished.rglob("*")) == before


def test_a_longer_run_keeps_its_steps_and_runs_again_what_came_after(finished, capsys):
    assert start(finished, CONSTANT, "--config.pretrain.train.steps=300") == actions(
        pretrain="continue", sft="again", before="again", grpo="again", after="again"
    )
    said = capsys.readouterr().out
    assert "kept: pretrain\n" in said and "run again: sft, for another config.pretrain.train.steps (240 -> 300)" in said
    assert (finished / "pretrain" / "checkpoints" / "240").is_dir() and (
        finished / "sft.old-1" / "checkpoints" / "60"
    ).is_dir()
    assert (finished / "after.old-1" / "evaluation.json").is_file() and not (finished / "sft" / "checkpoints").exists()
    finish(finished, pretrain=300)
    # the checkpoint of step 240 is there
    assert start(finished, CONSTANT) == actions(sft="again", before="again", grpo="again", after="again")
    finish(finished)
    assert start(finished, CONSTANT, "--config.pretrain.train.steps=300") == actions(
        sft="again", before="again", grpo="again", after="again"
    )
    finish(finished)
    assert start(finished, CONSTANT, "--config.pretrain.train.steps=300") == actions()
    assert start(finished, CONSTANT, "--config.grpo.steps=90", "--config.pretrain.train.steps=300") == actions(
        grpo="continue", after="again"
    )
    assert (finished / "after.old-4" / "evaluation.json").is_file() and (
        finished / "after.old-1" / "evaluation.json"
    ).is_file()


def test_a_schedule_over_the_stage_is_another_one_when_the_stage_is_longer(tmp_path):
    cosine = "--config.pretrain.train.optimizer.learning_rate={'kind':'cosine','peak':0.001%s}"
    run = tmp_path / "run"
    start(run, cosine % "")
    finish(run)
    message = (
        r"pretrain.train.optimizer.learning_rate \(0.00\d+ -> 0.00\d+ at step \d+, which is made; "
        r".*give it the 'steps' it had"
    )
    with pytest.raises(ConfigError, match=message):
        start(run, cosine % "", "--config.pretrain.train.steps=300")
    longer = start(run, cosine % ",'steps':240", "--config.pretrain.train.steps=300")
    assert longer["pretrain"] == "continue"
    # While the rate is still that of the warm-up, a longer stage has made the same steps.
    warm = "--config.pretrain.train.optimizer.learning_rate={'kind':'cosine','peak':0.001,'warmup_steps':100}"
    for made, allowed in ((101, True), (102, False)):
        other = tmp_path / str(made)
        start(other, warm)
        (other / "pretrain" / "checkpoints" / str(made)).mkdir(parents=True)
        if allowed:
            assert start(other, warm, "--config.pretrain.train.steps=300")["pretrain"] == "continue"
        else:
            with pytest.raises(ConfigError, match=r"at step 101, which is made"):  # from 0: step 100 is the peak
                start(other, warm, "--config.pretrain.train.steps=300")


def test_a_later_stage_that_changed_is_run_again(finished, capsys):
    assert start(finished, CONSTANT, "--config.grpo.kl_coefficient=0.01") == actions(grpo="again", after="again")
    assert (
        "run again: grpo, for another config.grpo.kl_coefficient (0.001 -> 0.01); what it had left is in"
        in capsys.readouterr().out
    )
    assert start(finished, CONSTANT, "--config.grpo.kl_coefficient=0.01") == actions(grpo="run", after="run")
    finish(finished)
    # The settings it had before: what it left then is still there, under another name.
    assert start(finished, CONSTANT) == actions(grpo="again", after="again")
    assert sorted(path.name for path in finished.glob("grpo*")) == ["grpo", "grpo.old-1", "grpo.old-2"]
    assert (finished / "grpo.old-1" / "checkpoints" / "80").is_dir()


def test_a_stage_may_be_as_short_as_one_of_its_checkpoints(tmp_path):
    run = tmp_path / "run"
    start(run, CONSTANT)
    for step in (120, 240):
        (run / "pretrain" / "checkpoints" / str(step)).mkdir(parents=True)
    assert start(run, CONSTANT, "--config.pretrain.train.steps=120")["pretrain"] == "keep"
    with pytest.raises(
        ConfigError, match=r"steps \(240 -> 180, and 240 steps are made; there are checkpoints of 120, 240\)"
    ):
        start(run, CONSTANT, "--config.pretrain.train.steps=180")
    # A schedule that is the same as far as the shorter stage goes, and another one after it.
    switch = (
        "--config.pretrain.train.optimizer.learning_rate="
        "{'kind':'switch','first':0.001,'second':0.0005,'at':0.5,'steps':240}"
    )
    assert start(run, switch, "--config.pretrain.train.steps=120")["pretrain"] == "keep"
    with pytest.raises(ConfigError, match=r"learning_rate \(0.001 -> 0.0005 at step 120, which is made"):
        start(run, switch)


def test_a_stage_that_changes_no_weights_concerns_itself_alone(finished):
    assert start(finished, CONSTANT, "--config.before.eval.problems=300") == actions(before="again")


def test_stages_may_be_left_out_and_added(finished):
    def without(*names):
        return lambda config: config.update(stages=tuple(name for name in ALL if name not in names))

    assert start(finished, CONSTANT, change=without("after", "before")) == {
        "pretrain": "keep",
        "sft": "keep",
        "grpo": "keep",
    }
    assert start(finished, CONSTANT) == actions()  # they were not touched, and know what they were made with
    assert start(finished, CONSTANT, "--config.grpo.kl_coefficient=0.01", change=without("grpo")) == {
        "pretrain": "keep",
        "sft": "keep",
        "before": "keep",
        "after": "again",
    }
    assert start(finished, CONSTANT, "--config.grpo.kl_coefficient=0.01") == actions(grpo="again", after="run")


def test_a_stage_goes_on_in_the_middle(finished):
    (finished / "grpo" / "checkpoints" / "80").rename(finished / "grpo" / "checkpoints" / "40")
    (finished / "after" / "evaluation.json").unlink()
    assert start(finished, CONSTANT) == actions(grpo="continue", after="run")


def test_a_run_that_has_left_nothing_may_become_any_other(tmp_path):
    start(tmp_path / "run", CONSTANT)
    assert start(tmp_path / "run", CONSTANT, "--config.seed=3") == dict.fromkeys(ALL, "run")
    finish(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"config.seed \(3 -> 0\)"):
        start(tmp_path / "run", CONSTANT)


def test_runs_of_older_versions_have_one_configuration(finished):
    for name in ALL:
        (finished / name / "experiment.json").unlink()
    with pytest.raises(ConfigError, match=r"config.seed \(0 -> 3\)"):
        start(finished, CONSTANT, "--config.seed=3")
    assert start(finished, CONSTANT, "--config.grpo.kl_coefficient=0.01") == actions(grpo="again", after="again")


def test_a_damaged_configuration_is_said(finished):
    (finished / "sft" / "experiment.json").write_text('{"stages": [')
    with pytest.raises(ConfigError, match=r"sft/experiment.json is damaged .*; pass another --workdir, or restore it"):
        start(finished, CONSTANT)


def test_one_run_at_a_time(tmp_path):
    """Another process holds the folder, and is killed."""
    run = tmp_path / "new" / "run"
    run.mkdir(parents=True)
    program = (
        f"import time; from deepseek_jax.locks import lock\n"
        f"with lock({str(run / 'run.lock')!r}, ''): print('held', flush=True); time.sleep(600)"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
    )
    assert child.stdout.readline() == b"held\n"
    with (
        pytest.raises(ConfigError, match=rf"run is in use, another run is going on there: .*\(process {child.pid} on "),
        hold(run),
    ):
        pass
    child.kill()
    assert child.wait() == -signal.SIGKILL
    (run / "run.lock").write_text("process 99999999 on a machine with a long name\n" * 3)  # of whoever held it before
    with hold(run), pytest.raises(ConfigError, match=rf"\(process {os.getpid()} on [^)\s]+\)$"), hold(run):
        pass
    with hold(run):
        pass


def test_a_folder_that_cannot_be_one_is_a_sentence(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file is a file: pass the --workdir of a folder"), hold(tmp_path / "file"):
        pass
    with (
        pytest.raises(UserError, match=r"cannot write .*file/run: Not a directory; .* pass another --workdir"),
        hold(tmp_path / "file" / "run"),
    ):
        pass

    def refuse(number):
        def mkdir(path, *_, **__):
            raise OSError(number, os.strerror(number), str(path))

        return mkdir

    for number, words in (
        (errno.EROFS, "Read-only file system; see to its permissions"),
        (errno.ENOSPC, "No space left on device; free some space"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(Path, "mkdir", refuse(number))
            with (
                pytest.raises(UserError, match=rf"^cannot write {tmp_path}/run: {words}, or pass another --workdir$"),
                hold(tmp_path / "run"),
            ):
                pass
    with pytest.raises(FileNotFoundError), explained(tmp_path):  # that is a bug, and keeps its traceback
        (tmp_path / "nowhere").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_records_are_json(finished):
    assert json.loads((finished / "sft" / "experiment.json").read_text()) == json.loads(
        (finished / "config.json").read_text()
    )

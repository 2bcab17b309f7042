"""A stage from start to end: killed, stopped, started again, badly fed."""

import contextlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from deepseek_jax.errors import CheckpointError, ConfigError, DataError
from deepseek_jax.json_io import read_json_lines
from deepseek_jax.model.config import GQAConfig, ModelConfig, MoEConfig
from deepseek_jax.model.ops import Ops
from deepseek_jax.model.runtime import RuntimeConfig
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.training import metrics
from deepseek_jax.training.batches import step_batches
from deepseek_jax.training.checkpoints import Checkpoints, load_variables, steps_in
from deepseek_jax.training.config import TrainConfig
from deepseek_jax.training.evaluate import make_evaluate
from deepseek_jax.training.loop import train
from deepseek_jax.training.metrics import MetricsWriter, read_metrics
from deepseek_jax.training.optimizer import build_optimizer
from deepseek_jax.training.preemption import Terminated
from deepseek_jax.training.state import create_state
from deepseek_jax.training.targets import targets

STEPS, VOCAB = 40, 61


class Counting:
    """Batches of sequences that count upwards, from a random number on. `pause` seconds each; `signal_at` raises
    SIGTERM."""

    def __init__(self, pause=0.0, signal_at=None, rows=4):
        self.position, self.pause, self.signal_at, self.rows = 0, pause, signal_at, rows

    def __next__(self):
        return self.take(self.rows)

    def take(self, num_rows):
        time.sleep(self.pause)
        start = np.random.default_rng(self.position).integers(0, VOCAB, (num_rows, 1))
        self.position += 1
        if self.position == self.signal_at:
            os.kill(os.getpid(), signal.SIGTERM)
        tokens = ((start + np.arange(12)) % VOCAB).astype(np.int32)
        ones = np.ones_like(tokens)
        return {
            "tokens": tokens,
            "segment_ids": ones,
            "positions": np.broadcast_to(np.arange(12, dtype=np.int32), tokens.shape).copy(),
            "loss_mask": ones,
            "num_bytes": np.full(num_rows, 11, np.int32),
        }

    def get_state(self):
        return {"position": self.position}

    def set_state(self, state):
        self.position = state["position"]

    def close(self):
        self.closed = True


def held_out():
    loader = Counting()
    loader.position = 10_000
    return [next(loader) for _ in range(2)]


def tiny():
    return Transformer(
        ModelConfig(
            vocab_size=VOCAB,
            hidden_size=16,
            num_layers=1,
            intermediate_size=16,
            attention=GQAConfig(num_heads=2, num_kv_heads=1, head_dim=8),
            moe=MoEConfig(num_experts=4, top_k=2, intermediate_size=8),
            init_std=0.1,
        ),
        Ops(runtime=RuntimeConfig(experts="dense")),
    )


def run(workdir, loader, steps=STEPS, held_out=held_out, **changes):
    model = tiny()
    fields = dict(steps=steps, log_every=2, eval_every=20, checkpoint_every=5, optimizer={"learning_rate": 0.02})
    config = TrainConfig.from_dict(fields | changes)
    return train(model, config, lambda: loader, workdir, held_out=held_out, flops_per_token=1e6, peak_flops=1e9)


def results(workdir):
    """Log lines without their timing, and the final weights."""
    timing = ("tokens_per_second", "flops_per_second", "mfu")
    lines = [{name: value for name, value in line.items() if name not in timing} for line in read_metrics(workdir)]
    return lines, load_variables(workdir)[1]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("uninterrupted")
    return workdir, run(workdir, Counting())


def test_learns_evaluates_and_leaves_its_files(uninterrupted):
    workdir, result = uninterrupted
    lines = read_metrics(workdir)
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == STEPS // 2 and losses[-1] < 0.7 * losses[0]
    assert [line["step"] for line in lines if "bits_per_byte" in line] == [20, 40]
    assert result.metrics["bits_per_byte"] == lines[-1]["bits_per_byte"] < lines[10]["bits_per_byte"]
    assert lines[-2]["mfu"] == pytest.approx(lines[-2]["tokens_per_second"] * 1e-3)
    assert lines[-2]["tokens"] == 48 and len(lines[-2]["max_violation_per_layer"]) == 1
    assert sorted(path.name for path in workdir.iterdir()) == [
        "checkpoints",
        "expert_load.jsonl",
        "goodput.json",
        "goodput.jsonl",
        "metrics.jsonl",
        "tensorboard",
    ]
    assert int(result.state.step) == STEPS


def test_a_finished_stage_returns_what_it_left(uninterrupted):
    workdir, result = uninterrupted
    again = run(workdir, Bad(ends))  # asks for no data
    assert again.metrics == result.metrics
    jax.tree.map(np.testing.assert_array_equal, again.state.variables, result.state.variables)


def test_killed_and_stopped_and_started_again_is_bit_identical(uninterrupted, tmp_path, compilation_cache, capsys):
    """SIGKILL at a random step in a process of its own, then SIGTERM, then to the end."""
    program = (
        "import sys; sys.path.insert(0, sys.argv[2]); import test_training_loop as t; "
        "t.run(sys.argv[1], t.Counting(pause=0.03))"
    )
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(compilation_cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    child = subprocess.Popen([sys.executable, "-c", program, str(tmp_path), os.path.dirname(__file__)], env=environment)
    lines = random.randrange(4, 16)  # each is two steps; the first checkpoint is at step 5
    deadline = time.monotonic() + 300
    while len(read_metrics(tmp_path)) < lines or not any(
        path.name.isdigit() for path in (tmp_path / "checkpoints").iterdir()
    ):
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    child.kill()
    assert child.wait() == -signal.SIGKILL

    loader = Counting(signal_at=33)
    with pytest.raises(Terminated) as stopped:
        run(tmp_path, loader)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert (tmp_path / "checkpoints" / "33").is_dir()
    said = capsys.readouterr().out
    assert "going on from step" in said and f"SIGTERM: saved step 33 of {STEPS}" in said
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL

    run(tmp_path, Counting())
    lines, variables = results(tmp_path)
    expected_lines, expected_variables = results(uninterrupted[0])
    # The stop at step 33 wrote a line of its own.
    assert json.dumps([line for line in lines if line["step"] != 33]) == json.dumps(expected_lines)
    jax.tree.map(np.testing.assert_array_equal, variables, expected_variables)

    goodput, events = json.loads((tmp_path / "goodput.json").read_text()), read_json_lines(tmp_path / "goodput.jsonl")
    starts = [event["start"] for event in events if "start" in event]
    assert starts[0] == 0 and starts[1] % 5 == 0 and starts[2] == 33 and goodput["restarts"] == 2
    assert goodput["wall_seconds"] == pytest.approx(events[-1]["time"] - events[0]["time"])
    assert min(goodput["seconds"][cause] for cause in ("step", "start-up", "down", "checkpoint", "evaluation")) > 0


class Killed(BaseException):
    """Ends a run as SIGKILL does: nobody saves anything."""


def passes(trouble, at):
    """held_out() whose pass number `at` (from 0; the first is the look before the first step) is `trouble()`."""
    count = itertools.count()
    return lambda: trouble() if next(count) == at else held_out()


def raises(error):
    def trouble(*_):
        raise error

    return trouble


def same_results(workdir, uninterrupted, missing=()):
    lines, variables = results(workdir)
    expected_lines, expected_variables = results(uninterrupted[0])
    assert json.dumps(lines) == json.dumps([line for line in expected_lines if line["step"] not in missing])
    jax.tree.map(np.testing.assert_array_equal, variables, expected_variables)


def saved_steps(workdir):
    return steps_in(workdir / "checkpoints")


def test_killed_between_a_save_and_its_evaluation_goes_on_bit_for_bit(uninterrupted, tmp_path, monkeypatch):
    """At step 20 before the evaluation, then before it is noted, and the same at the last step, which has no step after
    it."""
    result = None
    for at, step in ((1, 20), (None, 20), (2, 40), (None, 40)):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            if at is None:
                patch.setattr(Checkpoints, "note", raises(Killed()))
            run(tmp_path, Counting(), held_out=passes(raises(Killed()), at))
        assert (
            saved_steps(tmp_path)[-1] == step and not (tmp_path / "checkpoints" / str(step) / "metrics.json").exists()
        )
    result = run(tmp_path, Bad(ends))  # every step is made: asks for no data
    assert result.metrics == uninterrupted[1].metrics
    assert load_variables(tmp_path, best=True)[0] == load_variables(uninterrupted[0], best=True)[0]
    assert json.loads((tmp_path / "checkpoints" / "40" / "metrics.json").read_text()) == result.metrics
    same_results(tmp_path, uninterrupted)


@pytest.mark.parametrize(
    ("where", "step"),
    [("a batch", 12), ("an evaluation", 20), ("the log", 13), ("a picture", 13), ("the last evaluation", 40)],
)
def test_an_exception_loses_no_step(uninterrupted, tmp_path, monkeypatch, capsys, where, step):
    """It ends the run, after what was reached is saved and said; the run goes on from there, bit for bit."""
    error, loader, passing = DataError("file.jsonl line 7: bad"), Counting(), held_out
    with monkeypatch.context() as patch, pytest.raises(DataError, match=r"^file.jsonl line 7: bad$"):
        if where == "a batch":
            loader = Fails(error, after=12)
        elif where == "the log":
            write = MetricsWriter.write
            patch.setattr(
                MetricsWriter, "write", lambda self, at, values: raises(error)() if at > 11 else write(self, at, values)
            )
        elif where == "a picture":  # of the experts' load, on TensorBoard
            draw, drawn = metrics._picture, itertools.count(1)
            patch.setattr(metrics, "_picture", lambda matrix: raises(error)() if next(drawn) > 5 else draw(matrix))
        else:
            passing = passes(raises(error), 1 if step == 20 else 2)
        run(tmp_path, loader, held_out=passing)
    assert saved_steps(tmp_path)[-1] == step and loader.closed
    # else it was saved before the exception
    assert ("start again to resume there" in capsys.readouterr().out) == (step % 5 != 0)
    run(tmp_path, Counting())
    same_results(tmp_path, uninterrupted, missing=(12,) if where == "the log" else ())
    loads = [line["step"] for line in read_json_lines(tmp_path / "expert_load.jsonl")]
    assert loads == [step for step in range(2, STEPS + 1, 2) if where != "the log" or step != 12]


def test_held_out_data_is_looked_at_before_the_first_step(tmp_path):
    def wrong(**fields):
        return lambda: [batch | fields for batch in held_out()]

    outside = held_out()[0]["tokens"] + 60
    for trouble, message in (
        (raises(DataError("held.jsonl line 1")), "held.jsonl line 1"),
        (list, "the held-out data gives no batch"),
        (wrong(tokens=outside), "outside the model's vocabulary of 61"),
        (wrong(tokens=outside - 100), "is negative: ids go from 0 to 60"),
        (wrong(tokens=outside / 2), "a batch has tokens of dtype float64: token ids are integers"),
    ):
        loader = Bad(raises(AssertionError("asked for a batch")))
        with pytest.raises(DataError, match=message):
            run(tmp_path, loader, held_out=trouble)
        assert not saved_steps(tmp_path) and not (tmp_path / "metrics.jsonl").exists()


def test_without_held_out_data(tmp_path):
    result = run(tmp_path, Counting(), steps=2, eval_every=1, held_out=None)
    assert result.metrics == {} and saved_steps(tmp_path) == [2]
    assert [line["step"] for line in read_metrics(tmp_path)] == [2]
    assert run(tmp_path, Bad(ends), steps=2, eval_every=1, held_out=None).metrics == {}


def test_a_longer_stage_and_a_shorter_one_again(uninterrupted, tmp_path):
    """Twenty steps, then forty: the same as forty at once. The twenty are still there afterwards, and asking for them
    changes nothing."""
    run(tmp_path, Counting(), steps=20, keep_last=9)
    first = results(tmp_path)
    run(tmp_path, Counting(), keep_last=9)
    same_results(tmp_path, uninterrupted)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    again = run(tmp_path, Bad(ends), steps=20, keep_last=9)
    assert int(again.state.step) == 20 and again.metrics["bits_per_byte"] == first[0][-1]["bits_per_byte"]
    jax.tree.map(np.testing.assert_array_equal, again.state.variables, first[1])
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    with pytest.raises(
        CheckpointError,
        match=r"has gone beyond step 19, and has checkpoints of steps \[5, 10, 15, 20, 25, 30, 35, 40\] alone",
    ):
        run(tmp_path, Bad(ends), steps=19)


def test_a_state_that_was_given_away_is_not_saved(tmp_path):
    model = tiny()
    optimizer = build_optimizer(TrainConfig(steps=1).optimizer)
    state = create_state(model, optimizer, jax.random.key(0)).replace(step=jax.numpy.int32(3))
    with contextlib.closing(Checkpoints(tmp_path, model.config)) as store:
        assert store.rescue(state).startswith("saved step 3 in") and steps_in(tmp_path) == [3]
        state.params["embed"]["embedding"].delete()
        said = store.rescue(state.replace(step=jax.numpy.int32(4)))
        assert "has destroyed its state. Checkpoints of steps [3] are untouched" in said and steps_in(tmp_path) == [3]


def test_batch_size_follows_its_schedule(tmp_path):
    run(tmp_path, Counting(), steps=4, log_every=1, batch_size={"kind": "switch", "first": 2, "second": 4, "at": 0.5})
    assert [line["tokens"] for line in read_metrics(tmp_path) if "tokens" in line] == [24, 24, 48, 48]


def test_scheduled_batches_are_whole_microbatches():
    config = TrainConfig.from_dict(
        {"steps": 9, "microbatch": 4, "batch_size": {"kind": "ramp", "start": 1, "end": 17, "steps": 8}}
    )
    sizes = [len(batch["tokens"]) for batch in itertools.islice(step_batches(Counting(), config, VOCAB, 0), 9)]
    assert sizes[0] == 4 and sizes[-1] == 16 and sizes == sorted(sizes) and not any(size % 4 for size in sizes)


def test_bits_per_byte_is_the_mean_over_everything(model, variables, pack, document):
    """Two unequal batches; the text of a row has twice as many bytes as targets."""
    batches = [pack([[document(12, 1)], [document(3, 2)]], 12), pack([[document(5, 3), document(4, 4)], []], 12)]
    nats = count = 0
    for batch in batches:
        output = model.apply(
            variables, batch["tokens"], segment_ids_BT=batch["segment_ids"], positions_BT=batch["positions"]
        )
        log_probs = jax.nn.log_softmax(model.apply(variables, output.hidden_BTD, method="unembed"))
        tokens, mask = (np.asarray(x) for x in targets(batch, 1))
        nats -= np.sum(np.take_along_axis(np.asarray(log_probs), tokens[..., None], -1)[..., 0] * mask)
        count += mask.sum()
        batch["num_bytes"] = (2 * mask.sum(axis=1)).astype(np.int32)
    values = make_evaluate(model, chunk=8)(variables, batches)
    assert values["held_out_loss"] == pytest.approx(nats / count, rel=1e-5)
    assert values["bits_per_byte"] == pytest.approx(nats / count / np.log(2) / 2, rel=1e-5)
    with pytest.raises(DataError, match="no text to predict"):
        make_evaluate(model)(variables, [])
    with pytest.raises(DataError, match="no text to predict"):  # bytes, and no target that is trained on
        make_evaluate(model, chunk=8)(variables, [batches[0] | {"loss_mask": 0 * batches[0]["loss_mask"]}])


class Bad(Counting):
    """A batch changed by a function."""

    def __init__(self, change):
        super().__init__()
        self.change = change

    def __next__(self):
        return self.change(super().__next__())


class Fails(Counting):
    """Raises `error` for the batch after the first `after`, and is then at some place inside it."""

    def __init__(self, error, after):
        super().__init__()
        self.error, self.after = error, after

    def __next__(self):
        batch = super().__next__()
        if self.position > self.after:
            raise self.error
        return batch


def ends(_):
    raise StopIteration


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda batch: batch | {"tokens": batch["tokens"] + 5},
            "is outside the model's vocabulary of 61: raise model.vocab_size",
        ),
        (lambda batch: batch | {"tokens": batch["tokens"] - 5}, "is negative: ids go from 0 to 60"),
        (lambda batch: batch | {"tokens": batch["tokens"] * 1.0}, "a batch has tokens of dtype float64"),
        (lambda batch: {"tokens": batch["tokens"]}, "a batch lacks segment_ids, positions, loss_mask"),
        (ends, "the data ended after 0 of 40 steps: repeat it"),
    ],
)
def test_bad_data_is_refused_before_anything_is_compiled(tmp_path, change, message):
    loader = Bad(change)
    with pytest.raises(DataError, match=message):
        run(tmp_path, loader)
    assert loader.closed and not saved_steps(tmp_path)


def test_bad_configs_are_refused():
    with pytest.raises(ConfigError, match="unknown field train.log_evry: did you mean 'log_every'"):
        TrainConfig.from_dict({"steps": 1, "log_evry": 1})
    with pytest.raises(ConfigError, match="unknown field train.optimizer.weigt_decay: did you mean 'weight_decay'"):
        TrainConfig.from_dict({"steps": 1, "optimizer": {"weigt_decay": 1}})
    with pytest.raises(ConfigError, match="unknown argument train.objective.mtp_weight.sart"):
        TrainConfig.from_dict({"steps": 1, "objective": {"mtp_weight": {"kind": "ramp", "sart": 1}}})
    with pytest.raises(ConfigError, match="missing field train.steps"):
        TrainConfig.from_dict({})
    with pytest.raises(ConfigError, match="train.steps=0: must be at least 1"):
        TrainConfig(steps=0)

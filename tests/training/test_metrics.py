"""Log lines, TensorBoard files and the progress bar."""

import io
import json
import math
import resource
import sys
import threading

import numpy as np
import pytest
import rich.console
from tensorboardX.proto.event_pb2 import Event

from deepseek_jax.errors import UserError
from deepseek_jax.json_io import read_json_lines
from deepseek_jax.training import metrics
from deepseek_jax.training.metrics import MetricsWriter, Progress, _picture, read_metrics


def curves(workdir):
    """{(curve, step): value} of all TensorBoard files: length-prefixed records of protocol buffers."""
    found = {}
    for path in sorted((workdir / "tensorboard").iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            size = int.from_bytes(data[at : at + 8], "little")
            event = Event.FromString(data[at + 12 : at + 12 + size])
            found |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
            at += size + 16
    return found


def test_a_line_per_step_and_the_same_curves(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write(1, {"loss": np.float32(2.5), "load": np.array([1.0, 3.0])})
    writer.write(2, {"loss": math.nan, "load": np.array([2.0, math.inf])})
    writer.close()
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [
        {"step": 1, "loss": 2.5, "load": [1.0, 3.0]},
        {"step": 2, "loss": None, "load": [2.0, None]},
    ]
    found = curves(tmp_path)
    assert found["train/loss", 1] == 2.5 and found["train/load/1", 1] == 3.0 and math.isnan(found["train/loss", 2])


def test_tags_are_grouped_and_matrices_and_texts_have_their_place(tmp_path):
    writer = MetricsWriter(tmp_path, group="rl")
    load = np.array([[0.5, 1.5], [1.0, np.nan]])
    for step in (1, 2):
        writer.write(
            step,
            {
                "reward_mean": 1.0,
                "held_out_accuracy": 0.5,
                "bits_per_byte": 2.0,
                "max_violation_max": 0.1,
                "bias_update_speed": 0.1,
                "expert_load": step * load,
            },
        )
        writer.write_samples(step, [{"prompt": "1+1", "completion": "<answer>2</answer>", "reward": math.nan}])
    writer.close()
    tags = {tag for tag, _ in curves(tmp_path)}
    assert tags >= {
        "rl/reward_mean",
        "eval/held_out_accuracy",
        "eval/bits_per_byte",
        "moe/max_violation_max",
        "moe/bias_update_speed",
        "moe/expert_load",
    }
    assert any(tag.startswith("rl/samples") for tag in tags)
    assert read_json_lines(tmp_path / "expert_load.jsonl") == [
        {"step": 1, "expert_load": [[0.5, 1.5], [1.0, None]]},
        {"step": 2, "expert_load": [[1.0, 3.0], [2.0, None]]},
    ]
    assert "expert_load" not in read_metrics(tmp_path)[0]
    assert read_json_lines(tmp_path / "samples.jsonl")[1] == {
        "step": 2,
        "prompt": "1+1",
        "completion": "<answer>2</answer>",
        "reward": None,
    }
    writer = MetricsWriter(tmp_path, last_step=1)
    writer.write(2, {"expert_load": load})
    writer.write_samples(2, [{"completion": "again"}])
    writer.close()
    assert [line["expert_load"][0] for line in read_json_lines(tmp_path / "expert_load.jsonl")] == [[0.5, 1.5]] * 2
    assert [line["completion"] for line in read_json_lines(tmp_path / "samples.jsonl")] == [
        "<answer>2</answer>",
        "again",
    ]


def test_a_picture_of_loads_has_the_mean_in_the_middle():
    picture = _picture(np.array([[1.0, 3.0], [0.0, np.inf]]))
    assert picture.shape == (16, 16) and picture[0, 0] == 127 and picture[0, 15] == 255 and picture[15, 0] == 0


def test_resuming_drops_what_will_be_run_again(tmp_path):
    writer = MetricsWriter(tmp_path)
    for step in (1, 2, 3):
        writer.write(step, {"loss": float(step)})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # killed while writing
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]
    writer = MetricsWriter(tmp_path, last_step=2)
    writer.write(3, {"loss": 30.0})
    writer.close()
    assert [(line["step"], line["loss"]) for line in read_metrics(tmp_path)] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert read_metrics(tmp_path / "nowhere") == []


def test_a_disk_that_fills_up_is_one_sentence(tmp_path, capfd):
    """The system refuses to write more, as a full disk refuses; no thread says it again, and none is waited for."""
    threads = threading.active_count()
    writer = MetricsWriter(tmp_path)
    writer.write(1, {"loss": 2.5})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "metrics.jsonl").stat().st_size, limits[1]))
    try:
        for step in range(2, 40):
            with pytest.raises(
                UserError, match=r"^could not write .*metrics.jsonl: .*; free some space or choose another workdir$"
            ):
                writer.write(step, {"loss": 2.5})
        writer.close()
        assert capfd.readouterr().err == "" and threading.active_count() == threads
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1] and curves(tmp_path) == {("train/loss", 1): 2.5}


def test_plain_lines_without_a_terminal(capsys):
    with Progress("pretrain", total=10) as progress:
        progress.advance(1)
        progress.report("loss 4.0")
        progress.advance(3)
        progress.advance(5)
        progress.report("loss 3.0")
        progress.say("saved")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("pretrain 1/10  loss 4.0") and lines[2] == "saved"
    assert lines[1].startswith("pretrain 5/10  loss 3.0") and lines[1].endswith("left")


def test_the_time_left_after_a_restart_leaves_compilations_out(monkeypatch):
    """After a restart the first two steps compile, 30 s each; the others take 1 s, so that 97 of them take 97 s."""
    clock = [0.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: clock[0])
    progress = Progress("pretrain", total=200, done=100)
    shown = []
    for done, clock[0] in ((101, 30.0), (102, 60.0), (103, 61.0), (104, 62.0)):
        progress.advance(done)
        shown.append(progress._time_left())
    assert shown == ["30 s", "60 s", "61 s, 97 s left", "62 s, 96 s left"]
    clock[0] = 62.75
    assert progress._time_left() == "63 s, 95 s left", "it goes down between steps"


@pytest.mark.filterwarnings("ignore")
def test_a_bar_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    with Progress("pretrain", total=10, done=4) as progress:
        progress.advance(7)
        progress.report("loss 3.0")
        progress.say("a message [that] stays")
    out = capsys.readouterr().out
    assert (
        "7/10" in out
        and "pretrain 7/10  loss 3.0" in out.rstrip().splitlines()[-1]
        and "loss 3.0" in out
        and "a message [that] stays" in out
    )


@pytest.mark.parametrize("width", [40, 80, 100])
def test_no_number_is_cut_off_on_a_narrow_terminal(width):
    progress = Progress("pretrain", total=100_000, done=99)
    for done in (100, 150, 200):
        progress.advance(done)
    headline = "  ".join(f"number {i}.25" for i in range(9))
    progress._headline = headline
    console = rich.console.Console(width=width, file=io.StringIO())
    console.print(progress.view())
    first, *below = console.file.getvalue().splitlines()
    assert (
        first.startswith("pretrain 200/100000 ")
        and " left" in first
        and all(len(line) <= width for line in (first, *below))
    )
    assert " ".join(" ".join(below).split()) == " ".join(headline.split())

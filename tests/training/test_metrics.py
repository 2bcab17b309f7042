"""Log lines, TensorBoard files and the progress bar."""

import json
import math
import resource
import sys
import threading

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from deepseek_jax.errors import UserError
from deepseek_jax.training.metrics import MetricsWriter, Progress, read_metrics


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
    assert found["loss", 1] == 2.5 and found["load/1", 1] == 3.0 and math.isnan(found["loss", 2])


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
            with pytest.raises(UserError, match=r"^could not write .*metrics.jsonl: .*; free some space or choose another workdir$"):
                writer.write(step, {"loss": 2.5})
        writer.close()
        assert capfd.readouterr().err == "" and threading.active_count() == threads
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1] and curves(tmp_path) == {("loss", 1): 2.5}


def test_plain_lines_without_a_terminal(capsys):
    with Progress("pretrain", total=10) as progress:
        progress.advance(1)
        progress.report("loss 4.0")
        progress.advance(5)
        progress.report("loss 3.0")
        progress.say("saved")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("pretrain 1/10  loss 4.0") and lines[2] == "saved"
    assert lines[1].startswith("pretrain 5/10  loss 3.0") and lines[1].endswith("left")


@pytest.mark.filterwarnings("ignore")
def test_a_bar_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    with Progress("pretrain", total=10, done=4) as progress:
        progress.advance(7)
        progress.report("loss 3.0")
        progress.say("a message [that] stays")
    out = capsys.readouterr().out
    assert "7/10" in out and "loss 3.0" in out and "a message [that] stays" in out

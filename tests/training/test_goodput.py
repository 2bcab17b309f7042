"""Goodput: the causes of a stage's wall time, by a clock that the test moves."""

import json

import pytest

from deepseek_jax.training.goodput import Goodput, account


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now

    def spend(self, seconds):
        self.now += seconds


@pytest.fixture
def clock():
    return Clock()


def steps(clock, goodput, first, last, checkpoint_every=2):
    """Steps of 10 s, each after a second of waiting for data; a checkpoint takes 3 s."""
    for step in range(first, last + 1):
        with goodput("data"):
            clock.spend(1)
        clock.spend(10)
        goodput.started(())
        if step % checkpoint_every == 0:
            with goodput("checkpoint"):
                clock.spend(3)
        goodput.reached(step)


def test_one_run(tmp_path, clock):
    goodput = Goodput(tmp_path, clock)
    clock.spend(50)
    goodput.begin(0)
    steps(clock, goodput, 1, 5)
    with goodput("evaluation"):
        clock.spend(7)
        with goodput("data", hidden=lambda: True):  # the device was at work: no time is lost by it
            clock.spend(2)
    goodput.reached(5)
    line = goodput.report()
    values = json.loads((tmp_path / "goodput.json").read_text())
    # The first step, with the compilation, is part of the start.
    assert values["seconds"] == {
        "step": 40,
        "start-up": 60,
        "data": 5,
        "evaluation": 9,
        "checkpoint": 6,
        "lost": 0,
        "down": 0,
    }
    assert (
        values["wall_seconds"] == clock.now - 1000 == 120
        and values["goodput"] == pytest.approx(40 / 120)
        and values["restarts"] == 0
    )
    assert line == (
        "goodput 33.3% of 120 s; starting and compiling 50.0%, waiting for data 4.2%, evaluation 7.5%, checkpoints 5.0%"
    )


def test_killed_after_a_checkpoint_and_started_again(tmp_path, clock):
    """Killed in step 6, after the log line of step 5 and the checkpoint of step 4; 100 s until the next start; then to
    the end."""
    killed = Goodput(tmp_path, clock)
    killed.begin(0)
    steps(clock, killed, 1, 5)
    killed_at = clock.now
    clock.spend(8)
    with (tmp_path / "goodput.jsonl").open("a") as file:
        file.write('{"time": 12')  # cut short
    clock.spend(92)
    again = Goodput(tmp_path, clock)
    clock.spend(20)
    again.begin(4)
    steps(clock, again, 5, 8)
    assert (
        again.report().startswith("goodput 26.0% of 231 s over 1 restart; ")
        and "steps made again 4.3%, down 43.3%" in again.report()
    )
    values = json.loads((tmp_path / "goodput.json").read_text())
    assert values["seconds"] == {
        "step": 30 + 30,
        "start-up": 10 + 30,
        "data": 9,
        "evaluation": 0,
        "checkpoint": 12,
        "lost": 10,
        "down": 100,
    }
    assert values["wall_seconds"] == clock.now - 1000 and values["restarts"] == 1
    assert sum(values["shares"].values()) == pytest.approx(1)
    assert killed_at == 1000 + 55 + 6


def test_going_back_behind_the_last_start(tmp_path, clock):
    """The newest checkpoint was damaged: steps of both runs before are made again, and a span of steps is cut in
    proportion."""
    lines = [
        {"time": 0.0, "start": 0},
        {
            "time": 10.0,
            "step": 10,
            "seconds": {"step": 10.0, "start-up": 0.0, "data": 0.0, "evaluation": 0.0, "checkpoint": 0.0},
        },
        {"time": 12.0, "start": 10},
        {
            "time": 17.0,
            "step": 15,
            "seconds": {"step": 4.0, "start-up": 1.0, "data": 0.0, "evaluation": 0.0, "checkpoint": 0.0},
        },
        {"time": 20.0, "start": 5},
        {
            "time": 30.0,
            "step": 15,
            "seconds": {"step": 10.0, "start-up": 0.0, "data": 0.0, "evaluation": 0.0, "checkpoint": 0.0},
        },
    ]
    values = account(lines)
    assert values["seconds"] == {
        "step": 15,
        "start-up": 1,
        "data": 0,
        "evaluation": 0,
        "checkpoint": 0,
        "lost": 9,
        "down": 5,
    }
    assert values["wall_seconds"] == 30 and values["goodput"] == 0.5 and values["restarts"] == 2


def test_an_error_in_a_block_still_ends_it(tmp_path, clock):
    goodput = Goodput(tmp_path, clock)
    goodput.begin(0)
    goodput.started(())
    with pytest.raises(KeyError), goodput("data"):
        clock.spend(4)
        raise KeyError
    clock.spend(6)
    goodput.reached(1)
    goodput.report()
    seconds = json.loads((tmp_path / "goodput.json").read_text())["seconds"]
    assert seconds["data"] == 4 and seconds["step"] == 6

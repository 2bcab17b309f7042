"""Goodput: the share of a stage's wall time that went into steps that count, and the causes of the rest.

Wall time runs from the first start of the stage to now, over every restart, and is divided without remainder into

    step         steps that still count: those up to the checkpoint from which the next start resumed
    start-up     from the start of the stage to the end of its first step: weights or checkpoint, compilation
    data         the device had nothing to do because the loader was not done
    evaluation   held-out loss or accuracy
    checkpoint   waiting for a checkpoint; what is written in the background costs nothing
    lost         steps that were made, and made again after a restart
    down         from the last sign of life, which of a killed run is its last log line or checkpoint, to the next start

Goodput is the first of these over their sum.
"""

import contextlib
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from deepseek_jax.json_io import read_json_lines, to_json
from deepseek_jax.parallel.hosts import is_primary, write_text

SPENT = ("step", "start-up", "data", "evaluation", "checkpoint")  # by a process that runs
NAMES = {
    "start-up": "starting and compiling",
    "data": "waiting for data",
    "evaluation": "evaluation",
    "checkpoint": "checkpoints",
}
NAMES |= {"lost": "steps made again", "down": "down"}


class Goodput:
    """Keeps the time of one run of a stage, in `goodput.jsonl` with the runs before it; process 0 alone writes.

    `with clock("data"):` gives the time of a block to its cause; the rest belongs to the steps, and before `started` to
    the start-up.
    """

    def __init__(self, workdir, now: Callable[[], float] = time.time):
        self.path = pathlib.Path(workdir) / "goodput.jsonl"
        self._now = now
        self._cause = "start-up"
        self._seconds = dict.fromkeys(SPENT, 0.0)
        self._begin = self._since = now()

    def begin(self, step: int) -> None:
        """Records the step from which the stage starts or resumes."""
        lines = [*read_json_lines(self.path, _usable), {"time": self._begin, "start": step}] if is_primary() else []
        write_text(self.path, "".join(to_json(line) + "\n" for line in lines))

    def started(self, outputs: Any) -> None:
        """The first time, waits for the outputs of the first step: compilation is not part of the steps."""
        if self._cause == "start-up":
            jax.block_until_ready(outputs)
            self._switch("step")

    @contextlib.contextmanager
    def __call__(self, cause: str, hidden: Callable[[], bool] = lambda: False) -> Iterator[None]:
        """Gives the block's time to `cause`, unless `hidden()` is true after it because the device was busy all the
        while."""
        around = self._cause
        self._switch(cause)
        try:
            yield
        finally:
            if hidden():
                self._cause = around
            self._switch(around)

    def reached(self, step: int) -> None:
        """A sign of life; one is due at every checkpoint."""
        self._switch(self._cause)
        if is_primary():
            with self.path.open("a", encoding="utf-8") as file:
                file.write(to_json({"time": self._since, "step": step, "seconds": self._seconds}) + "\n")

    def report(self) -> str:
        """One line about all runs of the stage so far; the same as numbers in goodput.json."""
        if not is_primary():
            return ""
        values = account(read_json_lines(self.path, _usable))
        write_text(self.path.with_suffix(".json"), to_json(values, indent=1) + "\n")
        others = ", ".join(
            f"{NAMES[cause]} {share:.1%}"
            for cause, share in values["shares"].items()
            if cause != "step" and share >= 0.0005
        )
        count = values["restarts"]
        restarts = f" over {count} restart{'s' * (count > 1)}" if count else ""
        return (
            f"goodput {values['goodput']:.1%} of {values['wall_seconds']:,.0f} s{restarts}; {others or 'nothing else'}"
        )

    def _switch(self, cause: str) -> None:
        now = self._now()
        self._seconds[self._cause] += now - self._since
        self._cause, self._since = cause, now


def account(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Adds up the lines of a stage's runs -> goodput, wall_seconds, restarts, and by cause seconds and shares."""
    seconds = dict.fromkeys((*SPENT, "lost", "down"), 0.0)
    counting: list[tuple[int, int, float]] = []  # from step, to step, seconds: not made again so far
    restarts, end = -1, lines[0]["time"]
    for line in lines:
        if "start" in line:
            seconds["down"] += line["time"] - end
            restarts, step, before = restarts + 1, line["start"], dict.fromkeys(SPENT, 0.0)
            counting, lost = _cut(counting, step)
            seconds["lost"] += lost
        else:
            spent = {cause: line["seconds"][cause] - before[cause] for cause in SPENT}
            counting.append((step, line["step"], spent.pop("step")))
            for cause, value in spent.items():
                seconds[cause] += value
            step, before = line["step"], line["seconds"]
        end = line["time"]
    seconds["step"] = sum(value for *_, value in counting)
    wall = sum(seconds.values())
    shares = {cause: value / wall if wall else 0.0 for cause, value in seconds.items()}
    return {"goodput": shares["step"], "wall_seconds": wall, "restarts": restarts, "seconds": seconds, "shares": shares}


def _usable(line: Mapping[str, Any]) -> bool:
    """True for a line that a run has written, False for one of another program."""
    spent = line.get("seconds")
    signs = (
        isinstance(line.get("step"), int)
        and isinstance(spent, dict)
        and all(isinstance(spent.get(cause), float | int) for cause in SPENT)
    )
    return isinstance(line.get("time"), float | int) and (isinstance(line.get("start"), int) or signs)


def _cut(spans: Sequence[tuple[int, int, float]], at: int) -> tuple[list[tuple[int, int, float]], float]:
    """The spans up to a step, and the seconds after it."""
    kept = []
    for first, last, seconds in spans:
        if last <= at:
            kept.append((first, last, seconds))
        elif first < at:
            kept.append((first, at, seconds * (at - first) / (last - first)))
    return kept, sum(s for *_, s in spans) - sum(s for *_, s in kept)

"""What a run tells: one JSON line per log step, TensorBoard files beside it, a live bar on a terminal and plain lines elsewhere."""

import contextlib
import pathlib
import sys
import time
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import rich.console
import rich.progress
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

from deepseek_jax.errors import UserError
from deepseek_jax.json_io import read_json_lines, to_json
from deepseek_jax.parallel.hosts import is_primary, write_text


class MetricsWriter:
    """Appends to `metrics.jsonl` and TensorBoard files in `workdir`; of several processes the first alone does.

    `last_step` is where a run resumes: what was logged after it belongs to steps that will be run again, and is dropped,
    as is a last line cut short. An array is a JSON list, and one TensorBoard curve per element.
    """

    def __init__(self, workdir, last_step: int = 0):
        self.path = pathlib.Path(workdir) / "metrics.jsonl"
        self._writes = is_primary()
        if not self._writes:
            return
        kept = [line for line in read_metrics(workdir) if line["step"] <= last_step]
        write_text(self.path, "".join(to_json(line) + "\n" for line in kept))
        self._file = self.path.open("a", encoding="utf-8")
        board = self.path.parent / "tensorboard"
        board.mkdir(exist_ok=True)
        # Written here and now: tensorboardX's own thread dies on a full disk, with a traceback, and whoever waits for it waits for ever.
        self._board = EventsWriter(str(board / "events"))
        self._board.write_event(Event(wall_time=time.time(), step=last_step + 1, session_log=SessionLog(status=SessionLog.START)))

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Raises UserError if the disk is full."""
        if not self._writes:
            return
        values = {name: np.asarray(value).tolist() for name, value in metrics.items()}
        try:
            self._file.write(to_json({"step": step} | values) + "\n")
            self._file.flush()
            for name, value in values.items():
                for suffix, number in enumerate_leaves(value):
                    self._board.write_event(Event(wall_time=time.time(), step=step, summary=summary.scalar(name + suffix, number)))
            self._board.flush()
        except OSError as error:
            raise UserError(f"could not write {self.path}: {error.strerror}; free some space or choose another workdir") from error

    def close(self) -> None:
        """Raises nothing: what could not be written `write` has said."""
        for file in (self._file, self._board) if self._writes else ():
            with contextlib.suppress(OSError):
                file.close()


def enumerate_leaves(value: Any) -> Iterable[tuple[str, float]]:
    """("", number) of a number; ("/0", first), ("/1", second), … of a list."""
    if isinstance(value, list):
        return [(f"/{i}", number) for i, number in enumerate(value)]
    return [("", value)]


def read_metrics(workdir) -> list[dict[str, Any]]:
    """The lines of a workdir's `metrics.jsonl`, oldest first."""
    return read_json_lines(pathlib.Path(workdir) / "metrics.jsonl", has_step)


def has_step(line: Mapping[str, Any]) -> bool:
    """Whether a line says to which step it belongs."""
    return isinstance(line.get("step"), int)


class Progress:
    """A bar with the time left on a terminal; a line for each report elsewhere. Use as a context manager."""

    def __init__(self, name: str, total: int, done: int = 0):
        self.name, self.total, self.done = name, total, done
        self._start = time.monotonic()
        self._first: tuple[float, int] | None = None  # when the first step was done: it holds the compilation
        self._bar = self._task = None
        if sys.stdout.isatty():
            self._bar = rich.progress.Progress(
                rich.progress.TextColumn("{task.description}"),
                rich.progress.BarColumn(),
                rich.progress.MofNCompleteColumn(),
                rich.progress.TimeElapsedColumn(),
                rich.progress.TimeRemainingColumn(),
                rich.progress.TextColumn("{task.fields[headline]}"),
                console=rich.console.Console(file=sys.stdout),
            )
            self._task = self._bar.add_task(name, total=total, completed=done, headline="compiling")

    def __enter__(self):
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_):
        if self._bar is not None:
            self._bar.stop()

    def advance(self, done: int) -> None:
        self.done = done
        self._first = self._first or (time.monotonic(), done)
        if self._bar is not None:
            self._bar.update(self._task, completed=done)

    def report(self, headline: str) -> None:
        """Shows a few numbers beside the bar, or as a line of their own."""
        if self._bar is not None:
            self._bar.update(self._task, headline=headline)
        else:
            self.say(f"{self.name} {self.done}/{self.total}  {headline}  {self._time_left()}")

    def say(self, message: str) -> None:
        """A line that stays on the screen."""
        if self._bar is not None:
            self._bar.console.print(message, markup=False, highlight=False)
        else:
            print(message, flush=True)

    def _time_left(self) -> str:
        now = time.monotonic()
        spent = f"{now - self._start:.0f} s"
        if self._first is None or self.done in (self._first[1], self.total):
            return spent
        left = (now - self._first[0]) / (self.done - self._first[1]) * (self.total - self.done)
        return f"{spent}, {left:.0f} s left" if left < 120 else f"{spent}, {left / 60:.0f} min left"

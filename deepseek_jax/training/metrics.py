"""Metrics of a run: one JSON line per log step, TensorBoard files, and a live bar on a terminal or plain lines
elsewhere."""

import collections
import contextlib
import pathlib
import re
import sys
import textwrap
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TextIO

import numpy as np
import rich.console
import rich.live
import rich.progress_bar
import rich.table
import rich.text
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

from deepseek_jax.errors import UserError
from deepseek_jax.json_io import read_json_lines, to_json
from deepseek_jax.parallel.hosts import is_primary, write_text

GROUPS = (("eval", r"held_out_.*|bits_per_byte"), ("moe", r"max_violation.*|expert_.*|bias_.*|balance"))


class MetricsWriter:
    """Appends to `metrics.jsonl` and TensorBoard files in `workdir`; of several processes the first alone does.

    `last_step` is where a run resumes: what was logged after it belongs to steps that will be run again, and is
    dropped, as is a last line cut short. A list of numbers is one TensorBoard curve per element. A matrix, such as the
    load of every expert in every layer, is a TensorBoard image and a line of a file of its own, `<name>.jsonl`.
    TensorBoard has the tags in groups: eval, moe, and `group` for all others.
    """

    def __init__(self, workdir, last_step: int = 0, group: str = "train"):
        self.path = pathlib.Path(workdir) / "metrics.jsonl"
        self._writes, self._last_step, self._group = is_primary(), last_step, group
        self._files: dict[pathlib.Path, TextIO] = {}
        if not self._writes:
            return
        self._file(self.path)
        board = self.path.parent / "tensorboard"
        board.mkdir(exist_ok=True)
        # Written here and now: tensorboardX's own thread dies on a full disk, with a traceback, and waiting for it
        # never ends.
        self._board = EventsWriter(str(board / "events"))
        self._board.write_event(
            Event(wall_time=time.time(), step=last_step + 1, session_log=SessionLog(status=SessionLog.START))
        )

    def _file(self, path: pathlib.Path) -> TextIO:
        """Opened for appending, without the lines of steps that are run again."""
        if path not in self._files:
            kept = [line for line in read_json_lines(path, has_step) if line["step"] <= self._last_step]
            write_text(path, "".join(to_json(line) + "\n" for line in kept))
            self._files[path] = path.open("a", encoding="utf-8")
        return self._files[path]

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Raises UserError if the disk is full."""
        if not self._writes:
            return
        arrays = {name: np.asarray(value) for name, value in metrics.items()}
        values = {name: array.tolist() for name, array in arrays.items() if array.ndim < 2}
        matrices = {name: array for name, array in arrays.items() if array.ndim == 2}
        try:
            self._append(self.path, {"step": step} | values)
            for name, matrix in matrices.items():
                self._append(
                    self.path.with_name(f"{name}.jsonl"), {"step": step, name: np.round(matrix.astype(np.float64), 4)}
                )
                self._show(step, summary.image(self.tag(name), _picture(matrix), dataformats="HW"))
            for name, value in values.items():
                for suffix, number in enumerate_leaves(value):
                    self._show(step, summary.scalar(self.tag(name) + suffix, number))
            self._board.flush()
        except OSError as error:
            raise UserError(
                f"could not write {self.path}: {error.strerror}; free some space or choose another workdir"
            ) from error

    def write_samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Writes completions to read: lines of `samples.jsonl`, and a text in TensorBoard. Raises UserError if the disk
        is full."""
        if not self._writes or not rows:
            return
        path = self.path.with_name("samples.jsonl")
        try:
            for row in rows:
                self._append(path, {"step": step} | row)
            texts = ["\n".join(f"{name}: {value}" for name, value in row.items()) for row in rows]
            self._show(
                step,
                summary.text(self.tag("samples"), "\n\n---\n\n".join(textwrap.indent(text, "    ") for text in texts)),
            )
            self._board.flush()
        except OSError as error:
            raise UserError(
                f"could not write {path}: {error.strerror}; free some space or choose another workdir"
            ) from error

    def _append(self, path: pathlib.Path, line: Mapping[str, Any]) -> None:
        self._file(path).write(to_json(line) + "\n")
        self._file(path).flush()

    def _show(self, step: int, shown: Any) -> None:
        self._board.write_event(Event(wall_time=time.time(), step=step, summary=shown))

    def tag(self, name: str) -> str:
        """The TensorBoard tag of a metric: its group, a slash, its name."""
        return f"{next((group for group, names in GROUPS if re.fullmatch(names, name)), self._group)}/{name}"

    def close(self) -> None:
        """Closes the files and raises nothing: `write` has reported what could not be written."""
        for file in (*self._files.values(), self._board) if self._writes else ():
            with contextlib.suppress(OSError):
                file.close()


def _picture(matrix: np.ndarray) -> np.ndarray:
    """uint8 [height, width]: 0 is black and twice the mean or more is white; every number is a square large enough to
    see."""
    values = np.nan_to_num(matrix.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    mean = values.mean() or 1.0
    size = max(1, min(8, 512 // max(values.shape)))
    return np.kron(np.clip(values / mean * 127.5, 0, 255), np.ones((size, size))).astype(np.uint8)


def enumerate_leaves(value: Any) -> Iterable[tuple[str, float]]:
    """("", number) of a number; ("/0", first), ("/1", second), … of a list."""
    if isinstance(value, list):
        return [(f"/{i}", number) for i, number in enumerate(value)]
    return [("", value)]


def read_metrics(workdir) -> list[dict[str, Any]]:
    """The lines of a workdir's `metrics.jsonl`, oldest first."""
    return read_json_lines(pathlib.Path(workdir) / "metrics.jsonl", has_step)


def has_step(line: Mapping[str, Any]) -> bool:
    """True if a line names its step."""
    return isinstance(line.get("step"), int)


class Progress:
    """On a terminal, a bar with step, total and time left, and the newest numbers below it; elsewhere a line for each
    report.

    Lines are as wide as the terminal is: nothing is cut off. In the end the last numbers stay on the screen. Use as a
    context manager.
    """

    def __init__(self, name: str, total: int, done: int = 0):
        self.name, self.total, self.done = name, total, done
        self._start = time.monotonic()
        self._advances: collections.deque[tuple[float, int]] = collections.deque(maxlen=1000)  # (seconds, steps done)
        self._headline = "compiling"
        self._live = self._console = None
        if sys.stdout.isatty():
            self._console = rich.console.Console(file=sys.stdout)
            self._live = rich.live.Live(
                console=self._console, get_renderable=self.view, refresh_per_second=4, transient=True
            )

    def __enter__(self):
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_):
        if self._live is not None:
            self._live.stop()
            if self._headline != "compiling":
                self.say(self._line())

    def view(self) -> rich.console.RenderableType:
        """The text on the terminal: the bar's line, and the newest numbers below it."""
        text = rich.text.Text(f"{self.name} {self.done}/{self.total}  {self._time_left()}")
        line = rich.table.Table.grid(padding=(0, 1), expand=True)
        line.add_column(no_wrap=True, min_width=text.cell_len)
        line.add_column(ratio=1)
        line.add_row(text, rich.progress_bar.ProgressBar(total=max(self.total, 1), completed=self.done))
        return rich.console.Group(line, rich.text.Text(self._headline))

    def advance(self, done: int) -> None:
        self.done = done
        self._advances.append((time.monotonic(), done))

    def report(self, headline: str) -> None:
        """Shows a few numbers below the bar, or as a line of their own."""
        self._headline = headline
        if self._live is None:
            self.say(self._line())

    def say(self, message: str) -> None:
        """A line that stays on the screen."""
        if self._console is not None:
            self._console.print(message, markup=False, highlight=False, soft_wrap=True)
        else:
            print(message, flush=True)

    def _line(self) -> str:
        return f"{self.name} {self.done}/{self.total}  {self._headline}  {self._time_left()}"

    def _time_left(self) -> str:
        """The seconds spent, and those left if the rest goes as fast as the newer half of the steps made here: the
        first ones hold compilations, after a restart two of them."""
        now = time.monotonic()
        spent = f"{now - self._start:.0f} s"
        if len(self._advances) < 3 or self.done == self.total:
            return spent
        (begin, first), (end, last) = self._advances[(len(self._advances) - 1) // 2], self._advances[-1]
        left = max((end - begin) / (last - first) * (self.total - last) - (now - end), 0.0)
        return f"{spent}, {left:.0f} s left" if left < 120 else f"{spent}, {left / 60:.0f} min left"

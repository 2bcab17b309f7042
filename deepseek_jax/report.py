"""The report on a run: tables of its evaluations, completions to read, and the curves of a stage.

Figures are drawn without pyplot, so that importing this module leaves the program's matplotlib backend alone.
"""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich import box
from rich.cells import cell_len, chop_cells
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from deepseek_jax.atomic import atomic_path
from deepseek_jax.errors import DataError
from deepseek_jax.json_io import read_json

Record = Mapping[str, Any]

# Label of the panel -> its curves, each a pattern of metric names and what the legend says; \1 is what the pattern's
# group matches. A panel that no metric belongs to is not drawn.
PANELS = {
    "loss (nats per token)": ((r"cross_entropy", "training"), (r"held_out_loss", "held out"), (r"(mtp_\d+)", r"\1")),
    "bits per byte": ((r"bits_per_byte", "held out"),),
    "reward": ((r"reward_mean", "total"), (r"reward_(?!mean$|std$)(.+)", r"\1")),
    "accuracy": (
        (r"reward_accuracy", "sampled in training"),
        (r"held_out_accuracy", "held out, greedy"),
        (r"held_out_sampled_accuracy", "held out, sampled"),
        (r"held_out_((?:pass|maj)@\d+)", r"held out, \1"),
    ),
    "response length (tokens)": (
        (r"length_mean", "sampled in training"),
        (r"held_out_length", "held out, greedy"),
        (r"held_out_response_length", "held out, sampled"),
    ),
    "gradient norm": ((r"grad_norm", "gradient norm"),),
    "learning rate": ((r"learning_rate", "learning rate"),),
    "MaxVio": ((r"max_violation_mean", "mean over layers"), (r"max_violation_max", "worst layer")),
}
LOGARITHMIC = ("gradient norm",)
MEASURED = re.compile(r"held_out_.*|bits_per_byte")  # now and then, so with markers
PANELS_PER_ROW = 4


def plot_curves(records: Sequence[Record], path: Path, title: str) -> None:
    """Draws the metrics of a stage over its steps, as one PNG: the panels of `PANELS` that have numbers."""
    panels = {label: _curves(records, curves) for label, curves in PANELS.items()}
    panels = {label: curves for label, curves in panels.items() if curves}
    rows = max(1, math.ceil(len(panels) / PANELS_PER_ROW))
    columns = max(1, math.ceil(len(panels) / rows))
    figure = Figure(figsize=(4.3 * columns, 3.4 * rows + 0.3), layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for panel, (label, curves) in zip(grid, panels.items(), strict=False):
        for name, points, measured in curves:
            style = (
                {"marker": "o", "markersize": 4, "linestyle": "--", "clip_on": False, "zorder": 3}
                if measured or len(points) == 1
                else {}
            )
            panel.plot(*zip(*points, strict=True), label=name, **style)
        values = [value for _, points, _ in curves for _, value in points]
        if label in LOGARITHMIC and min(values) > 0:
            panel.set_yscale("log")
        elif min(values) >= 0:
            panel.set_ylim(bottom=0, top=None if max(values) else 1)
        panel.set(xlabel="optimizer step", ylabel=label)
        panel.grid(alpha=0.3)
        panel.legend(frameon=False, fontsize=8)
    for panel in grid[len(panels) :]:
        panel.set_axis_off()
    figure.suptitle(title)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _curves(
    records: Sequence[Record], curves: Sequence[tuple[str, str]]
) -> list[tuple[str, list[tuple[int, float]], bool]]:
    """(name, points, True if it is measured only now and then) of each metric that has numbers; null, NaN and other
    values are skipped."""
    keys = list(dict.fromkeys(key for record in records for key in record))
    found = []
    for pattern, name in curves:
        for key in keys:
            match = re.fullmatch(pattern, key)
            points = (
                [(record["step"], record[key]) for record in records if _is_finite(record.get(key))] if match else []
            )
            if points:
                found.append((match.expand(name).replace("_", " "), points, bool(MEASURED.fullmatch(key))))
    return found


def _is_finite(value: Any) -> bool:
    return (
        isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300 and math.isfinite(value)
    )


def read_evaluation(path: Path) -> dict[str, Any]:
    """An evaluation.json: numbers (null where one was not finite) and `samples`. Raises DataError for a file that is
    damaged."""
    advice = f"remove it and start again: {path.parent.name} is then evaluated anew"
    evaluation = read_json(path, advice)
    samples = evaluation.get("samples", [])
    texts = ("prompt", "completion")
    if not isinstance(samples, list) or not all(
        isinstance(row, dict) and all(isinstance(row.get(field), str) for field in texts) for row in samples
    ):
        raise DataError(f"{path} is damaged (samples are not a list of prompts and completions); {advice}")
    return evaluation


def comparison_table(evaluations: Mapping[str, Record], title: str) -> Table:
    """One column for each evaluation, one row for each number that any of them has."""
    table = Table(title=Text(title), title_justify="left")
    table.add_column("held out", overflow="fold")
    for name in evaluations:
        table.add_column(Text(name), justify="right", min_width=5)
    rows = list(
        dict.fromkeys(
            key for record in evaluations.values() for key, value in record.items() if isinstance(value, int | float)
        )
    )
    for row in rows:
        table.add_row(Text(row.replace("_", " ")), *(_number(record.get(row)) for record in evaluations.values()))
    return table


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    return str(value) if isinstance(value, int) else ""


def optimizer_table(rules: Mapping[str, Mapping[str, int]]) -> Table:
    """Which parameters each rule of an optimizer updates ({rule: {parameter: its size}}), one row for each rule.

    Parameters of the same name in several stacks of layers are named once, norms together.
    """
    view = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    view.add_column("optimizer", no_wrap=True)
    view.add_column("parameters", justify="right", no_wrap=True)
    view.add_column("tensors", overflow="fold")
    for rule, sizes in rules.items():
        names = dict.fromkeys(_in_a_layer(name) for name in sizes)
        view.add_row(Text(rule), f"{sum(sizes.values()):,}", Text("all" if len(rules) == 1 else ", ".join(names)))
    return view


def _in_a_layer(name: str) -> str:
    """ "attn/kv_a" of "moe_layers/attn/kv_a/kernel"."""
    if name.endswith("norm/scale"):
        return "norms"
    return re.sub(r"^(\w+_layers|mtp_\d+)/(block/)?|/(kernel|embedding)$", "", name)


def samples_table(evaluations: Mapping[str, Record], count: int) -> Table:
    """The same held-out problems as answered in each evaluation, one answer below the other, so that lines are as long
    as the screen is wide."""
    table = Table(title="Completions, sampled", title_justify="left")
    for column in ("problem", "stage", "completion"):
        table.add_column(column, overflow="fold")
    table.add_column("answer", no_wrap=True)
    asked = {name: record.get("samples", [])[:count] for name, record in evaluations.items()}
    for number in range(max((len(samples) for samples in asked.values()), default=0)):
        prompt = None
        for name, samples in asked.items():
            if number < len(samples):
                row = samples[number]
                shown = "" if row["prompt"] == prompt else row["prompt"]
                prompt = row["prompt"]
                right = "right" if row.get("right") else "wrong"
                table.add_row(TaggedText(shown), Text(name), TaggedText(row["completion"]), right)
        table.add_section()
    return table


class TaggedText:
    """Text that rich folds to the available width: at spaces where it can, and never inside a tag such as </answer>."""

    TAG = re.compile(r"<[^<>\s]{1,24}>")
    ATOMS = re.compile(rf"{TAG.pattern}|\s+|[^\s<]+|<")

    def __init__(self, text: str):
        self.text = text

    def fold(self, width: int) -> list[str]:
        """Lines of at most `width` cells; a tag that is wider is the only thing to stick out."""
        lines = []
        for line in self.text.split("\n"):
            current = ""
            for atom in self.ATOMS.findall(line):
                if cell_len(current + atom) <= width:
                    current += atom
                elif atom.isspace():
                    lines, current = [*lines, current], ""
                elif self.TAG.fullmatch(atom) or cell_len(atom) <= width:
                    lines, current = [*lines, current.rstrip()] if current.strip() else lines, atom
                else:  # a long word fills the line, and more
                    *full, current = chop_cells(current + atom, width)
                    lines += full
            lines.append(current)
        return lines

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text("\n".join(self.fold(options.max_width)), no_wrap=True, overflow="ignore")

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        longest = max((cell_len(line) for line in self.text.split("\n")), default=1)
        tag = max((cell_len(tag) for tag in self.TAG.findall(self.text)), default=1)
        return Measurement(tag, max(tag, longest)).with_maximum(options.max_width)

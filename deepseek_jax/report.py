"""What a finished run shows: a table over its evaluations, completions side by side, and the curves of reinforcement learning."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # figures go to files, on machines without a screen too

import matplotlib.pyplot as plt  # noqa: E402
from rich.table import Table  # noqa: E402
from rich.text import Text  # noqa: E402

Record = Mapping[str, Any]

CURVES = (
    ("reward", (("reward_mean", "total"), ("reward_accuracy", "accuracy"), ("reward_format", "format"), ("reward_language_consistency", "language"))),
    ("accuracy", (("reward_accuracy", "sampled in training"), ("heldout_accuracy", "held out, greedy"))),
    ("response length (tokens)", (("length_mean", "sampled in training"), ("heldout_length", "held out, greedy"))),
)


def plot_curves(records: Sequence[Record], path: Path, title: str) -> None:
    """Reward, accuracy and response length over optimiser steps, as one PNG."""
    figure, panels = plt.subplots(1, len(CURVES), figsize=(13, 3.6), layout="constrained")
    for panel, (label, curves) in zip(panels, CURVES, strict=True):
        for key, name in curves:
            points = [(record["step"], record[key]) for record in records if record.get(key) is not None]
            if points:
                held_out = key.startswith("heldout")
                panel.plot(*zip(*points, strict=True), label=name, marker="o" if held_out else None, linestyle="--" if held_out else "-")
        panel.set(xlabel="RL step (optimiser updates)", ylabel=label)
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
        panel.legend(frameon=False)
    figure.suptitle(title)
    partial = path.with_suffix(".partial.png")
    figure.savefig(partial, dpi=120)
    partial.replace(path)
    plt.close(figure)


def comparison_table(evaluations: Mapping[str, Record], title: str) -> Table:
    """One column for each evaluation, one row for each number that any of them has."""
    table = Table(title=title, title_justify="left")
    table.add_column("held out")
    for name in evaluations:
        table.add_column(name, justify="right")
    rows = list(dict.fromkeys(key for record in evaluations.values() for key, value in record.items() if isinstance(value, (int, float))))
    for row in rows:
        table.add_row(row.replace("_", " "), *(_number(record.get(row)) for record in evaluations.values()))
    return table


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return str(value) if isinstance(value, int) else f"{value:.3f}"


def samples_table(evaluations: Mapping[str, Record], count: int) -> Table:
    """The same held-out problems as answered in each evaluation."""
    table = Table(title="Completions, sampled", title_justify="left", show_lines=True)
    table.add_column("problem", overflow="fold")
    for name in evaluations:
        table.add_column(name, overflow="fold")
    columns = [record.get("samples", [])[:count] for record in evaluations.values()]
    for rows in zip(*columns, strict=False):
        table.add_row(*(Text(cell) for cell in (rows[0]["prompt"], *(f"{row['completion']}\n{'right' if row['right'] else 'wrong'}" for row in rows))))
    return table

"""A sweep as a figure: curves over one field or over training FLOPs, seeds as a mean with their spread, a map for two fields."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # figures go to files, on machines without a screen too

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402

from deepseek_jax.launch.results import Row  # noqa: E402
from deepseek_jax.launch.sweep import Sweep  # noqa: E402

LABELS = {"bits_per_byte": "held-out bits per byte", "held_out_loss": "held-out loss (nats per token)", "flops": "training FLOPs", "peak": "peak learning rate"}
Points = dict[tuple[Any, Any], list[float]]


def plot(sweep: Sweep, rows: Sequence[Row], path: Path, title: str) -> bool:
    """Writes the PNG of a sweep's finished runs. Returns False, and writes nothing, while there are none."""
    points = group(sweep, rows)
    if not points:
        return False
    two_fields = sweep.by is not None and len({x for x, _ in points}) > 1 and len({by for _, by in points}) > 1
    figure, panels = plt.subplots(1, 2 if two_fields else 1, figsize=(11.5, 4.4) if two_fields else (6.4, 4.4), layout="constrained", squeeze=False)
    _curves(panels[0, 0], sweep, points, rows)
    if two_fields:
        _map(figure, panels[0, 1], sweep, points)
    figure.suptitle(title)
    partial = path.with_suffix(".partial.png")
    figure.savefig(partial, dpi=130)
    partial.replace(path)
    plt.close(figure)
    return True


def group(sweep: Sweep, rows: Sequence[Row]) -> Points:
    """(x, by) -> the metric of each finished run there, in the order of the rows."""
    points: Points = defaultdict(list)
    for row in rows:
        if row["status"] == "done" and row.get(sweep.metric) is not None:
            points[row[sweep.x], row.get(sweep.by)].append(row[sweep.metric])
    return dict(points)


def _curves(panel, sweep: Sweep, points: Points, rows: Sequence[Row]) -> None:
    """Mean over seeds, with a bar from the lowest to the highest."""
    values = list(dict.fromkeys(by for _, by in points))
    colours = plt.get_cmap("viridis")(np.linspace(0.1, 0.85, len(values)))
    for by, colour in zip(values, colours, strict=True):
        xs = sorted(x for x, other in points if other == by)
        means = np.array([np.mean(points[x, by]) for x in xs])
        spread = np.array([[np.mean(points[x, by]) - min(points[x, by]), max(points[x, by]) - np.mean(points[x, by])] for x in xs]).T
        name = None if by is None else f"{_label(sweep.by)} {by:g}" if _is_number(by) else f"{by}"
        panel.errorbar(xs, means, yerr=spread, color=colour, marker="o", markersize=5, capsize=3, linewidth=1.5, label=name)
    if sweep.x == "flops":
        for row in rows:  # sizes by their names, where a point is one run
            values = points.get((row["flops"], row.get(sweep.by)), ())
            if len(values) == 1:
                panel.annotate(row["name"], (row["flops"], values[0]), xytext=(7, 5), textcoords="offset points", fontsize=9)
    seeds = max(map(len, points.values()))
    panel.set(xlabel=_label(sweep.x), ylabel=_label(sweep.metric) + (f"\nmean and range of {seeds} seeds" if seeds > 1 else ""))
    _scale(panel, [x for x, _ in points])
    panel.grid(alpha=0.3, which="both" if sweep.x == "flops" else "major")
    if sweep.by is not None:
        panel.legend(frameon=False)


def _scale(panel, xs: Sequence[Any]) -> None:
    """Logarithmic where the values span a factor, with a tick on each value where there are few."""
    xs = sorted(set(xs))
    if not all(map(_is_number, xs)):
        return
    if xs[0] > 0 and xs[-1] / xs[0] >= 4:
        panel.set_xscale("log")
    panel.margins(x=0.12)
    if xs[-1] < 1e5 and len(xs) <= 8:
        panel.set_xticks(xs, [f"{x:g}" for x in xs])
        panel.minorticks_off()


def _map(figure, panel, sweep: Sweep, points: Points) -> None:
    """The mean at every combination, the best one framed."""
    xs, bys = sorted({x for x, _ in points}), sorted({by for _, by in points})
    means = np.full((len(bys), len(xs)), np.nan)
    for (x, by), values in points.items():
        means[bys.index(by), xs.index(x)] = np.mean(values)
    lowest = sweep.best == "lowest"
    image = panel.imshow(means, cmap="viridis_r" if lowest else "viridis", aspect="auto", origin="lower")
    middle = (np.nanmin(means) + np.nanmax(means)) / 2
    for (row, column), value in np.ndenumerate(means):
        if not np.isnan(value):
            panel.text(column, row, f"{value:.3f}", ha="center", va="center", color="black" if (value < middle) == lowest else "white")
    row, column = np.unravel_index(np.nanargmin(means if lowest else -means), means.shape)
    panel.add_patch(plt.Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="crimson", linewidth=2.5))
    panel.set_xticks(range(len(xs)), [f"{x:g}" if _is_number(x) else str(x) for x in xs])
    panel.set_yticks(range(len(bys)), [f"{by:g}" if _is_number(by) else str(by) for by in bys])
    panel.set(xlabel=_label(sweep.x), ylabel=_label(sweep.by), title=f"{sweep.best} mean framed")
    figure.colorbar(image, ax=panel, label=_label(sweep.metric))


def _label(field: str) -> str:
    last = field.rpartition(".")[2]
    return LABELS.get(last, last.replace("_", " "))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)

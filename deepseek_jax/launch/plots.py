"""The figure of a sweep: curves over one field or over training FLOPs, seeds as a mean with their spread, a map for two
fields.

Where every point has the same seeds, the spread is that of the paired differences: the part of the seed that all points
share is subtracted.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogFormatterSciNotation, LogLocator

from deepseek_jax.atomic import atomic_path
from deepseek_jax.launch.sweep import Sweep
from deepseek_jax.launch.variants import Row, distinguishing_fields, fate, left_out

LABELS = {
    "bits_per_byte": "held-out bits per byte",
    "held_out_loss": "held-out loss (nats per token)",
    "flops": "training FLOPs",
    "peak": "peak learning rate",
}
Points = dict[tuple[Any, Any], dict[int, float]]


def plot(sweep: Sweep, rows: Sequence[Row], path: Path, title: str) -> bool:
    """Writes the PNG of a sweep's finished runs. Returns False, and writes nothing, while there are none."""
    if not group(sweep, rows):
        return False
    with atomic_path(path) as temporary:
        draw(sweep, rows, title).savefig(temporary, format="png", dpi=130)
    return True


def draw(sweep: Sweep, rows: Sequence[Row], title: str) -> Figure:
    """The figure, on a canvas of its own: the backend that a notebook has chosen stays."""
    points = group(sweep, rows)
    two_fields = len({x for x, _ in points}) > 1 and len({curve for _, curve in points}) > 1
    figure = Figure(figsize=(11.5, 4.4) if two_fields else (6.4, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2 if two_fields else 1, squeeze=False)
    _curves(panels[0, 0], sweep, points, rows)
    if sweep.x == "flops":
        _names(panels[0, 0], sweep, points, rows)
    if two_fields:
        _map(figure, panels[0, 1], sweep, points, rows)
    missing = ", ".join(f"{count} {why}" for why, count in left_out(rows, sweep.metric).items())
    figure.suptitle(f"{title}\nleft out: {missing}" if missing else title)
    return figure


def group(sweep: Sweep, rows: Sequence[Row]) -> Points:
    """(x, curve) -> seed -> the metric, of the finished runs that have a number. A curve is a value of `by` or, where
    runs differ in other fields too, the values of all of these, in words."""
    fields = curve_fields(sweep, rows)
    points: Points = defaultdict(dict)
    for row in rows:
        if fate(row, sweep.metric) is None:
            points[row[sweep.x], _curve(row, fields)][row["seed"]] = row[sweep.metric]
    return dict(points)


def curve_fields(sweep: Sweep, rows: Sequence[Row]) -> tuple[str, ...]:
    """The fields that distinguish the curves: `by`, and all others in which runs at one x with one seed differ."""
    by = () if sweep.by is None else (sweep.by,)
    return (*by, *distinguishing_fields(sweep, rows, (sweep.x, *by)))


def _curve(row: Row, fields: Sequence[str]) -> Any:
    if len(fields) < 2:
        value = row.get(fields[0]) if fields else None
        return value if value is None or isinstance(value, (int, float, str)) else str(value)
    return ", ".join(_named(field, row.get(field)) for field in fields)


def _named(field: str, value: Any) -> str:
    return (
        str(value)
        if field == "name"
        else f"{_label(field)} {value:g}"
        if _is_number(value)
        else f"{_label(field)}: {value}"
    )


def is_paired(points: Points) -> bool:
    return len(points) > 1 and len({tuple(sorted(seeds)) for seeds in points.values()}) == 1


def without_seed_effects(points: Points) -> Points:
    """The same means, with each seed's mean over all points replaced by the mean of all; for paired points only."""
    effect = {seed: np.mean([values[seed] for values in points.values()]) for seed in next(iter(points.values()))}
    mean = np.mean(list(effect.values()))
    return {
        key: {seed: value - effect[seed] + mean for seed, value in values.items()} for key, values in points.items()
    }


def _curves(panel, sweep: Sweep, points: Points, rows: Sequence[Row]) -> None:
    """Mean over seeds, with a bar from the lowest to the highest."""
    paired = is_paired(points)
    points = without_seed_effects(points) if paired else points
    values = list(dict.fromkeys(by for _, by in points))
    fields = curve_fields(sweep, rows)
    colors = matplotlib.colormaps["viridis"](np.linspace(0.1, 0.85, len(values)))
    logarithmic = _scale(panel, [x for x, _ in points])
    for number, (by, color) in enumerate(zip(values, colors, strict=True)):
        shift = (
            1.03 ** (number - (len(values) - 1) / 2) if logarithmic else 1
        )  # bars at the same x are drawn next to each other
        xs = ordered(x for x, other in points if other == by)
        runs = [list(points[x, by].values()) for x in xs]
        means = np.array([np.mean(r) for r in runs])
        spread = np.array([[mean - min(r), max(r) - mean] for mean, r in zip(means, runs, strict=True)]).T
        name = None if not fields else by if len(fields) > 1 else _named(fields[0], by)
        places = [x * shift for x in xs] if logarithmic else [x if _is_number(x) else str(x) for x in xs]
        panel.errorbar(
            places, means, yerr=spread, color=color, marker="o", markersize=5, capsize=3, linewidth=1.5, label=name
        )
    counts = sorted({len(seeds) for seeds in points.values()})
    seeds = (
        f"\nmean and range of {'-'.join(map(str, counts))} {'paired ' if paired else ''}seeds" if counts[-1] > 1 else ""
    )
    panel.set(xlabel=_label(sweep.x), ylabel=_label(sweep.metric) + seeds)
    panel.grid(alpha=0.3)
    if fields:
        panel.legend(frameon=False)


def _names(panel, sweep: Sweep, points: Points, rows: Sequence[Row]) -> None:
    """Labels sizes by their names, where a point is one run."""
    fields = curve_fields(sweep, rows)
    for row in rows:
        values = list(points.get((row["flops"], _curve(row, fields)), {}).values())
        if len(values) == 1 and fate(row, sweep.metric) is None:
            panel.annotate(
                row["name"], (row["flops"], values[0]), xytext=(7, 5), textcoords="offset points", fontsize=9
            )


def _scale(panel, xs: Sequence[Any]) -> bool:
    """Uses a logarithmic axis where numbers span a factor of 4 (returns True then), with a tick on each value where
    there are few."""
    panel.margins(x=0.12, y=0.1)
    if not all(map(_is_number, xs)):
        return False
    xs = sorted(set(xs))
    logarithmic = xs[0] > 0 and xs[-1] / xs[0] >= 4
    if logarithmic:
        panel.set_xscale("log")
    if xs[-1] < 1e5 and len(xs) <= 8:
        panel.set_xticks(xs, [f"{x:g}" for x in xs])
        panel.minorticks_off()
    elif logarithmic:
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 3) if xs[-1] / xs[0] < 1e3 else (1,)))
        panel.xaxis.set_major_formatter(
            LogFormatterSciNotation(labelOnlyBase=False, minor_thresholds=(math.inf, math.inf))
        )
        panel.minorticks_off()
    return logarithmic


def _map(figure, panel, sweep: Sweep, points: Points, rows: Sequence[Row]) -> None:
    """Draws the mean at every combination, with a frame around the best one."""
    xs, bys = ordered(x for x, _ in points), ordered(by for _, by in points)
    means = np.full((len(bys), len(xs)), np.nan)
    for (x, by), values in points.items():
        means[bys.index(by), xs.index(x)] = np.mean(list(values.values()))
    lowest = sweep.best == "lowest"
    image = panel.imshow(means, cmap="viridis_r" if lowest else "viridis", aspect="auto", origin="lower")
    middle = (np.nanmin(means) + np.nanmax(means)) / 2
    for (row, column), value in np.ndenumerate(means):
        if not np.isnan(value):
            panel.text(
                column,
                row,
                f"{value:.3f}",
                ha="center",
                va="center",
                color="black" if (value < middle) == lowest else "white",
            )
    row, column = np.unravel_index(np.nanargmin(means if lowest else -means), means.shape)
    panel.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="crimson", linewidth=2.5))
    panel.set_xticks(range(len(xs)), [f"{x:g}" if _is_number(x) else str(x) for x in xs])
    panel.set_yticks(range(len(bys)), [f"{by:g}" if _is_number(by) else str(by) for by in bys])
    fields = curve_fields(sweep, rows)
    panel.set(
        xlabel=_label(sweep.x), ylabel=_label(fields[0]) if len(fields) == 1 else "", title=f"{sweep.best} mean framed"
    )
    figure.colorbar(image, ax=panel, label=_label(sweep.metric))


def ordered(values: Iterable[Any]) -> list[Any]:
    """Each value once: numbers by size, values of other or mixed types in their order of appearance."""
    found = list(dict.fromkeys(values))
    return sorted(found) if all(map(_is_number, found)) else found


def _label(field: str) -> str:
    last = field.rpartition(".")[2]
    return LABELS.get(last, last.replace("_", " "))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)

"""A sweep as a figure: curves over one field or over training FLOPs, seeds as a mean with their spread, a map for two fields.

Where every point has the same seeds, the spread is that of the paired differences: what a seed adds to all points alike is
taken out of it.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # figures go to files, on machines without a screen too

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from matplotlib.ticker import LogFormatterSciNotation, LogLocator  # noqa: E402

from deepseek_jax.launch.results import Row  # noqa: E402
from deepseek_jax.launch.sweep import Sweep  # noqa: E402

LABELS = {"bits_per_byte": "held-out bits per byte", "held_out_loss": "held-out loss (nats per token)", "flops": "training FLOPs", "peak": "peak learning rate"}
Points = dict[tuple[Any, Any], dict[int, float]]


def plot(sweep: Sweep, rows: Sequence[Row], path: Path, title: str) -> bool:
    """Writes the PNG of a sweep's finished runs. Returns False, and writes nothing, while there are none."""
    points = group(sweep, rows)
    if not points:
        return False
    two_fields = sweep.by is not None and len({x for x, _ in points}) > 1 and len({by for _, by in points}) > 1
    figure, panels = plt.subplots(1, 2 if two_fields else 1, figsize=(11.5, 4.4) if two_fields else (6.4, 4.4), layout="constrained", squeeze=False)
    _curves(panels[0, 0], sweep, points)
    if sweep.x == "flops":
        _names(panels[0, 0], sweep, points, rows)
    if two_fields:
        _map(figure, panels[0, 1], sweep, points)
    figure.suptitle(title)
    partial = path.with_suffix(".partial.png")
    figure.savefig(partial, dpi=130)
    partial.replace(path)
    plt.close(figure)
    return True


def group(sweep: Sweep, rows: Sequence[Row]) -> Points:
    """(x, by) -> seed -> the metric, of the finished runs."""
    points: Points = defaultdict(dict)
    for row in rows:
        if row["status"] == "done" and row.get(sweep.metric) is not None:
            points[row[sweep.x], row.get(sweep.by)][row["seed"]] = row[sweep.metric]
    return dict(points)


def is_paired(points: Points) -> bool:
    return len(points) > 1 and len({tuple(sorted(seeds)) for seeds in points.values()}) == 1


def without_seed_effects(points: Points) -> Points:
    """The same means, with each seed's mean over all points in place of the mean of all: only for paired points."""
    effect = {seed: np.mean([values[seed] for values in points.values()]) for seed in next(iter(points.values()))}
    mean = np.mean(list(effect.values()))
    return {key: {seed: value - effect[seed] + mean for seed, value in values.items()} for key, values in points.items()}


def _curves(panel, sweep: Sweep, points: Points) -> None:
    """Mean over seeds, with a bar from the lowest to the highest."""
    paired = is_paired(points)
    points = without_seed_effects(points) if paired else points
    values = list(dict.fromkeys(by for _, by in points))
    colours = plt.get_cmap("viridis")(np.linspace(0.1, 0.85, len(values)))
    logarithmic = _scale(panel, [x for x, _ in points])
    for number, (by, colour) in enumerate(zip(values, colours, strict=True)):
        beside = 1.03 ** (number - (len(values) - 1) / 2) if logarithmic else 1  # bars at the same x stand side by side
        xs = sorted(x for x, other in points if other == by)
        runs = [list(points[x, by].values()) for x in xs]
        means = np.array([np.mean(r) for r in runs])
        spread = np.array([[mean - min(r), max(r) - mean] for mean, r in zip(means, runs, strict=True)]).T
        name = None if by is None else f"{_label(sweep.by)} {by:g}" if _is_number(by) else f"{by}"
        places = [x * beside for x in xs] if logarithmic else xs
        panel.errorbar(places, means, yerr=spread, color=colour, marker="o", markersize=5, capsize=3, linewidth=1.5, label=name)
    counts = sorted({len(seeds) for seeds in points.values()})
    seeds = f"\nmean and range of {'-'.join(map(str, counts))} {'paired ' if paired else ''}seeds" if counts[-1] > 1 else ""
    panel.set(xlabel=_label(sweep.x), ylabel=_label(sweep.metric) + seeds)
    panel.grid(alpha=0.3)
    if sweep.by is not None:
        panel.legend(frameon=False)


def _names(panel, sweep: Sweep, points: Points, rows: Sequence[Row]) -> None:
    """Sizes by their names, where a point is one run."""
    for row in rows:
        values = list(points.get((row["flops"], row.get(sweep.by)), {}).values())
        if len(values) == 1:
            panel.annotate(row["name"], (row["flops"], values[0]), xytext=(7, 5), textcoords="offset points", fontsize=9)


def _scale(panel, xs: Sequence[Any]) -> bool:
    """Logarithmic where numbers span a factor of 4 (returns whether), with a tick on each value where there are few."""
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
        panel.xaxis.set_major_formatter(LogFormatterSciNotation(labelOnlyBase=False, minor_thresholds=(math.inf, math.inf)))
        panel.minorticks_off()
    return logarithmic


def _map(figure, panel, sweep: Sweep, points: Points) -> None:
    """The mean at every combination, the best one framed."""
    xs, bys = sorted({x for x, _ in points}), sorted({by for _, by in points})
    means = np.full((len(bys), len(xs)), np.nan)
    for (x, by), values in points.items():
        means[bys.index(by), xs.index(x)] = np.mean(list(values.values()))
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

"""Variants of a sweep: runs that differ in their seed alone, with their results and the fields that distinguish
them."""

import dataclasses
import math
import re
import statistics
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from deepseek_jax.json_io import to_json
from deepseek_jax.launch.sweep import Sweep

Row = Mapping[str, Any]
_SEED_IN_NAME = re.compile(r"(^|[-_.]+)seed[-_]?\d+")


@dataclasses.dataclass(frozen=True)
class Variant:
    """`values` are the metric's of the finished runs, all finite; `left_out` counts the other runs by reason:
    "diverged" (the metric is NaN), "without the metric", or the run's state."""

    name: str
    values: tuple[float, ...]
    left_out: Mapping[str, int]

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.values) if self.values else None

    @property
    def deviation(self) -> float | None:
        """The standard deviation over seeds, from two seeds on."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None


def fate(row: Row, metric: str) -> str | None:
    """The reason why a run does not count; None for one that does."""
    value = row.get(metric)
    if row["status"] != "done":
        return row["status"]
    if value is None:
        return "without the metric"
    return None if math.isfinite(value) else "diverged"


def left_out(rows: Iterable[Row], metric: str) -> Counter[str]:
    return Counter(why for row in rows if (why := fate(row, metric)) is not None)


def variants(sweep: Sweep, rows: Sequence[Row]) -> list[Variant]:
    """The variants, in the order of the sweep."""
    overrides = {run.name: run.overrides for run in sweep.runs}
    groups: dict[str, list[Row]] = {}
    for row in rows:
        key = to_json({field: value for field, value in sorted(overrides[row["name"]].items()) if field != "seed"})
        groups.setdefault(key, []).append(row)
    names = [{_SEED_IN_NAME.sub("", row["name"]) for row in group} for group in groups.values()]
    unique = all(len(name) == 1 for name in names) and len(set.union(*names)) == len(names)
    return [
        Variant(
            name=(next(iter(name)) if unique else group[0]["name"]) or "base",
            values=tuple(row[sweep.metric] for row in group if fate(row, sweep.metric) is None),
            left_out=left_out(group, sweep.metric),
        )
        for name, group in zip(names, groups.values(), strict=True)
    ]


def distinguishing_fields(sweep: Sweep, rows: Sequence[Row], point: Sequence[str]) -> tuple[str, ...]:
    """The overridden fields in which runs differ that would otherwise be one point of a plot with the same seed;
    `point` are the columns that make a point. Runs that differ in their names alone have "name"."""
    fields = [
        field
        for field in dict.fromkeys(field for run in sweep.runs for field in run.overrides)
        if field not in (*point, "seed")
    ]
    found: list[str] = []
    while True:
        seen: dict[Hashable, Row] = {}
        clash = next(
            (
                (seen[key], row)
                for row in rows
                if seen.setdefault(key := tuple(str(row.get(field)) for field in (*point, *found, "seed")), row)
                is not row
            ),
            None,
        )
        if clash is None:
            return tuple(field for field in (*fields, "name") if field in found)
        first, second = clash
        found.append(
            next((field for field in fields if field not in found and first.get(field) != second.get(field)), "name")
        )


def results_table(sweep: Sweep, rows: Sequence[Row], title: str) -> Table:
    """A row per variant: the metric's mean and standard deviation over seeds, the number of runs, and the runs that are
    left out, with reasons."""
    view = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    view.add_column("variant")
    view.add_column(f"{sweep.metric}, mean ± standard deviation", justify="right", no_wrap=True)
    view.add_column("n", justify="right")
    view.add_column("left out")
    found = variants(sweep, rows)
    means = [variant.mean for variant in found if variant.mean is not None]
    best = (min if sweep.best == "lowest" else max)(means, default=None)
    for variant in found:
        value = (
            ""
            if variant.mean is None
            else f"{variant.mean:.4f}" + ("" if variant.deviation is None else f" ± {variant.deviation:.4f}")
        )
        reasons = ", ".join(f"{count} {why}" for why, count in variant.left_out.items())
        view.add_row(
            variant.name,
            value,
            str(len(variant.values)),
            reasons,
            style="bold" if variant.mean == best and best is not None else None,
        )
    return view

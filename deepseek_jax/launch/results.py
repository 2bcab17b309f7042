"""Results of a sweep: one table with a row per run, as parquet and as CSV."""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.csv
import pyarrow.parquet

from deepseek_jax.atomic import atomic_path
from deepseek_jax.errors import ConfigError
from deepseek_jax.json_io import read_json
from deepseek_jax.launch.jobs import Job
from deepseek_jax.launch.state import Status
from deepseek_jax.launch.variants import Row
from deepseek_jax.training.metrics import read_metrics

SPEEDS = ("tokens_per_second", "flops_per_second", "mfu")  # the run's median, not the last line's


def collect(jobs: Sequence[Job], statuses: Mapping[str, Status]) -> list[Row]:
    """A row per run: name, status, seconds, topology, tokens and FLOPs of its training, its overrides, its seed, and
    for each stage, as "stage.metric", the last value of every metric that is a number. Missing values are None."""
    rows = []
    for job in jobs:
        status = statuses[job.name]
        rows.append(
            {
                "name": job.name,
                "status": status.state,
                "exit_status": status.exit_status,
                "seconds": status.seconds,
                "topology": job.run.resources.topology,
                "tokens": job.tokens,
                "flops": job.flops,
                "seed": job.config.get("seed", 0),
                **job.run.overrides,
            }
        )
        for stage in job.stages:
            rows[-1] |= {f"{stage}.{name}": value for name, value in stage_metrics(job.folder / stage).items()}
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return [{name: row.get(name) for name in columns} for row in rows]


def stage_metrics(folder: Path) -> dict[str, float]:
    """The last value of each metric in a stage's `metrics.jsonl`, speeds as medians, and the numbers of its
    `evaluation.json`.

    A metric that was not finite in the end is left out: an earlier value would be taken for the result.
    """
    records = read_metrics(folder)
    last = {
        name: number for record in records for name, value in record.items() if (number := _number(value)) is not None
    }
    for name in SPEEDS:
        if name in last:
            measured = [record[name] for record in records if record.get(name) is not None]
            last[name] = statistics.median(measured) if measured else math.nan
    path = folder / "evaluation.json"
    evaluation = (
        read_json(path, "remove it and start the run again: the evaluation is then made anew", ConfigError)
        if path.exists()
        else {}
    )
    return last | {name: number for name, value in evaluation.items() if (number := _number(value)) is not None}


def _number(value: Any) -> float | None:
    """A logged number; NaN and infinity are written as null. None for lists and texts."""
    if value is None:
        return math.nan
    return value if isinstance(value, (int, float)) else None


def write_table(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Writes results.parquet and results.csv into `folder`; a column with several types is text."""
    table = pyarrow.table({name: _column([row[name] for row in rows]) for name in rows[0]})
    paths = []
    for suffix, write in (("parquet", pyarrow.parquet.write_table), ("csv", pyarrow.csv.write_csv)):
        path = folder / f"results.{suffix}"
        with atomic_path(path) as temporary:
            write(table, str(temporary))
        paths.append(path)
    return paths


def _column(values: Sequence[Any]) -> pyarrow.Array:
    kinds = {type(value) for value in values if value is not None}
    if kinds == {int, float}:
        return pyarrow.array([None if value is None else float(value) for value in values])
    if len(kinds) > 1 or kinds & {tuple, list, dict}:
        return pyarrow.array([None if value is None else str(value) for value in values])
    return pyarrow.array(values)

"""Sweep: one base experiment and runs that override some of its fields.

A sweep file has one function, `get_sweep()`, that returns a Sweep.
"""

import dataclasses
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from deepseek_jax.config_file import call
from deepseek_jax.errors import ConfigError
from deepseek_jax.launch.resources import Resources
from deepseek_jax.ranges import check, one_of

NAME = re.compile(r"[A-Za-z0-9]+([._-]{1,2}[A-Za-z0-9]+)*")  # a folder, a SLURM job and a SkyPilot job at once


@dataclasses.dataclass(frozen=True)
class Run:
    """One run. `overrides` maps fields to values, {"pretrain.train.steps": 100}, as `--config.field=value` does on the
    command line."""

    name: str
    overrides: Mapping[str, Any]
    resources: Resources = Resources()

    def __post_init__(self):
        if not NAME.fullmatch(self.name):
            raise ConfigError(f"run name {self.name!r}: letters and digits, joined by '.', '_' or '-'")


@dataclasses.dataclass(frozen=True)
class Sweep:
    """`experiment` is the path of the base file, from the working directory.

    The plot shows `metric` ("stage.name", a column of the table) over `x`: an overridden field, or "flops", the
    training FLOPs of a run. Runs that differ in their seed alone are one point with a spread; `by` is an overridden
    field with a curve for each of its values; where runs differ in other fields too, these distinguish curves as well.
    `best` is "lowest" or "highest".
    """

    experiment: str
    runs: Sequence[Run]
    x: str = "flops"
    by: str | None = None
    metric: str = "pretrain.bits_per_byte"
    best: str = "lowest"

    def __post_init__(self):
        if not self.runs:
            raise ConfigError("a sweep needs at least one run")
        twice = [name for name, count in Counter(run.name for run in self.runs).items() if count > 1]
        if twice:
            raise ConfigError(
                f"several runs are called {twice[0]!r}: every run has a folder of its own, so names must differ"
            )
        check(self, "", best=one_of(("lowest", "highest")))
        fields = {field for run in self.runs for field in run.overrides}
        for axis, other in ((self.x, ("flops",)), (self.by, (None,))):
            if axis not in fields and axis not in other:
                raise ConfigError(
                    f"the plot's axis {axis!r} is not a field that the runs override: {', '.join(sorted(fields))}"
                )
            for value in (run.overrides.get(axis) for run in self.runs):
                if isinstance(value, (Mapping, list, tuple)):
                    raise ConfigError(
                        f"the plot's axis {axis!r} has compound values, such as {value!r}: override one of its "
                        "fields, or choose another axis"
                    )


def grid(fields: Mapping[str, Sequence[Any]]) -> tuple[Run, ...]:
    """Every combination of the fields' values; the last field varies fastest. A name joins the last part of each field
    with its value; a compound value, such as a schedule, is named by its number."""
    last = [field.rpartition(".")[2] for field in fields]
    short = last if len(set(last)) == len(last) else list(fields)
    named = [
        [(f"{name}_{word}", value) for word, value in zip(_words(values), values, strict=True)]
        for name, values in zip(short, fields.values(), strict=True)
    ]
    return tuple(
        Run("-".join(name for name, _ in chosen), dict(zip(fields, (value for _, value in chosen), strict=True)))
        for chosen in itertools.product(*named)
    )


def _words(values: Sequence[Any]) -> list[str]:
    """Each value as a word of a name; by its number where a value is compound, or where two would have the same
    name."""
    if any(isinstance(value, (Mapping, list, tuple)) for value in values):
        return [str(number) for number in range(len(values))]
    words = [
        str(value) if isinstance(value, (int, float)) else re.sub(r"[^A-Za-z0-9]+", _separator, str(value)).strip("._-")
        for value in values
    ]
    return words if len(set(words)) == len(words) and all(words) else [str(number) for number in range(len(values))]


def _separator(found: re.Match) -> str:
    return found[0] if found[0] in ("_", ".", "-") else "-"


def cross(*groups: Iterable[Run]) -> tuple[Run, ...]:
    """Every combination of one run from each group: overrides together, names joined. Raises ConfigError where two
    disagree."""
    return tuple(_merge(runs) for runs in itertools.product(*groups))


def _merge(runs: Sequence[Run]) -> Run:
    overrides: dict[str, Any] = {}
    for run in runs:
        for field, value in run.overrides.items():
            if overrides.setdefault(field, value) != value:
                raise ConfigError(f"crossed runs disagree about {field}: {overrides[field]!r} and {value!r}")
    wanted = {run.resources for run in runs} - {Resources()} or {Resources()}
    if len(wanted) > 1:
        raise ConfigError(f"crossed runs want different resources: {', '.join(sorted(r.topology for r in wanted))}")
    return Run("-".join(run.name for run in runs), overrides, wanted.pop())


def paired_seeds(runs: Iterable[Run], seeds: Sequence[int]) -> tuple[Run, ...]:
    """Each run with each seed, the same ones for all: weights and data order then agree, and differences are paired."""
    return cross(runs, grid({"seed": seeds}))


def load_sweep(path: str) -> Sweep:
    """The sweep of a file, which may import its neighbors and the experiments a folder above. Raises ConfigError for a
    file that is missing, cannot be run or defines no sweep."""
    sweep, where = call(path, "get_sweep")
    if not isinstance(sweep, Sweep):
        raise ConfigError(f"{where}: get_sweep() returns {type(sweep).__name__}, not a deepseek_jax.launch.Sweep")
    return sweep

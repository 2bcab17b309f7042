"""Workdir: the folder of a run, held by one process at a time. A run that is started again keeps, continues or repeats
each stage.

`config.json` is the experiment of the latest start. Each stage's folder has the experiment that its results belong to,
as experiment.json. A stage is kept if its own settings and those of the stages that made its weights are the same, free
fields apart (see `identity`). Results of other settings are moved aside, never deleted.
"""

import contextlib
import dataclasses
import errno
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deepseek_jax.data.tokenizer_files import RECORD
from deepseek_jax.errors import ConfigError, UserError
from deepseek_jax.experiment import Experiment
from deepseek_jax.identity import decisive
from deepseek_jax.json_io import read_json, to_json
from deepseek_jax.locks import lock
from deepseek_jax.model.config import ModelConfig
from deepseek_jax.parallel.hosts import from_primary, is_primary, write_text
from deepseek_jax.stages import Stage, build_stages

DEFAULTS = {"precision": "float32", "tokenizer": "byte", "task": None, "seed": 0}
NOT_WRITABLE = (
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The action for each stage, "run" (it has no results yet), "continue", "keep" or "again", and the reasons for
    "again"."""

    actions: dict[str, str]
    reasons: dict[str, list[str]]

    def names(self, *actions: str) -> list[str]:
        return [name for name, action in self.actions.items() if action in actions]


def plan_run(experiment: Experiment, stages: Sequence[Stage]) -> Plan:
    """Compares the stages with what their folders hold; changes nothing. Raises ConfigError if the folder holds nothing
    that can be kept."""
    return Plan(**_agreed(lambda: dataclasses.asdict(_plan(experiment, stages))))


def _plan(experiment: Experiment, stages: Sequence[Stage]) -> Plan:
    actions, reasons = {}, {}
    for stage in stages:
        actions[stage.name] = "run"
        if stage.made():
            differs = _differences(stage, stages)
            actions[stage.name] = "again" if differs else "keep" if stage.finished() else "continue"
            if differs:
                reasons[stage.name] = differs
    plan = Plan(actions, reasons)
    if reasons and not plan.names("keep", "continue"):
        changed = next(iter(reasons.values()))
        raise ConfigError(
            f"{experiment.workdir} holds a run of another configuration: {_few(changed)}. Pass another --workdir, or "
            "the settings it was started with"
        )
    return plan


def claim(experiment: Experiment, stages: Sequence[Stage], plan: Plan) -> None:
    """Moves aside the results of stages that are run again, says so, and writes the configuration into the workdir and
    into the folders of stages that are to run.

    Raises ConfigError where the folder cannot be written to.
    """

    def write() -> None:
        with explained(experiment.workdir):
            if plan.names("again"):
                print(f"kept: {', '.join(plan.names('keep', 'continue'))}", flush=True)
            for name in plan.names("again"):
                aside = _free_name(experiment.workdir / name)
                (experiment.workdir / name).rename(aside)
                print(
                    f"run again: {name}, for another {_few(plan.reasons[name])}; what it had left is in {aside}",
                    flush=True,
                )
            text = to_json(experiment.config, indent=1) + "\n"
            write_text(experiment.workdir / "config.json", text)
            for stage in stages:
                if stage.leaves_results and plan.actions[stage.name] != "keep":
                    write_text(stage.folder / RECORD, text)

    _agreed(write)


def _free_name(folder: Path) -> Path:
    number = 1
    while (aside := folder.with_name(f"{folder.name}.old-{number}")).exists():
        number += 1
    return aside


def _few(changed: Sequence[str]) -> str:
    return f"{', '.join(changed[:3])}{' and more' if len(changed) > 3 else ''}"


def _differences(stage: Stage, stages: Sequence[Stage]) -> list[str]:
    """The settings that decide a stage's result and differ from those of the results in its folder."""
    record = _record(stage)
    if record is None:
        return []  # results that somebody has put there: the checkpoint says whether they fit
    experiment = stage.experiment
    before, now = _shared(record), _shared(experiment.config)
    differs = [
        f"config.{field} ({before.get(field)!r} -> {now.get(field)!r})"
        for field in sorted({*before, *now})
        if before.get(field) != now.get(field)
    ]
    if differs:
        return differs
    try:
        recorded = build_stages(
            dataclasses.replace(experiment, sections={name: record[name] for name in record["stages"]})
        )
    except ConfigError as error:
        return [f"configuration, which can no longer be read ({error})"]
    then, here = _makers(stage.name, recorded), _makers(stage.name, stages)
    names = [[maker.name for maker in makers] for makers in (then, here)]
    if names[0] != names[1]:
        return [f"config.stages ({names[0]} -> {names[1]})"]
    *earlier, own = zip(then, here, strict=True)
    differs = [text for old, new in earlier for text in _stage_differences(old, new)]
    return differs + _stage_differences(*own, made=stage.made())


def _record(stage: Stage) -> dict[str, Any] | None:
    """The experiment that a stage's results belong to; None where it is not recorded. Runs of older versions have one
    for all stages."""
    for path in (stage.folder / RECORD, stage.experiment.workdir / "config.json"):
        if path.exists():
            record = read_json(path, "pass another --workdir, or restore it", ConfigError)
            names = record.get("stages")
            return record if isinstance(names, list) and stage.name in names else None
    return None


def _shared(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that all stages share, by dotted path."""
    shared = {field: config.get(field, default) for field, default in DEFAULTS.items()}
    return decisive({"model": ModelConfig.from_saved(config["model"]), **shared})


def _makers(name: str, stages: Sequence[Stage]) -> list[Stage]:
    """The stages that make the weights of stage `name`, and that stage at the end."""
    place = [stage.name for stage in stages].index(name)
    return [stage for stage in stages[:place] if stage.changes_weights] + [stages[place]]


def _stage_differences(old: Stage, new: Stage, made: Sequence[int] = ()) -> list[str]:
    """The differences, as sentences. A stage that has made steps may be made longer, or as long as one of its
    checkpoints; of a schedule, only the steps already made matter then."""
    before, now = decisive(old.settings()), decisive(new.settings())
    steps = min(max(made, default=0), now.get(new.length, 0))
    return [
        f"config.{new.name}.{field} {text}"
        for field in dict.fromkeys((*before, *now))
        if (text := _difference(before.get(field), now.get(field), steps, made if field == new.length else ()))
    ]


def _difference(before: Any, now: Any, steps: int, made: Sequence[int]) -> str | None:
    """One difference, in words. `made` is not empty for the setting that says how many steps the stage makes; the first
    `steps` steps have to be the same."""
    if before == now:
        return None
    if made:
        return (
            None
            if now > made[-1] or now in made
            else f"({before} -> {now}, and {made[-1]} steps are made; there are checkpoints of {_listed(made)})"
        )
    if steps and callable(before) and callable(now):
        then, here = (np.broadcast_to(schedule(np.arange(steps)), steps) for schedule in (before, now))
        other = np.flatnonzero(then != here)
        if not len(other):
            return None
        step = int(other[0])
        return (
            f"({then[step]:g} -> {here[step]:g} at step {step}, which is made; a schedule without 'steps' spans the "
            "stage, so that a longer stage changes it: give it the 'steps' it had)"
        )
    return f"({before!r} -> {now!r})"


def _listed(steps: Sequence[int]) -> str:
    return ", ".join(map(str, steps))


@contextlib.contextmanager
def hold(workdir: Path) -> Iterator[None]:
    """Makes the folder and keeps other runs out of it until this process ends, in any way. Raises UserError if that
    can't be done."""
    with contextlib.ExitStack() as stack:

        def take() -> None:
            if workdir.exists() and not workdir.is_dir():
                raise ConfigError(f"{workdir} is a file: pass the --workdir of a folder, it is made if there is none")
            with explained(workdir):
                workdir.mkdir(parents=True, exist_ok=True)
                held = stack.enter_context(
                    lock(
                        workdir / "run.lock",
                        f"{workdir} is in use, another run is going on there: pass another --workdir, or wait",
                    )
                )
            if held is None:
                logging.warning("%s is on a file system without locks: see to it that no other run uses it", workdir)

        _agreed(take)
        yield


@contextlib.contextmanager
def explained(workdir: Path) -> Iterator[None]:
    """Turns the system's refusal to write to a folder into a ConfigError."""
    try:
        yield
    except OSError as error:
        if error.errno not in NOT_WRITABLE:
            raise
        advice = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "see to its permissions"
        raise UserError(
            f"cannot write {error.filename or workdir}: {error.strerror}; {advice}, or pass another --workdir"
        ) from error


def _agreed(make: Callable[[], Any]) -> Any:
    """The JSON value that process 0 makes, on every process; an error there is raised on all."""
    said: dict[str, Any] = {}
    if is_primary():
        try:
            said = {"made": make()}
        except UserError as error:
            said = {"refused": str(error)}
    said = json.loads(from_primary(json.dumps(said)))
    if "refused" in said:
        raise ConfigError(said["refused"])
    return said["made"]

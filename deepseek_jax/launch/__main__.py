"""python -m deepseek_jax.launch --sweep=experiments/sweeps/….py --launcher=local|slurm|skypilot [--only=…] [--plan]
[--results]

Runs a sweep's missing runs. Every run is checked before the first one starts. A sweep that is started again skips runs
that are done, running or queued; a failed run is reported and does not stop the others. Exits with 1 if any failed.
"""

import importlib.util
from argparse import Namespace
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Protocol

from ml_collections import ConfigDict

from deepseek_jax import cli
from deepseek_jax.errors import ConfigError, nearest
from deepseek_jax.launch.jobs import Job, build_jobs
from deepseek_jax.launch.local import LocalLauncher
from deepseek_jax.launch.plan import DryRun, plan, plan_table
from deepseek_jax.launch.plots import plot
from deepseek_jax.launch.results import collect, write_table
from deepseek_jax.launch.state import Status, read_status
from deepseek_jax.launch.sweep import Sweep, load_sweep
from deepseek_jax.launch.variants import results_table
from deepseek_jax.overrides import parse


class Launcher(Protocol):
    def launch(self, jobs: Sequence[Job]) -> int:
        """Runs `jobs`, or submits them. Returns how many are known to have failed."""


def main(argv: Sequence[str], dry_run: DryRun | None = None) -> int:
    flags = _parse(argv)
    sweep, name = load_sweep(flags.sweep), Path(flags.sweep).stem
    workdir = Path(flags.workdir or Path("runs") / name)
    jobs = build_jobs(sweep, workdir)
    chosen = choose(jobs, flags.only, here=flags.launcher == "local" and not flags.plan)
    statuses = {job.name: read_status(job.folder) for job in jobs}
    if flags.plan:
        estimates = plan(chosen, statuses, dry_run or _dry_run, flags.dollars_per_chip_hour)
        cli.show(plan_table(name, estimates, flags.launcher))
        return 0
    failed = 0
    if not flags.results:
        missing = [job for job in chosen if statuses[job.name].state not in ("done", "running")]
        print(f"{name}: {len(jobs)} runs in {workdir}, {_tally(statuses)}", flush=True)
        launcher = _launcher(flags, name, workdir)
        try:
            failed = launcher.launch(missing) if missing else 0
        finally:  # also where it was interrupted
            write_results(sweep, name, jobs, workdir)
        return 1 if failed else 0
    write_results(sweep, name, jobs, workdir)
    return 0


def choose(jobs: Sequence[Job], only: str | None, here: bool) -> list[Job]:
    """The jobs whose names match one of the comma-separated patterns. Without patterns: all jobs, or, to run here,
    those for a CPU.

    Raises ConfigError for a pattern that matches none.
    """
    if only is None:
        elsewhere = [job for job in jobs if job.run.resources.kind != "cpu"] if here else []
        for job in elsewhere:
            print(
                f"{job.name} wants {job.run.resources.topology} and is left out; --only={job.name} runs it here all "
                "the same"
            )
        return [job for job in jobs if job not in elsewhere]
    for pattern in only.split(","):
        if not any(fnmatchcase(job.name, pattern) for job in jobs):
            raise ConfigError(
                f"--only={only}: no run is called {pattern!r}: {nearest(pattern, [job.name for job in jobs])}"
            )
    return [job for job in jobs if any(fnmatchcase(job.name, pattern) for pattern in only.split(","))]


def write_results(sweep: Sweep, name: str, jobs: Sequence[Job], workdir: Path) -> None:
    """Prints the variants' results and the number of runs in each state; writes results.parquet, results.csv and
    results.png into the workdir."""
    statuses = {job.name: read_status(job.folder) for job in jobs}
    rows = collect(jobs, statuses)
    paths = write_table(rows, workdir)
    figure = workdir / "results.png"
    if plot(sweep, rows, figure, name):
        paths.append(figure)
    cli.show(results_table(sweep, rows, name))
    print(f"{name}: {_tally(statuses)}; {', '.join(map(str, paths))}", flush=True)


def _tally(statuses: Mapping[str, Status]) -> str:
    states = [status.state for status in statuses.values()]
    return ", ".join(
        f"{states.count(state)} {state}"
        for state in ("done", "running", "stopped", "failed", "missing")
        if state in states
    )


def _launcher(flags: Namespace, name: str, workdir: Path) -> Launcher:
    if flags.launcher == "local":
        return LocalLauncher(flags.slots, dict(_pair(text) for text in flags.slot_environment))
    if flags.launcher == "slurm":
        if importlib.util.find_spec("submitit") is None:
            raise ConfigError("--launcher=slurm needs submitit: pip install 'deepseek_jax[slurm]'")
        from deepseek_jax.launch.slurm import SlurmLauncher

        return SlurmLauncher(workdir, _literal(flags.slurm))
    from deepseek_jax.launch.skypilot import SkyPilotLauncher

    return SkyPilotLauncher(name, workdir, flags.bucket, flags.infra, flags.install)


def _dry_run(config: ConfigDict, name: str, topology: str, **options: Any) -> Mapping[str, Any]:
    from deepseek_jax.dry_run.dry_run import dry_run

    print(f"compiling {name} for {topology} …", flush=True)
    return dry_run(config, name, topology, **options)


def _parse(argv: Sequence[str]) -> Namespace:
    parser = cli.parser("deepseek_jax.launch", "Runs what is missing of a sweep, and collects what there is.")
    parser.add_argument("--sweep", required=True, help="a file with get_sweep()")
    parser.add_argument(
        "--launcher", choices=("local", "slurm", "skypilot"), default="local", help="where the runs run"
    )
    parser.add_argument("--only", help="names or patterns of runs, with commas; the others are left alone")
    parser.add_argument("--workdir", help="where results go (runs/<name of the sweep file> without it)")
    parser.add_argument(
        "--plan", action="store_true", help="print what would run, where, for how long and at what cost; start nothing"
    )
    parser.add_argument(
        "--results",
        action="store_true",
        help="print and write the table and the plot of what has finished; start nothing",
    )
    cli.add_price(parser)
    local = parser.add_argument_group("local")
    local.add_argument("--slots", type=cli.number(int, least=1), default=1, help="runs at a time")
    local.add_argument(
        "--slot_environment",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="{slot} in a value is the slot's number; may be repeated",
    )
    slurm = parser.add_argument_group("slurm")
    slurm.add_argument(
        "--slurm", default="{}", help="submitit's parameters, as \"{'slurm_partition': 'gpu', 'cpus_per_task': 32}\""
    )
    sky = parser.add_argument_group("skypilot")
    sky.add_argument("--bucket", help="gs://NAME or s3://NAME, holds the runs")
    sky.add_argument("--infra", help="cloud[/region[/zone]]; wherever there are machines without it")
    sky.add_argument("--install", help="what to install on the machines, for pip (the extra that fits them without it)")
    flags = parser.parse_args(argv)
    for launcher, names in (
        ("local", ("slots", "slot_environment")),
        ("slurm", ("slurm",)),
        ("skypilot", ("bucket", "infra", "install")),
    ):
        given = [name for name in names if getattr(flags, name) != parser.get_default(name)]
        if given and flags.launcher != launcher:
            raise ConfigError(
                f"--{given[0]} is for --launcher={launcher}, not for --launcher={flags.launcher}: leave it out"
            )
    if flags.dollars_per_chip_hour is not None and not flags.plan:
        raise ConfigError("--dollars_per_hour is for --plan: leave it out")
    return flags


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise ConfigError(f"--slot_environment={text}: NAME=VALUE, for example CUDA_VISIBLE_DEVICES={{slot}}")
    return name, value


def _literal(text: str) -> dict[str, Any]:
    value = parse(text)
    if not isinstance(value, dict):
        raise ConfigError(f"--slurm={text}: a dictionary, for example \"{{'slurm_partition': 'gpu'}}\"")
    return value


if __name__ == "__main__":
    cli.run(main)

"""python -m deepseek_jax --config=experiments/….py [--workdir=…] [--config.any.field=value] [--dry]

Runs an experiment's stages in order. A run that is started again resumes from its last checkpoint. `--dry` checks
everything except that the mesh fits this machine, and prints the plan without allocating a weight.

On several machines start it on each, with the same workdir on a file system that all see. SLURM, Open MPI, GKE and
Cloud TPUs tell the processes their ranks; elsewhere pass to each --coordinator=HOST:PORT (of process 0)
--num_processes=N --process_id=I.
"""

import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict
from rich.console import Console

from deepseek_jax import accounting, cli
from deepseek_jax.accounting.report import network_report, network_table
from deepseek_jax.atomic import atomic_path
from deepseek_jax.experiment import Experiment, build_experiment, read_flags
from deepseek_jax.parallel import hosts
from deepseek_jax.report import comparison_table, optimizer_table, read_evaluation, samples_table
from deepseek_jax.stages import EvalStage, Stage, build_stages, works
from deepseek_jax.training.checkpoints import saved_steps
from deepseek_jax.workdir import claim, explained, hold, plan_run


def main(argv: Sequence[str]) -> int | None:
    if not argv or "--help" in argv or "-h" in argv:
        print(__doc__)
        return 0 if argv else 2
    begin = time.monotonic()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    given, argv = hosts.split_flags(argv)
    config, name, workdir, dry = read_flags(argv)
    if dry:
        print_plan(config, name, workdir)
        return 0
    hosts.join(given or hosts.detect(), lambda: saved_steps(workdir))
    experiment = build_experiment(config, name, workdir)
    stages = build_stages(experiment)
    plan = plan_run(experiment, stages)
    for stage in stages:
        if plan.actions[stage.name] != "keep":
            stage.check_data(prepare=True)
    with hold(workdir), explained(workdir):
        claim(experiment, stages, plan)
        run_stages(experiment, stages, begin)
        print_results(experiment, stages)
    print(f"done in {time.monotonic() - begin:.0f} s; everything is in {workdir}", flush=True)
    return 0


def run_stages(experiment: Experiment, stages: Sequence[Stage], begin: float) -> None:
    """Runs all stages in order, each from the weights that the one before left."""
    counts = accounting.count_parameters(experiment.model.config)
    total, active = counts.total + counts.mtp_total, counts.activated()
    precision = experiment.model.ops.precision.name
    print(
        f"{experiment.name}: {total:,} parameters, {active:,} of them active for a token; {precision}; results in "
        f"{experiment.workdir}",
        flush=True,
    )
    variables = None
    for index, stage in enumerate(stages, start=1):
        print(
            f"[{index}/{len(stages)}] {stage.name}: {stage.summary()}  ({time.monotonic() - begin:.0f} s since the "
            "start)",
            flush=True,
        )
        variables = stage.run(variables)


def print_plan(config: ConfigDict, name: str, workdir: Path) -> None:
    """Prints the stages, the network and the mesh of a run; it may be meant for another machine."""
    experiment = build_experiment(config, name, workdir, elsewhere=0)
    stages = build_stages(experiment)
    console = Console(highlight=False)
    cli.show(network_table(experiment.name, network_report(experiment.model.config, stages=works(stages))))
    for index, stage in enumerate(stages, start=1):
        stage.check_data(prepare=False)
        console.print(f"[{index}/{len(stages)}] {stage.name}: {stage.summary()}", markup=False)
        if rules := stage.updated_by():
            console.print(optimizer_table(rules))
    if mesh := experiment.config.get("mesh"):
        console.print(
            f"mesh: {mesh}. Compile it for hardware that is not here: python -m deepseek_jax.dry_run", markup=False
        )
    console.print("The experiment is valid. Nothing was allocated.")


def print_results(experiment: Experiment, stages: Sequence[Stage]) -> None:
    """Prints the evaluations in one table and the paths of the curves, and writes both to results.txt."""
    if not hosts.is_primary():
        return
    evaluations = {stage.name: read_evaluation(stage.path) for stage in stages if isinstance(stage, EvalStage)}
    if not evaluations:
        return
    consoles = [Console(highlight=False)]
    with atomic_path(experiment.workdir / "results.txt") as temporary, temporary.open("w", encoding="utf-8") as file:
        consoles.append(Console(file=file, width=120, highlight=False))
        for console in consoles:
            console.print(comparison_table(evaluations, experiment.name))
            console.print(samples_table(evaluations, 3))
            for stage in stages:
                curves = experiment.workdir / stage.name / "curves.png"
                if curves.exists():
                    console.print(f"curves: {curves}", markup=False, soft_wrap=True)


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])

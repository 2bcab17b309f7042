"""Jobs: every run of a sweep, checked before the first one starts."""

import dataclasses
from pathlib import Path

from ml_collections import ConfigDict

from deepseek_jax.errors import ConfigError, UserError
from deepseek_jax.experiment import build_experiment, mesh_sizes, read_flags
from deepseek_jax.launch.metric_names import check_metric
from deepseek_jax.launch.sweep import Run, Sweep
from deepseek_jax.overrides import written
from deepseek_jax.parallel.mesh import MeshConfig
from deepseek_jax.parallel.rules import build_rules
from deepseek_jax.parallel.rules import shards as batch_shards
from deepseek_jax.stages import Stage, build_stages, works
from deepseek_jax.workdir import plan_run


@dataclasses.dataclass(frozen=True)
class Job:
    """A run that can start: `python -m deepseek_jax` with `arguments` leaves its results in `folder`.

    `tokens` and `flops` are those of all its stages (see `Stage.work`).
    """

    run: Run
    folder: Path
    experiment: str
    config: ConfigDict
    stages: tuple[str, ...]
    tokens: int
    flops: float

    @property
    def name(self) -> str:
        return self.run.name

    @property
    def arguments(self) -> list[str]:
        return arguments(self.experiment, self.run, self.folder)


def arguments(experiment: str, run: Run, folder: Path) -> list[str]:
    """The command line after `python -m deepseek_jax`."""
    return [
        f"--config={experiment}",
        f"--workdir={folder}",
        *(f"--config.{field}={written(value)}" for field, value in run.overrides.items()),
    ]


def build_jobs(sweep: Sweep, workdir: Path) -> list[Job]:
    """A job for each run, in `workdir`/<name of the run>.

    Raises ConfigError naming the runs whose fields or values are not valid, or whose folder holds another run, and for
    a metric that the first run will not have.
    """
    jobs, mistakes, stages = [], [], None
    for run in sweep.runs:
        try:
            job, built = _build(sweep.experiment, run, workdir / run.name)
        except UserError as error:
            mistakes.append(f"{run.name}: {error}")
        else:
            jobs.append(job)
            stages = stages or built
    if mistakes:
        more = f"\n  and {len(mistakes) - 5} more" if len(mistakes) > 5 else ""
        raise ConfigError(
            f"{len(mistakes)} of {len(sweep.runs)} runs are not valid, nothing was started:\n  "
            + "\n  ".join(mistakes[:5])
            + more
        )
    check_metric(sweep.metric, stages)
    return jobs


def _build(experiment: str, run: Run, folder: Path) -> tuple[Job, list[Stage]]:
    config, name, _, _ = read_flags(arguments(experiment, run, folder))
    # a CPU's are for the run's environment to say
    devices = 0 if run.resources.kind == "cpu" else run.resources.num_devices
    built = build_experiment(config, name, folder, elsewhere=devices)
    shards = 1
    if built.config.get("mesh") and devices:
        mesh = MeshConfig.from_dict(built.config["mesh"])
        sizes = mesh_sizes(mesh, built.config, built.model.config, tuple(built.sections), devices)
        rules = build_rules(mesh.rules, built.model.config.attention.sharding_rules)
        shards = batch_shards(dict(rules), sizes, "batch")
    stages = build_stages(built)
    plan_run(built, stages)
    work = works(stages, shards).values()
    job = Job(
        run=run,
        folder=folder,
        experiment=experiment,
        config=config,
        stages=tuple(stage.name for stage in stages),
        tokens=sum(stage.tokens for stage in work),
        flops=sum(stage.flops for stage in work),
    )
    return job, stages

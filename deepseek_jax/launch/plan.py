"""The plan: estimates a sweep's time, memory and cost, by dry run for accelerators, from finished runs for this CPU."""

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from deepseek_jax.accounting.report import quantity
from deepseek_jax.errors import ConfigError, UserError
from deepseek_jax.launch.jobs import Job
from deepseek_jax.launch.resources import Resources, job_parameters
from deepseek_jax.launch.state import Status

DryRun = Callable[..., Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Estimate:
    """The estimate for a run; a field is None where the figure is unknown. `memory` and `limit` are bytes per device;
    `basis` names the source of the figures, `price` that of the price."""

    job: Job
    status: Status
    hours: float | None
    dollars: float | None
    fits: bool | None
    memory: int | None
    limit: int | None
    basis: str
    price: str | None = None


def plan(
    jobs: Sequence[Job], statuses: Mapping[str, Status], dry_run: DryRun, dollars_per_chip_hour: float | None = None
) -> list[Estimate]:
    """An estimate for each job; `dry_run` is `dry_run.dry_run.dry_run`, called once for runs that differ in their seed
    alone.

    On the CPU a finished run has its own time, and another run the time of the finished run nearest in FLOPs, scaled by
    FLOPs.
    """
    known: dict[str, Mapping[str, Any] | UserError] = {}
    measured = [
        (job.flops, statuses[job.name].seconds) for job in jobs if statuses[job.name].state == "done" and job.flops
    ]
    return [
        _measured(job, statuses[job.name], measured)
        if job.run.resources.kind == "cpu"
        else _compiled(job, statuses[job.name], dry_run, dollars_per_chip_hour, known)
        for job in jobs
    ]


def _measured(job: Job, status: Status, measured: Sequence[tuple[float, float]]) -> Estimate:
    hours, basis = None, "unknown until a run has finished"
    if status.state == "done":
        hours, basis = status.seconds / 3600, "measured"
    elif measured and job.flops:
        flops, seconds = min(measured, key=lambda pair: abs(math.log(pair[0] / job.flops)))
        hours, basis = seconds * job.flops / flops / 3600, f"a finished run of {flops:.2g} FLOPs"
    return Estimate(job, status, hours, None, None, None, None, basis)


def _compiled(
    job: Job, status: Status, dry_run: DryRun, price: float | None, known: dict[str, Mapping[str, Any] | UserError]
) -> Estimate:
    topology = job.run.resources.topology
    key = topology + json.dumps(job.config.to_dict() | {"seed": 0}, sort_keys=True)
    if key not in known:
        try:
            known[key] = dry_run(job.config, job.name, topology, dollars_per_chip_hour=price)
        except UserError as error:
            known[key] = error
    result = known[key]
    if isinstance(result, UserError):
        return Estimate(job, status, None, None, None, None, None, f"no dry run: {result}")
    return Estimate(
        job=job,
        status=status,
        hours=result["hours_lower_bound"],
        dollars=result["dollars_lower_bound"],
        fits=result["fits"],
        memory=result["memory_bytes_per_device"]["total"],
        limit=result["hbm_capacity"],
        basis="dry run, lower bound",
        price=result.get("price_source"),
    )


# machines without accelerators
_NOT_PRICED = {"local": "this machine's", "slurm": "the cluster's", "skypilot": "the cloud's"}


def plan_table(name: str, estimates: Sequence[Estimate], launcher: str = "local") -> Table:
    """One row per run: the machine that its launcher asks for, and for how long. The caption sums up the runs that are
    not done and says why a cost is unknown."""
    missing = [estimate for estimate in estimates if estimate.status.state != "done"]
    table = Table(
        title=f"{name}: {len(missing)} of {len(estimates)} runs to do",
        title_justify="left",
        show_footer=True,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
    )
    table.add_column("run", footer="to do", no_wrap=True)
    table.add_column("status", no_wrap=True)
    table.add_column("where", no_wrap=True)
    table.add_column("tokens", justify="right", footer=quantity(sum(e.job.tokens for e in missing)), no_wrap=True)
    table.add_column("FLOPs", justify="right", footer=f"{sum(e.job.flops for e in missing):.2g}", no_wrap=True)
    table.add_column("time", justify="right", footer=_total([e.hours for e in missing], _hours), no_wrap=True)
    table.add_column(
        "cost",
        justify="right",
        footer=_total([e.dollars for e in missing if e.job.run.resources.kind != "cpu"], _dollars),
        no_wrap=True,
    )
    table.add_column("memory per device", justify="right", no_wrap=True)
    table.add_column("from")
    for e in estimates:
        row = (
            e.job.name,
            e.status.state,
            _where(e.job.run.resources, launcher),
            quantity(e.job.tokens),
            f"{e.job.flops:.2g}",
        )
        cost = _NOT_PRICED[launcher] if e.job.run.resources.kind == "cpu" else _dollars(e.dollars)
        table.add_row(*row, _hours(e.hours), cost, _memory(e), e.basis)
    table.caption = "\n".join(_notes(estimates, launcher)) or None
    return table


def _where(resources: Resources, launcher: str) -> str:
    """The launcher's request, in its own words, or the reason why it cannot have the machine."""
    try:
        if launcher == "slurm":
            asked = job_parameters(resources)
            gpus = f" × {asked['gpus_per_node']} GPUs" if "gpus_per_node" in asked else ""
            nodes = f"{asked['nodes']} node{'s' if asked['nodes'] > 1 else ''}"
            return f"{resources.topology}: SLURM, {nodes}{gpus}, {asked['timeout_min'] / 60:g} h a job"
        if launcher == "skypilot":
            spot = "spot" if resources.spot else "on demand"
            machine = resources.accelerators or "a machine without accelerators"
            return f"{resources.topology}: SkyPilot, {resources.num_nodes} × {machine}, {spot}"
    except ConfigError as error:
        return str(error)
    return resources.topology


def _notes(estimates: Sequence[Estimate], launcher: str) -> Iterator[str]:
    unpriced = sorted(
        {e.job.run.resources.kind for e in estimates if e.hours is not None and e.dollars is None} - {"cpu"}
    )
    if unpriced:
        yield f"no price known for {', '.join(unpriced)}: pass --dollars_per_hour"
    prices = sorted(
        {f"{e.job.run.resources.kind}: {e.price}" for e in estimates if e.dollars is not None and e.price is not None}
    )
    if prices:
        yield f"prices: {'; '.join(prices)}" + (
            " (on demand; spot machines cost less)" if launcher == "skypilot" else ""
        )
    if any(e.job.run.resources.kind == "cpu" for e in estimates) and launcher != "local":
        yield "machines without accelerators are not priced here"


def _total(values: Sequence[float | None], text: Callable[[float | None], str]) -> str:
    if not values:
        return ""
    known = [value for value in values if value is not None]
    return text(sum(known)) + (" + unknown" if known and len(known) < len(values) else "") if known else text(None)


def _hours(hours: float | None) -> str:
    if hours is None:
        return "unknown"
    if hours < 1:
        return f"{hours * 3600:.0f} s" if hours < 0.05 else f"{hours * 60:.0f} min"
    return f"{hours:.1f} h" if hours < 48 else f"{hours / 24:.1f} days"


def _dollars(dollars: float | None) -> str:
    return "unknown" if dollars is None else f"${dollars:,.0f}"


def _memory(estimate: Estimate) -> str:
    if estimate.limit is None:
        return ""
    needed, limit = "?" if estimate.memory is None else f"{estimate.memory / 1e9:.1f}", f"{estimate.limit / 1e9:.1f} GB"
    return f"{needed} of {limit}" if estimate.fits else f"{needed} of {limit}: does not fit"

"""The dry run: compiles an experiment's program for hardware that is not there and returns its figures."""

import dataclasses
import math
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from deepseek_jax.accounting import cost
from deepseek_jax.accounting.counts import count_parameters
from deepseek_jax.dry_run.compiled import measure
from deepseek_jax.dry_run.programs import PROGRAMS, Program
from deepseek_jax.dry_run.topologies import Topology, topology
from deepseek_jax.errors import ConfigError
from deepseek_jax.experiment import build_experiment
from deepseek_jax.model.presets import preset
from deepseek_jax.ranges import above, check_value, one_of, or_none
from kernels_pallas.trust import unchecked


@unchecked()  # kernels for hardware that is not here
def dry_run(
    config: ConfigDict,
    name: str,
    topology_name: str,
    *,
    stage: str | None = None,
    program: str = "train",
    dollars_per_chip_hour: float | None = None,
    **options: Any,
) -> dict[str, Any]:
    """All figures of one program on one topology, for JSON; `options` are the program's (sequences and context of
    "decode").

    Memory in bytes per device, "flops" of the whole mesh by number format, "collective_bytes" per device on the wire by
    mesh axes and kind, times in seconds and lower bounds, "dollars_lower_bound" None where no price is known
    ("price_source" names its source). For a program that does not fit, the figures that need the compiled text are
    None. Raises ConfigError for unknown names and for an experiment that does not fit the mesh, UserError where libtpu
    or the CUDA plugin is missing.
    """
    check_value("--program", program, one_of(PROGRAMS))
    if options and program != "decode":
        raise ConfigError(f"--{next(iter(options))} is for --program=decode, not for --program={program}: leave it out")
    check_value(
        "--dollars_per_hour", dollars_per_chip_hour, or_none(above(0, below=math.inf), "for the chip's own price")
    )
    target = topology(topology_name)
    config = config.copy_and_resolve_references()
    names_mesh = bool(config.get("mesh"))
    if not names_mesh:
        with config.unlocked():
            config.mesh = {"fsdp": -1}
    experiment = build_experiment(config, name, Path("runs") / name, devices=target.devices)
    plan = PROGRAMS[program](experiment, stage, **options)
    mesh = experiment.model.ops.mesh
    measured = measure(plan.jitted, plan.arguments, target, mesh, named=plan.named, assumptions=plan.assumptions)
    is_v3 = count_parameters(experiment.model.config).main == count_parameters(preset("v3_671b")).main
    return {
        "experiment": name,
        "program": program,
        "topology": topology_name,
        "num_devices": len(target.devices),
        "num_chips": target.num_chips,
        "mesh": {axis: size for axis, size in mesh.shape.items() if size > 1},
        "mesh_assumed": not names_mesh,
        "assumptions": dataclasses.asdict(plan.assumptions),
        "tokens_per_step": plan.tokens,
        "steps": plan.calls,
        "model_flops": plan.model_flops,
        **measured,
        **bounds(plan, target, measured, dollars_per_chip_hour, is_v3),
    }


def bounds(
    plan: Program, target: Topology, measured: dict[str, Any], price: float | None, is_v3: bool
) -> dict[str, Any]:
    """Step time, utilization, hours and dollars from the roofline; all None for a program that does not fit.

    Without a `price` the chip's own is taken. "v3_bill" is V3's own, for V3's own network, else None.
    """
    seconds = measured["roofline"]["seconds"] if measured["roofline"] else None
    source = "--dollars_per_hour" if price is not None else target.chip.price_source
    price = target.chip.dollars_per_hour if price is None else price
    result: dict[str, Any] = {
        "step_seconds_lower_bound": seconds,
        "dollars_per_chip_hour": price,
        "price_source": source if price is not None else None,
    }
    speed = None if seconds is None else plan.tokens / seconds
    result["tokens_per_second_upper_bound"] = speed
    result["mfu_upper_bound"] = (
        None if seconds is None else plan.model_flops / (seconds * target.chip.bf16 * target.num_chips)
    )
    hours = None if seconds is None or plan.calls is None else seconds * plan.calls / 3600
    result |= {"hours_lower_bound": hours, "dollars_lower_bound": _dollars(hours, target, price)}
    stated = sum(cost.V3_GPU_HOURS.values())
    result["v3_bill"] = {"h800_hours": stated, "dollars": cost.dollars(stated)} if is_v3 else None
    return result


def _dollars(hours: float | None, target: Topology, price: float | None) -> float | None:
    return None if hours is None or price is None else cost.dollars(hours * target.num_chips, price)

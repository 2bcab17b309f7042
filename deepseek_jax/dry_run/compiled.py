"""Measures one jitted program compiled for one topology, without running it."""

import re
import resource
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from deepseek_jax.dry_run import hlo
from deepseek_jax.dry_run.branches import Taken
from deepseek_jax.dry_run.collectives import traffic
from deepseek_jax.dry_run.hbm import memory_traffic
from deepseek_jax.dry_run.program_flops import FlopAssumptions, jaxpr_flops
from deepseek_jax.dry_run.roofline import TERMS, roofline
from deepseek_jax.dry_run.topologies import Topology

# Nothing runs, so XLA need not search for the fastest schedule of each instruction.
QUICK = {"exec_time_optimization_effort": -1.0}
# Every offloaded collective is a SparseCore program of its own, hundreds of them, compiled one after another. They move
# the same bytes between the same chips from where the rest of the program runs.
_COLLECTIVES = (
    "all_gather",
    "2d_all_gather",
    "3d_all_gather",
    "all_reduce",
    "reduce_scatter",
    "nd_reduce_scatter",
    "dense_all_to_all",
    "ragged_all_to_all",
)
_OPERATIONS = ("copy", "gather", "reduce", "reshape", "scatter", "sort")
_OFFLOADS = (
    "compute_offload",
    "async_all_to_all",
    "collective_aggregator",
    "hierarchical_all_reduce",
    *(f"collective_offload_{name}" for name in _COLLECTIVES),
)
WITHOUT_SPARSE_CORES = dict.fromkeys(
    (
        *(f"xla_tpu_enable_sparse_core_{name}" for name in _OFFLOADS),
        *(f"xla_tpu_enable_offloading_{name}_to_sparsecore" for name in _OPERATIONS),
        "xla_tpu_enable_conditional_sparse_core_collective_offload",
    ),
    "false",
)
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def measure(
    program: Callable,
    arguments: Sequence[Any],
    topology: Topology,
    mesh: jax.sharding.Mesh,
    *,
    named: dict[str, Any] | None = None,
    assumptions: FlopAssumptions = FlopAssumptions(branch="least"),
) -> dict[str, Any]:
    """Compiles the jitted `program` for `arguments` (jax.ShapeDtypeStruct with shardings on `mesh`, whose devices are
    the topology's).

    `named` picks arguments, such as {"parameters": state.params}, whose bytes are reported apart. Returns fields for
    JSON: "flops" by number format for the whole mesh, "memory_bytes_per_device", "fits", "hbm_bytes" (traffic per
    device), "collective_bytes" ({axes: {kind: bytes per device on the wire}}), "roofline" (seconds), "assumed_loops",
    "compile_seconds", "peak_host_bytes". Where the compiler finds that the program does not fit, the fields that need
    the compiled text are None.
    """
    started = time.monotonic()
    traced = program.trace(*arguments)
    flops, taken = jaxpr_flops(traced.jaxpr.jaxpr, assumptions)
    parts = {name: sharded_bytes(tree) for name, tree in (named or {}).items()}
    capacity = topology.hbm_bytes_per_device
    report: dict[str, Any] = {"flops": dict(flops), "hbm_capacity": capacity}
    try:
        compiled = traced.lower().compile(
            compiler_options=QUICK | (WITHOUT_SPARSE_CORES if topology.chip.offloads else {})
        )
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        memory = {**parts, "total": needed_bytes(str(error))}
        report |= {
            "memory_bytes_per_device": memory,
            "fits": False,
            "hbm_bytes": None,
            "collective_bytes": None,
            "roofline": None,
            "assumed_loops": [],
        }
    else:
        report |= compiled_report(compiled, parts, flops, taken, topology, mesh, assumptions)
    return report | {
        "compile_seconds": time.monotonic() - started,
        "peak_host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def compiled_report(
    compiled, parts: dict[str, int], flops, taken: Taken, topology: Topology, mesh, assumptions: FlopAssumptions
) -> dict[str, Any]:
    """Reads the compiled text into the fields of `measure`; `taken` holds the branches that `flops` counted."""
    memory = memory_bytes(compiled.memory_analysis(), parts)
    module = hlo.parse(compiled.as_text())
    choices = {"while_trips": assumptions.while_trips, "branch": assumptions.branch}
    moved = traffic(module, mesh.size, taken=taken, **choices)
    hbm_bytes = memory_traffic(module, taken=moved.taken, **choices)
    bound = roofline(flops, hbm_bytes, moved.collectives, topology, mesh.devices)
    return {
        "memory_bytes_per_device": memory,
        "fits": memory["total"] <= topology.hbm_bytes_per_device,
        "hbm_bytes": hbm_bytes,
        "collective_bytes": moved.by_axes(dict(mesh.shape)),
        "roofline": {
            **{f"{term}_seconds": getattr(bound, term) for term in TERMS},
            "binding": bound.binding,
            "seconds": bound.seconds,
            "seconds_without_overlap": bound.seconds_without_overlap,
        },
        "assumed_loops": list(moved.assumed_loops),
    }


def memory_bytes(analysis, parts: dict[str, int]) -> dict[str, int]:
    """XLA's buffer sizes of one device: named arguments, other arguments, outputs that reuse no argument, temporaries,
    code, total."""
    memory = dict(parts)
    memory["other arguments"] = analysis.argument_size_in_bytes - sum(parts.values())
    memory["outputs"] = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    memory["temporaries"] = analysis.temp_size_in_bytes
    memory["code"] = analysis.generated_code_size_in_bytes
    return memory | {"total": sum(memory.values())}


def sharded_bytes(tree: Any) -> int:
    """Bytes that one device holds of a tree of jax.ShapeDtypeStruct with shardings."""

    def leaf_bytes(leaf) -> int:
        shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
        itemsize = 8 if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf.dtype.itemsize
        return int(np.prod(shape, dtype=np.int64)) * itemsize

    return sum(map(leaf_bytes, jax.tree.leaves(tree)))


def needed_bytes(message: str) -> int | None:
    """The bytes that a program would need, from the compiler's message that it does not fit."""
    match = re.search(r"(?:Used|temporaries \(|hbm usage >=|program requires) *([\d.]+)([KMGT]?)", message)
    return round(float(match[1]) * _UNITS[match[2]]) if match else None

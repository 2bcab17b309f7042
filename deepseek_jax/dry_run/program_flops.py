"""FLOPs of a traced program, counted on its jaxpr: a loop's body as often as it runs, recomputation included, before
XLA changes anything.

Matrix products, convolutions and grouped products count, a multiply-add as two; elementwise work does not. Shapes
outside `shard_map` are global, so the count is that of the whole mesh; the body of a `shard_map` is one device's work,
and is multiplied by the devices along its manual axes. Work that devices repeat there because their inputs are equal is
real work, and is counted.
"""

import dataclasses
import itertools
import math
import os
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

import jax
from jax.extend import core as jex_core
from jax.interpreters import partial_eval

from deepseek_jax.dry_run.branches import Conditional, Key, conditional_keys, taken_branch, taken_branches
from deepseek_jax.dry_run.hlo import Place
from deepseek_jax.ranges import at_least, check, one_of


@dataclasses.dataclass(frozen=True)
class FlopAssumptions:
    """Assumptions about what a jaxpr leaves open.

    `while_trips`: how often a loop runs whose end depends on data. `branch`: conditionals take their "most" or their
    "least" expensive branch, each at its worst, and all conditionals of one predicate the same (see `branches`).
    `ragged_fill`: the share of a grouped product's rows that belong to a group; the rest is padding that no kernel
    multiplies.
    """

    while_trips: int = 1
    branch: str = "most"
    ragged_fill: float = 1.0

    def __post_init__(self):
        check(self, "", branch=one_of(("most", "least")), ragged_fill=at_least(0, at_most=1))


def traced_flops(
    fn: Callable, *args: Any, assumptions: FlopAssumptions = FlopAssumptions(), **kwargs: Any
) -> Counter[str]:
    """FLOPs of `fn` on (abstract) arguments, by the number format of the products' left operand: {"bfloat16": …,
    "float32": …}."""
    return jaxpr_flops(jax.make_jaxpr(fn)(*args, **kwargs).jaxpr, assumptions)[0]


def jaxpr_flops(
    jaxpr: jex_core.Jaxpr, assumptions: FlopAssumptions = FlopAssumptions()
) -> tuple[Counter[str], dict[Key, int]]:
    """FLOPs of a jaxpr as `traced_flops`, and the branches that were counted, for the compiled text to follow.
    Equations that no output depends on are not counted."""
    jaxpr = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0]
    found = list(_conditionals(jaxpr, assumptions, 1, {}))
    taken = taken_branches([conditional for _, conditional in found], assumptions.branch)
    return _flops(
        jaxpr, assumptions, {id(eqn): taken_branch(conditional.keys, taken) for eqn, conditional in found}
    ), taken


def _conditionals(
    jaxpr: jex_core.Jaxpr, assumptions: FlopAssumptions, times: int, origins: Mapping[Any, Hashable]
) -> Iterator[tuple[jex_core.JaxprEqn, Conditional]]:
    """All conditionals of a jaxpr that runs `times` times. `origins` maps variables to what they are bound to outside
    of it."""
    origins = dict(origins)
    for eqn in jaxpr.eqns:
        name, inner = eqn.primitive.name, tuple(_inner_jaxprs(eqn.params))
        operands = [id(var) if isinstance(var, jex_core.Literal) else origins.get(var, var) for var in eqn.invars]
        if name in _SAME_TRUTH:
            origins[eqn.outvars[0]] = operands[_SAME_TRUTH[name]]
        if _kernel_notes(eqn) is not None:
            continue
        if name == "cond":
            costs = tuple(times * _flops(branch, assumptions, None).total() for branch in inner)
            yield eqn, Conditional(conditional_keys(len(inner), _place(eqn), operands[0]), costs)
            operands = operands[1:]
        if name == "scan":
            operands = operands[: eqn.params["num_consts"]]  # the rest is another one in every round
        bound = () if name in _REBINDING else operands
        repeated = times * _repetitions(name, eqn.params, assumptions)
        for body in inner:
            yield from _conditionals(body, assumptions, repeated, dict(zip(body.invars, bound, strict=False)))


# What makes the index of a conditional from its predicate: the operand that says which branch it is.
_SAME_TRUTH = {"convert_element_type": 0, "clamp": 1, "pvary": 0, "copy": 0}
_REBINDING = ("while", "pallas_call", "mpmd_map")  # their bodies' variables are not their operands in order


def _place(eqn: jex_core.JaxprEqn) -> Place | None:
    """The place of the code that called jax."""
    if eqn.source_info.traceback is None:
        return None
    for code, instruction in zip(*eqn.source_info.traceback.raw_frames(), strict=True):
        if not code.co_filename.startswith(_JAX):
            line, _, column, _ = next(itertools.islice(code.co_positions(), instruction // 2, None))
            return Place(code.co_filename, line, column)
    return None


_JAX = os.path.dirname(jax.__file__) + os.sep


def _flops(jaxpr: jex_core.Jaxpr, assumptions: FlopAssumptions, taken: Mapping[int, int] | None) -> Counter[str]:
    """`taken` holds the branch that runs by the id of the equation; None counts every conditional at its worst."""
    total = Counter()
    for eqn in jaxpr.eqns:
        _add(total, _equation_flops(eqn, assumptions, taken))
    return total


def _equation_flops(
    eqn: jex_core.JaxprEqn, assumptions: FlopAssumptions, taken: Mapping[int, int] | None
) -> Counter[str]:
    name, params = eqn.primitive.name, eqn.params
    if name in _PRODUCTS:
        flops = _PRODUCTS[name](eqn)
        if name.startswith("ragged"):
            flops = round(flops * assumptions.ragged_fill)
        return Counter({str(eqn.invars[0].aval.dtype): flops})
    if (notes := _kernel_notes(eqn)) is not None:
        calls = math.prod(_KERNEL_GRIDS[name](params)) // notes["kernel_points"]
        fill = assumptions.ragged_fill if notes["kernel_ragged"] else 1
        return Counter({notes["kernel_format"]: round(notes["kernel_flops"] * calls * fill)})
    inner = tuple(_inner_jaxprs(params))
    if name == "cond" and taken is None:
        return max((_flops(jaxpr, assumptions, None) for jaxpr in inner), key=Counter.total)
    if name == "cond":
        return _flops(inner[taken[id(eqn)]], assumptions, taken)
    total = Counter()
    for jaxpr in inner:
        _add(total, _flops(jaxpr, assumptions, taken), _repetitions(name, params, assumptions))
    return total


def _kernel_notes(eqn: jex_core.JaxprEqn) -> dict[str, Any] | None:
    """FLOPs that a kernel states for itself (kernels_pallas._compat.priced)."""
    notes = eqn.ctx.xla_metadata or {}
    return notes if "kernel_flops" in notes and eqn.primitive.name in _KERNEL_GRIDS else None


def _repetitions(name: str, params: dict[str, Any], assumptions: FlopAssumptions) -> int:
    if name == "scan":
        return params["length"]
    if name == "while":
        return assumptions.while_trips
    if name == "shard_map":
        return math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
    if name == "pallas_call":
        return math.prod(_KERNEL_GRIDS[name](params))
    return 1


# Kernels that say themselves what they compute (kernels_pallas._compat.priced), on TPU and on NVIDIA GPUs.
_KERNEL_GRIDS = {
    "pallas_call": lambda params: params["grid_mapping"].grid,
    "mpmd_map": lambda params: params["meshes"][0].grid,
}


def _inner_jaxprs(params: dict[str, Any]) -> Iterator[jex_core.Jaxpr]:
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, jex_core.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, jex_core.Jaxpr):
                yield item


def _add(total: Counter[str], flops: Counter[str], times: int = 1) -> None:
    for number_format, count in flops.items():
        total[number_format] += count * times


def _dot_general(eqn: jex_core.JaxprEqn) -> int:
    (contracting, _), _ = eqn.params["dimension_numbers"]
    lhs, out = eqn.invars[0].aval, eqn.outvars[0].aval
    return 2 * math.prod(out.shape) * math.prod(lhs.shape[axis] for axis in contracting)


def _convolution(eqn: jex_core.JaxprEqn) -> int:
    kernel, out = eqn.invars[1].aval, eqn.outvars[0].aval
    output_features = kernel.shape[eqn.params["dimension_numbers"].rhs_spec[0]]
    return 2 * math.prod(out.shape) * math.prod(kernel.shape) // output_features


def _ragged_dot(eqn: jex_core.JaxprEqn) -> int:
    """Each row of the left operand is multiplied by one group: its elements times the free axes of the right
    operand."""
    dimensions = eqn.params["ragged_dot_dimension_numbers"]
    (_, contracting), (_, batch) = dimensions.dot_dimension_numbers
    lhs, rhs = eqn.invars[0].aval, eqn.invars[1].aval
    taken = {*contracting, *batch, *dimensions.rhs_group_dimensions}
    return 2 * math.prod(lhs.shape) * math.prod(size for axis, size in enumerate(rhs.shape) if axis not in taken)


_PRODUCTS = {"dot_general": _dot_general, "conv_general_dilated": _convolution, "ragged_dot_general": _ragged_dot}

"""FLOPs of a traced program, counted on its jaxpr: a loop's body as often as it runs, recomputation included, whatever XLA makes of it.

Matrix products, convolutions and grouped products count, a multiply-add as two; elementwise work does not. Shapes outside `shard_map` are
global, so the count is that of the whole mesh; the body of a `shard_map` is what each device does, and is multiplied by the devices along its
manual axes. Work that devices repeat there because their inputs are equal is real work, and is counted.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend import core as jex_core
from jax.interpreters import partial_eval

from deepseek_jax.errors import ConfigError, nearest


@dataclasses.dataclass(frozen=True)
class Assumptions:
    """What a jaxpr does not say.

    `while_trips`: how often a loop runs whose end depends on data. `branch`: the "most" or the "least" expensive branch of a
    conditional, each taken at its worst. `ragged_fill`: which share of the rows of a grouped product belongs to a group; the rest is padding that no
    kernel multiplies.
    """

    while_trips: int = 1
    branch: str = "most"
    ragged_fill: float = 1.0

    def __post_init__(self):
        if self.branch not in ("most", "least"):
            raise ConfigError(f"branch={self.branch!r}: {nearest(self.branch, ('most', 'least'))}")
        if not 0 <= self.ragged_fill <= 1:
            raise ConfigError(f"ragged_fill={self.ragged_fill}: between 0 and 1")


def traced_flops(fn: Callable, *args: Any, assumptions: Assumptions = Assumptions(), **kwargs: Any) -> Counter[str]:
    """FLOPs of `fn` on (abstract) arguments, by the number format of the products' left operand: {"bfloat16": …, "float32": …}."""
    return jaxpr_flops(jax.make_jaxpr(fn)(*args, **kwargs).jaxpr, assumptions)


def jaxpr_flops(jaxpr: jex_core.Jaxpr, assumptions: Assumptions = Assumptions()) -> Counter[str]:
    """The same of a jaxpr. What no output depends on is not counted."""
    return _used_flops(partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0], assumptions)


def _used_flops(jaxpr: jex_core.Jaxpr, assumptions: Assumptions) -> Counter[str]:
    total = Counter()
    for eqn in jaxpr.eqns:
        _add(total, _equation_flops(eqn, assumptions))
    return total


def _equation_flops(eqn: jex_core.JaxprEqn, assumptions: Assumptions) -> Counter[str]:
    name, params = eqn.primitive.name, eqn.params
    if name in _PRODUCTS:
        flops = _PRODUCTS[name](eqn)
        if name.startswith("ragged"):
            flops = round(flops * assumptions.ragged_fill)
        return Counter({str(eqn.invars[0].aval.dtype): flops})
    if "kernel_flops" in (notes := eqn.ctx.xla_metadata or {}) and name in _KERNEL_GRIDS:
        calls = math.prod(_KERNEL_GRIDS[name](params)) // notes["kernel_points"]
        fill = assumptions.ragged_fill if notes["kernel_ragged"] else 1
        return Counter({notes["kernel_format"]: round(notes["kernel_flops"] * calls * fill)})
    inner = tuple(_inner_jaxprs(params))
    if name == "cond":
        worst = dataclasses.replace(assumptions, branch="most")
        choose = max if assumptions.branch == "most" else min
        inner = (choose(inner, key=lambda jaxpr: _used_flops(jaxpr, worst).total()),)
    total = Counter()
    for jaxpr in inner:
        _add(total, _used_flops(jaxpr, assumptions), _repetitions(name, params, assumptions))
    return total


def _repetitions(name: str, params: dict[str, Any], assumptions: Assumptions) -> int:
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
_KERNEL_GRIDS = {"pallas_call": lambda params: params["grid_mapping"].grid, "mpmd_map": lambda params: params["meshes"][0].grid}


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
    """Each row of the left operand meets one group: its elements times the free axes of the right operand."""
    dimensions = eqn.params["ragged_dot_dimension_numbers"]
    (_, contracting), (_, batch) = dimensions.dot_dimension_numbers
    lhs, rhs = eqn.invars[0].aval, eqn.invars[1].aval
    taken = {*contracting, *batch, *dimensions.rhs_group_dimensions}
    return 2 * math.prod(lhs.shape) * math.prod(size for axis, size in enumerate(rhs.shape) if axis not in taken)


_PRODUCTS = {"dot_general": _dot_general, "conv_general_dilated": _convolution, "ragged_dot_general": _ragged_dot}

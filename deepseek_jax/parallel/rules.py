"""From logical axes, which parameters and activations carry, to axes of the mesh: one table."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from deepseek_jax.errors import ConfigError, nearest
from deepseek_jax.parallel.mesh import AXES

Rules = tuple[tuple[str, tuple[str, ...]], ...]

# A dimension is divided by the axes of its row, first to last, as far as they divide it evenly and no dimension before
# it has taken them. A row "optimizer.NAME" replaces NAME for the optimizer's moments: {"embed": None,
# "optimizer.embed": "fsdp"} is ZeRO-1, the rows below ZeRO-3.
RULES: dict[str, tuple[str, ...]] = {
    # activations
    "batch": ("data", "fsdp", "expert"),
    "length": ("context",),
    # parameters; "heads", "ffn" and "vocab" are axes of activations too
    "embed": ("fsdp", "expert", "context"),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "ffn": ("tensor",),
    "experts": ("expert",),
    "expert_ffn": ("tensor",),
    "layers": (),
    "kv_lora": (),
    "kv_lora_rank": ("fsdp", "expert", "context"),
    "q_lora": ("fsdp", "expert", "context"),
    "mtp_input": ("fsdp", "expert", "context"),
    "norm": (),
    "router_experts": (),
}
OPTIMIZER = "optimizer."


def build_rules(changes: Sequence[tuple[str, Any]] = ()) -> Rules:
    """`RULES` with rows replaced: a value is an axis, a tuple of axes, or None. Raises ConfigError for an unknown row
    or axis."""
    rules = dict(RULES)
    for name, axes in changes:
        if name.removeprefix(OPTIMIZER) not in RULES:
            raise ConfigError(f"mesh.rules.{name}: {nearest(name, RULES)}")
        axes = () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)
        for axis in axes:
            if axis not in AXES:
                raise ConfigError(f"mesh.rules.{name}={axis!r}: {nearest(str(axis), AXES)}")
        rules[name] = axes
    return tuple(rules.items())


def shards(rules: Mapping[str, tuple[str, ...]], sizes: Mapping[str, int], name: str) -> int:
    """Into how many parts a mesh of these sizes divides a dimension."""
    return math.prod(sizes[axis] for axis in rules[name])


def divide(
    rules: Mapping[str, tuple[str, ...]],
    sizes: Mapping[str, int],
    names: Sequence[str | None],
    shape: Sequence[int],
    prefix: str = "",
    whole: set[str] | None = None,
) -> tuple[tuple[str, ...], ...]:
    """The mesh axes of each dimension, a tuple of tuples; see `RULES`. Raises KeyError for a name without a row.

    A dimension that an axis of its row does not divide is added to `whole`, in words.
    """
    taken: set[str] = set()
    result = []
    for name, size in zip(names, shape, strict=True):
        axes, left = (), size
        for axis in () if name is None else rules.get(prefix + name, rules[name]):
            if axis in taken or sizes[axis] == 1:
                continue
            if left % sizes[axis]:
                if whole is not None:
                    whole.add(f"{name} of {size} by {' and '.join((*axes, axis))} of {size // left * sizes[axis]}")
                break
            left //= sizes[axis]
            axes += (axis,)
            taken.add(axis)
        result.append(axes)
    return tuple(result)

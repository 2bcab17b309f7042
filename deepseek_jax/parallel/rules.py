"""From logical axes, which parameters and activations carry, to axes of the mesh: one table."""

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from deepseek_jax.errors import ConfigError, nearest
from deepseek_jax.model.config import ModelConfig
from deepseek_jax.parallel.mesh import AXES, MeshConfig

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


def build_rules(
    changes: Sequence[tuple[str, Any]] = (), added: Mapping[str, str | tuple[str, ...] | None] = MappingProxyType({})
) -> Rules:
    """`RULES` with rows replaced: a value is an axis, a tuple of axes, or None.

    `added` are rows for logical axes that only a variant's parameters have (`AttentionConfig.sharding_rules`). Raises
    ConfigError for an unknown row or axis.
    """
    rules = dict(RULES)
    for name, axes in added.items():
        if name in RULES:
            raise ConfigError(f"sharding_rules of the attention: {name!r} has a rule already; mesh.rules replaces it")
        rules[name] = _axes(axes, f"sharding_rules of the attention: {name}")
    for name, axes in changes:
        if name.removeprefix(OPTIMIZER) not in (known := {*RULES, *added}):
            raise ConfigError(f"mesh.rules.{name}: {nearest(name, known)}")
        rules[name] = _axes(axes, f"mesh.rules.{name}")
    return tuple(rules.items())


def _axes(axes: str | Sequence[str] | None, field: str) -> tuple[str, ...]:
    axes = () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)
    for axis in axes:
        if axis not in AXES:
            raise ConfigError(f"{field}={axis!r}: {nearest(str(axis), AXES)}")
    return axes


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
    """The mesh axes of each dimension, a tuple of tuples; see `RULES`. Raises ConfigError for a name without a row.

    A dimension that an axis of its row does not divide is added to `whole`, in words.
    """
    taken: set[str] = set()
    result = []
    for name, size in zip(names, shape, strict=True):
        if name is not None and name not in rules:
            raise ConfigError(
                f"logical axis {name!r} has no rule: {nearest(name, rules)}. An attention of your own lists such axes "
                "in `sharding_rules` of its config class"
            )
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


def check_divisible(
    sizes: Mapping[str, int],
    config: MeshConfig,
    model: ModelConfig,
    sequences: Sequence[tuple[str, int]] = (),
    lengths: Sequence[tuple[str, int]] = (),
) -> str | None:
    """A sentence about a size that a mesh of these `sizes` does not divide evenly; None if it divides everything.

    `sequences` and `lengths` are sizes of batches and of sequences in tokens, each with the field that it comes from.
    """
    rules, moe = dict(build_rules(config.rules, model.attention.sharding_rules)), model.moe
    divided = [("the attention heads", model.attention.num_key_heads, "heads")]
    divided += [(field, count, "batch") for field, count in sequences]
    divided += [(field, count, "length") for field, count in lengths]
    if moe is not None:
        divided.append(("model.moe.num_experts", moe.num_experts, "experts"))
    for what, count, name in divided:
        if count % shards(rules, sizes, name):
            axes = [axis for axis in rules[name] if sizes[axis] > 1]
            verb = "does" if len(axes) == 1 else "do"
            return f"{' and '.join(axes)} of {shards(rules, sizes, name)} in all {verb} not divide {what}={count}"
    for axis, factor in config.dcn:
        if sizes[axis] % factor:
            return f"dcn.{axis}={factor} does not divide {axis}={sizes[axis]}"
        limited = moe is not None and moe.topk_groups < moe.num_groups
        if axis in rules["experts"] and limited and moe.num_groups % factor:
            return (
                f"dcn.{axis}={factor} cuts through the {moe.num_groups} expert groups, so that a token would cross the "
                f"slow network to more than topk_groups={moe.topk_groups} places"
            )
    return None

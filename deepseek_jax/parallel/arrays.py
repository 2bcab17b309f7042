"""Shardings of whole arrays: the variables, the training state and the batches of a network.

Without a mesh the functions below give None, which `jax.jit` and `jax.device_put` take for "as it comes".
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from deepseek_jax.errors import ConfigError
from deepseek_jax.model.ops import Ops
from deepseek_jax.model.transformer import Transformer, abstract_variables, logical_axes
from deepseek_jax.parallel.rules import OPTIMIZER, divide
from deepseek_jax.parallel.sharding import MeshOps
from kernels_pallas.trust import say_once


def variables_sharding(model: Transformer) -> Any:
    """A NamedSharding for every leaf of `abstract_variables(model)`. Dimensions that the mesh cannot divide as its
    rules want are logged once."""
    if not isinstance(model.ops, MeshOps):
        return None
    shapes, axes, ops, whole = abstract_variables(model), dict(logical_axes(model)), model.ops, set()
    jax.tree.map(
        lambda leaf, axes: divide(dict(ops.rules), ops.sizes, tuple(axes), leaf.shape, whole=whole), shapes, axes
    )
    if whole:
        say_once(
            "mesh: devices do not share these dimensions of parameters, because they do not divide evenly: "
            f"{'; '.join(sorted(whole))}. Each device holds "
            "more of them, in weights and optimizer state; sizes that are multiples avoid it"
        )
    return jax.tree.map(lambda leaf, axes: ops.sharding(tuple(axes), leaf.shape), shapes, axes)


def state_sharding(model: Transformer, abstract_state: Any) -> Any:
    """A NamedSharding for every leaf of a training state of any class.

    A leaf is identified by the end of its path: moments, references and copies of a parameter are divided like the
    parameter, except for the optimizer's, which follow the rules "optimizer.…". All other leaves are replicated.
    """
    if not isinstance(model.ops, MeshOps):
        return None
    axes_of = {}
    for collection in dict(logical_axes(model)).values():
        for path, axes in jax.tree_util.tree_leaves_with_path(
            collection, is_leaf=lambda x: isinstance(x, PartitionSpec)
        ):
            axes_of[tuple(key.key for key in path)] = tuple(axes)

    def one(path, leaf):
        names = tuple(getattr(key, "key", getattr(key, "name", None)) for key in path)
        prefix = OPTIMIZER if "opt_state" in names else ""
        axes = next((axes_of[names[i:]] for i in range(len(names)) if names[i:] in axes_of), (None,) * len(leaf.shape))
        return model.ops.sharding(axes, leaf.shape, prefix)

    return jax.tree_util.tree_map_with_path(one, abstract_state)


def constrain_state(model: Transformer, state: Any) -> Any:
    """Inside a jitted function: the state laid out as `state_sharding` says, so that it comes back as it went in."""
    shardings = state_sharding(model, state)
    return state if shardings is None else jax.lax.with_sharding_constraint(state, shardings)


def on_whole_matrices(
    model: Transformer, axes: Sequence[str | None], function: Callable[..., jax.Array], x: jax.Array
) -> jax.Array:
    """Inside a jitted function: function(x, lay_out) of a moment x [stack…, A, B], computed while every matrix lies
    whole on one device, so that products of matrices are not summed over devices.

    The function passes its intermediate results [stack…, A, B] or [stack…, B, A] through `lay_out`, since the compiler
    lays out every step of a loop anew. x and the result lie where the optimizer's moments do.
    """
    if not isinstance(model.ops, MeshOps):
        return function(x, lambda x: x)
    layouts = whole_matrix_layouts(model.ops, axes, x.shape)
    constraints = [
        functools.partial(jax.lax.with_sharding_constraint, shardings=NamedSharding(model.ops.mesh, layout))
        for layout in layouts
    ]
    for lay_out in constraints:
        x = lay_out(x)
    x = function(x, constraints[-1])
    for lay_out in reversed(constraints):
        x = lay_out(x)
    return x


def whole_matrix_layouts(ops: MeshOps, axes: Sequence[str | None], shape: Sequence[int]) -> list[PartitionSpec]:
    """From how a moment [stack…, A, B] lies to whole matrices: the mesh axes of A, then those of B, then those that
    divide nothing move to the longest axis of the stack. The compiler can do each as one exchange, and not all at once.

    The stack need not divide evenly: then some devices hold fewer matrices. Axes that would leave devices without a
    matrix, or change the padding, are gathered instead, and so are those of a matrix without a stack.
    """
    divided = [list(each) for each in ops.mesh_axes(axes, shape, OPTIMIZER)]
    local = [size // math.prod(ops.sizes[axis] for axis in each) for size, each in zip(shape, divided, strict=True)]
    target = max(range(len(shape) - 2), key=lambda i: local[i], default=None)
    idle = [axis for axis, size in ops.sizes.items() if size > 1 and axis not in {*sum(divided, [])}]
    layouts = [list(map(tuple, divided))]
    ruled = target is not None and bool(divided[target])  # the stack's own rule divides it, evenly
    moved = 1  # devices that divide what the rule leaves
    for position in (-2, -1, None):
        axes_here = idle if position is None else divided[position]
        count = math.prod(ops.sizes[axis] for axis in axes_here)
        if target is not None and count > 1:
            before, after = (-(-local[target] // n) for n in (moved, moved * count))
            padded = (local[target] if ruled else before * moved), after * moved * count
            if before > 1 and (padded[0] == padded[1] or (moved == 1 and not ruled)):
                divided[target] += axes_here
                moved *= count
        if position is not None:
            divided[position] = []
        layouts.append(list(map(tuple, divided)))
    return [
        PartitionSpec(*(axes or None for axes in layout))
        for layout, before in zip(layouts, [None, *layouts], strict=False)
        if layout != before
    ]


def with_sharding(abstract: Any, shardings: Any) -> Any:
    """jax.ShapeDtypeStruct leaves that carry their sharding."""
    if shardings is None:
        return abstract
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), abstract, shardings
    )


def batch_sharding(ops: Ops, shape: tuple[int, ...]) -> NamedSharding | None:
    """Of an array of a batch, [B] or [B, T]."""
    if not isinstance(ops, MeshOps):
        return None
    return ops.sharding(("batch", "length")[: len(shape)], shape)


def host_share(ops: Ops, process: int | None = None) -> tuple[int, int]:
    """(index, count): the sequences of a batch fall into `count` equal blocks, of which this process (or `process`)
    holds block `index`.

    Several processes hold the same block where an axis that doesn't divide sequences runs across them. Raises
    ConfigError for a mesh on which a host's sequences are not one such block.
    """
    if not isinstance(ops, MeshOps):
        return 0, 1
    process = jax.process_index() if process is None else process
    mesh, axes = ops.mesh, dict(ops.rules)["batch"]
    coordinates = np.indices(mesh.devices.shape)
    sizes = [mesh.shape[axis] for axis in axes]
    shard_of_device = (
        np.ravel_multi_index([coordinates[mesh.axis_names.index(axis)] for axis in axes], sizes)
        if axes
        else 0 * coordinates[0]
    )
    owners = np.vectorize(lambda device: device.process_index)(mesh.devices)
    mine = np.unique(shard_of_device[owners == process])
    shards = math.prod(sizes)
    if len(mine) == 0 or shards % len(mine) or mine[0] % len(mine) or np.any(np.diff(mine) != 1):
        raise ConfigError(
            f"mesh {ops.sizes}: host {process} has the shards {mine.tolist()} of {shards} of the batch, not one block; "
            "put the axes that divide the batch across hosts, and the others inside"
        )
    return int(mine[0]) // len(mine), shards // len(mine)


def global_batch(ops: Ops, batch: Mapping[str, np.ndarray]) -> Mapping[str, Any]:
    """This process's sequences [B / count, …] as arrays of the whole batch [B, …], each device with its own shard."""
    if not isinstance(ops, MeshOps):
        return batch
    index, count = host_share(ops)

    def one(local: np.ndarray) -> jax.Array:
        shape, first = (len(local) * count, *local.shape[1:]), len(local) * index

        def slice_of(where: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = where[0].indices(shape[0])
            return local[(slice(start - first, stop - first), *where[1:])]

        return jax.make_array_from_callback(shape, batch_sharding(ops, shape), slice_of)

    return {name: one(np.asarray(array)) for name, array in batch.items()}

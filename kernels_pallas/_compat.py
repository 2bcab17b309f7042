"""Differences between versions of jax, behind functions that are the same for all."""

import contextlib
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.xla_metadata import set_xla_metadata

try:
    from jax.experimental.pallas import mosaic_gpu as plgpu
except ImportError:  # jax 0.10 wants absl-py for it, which it does not bring
    plgpu = None


def varying_axes(x: jax.Array) -> frozenset[str]:
    """The mesh axes along which `x` may differ from device to device, inside `shard_map`."""
    aval = jax.typeof(x)
    kind = getattr(aval, "manual_axis_type", None)  # jax 0.10; `vma` before and after
    return aval.vma if kind is None else kind.varying


def vary(tree: Any, axes: Iterable[str]) -> Any:
    """Marks a tree of arrays as different from device to device along `axes`, inside `shard_map`, so that their
    gradients are summed over those axes."""

    def mark(x):
        missing = tuple(axis for axis in axes if axis not in varying_axes(x))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(mark, tree)


def vary_alike(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Marks each array, or tree of arrays, as different along every mesh axis along which any of them is.

    A custom gradient needs this inside `shard_map`: the mark sums over devices the gradient of an array that is the
    same everywhere, and the custom rule does not.
    """
    return vary(arrays, sorted(frozenset().union(*map(varying_axes, jax.tree.leaves(arrays)))))


def output(shape: tuple[int, ...], dtype: jnp.dtype, *operands: jax.Array) -> jax.ShapeDtypeStruct:
    """The shape and dtype of a kernel's result, marked as different along every mesh axis along which an operand is."""
    axes = frozenset().union(*map(varying_axes, operands))
    if hasattr(jax.sharding, "ManualAxisType"):  # jax 0.10 and 0.11
        return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.sharding.ManualAxisType(varying=axes))
    return jax.ShapeDtypeStruct(shape, dtype, vma=axes)


def priced(
    flops: int, dtype: jnp.dtype, grid: tuple[int, ...], ragged: bool = False
) -> contextlib.AbstractContextManager:
    """Attaches a kernel's work to the kernel called within the context, for the counter of a program's FLOPs.

    The counter cannot see it, because the kernel's loops and conditions depend on data. `flops` counts a multiply-add
    as two and covers the whole `grid`, to which jax.vmap may add axes; the operands have `dtype`. `ragged` says that
    `flops` assumes that every row belongs to a group.
    """
    return set_xla_metadata(
        kernel_flops=flops, kernel_format=jnp.dtype(dtype).name, kernel_points=math.prod(grid), kernel_ragged=ragged
    )


def zeros(shape: tuple[int, ...], *like: jax.Array) -> jax.Array:
    """float32 zeros that differ along the same mesh axes as `like`: the start of a loop that adds products of
    `like`."""
    return vary_alike(jnp.zeros(shape, jnp.float32), *like)[0]


def load(ref, layout, optimized: bool = True) -> jax.Array:
    """Loads from shared memory into the registers of a warpgroup. `optimized` raises where the layouts allow slow
    accesses alone."""
    return plgpu.load(ref, *(((),) if jax.__version_info__ < (0, 11) else ()), layout=layout, optimized=optimized)


def kernel_times(run: Callable[[], Any]) -> list[tuple[str, float]]:
    """Runs run() and returns the name and the milliseconds on the GPU of each kernel that it starts and waits for.

    jax's public `profiler.measure` calls a function once more right before it counts, which would fill the L2 cache
    with its operands. The counter that it starts and reads has no public name; a jax that has moved it raises
    RuntimeError here.
    """
    from jax.experimental.mosaic.gpu import profiler

    counter = getattr(getattr(profiler, "mosaic_gpu_lib", None), "_mosaic_gpu_ext", None)
    if not hasattr(counter, "_cupti_init"):
        raise RuntimeError(f"jax {jax.__version__} has no counter of GPU time where 0.10 and 0.11 have it")
    counter._cupti_init()
    try:
        run()
    finally:
        timings = counter._cupti_get_timings(True)
    return timings

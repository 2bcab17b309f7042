"""Parts that the kernels for NVIDIA Hopper share."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from kernels_pallas._compat import output, plgpu, priced, vary_alike
from kernels_pallas.qtensor import E4M3

# Of a streaming multiprocessor, and bytes of shared memory that one block of threads may have.
REGISTERS, SHARED_MEMORY_PER_CORE, SHARED_MEMORY = 65536, 233472, 232448
ROWS = 64  # of the output in one warpgroup's hands: what one matrix instruction covers
STEP = 128  # numbers of K at a time in FP8: four instructions, one promotion
FREE_SHARED_MEMORY = SHARED_MEMORY - 1024  # bytes that barriers and alignment leave


def unavailable() -> str | None:
    """Why kernels for Hopper cannot be built here; None if they can."""
    if plgpu is None:
        return "needs jax.experimental.pallas.mosaic_gpu, which this jax cannot import (jax 0.10: install absl-py)"
    return None


def device() -> tuple[str, int]:
    """The kind and the number of cores of the GPU that the program is compiled for, or else of the first device; two
    cores where kernels are interpreted without a GPU."""
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    if abstract is not None and abstract.num_cores:
        return abstract.device_kind, abstract.num_cores
    real = jax.devices()[0]
    return real.device_kind, real.core_count if real.platform == "gpu" else 2


def pad(x: jax.Array, rows: int, columns: int) -> jax.Array:
    """Appends rows and columns of zeros to x [..., R, C]."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, rows), (0, columns)]) if rows or columns else x


@dataclasses.dataclass(frozen=True)
class Tile:
    """One tile of the output, and the steps of K that it sums.

    m, n      its row and column among the tiles of a matrix
    b_group   the matrix of b that it reads; None if b is one matrix
    y_group   the matrix of the output that it belongs to; None if the output is one matrix
    first     the first step of K
    steps     the number of steps; None for all
    """

    m: jax.Array
    n: jax.Array
    b_group: jax.Array | None = None
    y_group: jax.Array | None = None
    first: jax.Array | int = 0
    steps: jax.Array | None = None


def launch(
    body: Callable,
    shape: tuple[int, ...],
    dtype: jnp.dtype,
    flops: int,
    *arrays: jax.Array,
    operand_dtype: jnp.dtype = E4M3,
    ragged: bool = False,
) -> jax.Array:
    """Runs body(*references to arrays and result) once on each core, in three warpgroups; `flops`, `operand_dtype` and
    `ragged` as for `priced`."""
    grid = (device()[1],)
    kernel = plgpu.kernel(
        body,
        out_type=output(shape, dtype, *arrays),
        grid=grid,
        grid_names=("core",),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )
    with priced(flops, operand_dtype, grid, ragged):
        y = kernel(*arrays)
    return vary_alike(y, *arrays)[0]  # jax 0.10 forgets along which mesh axes the output differs


def tiled(columns: int, dtype: jnp.dtype):
    """The layout in shared memory that matrix instructions and copies expect of a matrix of so many columns."""
    size = jnp.dtype(dtype).itemsize
    swizzle = plgpu.find_swizzle(columns * size * 8)
    return plgpu.TilingTransform((8, swizzle // size)), plgpu.SwizzleTransform(swizzle)

"""Runs Hopper kernels without a GPU: interpreted with the race detector on, or compiled to read the machine code."""

import contextlib
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import QTensor, targets
from kernels_pallas._compat import plgpu

SM90 = "mosaic_gpu_sm90"


def interprets(test):
    """Marks a test that needs the interpreter of kernels for NVIDIA GPUs."""
    needed = pytest.mark.skipif(
        jax.__version_info__ < (0, 11, 2),
        reason=f"jax {jax.__version__}: interpreting kernels for Mosaic GPU needs jax 0.11.2 or newer (Python 3.12)",
    )
    return pytest.mark.interprets(needed(test))


compiles = pytest.mark.aot(chip="h100")


@contextlib.contextmanager
def interpreted(races=False):
    """Interprets kernels within the context, and asserts that the race detector finds a race if `races`, and none
    otherwise."""
    with (
        contextlib.redirect_stdout(io.StringIO()) as printed,
        plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)),
    ):
        yield
    assert ("RACE DETECTED" in printed.getvalue()) == races, printed.getvalue()[:2000]


def integers(shape, tile, seed=0) -> QTensor:
    """Small integers with power-of-two scales, whose products float32 adds exactly in any order."""
    rng = np.random.default_rng(seed)
    tiles = (*shape[:-2], -(-shape[-2] // tile[0]), -(-shape[-1] // tile[1]))
    return QTensor(
        jnp.asarray(rng.integers(-8, 9, shape), jnp.float8_e4m3fn),
        jnp.asarray(2.0 ** rng.integers(-3, 4, tiles), jnp.float32),
        tile,
    )


def struct(shape, tile) -> QTensor:
    """The shapes and dtypes of a QTensor, for compiling."""
    tiles = (*shape[:-2], -(-shape[-2] // tile[0]), -(-shape[-1] // tile[1]))
    return QTensor(jax.ShapeDtypeStruct(shape, jnp.float8_e4m3fn), jax.ShapeDtypeStruct(tiles, jnp.float32), tile)


def compiled(target, fn, *shapes) -> targets.Kernel:
    """Compiles the one kernel of `fn`, and asserts that it neither spills nor takes more shared memory than Hopper
    has."""
    (kernel,) = targets.compile_for(target, fn, *shapes)
    assert kernel.spill_stores == kernel.spill_loads == 0 and ".target sm_90a" in kernel.ptx
    assert 0 < kernel.shared_memory <= targets.SHARED_MEMORY
    return kernel

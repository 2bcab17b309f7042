"""Times of a compiled function on the device."""

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from kernels_pallas._compat import kernel_times

FLUSH = 512 * 2**20  # bytes, more than any L2 cache


def seconds(function: Callable, *arguments, repeats: int = 10) -> float:
    """The median seconds of `repeats` runs, after one that compiles. On NVIDIA GPUs only the kernels count, and the L2
    cache is emptied before each run."""
    function = jax.jit(function)
    jax.block_until_ready(function(*arguments))
    once = kernel_seconds if jax.default_backend() == "gpu" else _wall
    return sorted(once(function, arguments) for _ in range(repeats))[repeats // 2]


def _wall(function, arguments) -> float:
    begin = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    return time.perf_counter() - begin


def kernel_seconds(function, arguments) -> float:
    """The seconds that the kernels of one call take with an empty cache."""
    jax.block_until_ready(jnp.zeros(FLUSH, jnp.int8) + 1)
    timings = kernel_times(lambda: jax.block_until_ready(function(*arguments)))
    return sum(milliseconds for _, milliseconds in timings) / 1e3

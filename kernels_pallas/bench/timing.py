"""How long a compiled function runs on the device."""

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

FLUSH = 512 * 2**20  # bytes, more than any L2 cache


def seconds(function: Callable, *arguments, repeats: int = 10) -> float:
    """The median of `repeats` runs, after one that compiles. On NVIDIA GPUs the time of the kernels alone, with the L2 cache emptied before each."""
    function = jax.jit(function)
    jax.block_until_ready(function(*arguments))
    once = _kernels if jax.default_backend() == "gpu" else _wall
    return sorted(once(function, arguments) for _ in range(repeats))[repeats // 2]


def _wall(function, arguments) -> float:
    begin = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    return time.perf_counter() - begin


def _kernels(function, arguments) -> float:
    from jax.experimental.mosaic.gpu import profiler

    jax.block_until_ready(jnp.zeros(FLUSH, jnp.int8) + 1)
    _, milliseconds = profiler.measure(function)(*arguments)
    return milliseconds / 1e3

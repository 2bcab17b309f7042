"""Checks and times quantization and SwiGLU, which memory alone should bound, and attention."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from kernels_pallas import (
    accuracy,
    attention,
    dequantize,
    quantize_block,
    quantize_tile,
    quantize_transposed,
    requantize_transposed,
    swiglu_quantize,
)
from kernels_pallas.bench.measure import Ceilings, Row, verdict
from kernels_pallas.bench.shapes import HEADS
from kernels_pallas.bench.timing import seconds

# How many arrays each reads, and bytes read and written for each number.
QUANTIZERS = {
    "quantize_tile": (quantize_tile, 1, 3),
    "quantize_block": (quantize_block, 1, 3),
    "quantize_transposed": (quantize_transposed, 1, 3),
    "requantize_transposed": (requantize_transposed, 1, 2),
    "swiglu_quantize": (swiglu_quantize, 2, 5),
}
ATTENTION = {"attention, forward": 1, "attention, forward and gradients": 3}  # passes, one forward and two back


def quantizer_row(name: str, limits: Ceilings, small: bool, implementation: str | None) -> Row:
    """The table's row of one quantization: compared with XLA's, its speed as a share of a copy's."""
    function, arrays, bytes_each = QUANTIZERS[name]
    rows, columns = (256, 512) if small else (16384, 7168)
    given = tuple(jax.random.normal(jax.random.key(i), (rows, columns), jnp.bfloat16) for i in range(arrays))
    if name == "requantize_transposed":
        given = (jax.jit(functools.partial(quantize_tile, implementation="xla"))(*given),)
    run = lambda implementation: functools.partial(function, implementation=implementation)
    numbers = lambda implementation: dequantize(jax.jit(run(implementation))(*given))
    off, time = (
        float(accuracy.difference(numbers(implementation), numbers("xla"))),
        seconds(run(implementation), *given),
    )
    rate = bytes_each * rows * columns / time
    row: Row = {"shape": f"{rows} × {columns}", "off by": off, "verdict": verdict(off, accuracy.QUANTIZED)}
    return row | {"us": time * 1e6, "GB/s": rate / 1e9, "of copy": rate / limits.bandwidth}


def attention_row(name: str, small: bool, implementation: str | None) -> Row:
    """The table's row of attention with MLA's heads: bfloat16 compared with float32, and timed against XLA with its
    scores in memory. FLOPs are those of a causal mask, without recomputation."""
    rows, length, heads, width, values = (1, 128, 2, *HEADS[3:]) if small else HEADS
    given = [
        jax.random.normal(jax.random.key(i), (rows, length, heads, size), jnp.bfloat16)
        for i, size in enumerate((width, width, values, values))
    ]
    segments, passes = jnp.zeros((rows, length), jnp.int32), ATTENTION[name]

    def run(implementation: str | None) -> Callable:
        def call(q, k, v, do):
            forward = lambda *qkv: attention(*qkv, segments, segments, scale=width**-0.5, implementation=implementation)
            if passes == 1:
                return (forward(q, k, v),)
            o, pull_back = jax.vjp(forward, q, k, v)
            return o, *pull_back(do)

        return call

    expected = jax.jit(run("xla"))(*(x.astype(jnp.float32) for x in given))
    heads_first = lambda x: x.swapaxes(1, 2)
    pairs = zip(jax.jit(run(implementation))(*given), expected, strict=True)
    off = max(float(accuracy.difference(heads_first(got), heads_first(wanted))) for got, wanted in pairs)
    time, peer = seconds(run(implementation), *given), seconds(run("xla"), *given)
    flops = passes * rows * heads * length**2 * (width + values)
    row: Row = {"shape": f"{rows} × {heads} × {length}", "off by": off, "verdict": verdict(off, accuracy.ATTENDED)}
    return row | {"us": time * 1e6, "TFLOP/s": flops / time / 1e12, "× XLA": peer / time}

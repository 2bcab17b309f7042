"""Checks each FP8 product, and times it and the same product in bfloat16."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from kernels_pallas import (
    accuracy,
    dequantize,
    fp8_grouped_matmul,
    fp8_grouped_weight_gradient,
    fp8_matmul,
    quantize_block,
    quantize_tile,
)
from kernels_pallas.bench import check
from kernels_pallas.bench.shapes import Shape, deepgemm
from kernels_pallas.bench.timing import seconds
from kernels_pallas.grouped_linear.api import grouped_product, grouped_weight_gradient

Row = dict[str, float | str | None]


@dataclasses.dataclass(frozen=True)
class Case:
    """Two functions of arrays that compute the same product, from quantized and from bfloat16 operands."""

    fp8: Callable
    fp8_arguments: tuple
    peer: Callable
    peer_arguments: tuple
    out_dtype: jnp.dtype

    @property
    def allowed(self) -> float:
        return accuracy.SUMMED if self.out_dtype == jnp.float32 else accuracy.ROUNDED


def case(shape: Shape, implementation: str | None) -> Case:
    """Random normal operands for `shape`, quantized by XLA, so that a fault of the quantizers is not taken for one of
    the products."""
    gradient, groups = "gradient" in shape.operation, shape.groups
    rows, depth = (shape.m, shape.k * groups) if gradient else (shape.m * groups, shape.k)
    a = jax.random.normal(jax.random.key(0), (rows, depth), jnp.bfloat16)
    b_shape = (shape.n, depth) if gradient or groups == 1 else (groups, shape.n, depth)
    b = jax.random.normal(jax.random.key(1), b_shape, jnp.bfloat16)
    sizes = jnp.full((groups,), shape.k if gradient else shape.m, jnp.int32)
    out_dtype = jnp.dtype(jnp.float32 if gradient else jnp.bfloat16)
    fields = {"implementation": implementation, "out_dtype": out_dtype}
    by_xla = lambda quantize, x: jax.jit(functools.partial(quantize, implementation="xla"))(x)
    quantized = by_xla(quantize_tile, a), by_xla(quantize_tile if gradient else quantize_block, b)
    if shape.operation in ("dense", "weight gradient"):
        return Case(
            lambda a, b: fp8_matmul(a, b, **fields), quantized, lambda a, b: _dot(a, b, out_dtype), (a, b), out_dtype
        )
    alignment = 128 if int(sizes[0]) % 128 == 0 else 1
    if shape.operation == "grouped":
        fp8 = lambda a, b: fp8_grouped_matmul(a, b, sizes, alignment=alignment, **fields)
        return Case(
            fp8, quantized, lambda a, b: grouped_product(a, b, sizes, alignment, transposed=True), (a, b), out_dtype
        )
    fp8 = lambda a, b: fp8_grouped_weight_gradient(a, b, sizes, **fields)
    return Case(fp8, quantized, lambda x, dy: grouped_weight_gradient(x, dy, sizes, alignment), (a.T, b.T), out_dtype)


def error(shape: Shape, both: Case, fp8: Callable) -> float:
    """The distance of `fp8` from the float32 product on the case's operands (`accuracy.difference`)."""
    expected = jax.jit(lambda a, b: check.product(shape, dequantize(a), dequantize(b)))(*both.fp8_arguments)
    return float(accuracy.difference(jax.jit(fp8)(*both.fp8_arguments), expected))


def _dot(a: jax.Array, b: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return jax.lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=dtype)


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """The most that this device was seen to do: FLOP/s of a square product through XLA in each format, and bytes/s of a
    copy, read and written."""

    size: int
    bf16: float
    fp8: float
    bandwidth: float

    @property
    def flops(self) -> float:
        """The faster of the two: not every device multiplies FP8."""
        return max(self.bf16, self.fp8)

    def __str__(self) -> str:
        products = f"{self.size}³ through XLA {self.bf16 / 1e12:.2f} TFLOP/s in bfloat16, {self.fp8 / 1e12:.2f} in FP8"
        return f"{products}; copied {self.bandwidth / 1e9:.0f} GB/s"


def ceilings(small: bool) -> Ceilings:
    size, numbers = (512, 2**22) if small else (8192, 2**29)
    x = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
    ones = jnp.ones(numbers, jnp.bfloat16)
    rate = lambda x: 2 * size**3 / seconds(lambda a, b: _dot(a, b, jnp.bfloat16), x, x)
    return Ceilings(size, rate(x), rate(x.astype(jnp.float8_e4m3fn)), 4 * numbers / seconds(lambda x: x + 1, ones))


def product_row(shape: Shape, limits: Ceilings, implementation: str | None) -> Row:
    """The table's row of one product."""
    both = case(shape, implementation)
    off = error(shape, both, both.fp8)
    time, peer = seconds(both.fp8, *both.fp8_arguments), seconds(both.peer, *both.peer_arguments)
    return {
        "shape": shape.text,
        "off by": off,
        "verdict": verdict(off, both.allowed),
        "us": time * 1e6,
        "TFLOP/s": shape.flops / time / 1e12,
        "GB/s": shape.bytes / time / 1e9,
        "of ceiling": max(shape.flops / time / limits.flops, shape.bytes / time / limits.bandwidth),
        "bfloat16 TFLOP/s": shape.flops / peer / 1e12,
        "× bfloat16": peer / time,
        "DeepGEMM H800": deepgemm(shape),
    }


def verdict(off: float, allowed: float) -> str:
    return "right" if off <= allowed else "WRONG"

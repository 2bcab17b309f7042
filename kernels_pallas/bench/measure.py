"""One product, quantising or SwiGLU, measured beside its peer in bfloat16 through XLA."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from kernels_pallas import fp8_grouped_matmul, fp8_grouped_weight_gradient, fp8_matmul, quantize_block, quantize_tile, swiglu_quantize
from kernels_pallas.bench.shapes import Shape, deepgemm
from kernels_pallas.bench.timing import seconds


@dataclasses.dataclass(frozen=True)
class Case:
    """Two functions of no arguments but arrays, that compute the same from quantised and from bfloat16 operands."""

    fp8: Callable
    fp8_arguments: tuple
    peer: Callable
    peer_arguments: tuple


def case(shape: Shape, implementation: str | None) -> Case:
    """Random normal operands for `shape`."""
    gradient, groups = "gradient" in shape.operation, shape.groups
    rows, depth = (shape.m, shape.k * groups) if gradient else (shape.m * groups, shape.k)
    a = jax.random.normal(jax.random.key(0), (rows, depth), jnp.bfloat16)
    b_shape = (shape.n, depth) if gradient or groups == 1 else (groups, shape.n, depth)
    b = jax.random.normal(jax.random.key(1), b_shape, jnp.bfloat16)
    sizes = jnp.full((groups,), shape.k if gradient else shape.m, jnp.int32)
    fields = dict(implementation=implementation, out_dtype=jnp.float32 if gradient else jnp.bfloat16)
    qa, qb = jax.jit(quantize_tile)(a), jax.jit(quantize_tile if gradient else quantize_block)(b)
    if shape.operation in ("dense", "weight gradient"):
        return Case(lambda a, b: fp8_matmul(a, b, **fields), (qa, qb), lambda a, b: _dot(a, b, fields["out_dtype"]), (a, b))
    alignment = 128 if int(sizes[0]) % 128 == 0 else 1
    if shape.operation == "grouped":
        fp8 = lambda a, b: fp8_grouped_matmul(a, b, sizes, alignment=alignment, **fields)
        return Case(fp8, (qa, qb), lambda a, b: jax.lax.ragged_dot(a, b.mT, sizes), (a, b))
    over_rows = jax.lax.RaggedDotDimensionNumbers((((1,), (1,)), ((), ())), lhs_ragged_dimensions=(1,), rhs_group_dimensions=())
    peer = lambda a, b: jax.lax.ragged_dot_general(a, b, sizes, over_rows, preferred_element_type=jnp.float32)
    return Case(lambda a, b: fp8_grouped_weight_gradient(a, b, sizes, **fields), (qa, qb), peer, (a, b))


def _dot(a: jax.Array, b: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return jax.lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=dtype)


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """What this device was seen to do: FLOP/s in FP8, taken as twice those of an 8192³ product in bfloat16, and bytes/s copied (read and written)."""

    flops: float
    bandwidth: float


def ceilings(small: bool) -> Ceilings:
    size, numbers = (512, 2**22) if small else (8192, 2**29)
    x = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
    ones = jnp.ones(numbers, jnp.bfloat16)
    return Ceilings(2 * 2 * size**3 / seconds(lambda a, b: _dot(a, b, jnp.bfloat16), x, x), 4 * numbers / seconds(lambda x: x + 1, ones))


def product_row(shape: Shape, limits: Ceilings, implementation: str | None) -> dict[str, float | str | None]:
    """What the table shows of one product."""
    both = case(shape, implementation)
    time, peer = seconds(both.fp8, *both.fp8_arguments), seconds(both.peer, *both.peer_arguments)
    return {
        "product": f"{shape.operation}, {shape.name}",
        "shape": f"{f'{shape.groups} × ' if shape.groups > 1 else ''}{shape.m} × {shape.n} × {shape.k}",
        "us": time * 1e6,
        "TFLOP/s": shape.flops / time / 1e12,
        "GB/s": shape.bytes / time / 1e9,
        "of ceiling": max(shape.flops / time / limits.flops, shape.bytes / time / limits.bandwidth),
        "× bfloat16": peer / time,
        "DeepGEMM H800": deepgemm(shape),
    }


def memory_rows(limits: Ceilings, small: bool, implementation: str | None) -> list[dict[str, float | str]]:
    """Quantising and SwiGLU, which memory alone should bound."""
    rows, columns = (256, 512) if small else (16384, 7168)
    x, up = (jax.random.normal(jax.random.key(i), (rows, columns), jnp.bfloat16) for i in range(2))
    fields = dict(implementation=implementation)
    cases = {
        "quantize_tile": (lambda x: quantize_tile(x, **fields), (x,), 3),
        "quantize_block": (lambda x: quantize_block(x, **fields), (x,), 3),
        "swiglu_quantize": (lambda x, up: swiglu_quantize(x, up, **fields), (x, up), 5),
    }
    result = []
    for name, (function, arguments, bytes_each) in cases.items():
        time = seconds(function, *arguments)
        rate = bytes_each * rows * columns / time
        result.append({"operation": name, "shape": f"{rows} × {columns}", "us": time * 1e6, "GB/s": rate / 1e9, "of copy": rate / limits.bandwidth})
    return result

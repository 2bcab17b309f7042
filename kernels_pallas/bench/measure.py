"""One product, quantising or SwiGLU: first whether it is right, then how fast it is beside its peer."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from kernels_pallas import (
    attention,
    dequantize,
    fp8_grouped_matmul,
    fp8_grouped_weight_gradient,
    fp8_matmul,
    quantize_block,
    quantize_tile,
    quantize_transposed,
    requantize_transposed,
    swiglu_quantize,
)
from kernels_pallas.bench.shapes import HEADS, Shape, deepgemm
from kernels_pallas.bench.timing import seconds
from kernels_pallas.grouped_linear.api import GROUPED_PRODUCT, GROUPED_WEIGHT_GRADIENT
from kernels_pallas.implementations import choose

ALLOWED = 1e-3  # of a product against that of unquantised operands: DeepGEMM's criterion
ALLOWED_ROUNDING = 1e-6  # of a quantiser against XLA's: a GPU's division is off by 2 units in the last place, which moves few numbers by a step of E4M3
ALLOWED_BFLOAT16 = 1e-4  # of what is rounded to bfloat16, by 2^-9, several times


@jax.jit
def calc_diff(x: jax.Array, y: jax.Array) -> jax.Array:
    """1 - 2⟨x, y⟩ / (⟨x, x⟩ + ⟨y, y⟩), DeepGEMM's measure of difference; NaN for NaN."""
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    return 1 - 2 * jnp.sum(x * y) / jnp.sum(x * x + y * y)


def verdict(difference: float, allowed: float) -> str:
    return "right" if difference <= allowed else "WRONG"


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

    def peer(products, *operands):
        """The kernel in bfloat16 where there is one: on GPUs XLA's own is masked for every group, as many times the work."""
        return choose("grouped_linear", products, None, *operands)(*operands)

    if shape.operation == "grouped":
        fp8 = lambda a, b: fp8_grouped_matmul(a, b, sizes, alignment=alignment, **fields)
        return Case(fp8, (qa, qb), lambda a, b: peer(GROUPED_PRODUCT, a, b, sizes, alignment, True), (a, b))
    fp8 = lambda a, b: fp8_grouped_weight_gradient(a, b, sizes, **fields)
    return Case(fp8, (qa, qb), lambda x, dy: peer(GROUPED_WEIGHT_GRADIENT, x, dy, sizes, alignment), (a.T, b.T))


def _dot(a: jax.Array, b: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return jax.lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=dtype)


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """What this device was seen to do: FLOP/s of an 8192³ product through XLA in each format, and bytes/s copied (read and written)."""

    bf16: float
    fp8: float
    bandwidth: float

    @property
    def flops(self) -> float:
        """Whichever is faster: not every device multiplies FP8."""
        return max(self.bf16, self.fp8)


def ceilings(small: bool) -> Ceilings:
    size, numbers = (512, 2**22) if small else (8192, 2**29)
    x = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
    ones = jnp.ones(numbers, jnp.bfloat16)
    rate = lambda x: 2 * size**3 / seconds(lambda a, b: _dot(a, b, jnp.bfloat16), x, x)
    return Ceilings(rate(x), rate(x.astype(jnp.float8_e4m3fn)), 4 * numbers / seconds(lambda x: x + 1, ones))


def product_row(shape: Shape, limits: Ceilings, implementation: str | None) -> dict[str, float | str | None]:
    """What the table shows of one product."""
    both = case(shape, implementation)
    difference = float(calc_diff(jax.jit(both.fp8)(*both.fp8_arguments), jax.jit(both.peer)(*both.peer_arguments)))
    time, peer = seconds(both.fp8, *both.fp8_arguments), seconds(both.peer, *both.peer_arguments)
    return {
        "product": f"{shape.operation}, {shape.name}",
        "shape": shape.text,
        "calc_diff": difference,
        "verdict": verdict(difference, ALLOWED),
        "us": time * 1e6,
        "TFLOP/s": shape.flops / time / 1e12,
        "GB/s": shape.bytes / time / 1e9,
        "of ceiling": max(shape.flops / time / limits.flops, shape.bytes / time / limits.bandwidth),
        "bfloat16 TFLOP/s": shape.flops / peer / 1e12,
        "× bfloat16": peer / time,
        "DeepGEMM H800": deepgemm(shape),
    }


def memory_rows(limits: Ceilings, small: bool, implementation: str | None) -> list[dict[str, float | str]]:
    """Quantising and SwiGLU, which memory alone should bound."""
    rows, columns = (256, 512) if small else (16384, 7168)
    x, up = (jax.random.normal(jax.random.key(i), (rows, columns), jnp.bfloat16) for i in range(2))
    q = jax.jit(quantize_tile)(x)
    cases = {
        "quantize_tile": (quantize_tile, (x,), 3),
        "quantize_block": (quantize_block, (x,), 3),
        "quantize_transposed": (quantize_transposed, (x,), 3),
        "requantize_transposed": (requantize_transposed, (q,), 2),
        "swiglu_quantize": (swiglu_quantize, (x, up), 5),
    }
    result = []
    for name, (function, arguments, bytes_each) in cases.items():
        run = lambda implementation: functools.partial(function, implementation=implementation)
        dequantized = lambda implementation: dequantize(jax.jit(run(implementation))(*arguments), jnp.float32)
        difference = float(calc_diff(dequantized(implementation), dequantized("xla")))
        time = seconds(run(implementation), *arguments)
        rate = bytes_each * rows * columns / time
        row = {"operation": name, "shape": f"{rows} × {columns}", "calc_diff": difference, "verdict": verdict(difference, ALLOWED_ROUNDING)}
        result.append(row | {"us": time * 1e6, "GB/s": rate / 1e9, "of copy": rate / limits.bandwidth})
    return result


def attention_rows(small: bool, implementation: str | None) -> list[dict[str, float | str]]:
    """MLA's heads, forward alone and with all gradients, against XLA's scores in memory. FLOPs are those of a causal mask; recomputation is not counted."""
    rows, length, heads, width, values = (1, 128, 2, *HEADS[3:]) if small else HEADS
    shapes = (rows, length, heads, width), (rows, length, heads, width), (rows, length, heads, values), (rows, length, heads, values)
    *qkv, do = (jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) for i, shape in enumerate(shapes))
    segments = jnp.zeros((rows, length), jnp.int32)

    def forward(implementation, q, k, v, do):
        return attention(q, k, v, segments, segments, scale=width**-0.5, implementation=implementation)

    def gradients(implementation, q, k, v, do):
        return jnp.concatenate([x.reshape(-1) for x in jax.vjp(lambda *qkv: forward(implementation, *qkv, do), q, k, v)[1](do)])

    result = []
    for name, function, passes in (("forward", forward, 1), ("forward and gradients", gradients, 3)):
        ours, theirs = functools.partial(function, implementation), functools.partial(function, "xla")
        difference = float(calc_diff(jax.jit(ours)(*qkv, do), jax.jit(theirs)(*qkv, do)))
        time, peer = seconds(ours, *qkv, do), seconds(theirs, *qkv, do)
        flops = passes * rows * heads * length**2 * (width + values)
        row = {"operation": f"attention, {name}", "shape": f"{rows} × {heads} × {length}", "calc_diff": difference}
        row["verdict"] = verdict(difference, ALLOWED_BFLOAT16)
        result.append(row | {"us": time * 1e6, "TFLOP/s": flops / time / 1e12, "× XLA": peer / time})
    return result

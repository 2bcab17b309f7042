"""Figures of the kernels' machine code for a GPU that need not be there."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from kernels_pallas import QTensor, fp8_grouped_matmul, fp8_grouped_weight_gradient, fp8_matmul, targets
from kernels_pallas.attention import mosaic_gpu_sm90 as attention
from kernels_pallas.bench.shapes import HEADS, LINEARS, Shape, shapes
from kernels_pallas.grouped_linear import mosaic_gpu_sm90 as grouped_linear
from kernels_pallas.hopper import REGISTERS, SHARED_MEMORY_PER_CORE

THREADS = 384  # three warpgroups


def machine_code_row(shape: str, target: str, function, *arguments) -> dict[str, int | float | str | None]:
    (kernel,) = targets.compile_for(getattr(targets, target), function, *arguments)
    counts = kernel.instructions or {}
    return {
        "shape": shape,
        "registers": kernel.registers,
        "spilled bytes": kernel.spill_stores + kernel.spill_loads,
        "shared memory": kernel.shared_memory,
        "matrix instructions": kernel.fp8_products + kernel.bf16_products,
        "FFMA": counts.get("FFMA"),
        "blocks per core": min(
            REGISTERS // (kernel.registers * THREADS), SHARED_MEMORY_PER_CORE // (kernel.shared_memory + 1024)
        ),
    }


def programs() -> Iterator[tuple[str, str, tuple]]:
    """The FP8 products, and experts and attention in bfloat16: a name, a shape, and the function with the shapes of its
    arguments."""
    yield from ((shape.title, shape.text, _program(shape)) for shape in shapes())
    yield from _bfloat16_programs()


def _bfloat16_programs() -> Iterator[tuple[str, str, tuple]]:
    (n, k), groups, rows = LINEARS["gate and up"], 4, 4 * 8192
    x, dy, w = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((rows, k), (rows, n), (groups, k, n)))
    sizes, shape = jax.ShapeDtypeStruct((groups,), jnp.int32), f"{groups} × {rows // groups} × {n} × {k}"
    product = functools.partial(grouped_linear.grouped_product, alignment=128)
    yield "bfloat16 grouped", shape, (functools.partial(product, transposed=False), x, w, sizes)
    yield "bfloat16 grouped input gradient", shape, (functools.partial(product, transposed=True), dy, w, sizes)
    yield (
        "bfloat16 grouped weight gradient",
        shape,
        (functools.partial(grouped_linear.grouped_weight_gradient, alignment=128), x, dy, sizes),
    )

    rows, length, heads, width, values = HEADS
    q, v = (jax.ShapeDtypeStruct((rows, length, heads, size), jnp.bfloat16) for size in (width, values))
    segments, row = (
        jax.ShapeDtypeStruct((rows, length), jnp.int32),
        jax.ShapeDtypeStruct((rows, heads, length), jnp.float32),
    )
    shape = f"{rows} × {heads} × {length} × {length}, {width} and {values} wide"
    for name, backward in (
        ("forward", ()),
        ("query_gradient", (v, row, row)),
        ("key_and_value_gradients", (v, row, row)),
    ):
        kernel = getattr(attention, name)
        function = lambda *x, kernel=kernel: kernel(*x[:5], 0, 1.0, *x[5:])
        yield f"attention, {name.replace('_', ' ')}", shape, (function, q, q, v, segments, segments, *backward)


def _program(shape: Shape):
    """The function and the shapes of its arguments."""
    gradient, groups = "gradient" in shape.operation, shape.groups
    fields = dict(implementation="mosaic_gpu_sm90", out_dtype=jnp.float32 if gradient else jnp.bfloat16)
    rows, depth = (shape.m, shape.k * groups) if gradient else (shape.m * groups, shape.k)
    a = _struct((rows, depth), (1, 128))
    if shape.operation in ("dense", "weight gradient"):
        return (
            (lambda a, b: fp8_matmul(a, b, **fields)),
            a,
            _struct((shape.n, depth), (1, 128) if gradient else (128, 128)),
        )
    sizes = jax.ShapeDtypeStruct((groups,), jnp.int32)
    if gradient:
        return (
            (lambda a, b, sizes: fp8_grouped_weight_gradient(a, b, sizes, **fields)),
            a,
            _struct((shape.n, depth), (1, 128)),
            sizes,
        )
    grouped = lambda a, b, sizes: fp8_grouped_matmul(a, b, sizes, alignment=128, **fields)
    return grouped, a, _struct((groups, shape.n, depth), (128, 128)), sizes


def _struct(shape: tuple[int, ...], tile: tuple[int, int]) -> QTensor:
    tiles = (*shape[:-2], -(-shape[-2] // tile[0]), -(-shape[-1] // tile[1]))
    return QTensor(jax.ShapeDtypeStruct(shape, jnp.float8_e4m3fn), jax.ShapeDtypeStruct(tiles, jnp.float32), tile)

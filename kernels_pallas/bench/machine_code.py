"""What compiling alone can tell of a product on a GPU."""

import jax
import jax.numpy as jnp

from kernels_pallas import QTensor, fp8_grouped_matmul, fp8_grouped_weight_gradient, fp8_matmul, targets
from kernels_pallas.bench.shapes import Shape

THREADS = 384  # three warpgroups
REGISTERS, SHARED_MEMORY = 65536, 233472  # of a multiprocessor


def machine_code_row(shape: Shape, target: str) -> dict[str, int | float | str | None]:
    (kernel,) = targets.compile_for(getattr(targets, target), *_program(shape))
    counts = kernel.instructions or {}
    return {
        "product": f"{shape.operation}, {shape.name}",
        "shape": f"{f'{shape.groups} × ' if shape.groups > 1 else ''}{shape.m} × {shape.n} × {shape.k}",
        "registers": kernel.registers,
        "spilled bytes": kernel.spill_stores + kernel.spill_loads,
        "shared memory": kernel.shared_memory,
        "FP8 products": kernel.fp8_products,
        "FFMA": counts.get("FFMA"),
        "blocks per core": min(REGISTERS // (kernel.registers * THREADS), SHARED_MEMORY // (kernel.shared_memory + 1024)),
    }


def _program(shape: Shape):
    """The function and the shapes of its arguments."""
    gradient, groups = "gradient" in shape.operation, shape.groups
    fields = dict(implementation="mosaic_gpu_sm90", out_dtype=jnp.float32 if gradient else jnp.bfloat16)
    rows, depth = (shape.m, shape.k * groups) if gradient else (shape.m * groups, shape.k)
    a = _struct((rows, depth), (1, 128))
    if shape.operation in ("dense", "weight gradient"):
        return (lambda a, b: fp8_matmul(a, b, **fields)), a, _struct((shape.n, depth), (1, 128) if gradient else (128, 128))
    sizes = jax.ShapeDtypeStruct((groups,), jnp.int32)
    if gradient:
        return (lambda a, b, sizes: fp8_grouped_weight_gradient(a, b, sizes, **fields)), a, _struct((shape.n, depth), (1, 128)), sizes
    grouped = lambda a, b, sizes: fp8_grouped_matmul(a, b, sizes, alignment=128, **fields)
    return grouped, a, _struct((groups, shape.n, depth), (128, 128)), sizes


def _struct(shape: tuple[int, ...], tile: tuple[int, int]) -> QTensor:
    tiles = (*shape[:-2], -(-shape[-2] // tile[0]), -(-shape[-1] // tile[1]))
    return QTensor(jax.ShapeDtypeStruct(shape, jnp.float8_e4m3fn), jax.ShapeDtypeStruct(tiles, jnp.float32), tile)

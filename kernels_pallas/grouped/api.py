"""FP8 products of experts, each group of rows with a matrix of its own, and the tables of their implementations."""

import jax
import jax.numpy as jnp

from kernels_pallas.examples import COLUMNS, few, groups, quantized
from kernels_pallas.grouped import mosaic_gpu_sm90, mosaic_tpu, reference
from kernels_pallas.implementations import Operation, anything, choose
from kernels_pallas.matmul.accumulation import Accumulation
from kernels_pallas.qtensor import QTensor


def _small(a: QTensor, b: QTensor, sizes_G: jax.Array, alignment: int, *rest) -> tuple:
    sizes, rows = groups(b.shape[0], a.shape[0], alignment)
    b_shape = (len(sizes), few(b.shape[1], COLUMNS), b.shape[2])
    return quantized(0, a, (rows, a.shape[1])), quantized(1, b, b_shape), sizes, alignment, *rest


def _small_weight_gradient(x: QTensor, dy: QTensor, sizes_G: jax.Array, alignment: int, *rest) -> tuple:
    sizes, depth = groups(sizes_G.shape[0], x.shape[1], alignment)
    return *(quantized(i, q, (few(q.shape[0], COLUMNS), depth)) for i, q in enumerate((x, dy))), sizes, alignment, *rest


GROUPED_MATMUL = Operation(
    "fp8_grouped_matmul",
    {
        "xla": (reference.grouped_matmul, anything),
        "mosaic_gpu_sm90": (mosaic_gpu_sm90.grouped_matmul, mosaic_gpu_sm90.grouped_matmul_reason),
        "mosaic_tpu": (mosaic_tpu.grouped_matmul, mosaic_tpu.grouped_matmul_reason),
    },
    _small,
)
GROUPED_WEIGHT_GRADIENT = Operation(
    "fp8_grouped_weight_gradient",
    {
        "xla": (reference.grouped_weight_gradient, anything),
        "mosaic_gpu_sm90": (mosaic_gpu_sm90.grouped_weight_gradient, mosaic_gpu_sm90.grouped_weight_gradient_reason),
        "mosaic_tpu": (mosaic_tpu.grouped_weight_gradient, mosaic_tpu.grouped_weight_gradient_reason),
    },
    _small_weight_gradient,
)


def fp8_grouped_matmul(
    a: QTensor,
    b: QTensor,
    group_sizes: jax.Array,
    *,
    alignment: int = 1,
    out_dtype: jnp.dtype = jnp.bfloat16,
    accumulation: Accumulation = Accumulation(),
    implementation: str | tuple[str, ...] | None = None,
) -> jax.Array:
    """Rows of group g of a [R, K] times b[g] of b [G, N, K] transposed -> [R, N] in `out_dtype`.

    `group_sizes` is int32 [G]. Groups follow one another from row 0 and may be empty; rows past the last group give
    zero. The caller promises that `alignment` divides every size and R. Raises ValueError for shapes that do not match.
    """
    if len(a.shape) != 2 or len(b.shape) != 3 or a.shape[1] != b.shape[2] or group_sizes.shape != (b.shape[0],):
        raise ValueError(
            f"fp8_grouped_matmul: a {a.shape}, b {b.shape}, group_sizes {group_sizes.shape} must be [R, K], [G, N, K], "
            "[G]"
        )
    if a.shape[0] % alignment:
        raise ValueError(f"fp8_grouped_matmul: alignment={alignment} does not divide the {a.shape[0]} rows")
    arguments = (a, b, group_sizes, alignment, accumulation, out_dtype)
    return choose(GROUPED_MATMUL, implementation, *arguments)(*arguments)


def fp8_grouped_weight_gradient(
    x: QTensor,
    dy: QTensor,
    group_sizes: jax.Array,
    *,
    alignment: int = 128,
    out_dtype: jnp.dtype = jnp.float32,
    accumulation: Accumulation = Accumulation(),
    implementation: str | tuple[str, ...] | None = None,
) -> jax.Array:
    """Columns of group g of x [D, P] times those of dy [F, P] transposed -> [G, D, F] in `out_dtype`; zero for an empty
    group.

    `alignment` must divide every group size and P, and the tiles along P must divide `alignment`, so that no tile lies
    across two groups (`layout.pad_groups`). Raises ValueError where shapes or tiles do not match.
    """
    if len(x.shape) != 2 or x.shape[1:] != dy.shape[1:] or x.shape[1] % alignment:
        raise ValueError(
            f"fp8_grouped_weight_gradient: x {x.shape} and dy {dy.shape} must be [D, P] and [F, P], P a multiple of "
            f"alignment={alignment}"
        )
    for name, q in (("x", x), ("dy", dy)):
        if alignment % min(q.tile[1], alignment):
            raise ValueError(
                f"fp8_grouped_weight_gradient: {name}'s tiles {q.tile} lie across groups of multiples of "
                f"alignment={alignment}"
            )
    arguments = (x, dy, group_sizes, alignment, accumulation, out_dtype)
    return choose(GROUPED_WEIGHT_GRADIENT, implementation, *arguments)(*arguments)

"""The product of two quantized matrices, and the table of its implementations."""

import jax
import jax.numpy as jnp

from kernels_pallas.examples import COLUMNS, few, few_rows, quantized
from kernels_pallas.implementations import Operation, anything, choose
from kernels_pallas.matmul import mosaic_gpu_sm90, mosaic_tpu, reference
from kernels_pallas.matmul.accumulation import Accumulation
from kernels_pallas.qtensor import QTensor


def _small(a: QTensor, b: QTensor, *rest) -> tuple:
    return quantized(0, a, few_rows(a.shape)), quantized(1, b, (few(b.shape[0], COLUMNS), b.shape[1])), *rest


MATMUL = Operation(
    "fp8_matmul",
    {
        "xla": (reference.matmul, anything),
        "mosaic_gpu_sm90": (mosaic_gpu_sm90.matmul, mosaic_gpu_sm90.reason),
        "mosaic_tpu": (mosaic_tpu.matmul, mosaic_tpu.reason),
    },
    _small,
)


def fp8_matmul(
    a: QTensor,
    b: QTensor,
    *,
    out_dtype: jnp.dtype = jnp.bfloat16,
    accumulation: Accumulation = Accumulation(),
    implementation: str | tuple[str, ...] | None = None,
) -> jax.Array:
    """a [M, K] times b [N, K] transposed -> [M, N] in `out_dtype`; both have K last, as FP8 tensor cores read them.

    Partial sums over 128 numbers of K are multiplied with their scales and added in float32 (V3 §3.3.2, Fig. 7b). Pass
    `q.mT` for an operand that lies the other way. Raises ValueError for shapes that do not match, and Unsupported if
    the implementation does not support the operands.
    """
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"fp8_matmul: a {a.shape} and b {b.shape} must be [M, K] and [N, K]")
    arguments = (a, b, accumulation, out_dtype)
    return choose(MATMUL, implementation, *arguments)(*arguments)

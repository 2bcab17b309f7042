"""SwiGLU and its quantization in one pass on TPUs: gate and up are read once, and only eight bits are written."""

import jax

from kernels_pallas.qtensor import QTensor, Quantizer
from kernels_pallas.quantize import mosaic_tpu
from kernels_pallas.swiglu.reference import swiglu


def swiglu_quantize(gate: jax.Array, up: jax.Array, quantizer: Quantizer) -> QTensor:
    """silu(gate) · up [..., R, F], rounded to the dtype of `gate`, in tiles or blocks."""
    return mosaic_tpu.quantize_rows(swiglu, (gate, up), quantizer)


def reason(gate: jax.Array, up: jax.Array, quantizer: Quantizer) -> str | None:
    return mosaic_tpu.reason(gate, quantizer)

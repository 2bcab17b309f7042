"""SwiGLU and its quantization in one pass on NVIDIA Hopper, through Pallas Mosaic GPU. Compiled and interpreted only;
no GPU has run it.

    h = silu(gate) · up in float32, rounded to the dtype of gate; then scale = max(amax of the tile, min_amax) / 448,
    values = clip(h / scale, ±448)

It reads gate and up once and writes a byte for each number: the kernel of `quantize.mosaic_gpu_sm90` with two sources.
The exponential is that of the GPU, so that h may round differently from the reference's.
"""

import jax
import jax.numpy as jnp

from kernels_pallas.qtensor import QTensor, Quantizer
from kernels_pallas.quantize import mosaic_gpu_sm90 as quantize
from kernels_pallas.quantize.mosaic_gpu_sm90 import along, load_strip, quantized_tiles
from kernels_pallas.swiglu.reference import swiglu


def reason(gate: jax.Array, up: jax.Array, quantizer: Quantizer) -> str | None:
    return quantize.reason(gate, quantizer)


def swiglu_quantize(gate: jax.Array, up: jax.Array, quantizer: Quantizer) -> QTensor:
    """[..., R, F] twice -> QTensor [..., R, F]."""
    if gate.ndim > 2:
        return jax.vmap(lambda gate, up: swiglu_quantize(gate, up, quantizer))(gate, up)

    def strip(rows, gate_slot, up_slot):
        return swiglu(load_strip(rows, gate_slot), load_strip(rows, up_slot)).astype(gate.dtype).astype(jnp.float32)

    return quantized_tiles(strip, [(along, gate), (along, up)], gate.shape, quantizer, approx_math=True)

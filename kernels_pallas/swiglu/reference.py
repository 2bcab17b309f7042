"""SwiGLU whose result is wanted quantized, by its definition."""

import jax
import jax.numpy as jnp

from kernels_pallas.qtensor import QTensor, Quantizer
from kernels_pallas.quantize.reference import quantize


def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """silu(gate) · up, computed in float32, in the dtype of `gate`."""
    return (jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)).astype(gate.dtype)


def swiglu_quantize(gate: jax.Array, up: jax.Array, quantizer: Quantizer) -> QTensor:
    return quantize(swiglu(gate, up), quantizer)

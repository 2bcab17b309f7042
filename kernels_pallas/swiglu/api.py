"""SwiGLU, with gradients, and SwiGLU quantized at once: what a user calls."""

import jax

from kernels_pallas._compat import vary_alike
from kernels_pallas.examples import few_rows, normal
from kernels_pallas.implementations import Operation, choose
from kernels_pallas.qtensor import TILE, QTensor, Quantizer
from kernels_pallas.swiglu import mosaic_gpu_sm90, mosaic_tpu, reference


def _small(gate: jax.Array, up: jax.Array, quantizer: Quantizer) -> tuple:
    return *(normal(i, few_rows(x.shape), x.dtype) for i, x in enumerate((gate, up))), quantizer


SWIGLU_QUANTIZE = Operation(
    "swiglu_quantize",
    {
        "xla": (reference.swiglu_quantize, lambda *_: None),
        "mosaic_gpu_sm90": (mosaic_gpu_sm90.swiglu_quantize, mosaic_gpu_sm90.reason),
        "mosaic_tpu": (mosaic_tpu.swiglu_quantize, mosaic_tpu.reason),
    },
    _small,
    instead="XLA computes it in several passes through memory instead; shapes and formats that the kernel takes avoid it",
)


def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """silu(gate) · up, computed in float32 and rounded once, to the dtype of `gate`; its gradient likewise. Any float
    dtype, equal shapes.

    What is kept for the backward pass is gate and up in their own dtype: float32 exists inside fused loops only.
    """
    return _swiglu(*vary_alike(gate, up))


_swiglu = jax.custom_vjp(reference.swiglu)
_swiglu.defvjp(
    lambda gate, up: (reference.swiglu(gate, up), (gate, up)),
    lambda operands, dh: jax.vjp(reference.swiglu, *operands)[1](dh),
)


def swiglu_quantize(
    gate: jax.Array, up: jax.Array, quantizer: Quantizer = TILE, *, implementation: str | tuple[str, ...] | None = None
) -> QTensor:
    """[R, F] twice -> silu(gate) · up [R, F], computed in float32, rounded to the dtype of `gate` and quantized.

    Raises ValueError if shapes or dtypes differ and Unsupported for an implementation that cannot do it.
    """
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(f"swiglu_quantize: gate {gate.dtype}{gate.shape} and up {up.dtype}{up.shape} must be alike")
    return choose(SWIGLU_QUANTIZE, implementation, gate, up, quantizer)(gate, up, quantizer)

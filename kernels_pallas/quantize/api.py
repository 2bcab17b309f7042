"""Quantization, SwiGLU, and the tables of their implementations."""

import jax

from kernels_pallas._compat import vary_alike
from kernels_pallas.examples import few_rows, normal, quantized
from kernels_pallas.implementations import Operation, anything, choose
from kernels_pallas.qtensor import TILE, QTensor, Quantizer
from kernels_pallas.quantize import mosaic_gpu_sm90, mosaic_tpu, reference


def _small(x: jax.Array, quantizer: Quantizer) -> tuple:
    return normal(0, few_rows(x.shape), x.dtype), quantizer


def _small_quantized(q: QTensor, quantizer: Quantizer) -> tuple:
    return quantized(0, q, few_rows(q.shape)), quantizer


def _small_swiglu(gate: jax.Array, up: jax.Array, quantizer: Quantizer) -> tuple:
    return *(normal(i, few_rows(x.shape), x.dtype) for i, x in enumerate((gate, up))), quantizer


INSTEAD = "XLA quantizes instead, in several passes through memory; shapes and formats that the kernel takes avoid it"
QUANTIZE = Operation(
    "quantize",
    {
        "xla": (reference.quantize, anything),
        "mosaic_gpu_sm90": (mosaic_gpu_sm90.quantize, mosaic_gpu_sm90.reason),
        "mosaic_tpu": (mosaic_tpu.quantize, mosaic_tpu.reason),
    },
    _small,
    instead=INSTEAD,
)
QUANTIZE_TRANSPOSED = Operation(
    "quantize_transposed",
    {
        "xla": (lambda x, quantizer: reference.quantize(x.mT, quantizer), anything),
        "mosaic_gpu_sm90": (mosaic_gpu_sm90.quantize_transposed, mosaic_gpu_sm90.reason),
        "mosaic_tpu": (mosaic_tpu.quantize_transposed, mosaic_tpu.transposed_reason),
    },
    _small,
    instead=INSTEAD,
)
REQUANTIZE_TRANSPOSED = Operation(
    "requantize_transposed",
    {
        "xla": (reference.requantize_transposed, anything),
        "mosaic_gpu_sm90": (mosaic_gpu_sm90.requantize_transposed, mosaic_gpu_sm90.requantize_reason),
        "mosaic_tpu": (mosaic_tpu.requantize_transposed, mosaic_tpu.requantize_reason),
    },
    _small_quantized,
    instead=INSTEAD,
)
SWIGLU_QUANTIZE = Operation(
    "swiglu_quantize",
    {
        "xla": (reference.swiglu_quantize, anything),
        "mosaic_gpu_sm90": (mosaic_gpu_sm90.swiglu_quantize, mosaic_gpu_sm90.swiglu_reason),
        "mosaic_tpu": (mosaic_tpu.swiglu_quantize, mosaic_tpu.swiglu_reason),
    },
    _small_swiglu,
    instead=INSTEAD,
)


def quantize(
    x: jax.Array, quantizer: Quantizer = TILE, *, implementation: str | tuple[str, ...] | None = None
) -> QTensor:
    """Quantizes [..., R, C] of any float dtype -> QTensor [..., R, C].

    By default, as in the released quantizer, scale = max(amax, 1e-4) / 448 for each tile and values = clip(x / scale,
    ±448) in E4M3; other formats have other largest magnitudes. A NaN or an infinity makes its whole tile NaN. Raises
    Unsupported if the implementation does not support x or the quantizer.
    """
    return choose(QUANTIZE, implementation, x, quantizer)(x, quantizer)


def quantize_tile(x: jax.Array, *, implementation: str | tuple[str, ...] | None = None, **fields) -> QTensor:
    """Quantizes in 1 × 128 tiles along the last axis, as V3 does activations and their gradients (§3.3.2). `fields` are
    those of Quantizer."""
    return quantize(x, Quantizer(**({"scope": "tile"} | fields)), implementation=implementation)


def quantize_block(x: jax.Array, *, implementation: str | tuple[str, ...] | None = None, **fields) -> QTensor:
    """Quantizes in 128 × 128 blocks, as V3 does weights (§3.3.2). `fields` are those of Quantizer."""
    return quantize(x, Quantizer(**({"scope": "block"} | fields)), implementation=implementation)


def quantize_transposed(
    x: jax.Array, quantizer: Quantizer = TILE, *, implementation: str | tuple[str, ...] | None = None
) -> QTensor:
    """Quantizes and transposes [..., R, C] -> QTensor [..., C, R] with tiles along R: an operand of the weight
    gradient."""
    return choose(QUANTIZE_TRANSPOSED, implementation, x, quantizer)(x, quantizer)


def requantize_transposed(
    q: QTensor, quantizer: Quantizer = TILE, *, implementation: str | tuple[str, ...] | None = None
) -> QTensor:
    """Scales and transposes a QTensor [..., R, C] -> QTensor [..., C, R] with tiles along R: a residual as the weight
    gradient reads it."""
    return choose(REQUANTIZE_TRANSPOSED, implementation, q, quantizer)(q, quantizer)


def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """silu(gate) · up of equal shapes and any float dtype, computed in float32 and rounded once, to the dtype of
    `gate`; its gradient likewise.

    The backward pass holds gate and up in their own dtype: float32 exists only inside fused loops.
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
    """silu(gate) · up of two arrays [R, F], computed in float32, rounded to the dtype of `gate` and quantized: [R, F].

    Raises ValueError if shapes or dtypes differ, and Unsupported if the implementation does not support them.
    """
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(f"swiglu_quantize: gate {gate.dtype}{gate.shape} and up {up.dtype}{up.shape} must be alike")
    return choose(SWIGLU_QUANTIZE, implementation, gate, up, quantizer)(gate, up, quantizer)

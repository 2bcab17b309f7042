"""FP8 products as DeepSeek-V3 trained with them, on NVIDIA Hopper, TPUs and everything that XLA compiles for.

The package does not need deepseek_jax; see README.md. Shape suffixes: M, N, K as in matrix products; R rows, P padded
rows, G groups; N tokens, D and F the widths of a Linear.
"""

from kernels_pallas._compat import vary, varying_axes
from kernels_pallas.attention.api import attention
from kernels_pallas.grouped.api import fp8_grouped_matmul, fp8_grouped_weight_gradient
from kernels_pallas.grouped_linear.api import grouped_linear
from kernels_pallas.implementations import Unsupported
from kernels_pallas.linear.api import (
    fp8_grouped_linear,
    fp8_grouped_swiglu_linear,
    fp8_linear,
    fp8_swiglu_linear,
    prequantize,
    prequantize_weight,
)
from kernels_pallas.linear.quantization import PRODUCTS, LinearQuantization, PreQuantized, master
from kernels_pallas.matmul.accumulation import Accumulation
from kernels_pallas.matmul.api import fp8_matmul
from kernels_pallas.qtensor import QTensor, Quantizer, dequantize
from kernels_pallas.quantize.api import (
    quantize,
    quantize_block,
    quantize_tile,
    quantize_transposed,
    requantize_transposed,
    swiglu,
    swiglu_quantize,
)

__all__ = [
    "PRODUCTS",
    "Accumulation",
    "LinearQuantization",
    "PreQuantized",
    "QTensor",
    "Quantizer",
    "Unsupported",
    "attention",
    "dequantize",
    "fp8_grouped_linear",
    "fp8_grouped_matmul",
    "fp8_grouped_swiglu_linear",
    "fp8_grouped_weight_gradient",
    "fp8_linear",
    "fp8_matmul",
    "fp8_swiglu_linear",
    "grouped_linear",
    "master",
    "prequantize",
    "prequantize_weight",
    "quantize",
    "quantize_block",
    "quantize_tile",
    "quantize_transposed",
    "requantize_transposed",
    "swiglu",
    "swiglu_quantize",
    "vary",
    "varying_axes",
]

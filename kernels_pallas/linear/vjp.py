"""y = x W in FP8, forward and backward, for one matrix or for one matrix for each group of rows (V3 §3.3.1, Fig. 6).

Weights are given as arrays, as PreQuantized, or as QTensors, which have no gradient.
"""

import functools

import jax
import jax.numpy as jnp

from kernels_pallas.grouped.api import fp8_grouped_matmul, fp8_grouped_weight_gradient
from kernels_pallas.grouped.layout import pad_groups, take_quantized, take_rows
from kernels_pallas.grouped_linear.api import grouped_product, grouped_weight_gradient
from kernels_pallas.linear.quantization import PreQuantized, StaticArgs, master
from kernels_pallas.matmul.api import fp8_matmul
from kernels_pallas.qtensor import QTensor, Quantizer, dequantize
from kernels_pallas.quantize.api import quantize, quantize_transposed, requantize_transposed, swiglu, swiglu_quantize

Operand = jax.Array | QTensor | PreQuantized


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def linear(static: StaticArgs, x_RD: jax.Array | PreQuantized, w: Operand, sizes_G: jax.Array | None) -> jax.Array:
    """x W, [R, F] in the dtype of x: one matrix [D, F], or [G, D, F] and the group sizes, int32 [G]."""
    return forward(static, operand(static, "forward", x_RD, static.quantization.input), w, sizes_G, x_RD.dtype)


def _linear_fwd(static, x_RD, w, sizes_G):
    x = operand(static, "forward", x_RD, static.quantization.input)
    y_RF = forward(static, x, w, sizes_G, x_RD.dtype)
    structure = jax.tree.map(lambda _: None, x_RD)  # tells an array from a PreQuantized, and holds no numbers
    residual = None if isinstance(w, QTensor) else residual_input(static, x_RD, x)
    return y_RF, (structure, residual, residual_weight(static, w), sizes_G)


def _linear_bwd(static, residuals, dy_RF):
    structure, x, w, sizes_G = residuals
    dx_RD = input_gradient(static, dy_RF, w, sizes_G)  # FP8: Dgrad
    return cotangent(structure, dx_RD), weight_cotangent(static, x, dy_RF, w, sizes_G), None


linear.defvjp(_linear_fwd, _linear_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def swiglu_linear(
    static: StaticArgs, gate_RF: jax.Array, up_RF: jax.Array, w: Operand, sizes_G: jax.Array | None
) -> jax.Array:
    """(silu(gate) · up) W, [R, D]. The backward pass holds gate and up, quantized, and computes silu(gate) · up again
    (V3 §3.3.3)."""
    if "forward" in static.quantization.products:
        hidden = swiglu_quantize(gate_RF, up_RF, static.quantization.input, implementation=static.implementation)
    else:
        hidden = swiglu(gate_RF, up_RF)
    return forward(static, hidden, w, sizes_G, gate_RF.dtype)


def _swiglu_linear_fwd(static, gate_RF, up_RF, w, sizes_G):
    quantizer = static.quantization.residual or static.quantization.input
    kept = tuple(quantize(x, quantizer, implementation=static.implementation) for x in (gate_RF, up_RF))
    return swiglu_linear(static, gate_RF, up_RF, w, sizes_G), (kept, residual_weight(static, w), sizes_G)


def _swiglu_linear_bwd(static, residuals, dy_RD):
    kept, w, sizes_G = residuals
    hidden_RF, pull_back = jax.vjp(swiglu, *(dequantize(q, dy_RD.dtype) for q in kept))
    dw = weight_cotangent(static, hidden_RF, dy_RD, w, sizes_G)
    return *pull_back(input_gradient(static, dy_RD, w, sizes_G)), dw, None


swiglu_linear.defvjp(_swiglu_linear_fwd, _swiglu_linear_bwd)


def forward(static: StaticArgs, x, w: Operand, sizes_G: jax.Array | None, dtype: jnp.dtype) -> jax.Array:
    """x W, [R, F] in `dtype`, of x as the product reads it."""
    weight = operand(static, "forward", w, static.quantization.weight)
    return matmul(static, x, weight.mT, sizes_G, dtype)  # FP8: Fprop


def input_gradient(static: StaticArgs, dy_RF: jax.Array, w: Operand, sizes_G: jax.Array | None) -> jax.Array:
    """dy Wᵀ, [R, D]: W [D, F] has the product's K = F last already."""
    dy = operand(static, "input_gradient", dy_RF, static.quantization.gradient)
    weight = operand(static, "input_gradient", w, static.quantization.weight)
    return matmul(static, dy, weight, sizes_G, dy_RF.dtype)


def weight_gradient(
    static: StaticArgs, x, dy_RF: jax.Array, sizes_G: jax.Array | None, out_dtype: jnp.dtype
) -> jax.Array:
    """xᵀ dy, [D, F] or [G, D, F] in `out_dtype`, of x as `residual_input` kept it. K runs over rows, so that both
    operands are scaled again in tiles along them."""
    quantization, how = static.quantization, {"implementation": static.implementation}
    if "weight_gradient" not in quantization.products:
        x_RD = dequantize(x, dy_RF.dtype) if isinstance(x, QTensor) else x
        if sizes_G is None:
            return (x_RD.T @ dy_RF).astype(out_dtype)
        return grouped_weight_gradient(x_RD, dy_RF, sizes_G, static.alignment, **how).astype(out_dtype)
    block = quantization.gradient.size
    if sizes_G is not None and static.alignment % block:
        padding = pad_groups(sizes_G, dy_RF.shape[0], block)
        x = (take_quantized if isinstance(x, QTensor) else take_rows)(x, padding.source_P)
        dy_RF, sizes_G = take_rows(dy_RF, padding.source_P), padding.sizes_G
    transposed = requantize_transposed if isinstance(x, QTensor) else quantize_transposed
    x_DR, dy_FR = transposed(x, quantization.input, **how), quantize_transposed(dy_RF, quantization.gradient, **how)
    how |= {"out_dtype": out_dtype, "accumulation": quantization.accumulation}
    if sizes_G is None:
        return fp8_matmul(x_DR, dy_FR, **how)
    return fp8_grouped_weight_gradient(x_DR, dy_FR, sizes_G, alignment=block, **how)


def operand(static: StaticArgs, product: str, x: Operand, quantizer: Quantizer) -> jax.Array | QTensor:
    """x as `product`, one of PRODUCTS, reads it: a QTensor if that product runs in FP8, else an array."""
    in_fp8 = product in static.quantization.products
    if isinstance(x, PreQuantized):
        x = x.quantized if in_fp8 else x.master
    if isinstance(x, QTensor):
        return x if in_fp8 else dequantize(x)
    return quantize(x, quantizer, implementation=static.implementation) if in_fp8 else x


def matmul(static: StaticArgs, a, b, sizes_G: jax.Array | None, out_dtype: jnp.dtype) -> jax.Array:
    """a [R, K] times b [N, K], or [G, N, K] for groups of rows, transposed: [R, N]. In FP8 if a and b are QTensors,
    else in the dtype of a."""
    how = {"implementation": static.implementation}
    if not isinstance(a, QTensor):
        b = b.astype(a.dtype)
        if sizes_G is None:
            return (a @ b.mT).astype(out_dtype)
        return grouped_product(a, b, sizes_G, static.alignment, transposed=True, **how).astype(out_dtype)
    how |= {"out_dtype": out_dtype, "accumulation": static.quantization.accumulation}
    if sizes_G is None:
        return fp8_matmul(a, b, **how)
    return fp8_grouped_matmul(a, b, sizes_G, alignment=static.alignment, **how)


def residual_input(static: StaticArgs, x_RD: jax.Array | PreQuantized, multiplied: jax.Array | QTensor):
    """The x that the weight gradient reads; `multiplied` is x as the forward product read it."""
    if static.quantization.residual is not None:
        return quantize(master(x_RD), static.quantization.residual, implementation=static.implementation)
    return multiplied if "weight_gradient" in static.quantization.products else master(x_RD)


def residual_weight(static: StaticArgs, w: Operand) -> Operand:
    """The weight that the input gradient reads. Of a master copy that it does not read, only the dtype is kept."""
    if not isinstance(w, PreQuantized) or "input_gradient" not in static.quantization.products:
        return w
    return PreQuantized(jnp.zeros((0,), w.dtype), w.quantized)


def weight_cotangent(static: StaticArgs, x, dy_RF: jax.Array, w: Operand, sizes_G: jax.Array | None):
    """The gradient of W in the structure of W; None for a QTensor, which has none."""
    if isinstance(w, QTensor):
        return None
    return cotangent(w, weight_gradient(static, x, dy_RF, sizes_G, w.dtype))  # FP8: Wgrad


def cotangent(operand: jax.Array | PreQuantized, gradient: jax.Array):
    return PreQuantized(gradient, None) if isinstance(operand, PreQuantized) else gradient

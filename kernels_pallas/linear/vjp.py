"""y = x W in FP8, forward and backward, for one matrix or one for each group of rows (V3 §3.3.1, Fig. 6)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from kernels_pallas.grouped.api import fp8_grouped_matmul, fp8_grouped_weight_gradient
from kernels_pallas.grouped.layout import pad_groups, take_quantized, take_rows
from kernels_pallas.grouped_linear.api import grouped_product, grouped_weight_gradient
from kernels_pallas.matmul.accumulation import Accumulation
from kernels_pallas.matmul.api import fp8_matmul
from kernels_pallas.qtensor import BLOCK, GRADIENT, TILE, QTensor, Quantizer, dequantize
from kernels_pallas.quantize.api import quantize, quantize_transposed, requantize_transposed, swiglu, swiglu_quantize

PRODUCTS = ("forward", "input_gradient", "weight_gradient")


@dataclasses.dataclass(frozen=True)
class LinearQuantization:
    """How a Linear multiplies; the defaults are V3's. Hashable.

    input, weight, gradient   quantizers of x, of W and of dy
    saved                     what is kept of x for the weight gradient: another quantizer, or None for x as it was multiplied
    products                  which of "forward", "input_gradient", "weight_gradient" run in FP8; the others in the dtype of x
    accumulation              how partial sums are kept
    """

    input: Quantizer = TILE
    weight: Quantizer = BLOCK
    gradient: Quantizer = GRADIENT
    saved: Quantizer | None = None
    products: tuple[str, ...] = PRODUCTS
    accumulation: Accumulation = Accumulation()

    def __post_init__(self):
        for product in self.products:
            if product not in PRODUCTS:
                raise ValueError(f"products={self.products}: {product!r} is none of {', '.join(PRODUCTS)}")


@functools.partial(jax.tree_util.register_dataclass, data_fields=("master", "quantized"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class PreQuantized:
    """An operand that was quantized before it comes here: a weight on the devices that each hold a part of it, tokens
    before they are copied or sent to their experts, so that eight bits travel and are kept. Products in FP8 read
    `quantized`; `master` is what the gradient is of, and no more if all of them are. Made by `prepare` and
    `prequantize_weight`."""

    master: jax.Array
    quantized: QTensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.master.shape

    @property
    def dtype(self) -> jnp.dtype:
        return self.master.dtype


@dataclasses.dataclass(frozen=True)
class How:
    """A Linear's static arguments; `alignment` divides all group sizes."""

    format: LinearQuantization = LinearQuantization()
    alignment: int = 1
    implementation: str | tuple[str, ...] | None = None


def product(how: How, name: str, a, b, sizes_G: jax.Array | None, out_dtype: jnp.dtype) -> jax.Array:
    """a [R, K] times b [N, K] or [G, N, K] transposed; quantized operands if the product called `name` runs in FP8."""
    fields = dict(out_dtype=out_dtype, accumulation=how.format.accumulation, implementation=how.implementation)
    if name not in how.format.products:
        return _plain(how, a, b, sizes_G).astype(out_dtype)
    if sizes_G is None:
        return fp8_matmul(a, b, **fields)
    return fp8_grouped_matmul(a, b, sizes_G, alignment=how.alignment, **fields)


def _plain(how: How, a_RK: jax.Array, b: jax.Array, sizes_G: jax.Array | None) -> jax.Array:
    b = b.astype(a_RK.dtype)
    if sizes_G is None:
        return a_RK @ b.mT
    return grouped_product(a_RK, b, sizes_G, how.alignment, transposed=True, implementation=how.implementation)


def plain(x: jax.Array | PreQuantized) -> jax.Array:
    """An operand as it was before it was prepared, if it was."""
    return x.master if isinstance(x, PreQuantized) else x


def quantized(how: How, name: str, x: jax.Array | QTensor | PreQuantized, quantizer: Quantizer):
    """x as the product called `name` reads it; it may come quantized."""
    if isinstance(x, PreQuantized):
        x = x.quantized if name in how.format.products else x.master
    if isinstance(x, QTensor):
        return x if name in how.format.products else dequantize(x)
    return quantize(x, quantizer, implementation=how.implementation) if name in how.format.products else x


def save(how: How, x_RD: jax.Array | PreQuantized, multiplied):
    """What is kept of x for the weight gradient; `multiplied` is x as the forward product read it."""
    if how.format.saved is not None:
        return quantize(plain(x_RD), how.format.saved, implementation=how.implementation)
    return multiplied if "weight_gradient" in how.format.products else plain(x_RD)


def input_gradient(how: How, dy_RF: jax.Array, w: jax.Array, sizes_G: jax.Array | None) -> jax.Array:
    """dy Wᵀ [R, D]: W [D, F] has the product's K = F last already."""
    dy, weight = (
        quantized(how, "input_gradient", x, q) for x, q in ((dy_RF, how.format.gradient), (w, how.format.weight))
    )
    return product(how, "input_gradient", dy, weight, sizes_G, dy_RF.dtype)


def weight_gradient(how: How, saved, dy_RF: jax.Array, sizes_G: jax.Array | None, out_dtype: jnp.dtype) -> jax.Array:
    """xᵀ dy [D, F] or [G, D, F]: K runs over rows, so that both operands are scaled again in tiles along them."""
    if "weight_gradient" not in how.format.products:
        x_RD = dequantize(saved, dy_RF.dtype) if isinstance(saved, QTensor) else saved
        return _plain_weight_gradient(how, x_RD, dy_RF, sizes_G).astype(out_dtype)
    fields = dict(implementation=how.implementation)
    if sizes_G is not None and how.alignment % how.format.gradient.size:
        padding = pad_groups(sizes_G, dy_RF.shape[0], how.format.gradient.size)
        saved = (
            take_quantized(saved, padding.source_P)
            if isinstance(saved, QTensor)
            else take_rows(saved, padding.source_P)
        )
        dy_RF, sizes_G = take_rows(dy_RF, padding.source_P), padding.sizes_G
    x_DR = (requantize_transposed if isinstance(saved, QTensor) else quantize_transposed)(
        saved, how.format.input, **fields
    )
    dy_FR = quantize_transposed(dy_RF, how.format.gradient, **fields)
    fields |= dict(out_dtype=out_dtype, accumulation=how.format.accumulation)
    if sizes_G is None:
        return fp8_matmul(x_DR, dy_FR, **fields)
    return fp8_grouped_weight_gradient(x_DR, dy_FR, sizes_G, alignment=how.format.gradient.size, **fields)


def _plain_weight_gradient(how: How, x_RD: jax.Array, dy_RF: jax.Array, sizes_G: jax.Array | None) -> jax.Array:
    if sizes_G is None:
        return x_RD.T @ dy_RF
    return grouped_weight_gradient(x_RD, dy_RF, sizes_G, how.alignment, implementation=how.implementation)


def keep(how: How, w: jax.Array | PreQuantized) -> jax.Array | PreQuantized:
    """What the backward pass needs of a weight: of one that came quantized, of the master copy no more than the
    dtype."""
    if not isinstance(w, PreQuantized) or "input_gradient" not in how.format.products:
        return w
    return PreQuantized(jnp.zeros((0,), w.dtype), w.quantized)


def cotangent(operand: jax.Array | PreQuantized, gradient: jax.Array):
    return PreQuantized(gradient, None) if isinstance(operand, PreQuantized) else gradient


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def linear(
    how: How, x_RD: jax.Array | PreQuantized, w: jax.Array | PreQuantized, sizes_G: jax.Array | None
) -> jax.Array:
    """x W, [R, F]: one matrix [D, F], or [G, D, F] and the group sizes."""
    return forward(how, x_RD, w, sizes_G)[0]


def forward(how: How, x_RD: jax.Array | PreQuantized, w: jax.Array | QTensor | PreQuantized, sizes_G: jax.Array | None):
    """-> x W, and x as it was multiplied."""
    x, weight = quantized(how, "forward", x_RD, how.format.input), quantized(how, "forward", w, how.format.weight)
    return product(how, "forward", x, weight.mT, sizes_G, x_RD.dtype), x


def _linear_fwd(how, x_RD, w, sizes_G):
    y_RF, x = forward(how, x_RD, w, sizes_G)
    no_numbers = jax.tree.map(lambda _: None, x_RD)  # only whether it came quantized
    return y_RF, (no_numbers, save(how, x_RD, x), keep(how, w), sizes_G)


def _linear_bwd(how, residuals, dy_RF):
    x, saved, w, sizes_G = residuals
    dw = weight_gradient(how, saved, dy_RF, sizes_G, w.dtype)
    return cotangent(x, input_gradient(how, dy_RF, w, sizes_G)), cotangent(w, dw), None


linear.defvjp(_linear_fwd, _linear_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def swiglu_linear(how: How, gate_RF: jax.Array, up_RF: jax.Array, w: jax.Array, sizes_G: jax.Array | None) -> jax.Array:
    """(silu(gate) · up) W, [R, D]. What is kept is gate and up, quantized; their product is computed again in the
    backward pass (V3 §3.3.3)."""
    return swiglu_forward(how, gate_RF, up_RF, w, sizes_G)


def swiglu_forward(
    how: How, gate_RF: jax.Array, up_RF: jax.Array, w: jax.Array | QTensor | PreQuantized, sizes_G: jax.Array | None
) -> jax.Array:
    if "forward" in how.format.products:
        hidden = swiglu_quantize(gate_RF, up_RF, how.format.input, implementation=how.implementation)
    else:
        hidden = swiglu(gate_RF, up_RF)
    return product(how, "forward", hidden, quantized(how, "forward", w, how.format.weight).mT, sizes_G, gate_RF.dtype)


def _swiglu_linear_fwd(how, gate_RF, up_RF, w, sizes_G):
    saved = tuple(
        quantize(x, how.format.saved or how.format.input, implementation=how.implementation) for x in (gate_RF, up_RF)
    )
    return swiglu_forward(how, gate_RF, up_RF, w, sizes_G), (saved, keep(how, w), sizes_G)


def _swiglu_linear_bwd(how, residuals, dy_RD):
    saved, w, sizes_G = residuals
    hidden_RF, pull_back = jax.vjp(swiglu, *(dequantize(q, dy_RD.dtype) for q in saved))
    dw = weight_gradient(how, hidden_RF, dy_RD, sizes_G, w.dtype)
    return *pull_back(input_gradient(how, dy_RD, w, sizes_G)), cotangent(w, dw), None


swiglu_linear.defvjp(_swiglu_linear_fwd, _swiglu_linear_bwd)

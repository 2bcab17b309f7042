"""Choices of an FP8 Linear, and operands that come quantized."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from kernels_pallas.matmul.accumulation import Accumulation
from kernels_pallas.qtensor import BLOCK, GRADIENT, TILE, QTensor, Quantizer

PRODUCTS = ("forward", "input_gradient", "weight_gradient")  # V3 Fig. 6 calls them Fprop, Dgrad and Wgrad


@dataclasses.dataclass(frozen=True)
class LinearQuantization:
    """The number formats of a Linear's three products; the defaults are V3's (§3.3). Hashable.

    input, weight, gradient   quantizers of x, of W and of dy
    residual                  quantizer of the x that is kept for the weight gradient, or None to keep x as it was
                              multiplied
    products                  those of "forward", "input_gradient" and "weight_gradient" that run in FP8; the others run
                              in the dtype of x
    accumulation              how partial sums are kept

    Raises ValueError for a product of another name.
    """

    input: Quantizer = TILE
    weight: Quantizer = BLOCK
    gradient: Quantizer = GRADIENT
    residual: Quantizer | None = None
    products: tuple[str, ...] = PRODUCTS
    accumulation: Accumulation = Accumulation()

    def __post_init__(self):
        for product in self.products:
            if product not in PRODUCTS:
                raise ValueError(f"products={self.products}: {product!r} is none of {', '.join(PRODUCTS)}")


@functools.partial(jax.tree_util.register_dataclass, data_fields=("master", "quantized"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class PreQuantized:
    """An operand that was quantized earlier, so that eight bits travel and are kept: a weight before other devices get
    it, tokens before they are copied to their experts.

    Products in FP8 read `quantized`, the others `master`. The gradient is that of `master`. `prequantize` and
    `prequantize_weight` make it.
    """

    master: jax.Array
    quantized: QTensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.master.shape

    @property
    def dtype(self) -> jnp.dtype:
        return self.master.dtype


@dataclasses.dataclass(frozen=True)
class StaticArgs:
    """The static arguments of a Linear. `alignment` divides every group size and the number of rows."""

    quantization: LinearQuantization = LinearQuantization()
    alignment: int = 1
    implementation: str | tuple[str, ...] | None = None


def master(x: jax.Array | PreQuantized) -> jax.Array:
    """The unquantized array of an operand."""
    return x.master if isinstance(x, PreQuantized) else x

"""Linear layers in FP8 with gradients: what a user calls."""

from collections.abc import Callable

import jax

from kernels_pallas._compat import vary_alike
from kernels_pallas.linear import vjp
from kernels_pallas.linear.vjp import How, LinearQuantization, PreQuantized
from kernels_pallas.qtensor import BLOCK, TILE, QTensor, Quantizer, retile
from kernels_pallas.quantize import api as quantize_api
from kernels_pallas.quantize.reference import quantize


def prepare(
    x: jax.Array,
    quantizer: Quantizer = TILE,
    *,
    take: Callable[[jax.Array], jax.Array] = lambda x: x,
    implementation: str | tuple[str, ...] | None = None,
) -> PreQuantized:
    """Rows of x [N, D], with what the Linears below would make of them first: `take`, which moves whole rows ([N, ·] ->
    [R, ·], zeros where there is none), then moves eight bits. Its gradient is the gradient of take(x)."""
    q = quantize_api.quantize(jax.lax.stop_gradient(x), quantizer, implementation=implementation)
    q = retile(q, q.tile[1])
    return PreQuantized(take(x), QTensor(take(q.values), take(q.scales), q.tile))


def prequantize_weight(w: jax.Array, quantizer: Quantizer = BLOCK, part: tuple[int, int] | None = None) -> PreQuantized:
    """W [..., D, F], a float32 master copy, with what the Linears below would make of it first: for a W that is sent
    somewhere before it is multiplied, or multiplied more than once. Its gradient is the gradient of W.

    Through XLA, which divides it among devices as W is divided: in parts of rows × columns = `part`, if any.
    """
    return PreQuantized(w, quantize(jax.lax.stop_gradient(w), quantizer, part))


def fp8_linear(
    x: jax.Array | PreQuantized,
    w: jax.Array | QTensor | PreQuantized,
    *,
    format: LinearQuantization = LinearQuantization(),
    implementation: str | tuple[str, ...] | None = None,
) -> jax.Array:
    """x [N, D] times W [D, F] -> [N, F] in the dtype of x, forward and backward in FP8 as V3 does it (§3.3.1).

    x is quantized in 1 × 128 tiles and W in 128 × 128 blocks, from its master copy; dy in 1 × 128 tiles for the input
    gradient and in 128 × 1 for W's, which comes in W's dtype. Kept for the backward pass: x in E4M3. `format` has a
    field for each of these choices. Both may be quantized already (`prepare`, `prequantize_weight`), and W a QTensor, such
    as a released checkpoint's: then there is a forward pass only. Raises ValueError for shapes that do not match.
    """
    if len(x.shape) != 2 or len(w.shape) != 2 or x.shape[1] != w.shape[0]:
        raise ValueError(f"fp8_linear: x {x.shape} and w {w.shape} must be [N, D] and [D, F]")
    return _linear(How(format, implementation=implementation), x, w, None)


def fp8_grouped_linear(
    x: jax.Array | PreQuantized,
    w: jax.Array | QTensor | PreQuantized,
    group_sizes: jax.Array,
    *,
    alignment: int = 1,
    format: LinearQuantization = LinearQuantization(),
    implementation: str | tuple[str, ...] | None = None,
) -> jax.Array:
    """Rows of group g of x [R, D] times W[g] of W [G, D, F] -> [R, F]: `fp8_linear` for the experts of a mixture.

    `group_sizes` int32 [G]; groups lie one after another and may be empty; rows past the last give zero and have no
    gradient. `alignment` promises that every size, and R, is a multiple of it. Raises ValueError for shapes that do not
    match.
    """
    _check("fp8_grouped_linear", x, w, group_sizes, alignment)
    return _linear(How(format, alignment, implementation), x, w, group_sizes)


def fp8_swiglu_linear(
    gate: jax.Array,
    up: jax.Array,
    w: jax.Array | QTensor | PreQuantized,
    *,
    format: LinearQuantization = LinearQuantization(),
    implementation: str | tuple[str, ...] | None = None,
) -> jax.Array:
    """(silu(gate) · up) W: [N, F] twice and [F, D] -> [N, D]. Keeps gate and up quantized and computes their product
    again (V3 §3.3.3)."""
    if gate.shape != up.shape or gate.ndim != 2 or len(w.shape) != 2 or gate.shape[1] != w.shape[0]:
        raise ValueError(
            f"fp8_swiglu_linear: gate {gate.shape}, up {up.shape} and w {w.shape} must be [N, F], [N, F] and [F, D]"
        )
    return _swiglu_linear(How(format, implementation=implementation), gate, up, w, None)


def fp8_grouped_swiglu_linear(
    gate: jax.Array,
    up: jax.Array,
    w: jax.Array | QTensor | PreQuantized,
    group_sizes: jax.Array,
    *,
    alignment: int = 1,
    format: LinearQuantization = LinearQuantization(),
    implementation: str | tuple[str, ...] | None = None,
) -> jax.Array:
    """`fp8_swiglu_linear` for groups of rows: [R, F] twice, [G, F, D] and sizes [G] -> [R, D]."""
    if gate.shape != up.shape:
        raise ValueError(f"fp8_grouped_swiglu_linear: gate {gate.shape} and up {up.shape} must be alike")
    _check("fp8_grouped_swiglu_linear", gate, w, group_sizes, alignment)
    return _swiglu_linear(How(format, alignment, implementation), gate, up, w, group_sizes)


def _linear(how: How, x, w, group_sizes):
    if isinstance(w, QTensor):
        return vjp.forward(how, x, w, group_sizes)[0]
    return vjp.linear(how, *vary_alike(x, w, group_sizes))


def _swiglu_linear(how: How, gate, up, w, group_sizes):
    if isinstance(w, QTensor):
        return vjp.swiglu_forward(how, gate, up, w, group_sizes)
    return vjp.swiglu_linear(how, *vary_alike(gate, up, w, group_sizes))


def _check(
    name: str,
    x: jax.Array | PreQuantized,
    w: jax.Array | QTensor | PreQuantized,
    group_sizes: jax.Array,
    alignment: int,
) -> None:
    if len(x.shape) != 2 or len(w.shape) != 3 or x.shape[1] != w.shape[1] or group_sizes.shape != w.shape[:1]:
        raise ValueError(
            f"{name}: x {x.shape}, w {w.shape}, group_sizes {group_sizes.shape} must be [R, D], [G, D, F], [G]"
        )
    if x.shape[0] % alignment:
        raise ValueError(f"{name}: alignment={alignment} does not divide the {x.shape[0]} rows")

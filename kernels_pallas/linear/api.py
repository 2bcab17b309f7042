"""Linear layers in FP8 with gradients, and operands that are quantized ahead of them."""

import jax

from kernels_pallas._compat import vary_alike
from kernels_pallas.linear import vjp
from kernels_pallas.linear.quantization import LinearQuantization, PreQuantized, StaticArgs
from kernels_pallas.qtensor import BLOCK, TILE, QTensor, Quantizer, retile
from kernels_pallas.quantize import api as quantize_api
from kernels_pallas.quantize.reference import quantize


def prequantize(
    x: jax.Array, quantizer: Quantizer = TILE, *, implementation: str | tuple[str, ...] | None = None
) -> PreQuantized:
    """Quantizes x [N, D] as the Linears below would: for tokens that are copied to their experts first, in eight bits.

    Every row has scales of its own, so that rows may be moved: jax.tree.map(take, prequantize(x)) stands for take(x),
    and its gradient is that of take(x).
    """
    q = quantize_api.quantize(jax.lax.stop_gradient(x), quantizer, implementation=implementation)
    return PreQuantized(x, retile(q, q.tile[1]))


def prequantize_weight(
    w: jax.Array, quantizer: Quantizer = BLOCK, local_shape: tuple[int, int] | None = None
) -> PreQuantized:
    """Quantizes W [..., D, F], a float32 master copy, as the Linears below would: for a W that travels before it is
    multiplied, or is multiplied more than once. Its gradient is the gradient of W.

    XLA does it, and divides it among devices as W is divided. `local_shape` gives the rows and columns that each device
    holds, if W is divided.
    """
    return PreQuantized(w, quantize(jax.lax.stop_gradient(w), quantizer, local_shape))


def fp8_linear(
    x: jax.Array | PreQuantized,
    w: jax.Array | QTensor | PreQuantized,
    *,
    quantization: LinearQuantization = LinearQuantization(),
    implementation: str | tuple[str, ...] | None = None,
) -> jax.Array:
    """x [N, D] times W [D, F] -> [N, F] in the dtype of x, forward and backward in FP8 as in V3 (§3.3.1, Fig. 6).

    By default x is quantized in 1 × 128 tiles and W, from its master copy, in 128 × 128 blocks; dy in 1 × 128 tiles
    for the input gradient and in 128 × 1 tiles for W's gradient, which has W's dtype. The backward pass holds x in
    E4M3. `quantization` has a field for each of these choices. x and W may come quantized (`prequantize`,
    `prequantize_weight`), and W may be a QTensor, such as a released checkpoint's, which has no gradient. Raises
    ValueError for shapes that do not match.
    """
    if len(x.shape) != 2 or len(w.shape) != 2 or x.shape[1] != w.shape[0]:
        raise ValueError(f"fp8_linear: x {x.shape} and w {w.shape} must be [N, D] and [D, F]")
    return vjp.linear(StaticArgs(quantization, 1, implementation), *vary_alike(x, w, None))


def fp8_grouped_linear(
    x: jax.Array | PreQuantized,
    w: jax.Array | QTensor | PreQuantized,
    group_sizes: jax.Array,
    *,
    alignment: int = 1,
    quantization: LinearQuantization = LinearQuantization(),
    implementation: str | tuple[str, ...] | None = None,
) -> jax.Array:
    """Rows of group g of x [R, D] times W[g] of W [G, D, F] -> [R, F]: `fp8_linear` for the experts of a mixture.

    `group_sizes` is int32 [G]. Groups follow one another from row 0 and may be empty; rows past the last group give
    zero and have no gradient. The caller promises that `alignment` divides every size and R. Raises ValueError for
    shapes that do not match.
    """
    _check_grouped("fp8_grouped_linear", x, w, group_sizes, alignment)
    return vjp.linear(StaticArgs(quantization, alignment, implementation), *vary_alike(x, w, group_sizes))


def fp8_swiglu_linear(
    gate: jax.Array,
    up: jax.Array,
    w: jax.Array | QTensor | PreQuantized,
    *,
    quantization: LinearQuantization = LinearQuantization(),
    implementation: str | tuple[str, ...] | None = None,
) -> jax.Array:
    """(silu(gate) · up) W: [N, F] twice and [F, D] -> [N, D]. The backward pass holds gate and up, quantized, and
    computes their product again (V3 §3.3.3)."""
    if gate.shape != up.shape or gate.ndim != 2 or len(w.shape) != 2 or gate.shape[1] != w.shape[0]:
        raise ValueError(
            f"fp8_swiglu_linear: gate {gate.shape}, up {up.shape} and w {w.shape} must be [N, F], [N, F] and [F, D]"
        )
    return vjp.swiglu_linear(StaticArgs(quantization, 1, implementation), *vary_alike(gate, up, w, None))


def fp8_grouped_swiglu_linear(
    gate: jax.Array,
    up: jax.Array,
    w: jax.Array | QTensor | PreQuantized,
    group_sizes: jax.Array,
    *,
    alignment: int = 1,
    quantization: LinearQuantization = LinearQuantization(),
    implementation: str | tuple[str, ...] | None = None,
) -> jax.Array:
    """`fp8_swiglu_linear` for groups of rows: [R, F] twice, [G, F, D] and sizes [G] -> [R, D]."""
    if gate.shape != up.shape:
        raise ValueError(f"fp8_grouped_swiglu_linear: gate {gate.shape} and up {up.shape} must be alike")
    _check_grouped("fp8_grouped_swiglu_linear", gate, w, group_sizes, alignment)
    return vjp.swiglu_linear(StaticArgs(quantization, alignment, implementation), *vary_alike(gate, up, w, group_sizes))


def _check_grouped(
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

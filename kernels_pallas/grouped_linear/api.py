"""A Linear for each group of rows, with gradients: what a user calls."""

import functools

import jax

from kernels_pallas._compat import vary_alike
from kernels_pallas.grouped_linear import mosaic_gpu_sm90, reference
from kernels_pallas.implementations import choose

GROUPED_PRODUCT = {
    "xla": (reference.grouped_product, lambda *_: None),
    "mosaic_gpu_sm90": (mosaic_gpu_sm90.grouped_product, lambda x, w, sizes, alignment, transposed: mosaic_gpu_sm90.reason(x, w)),
}
GROUPED_WEIGHT_GRADIENT = {
    "xla": (reference.grouped_weight_gradient, lambda *_: None),
    "mosaic_gpu_sm90": (mosaic_gpu_sm90.grouped_weight_gradient, lambda x, dy, sizes, alignment: mosaic_gpu_sm90.reason(x, dy)),
}


def grouped_linear(
    x: jax.Array, w: jax.Array, group_sizes: jax.Array, *, alignment: int = 1, implementation: str | tuple[str, ...] | None = None
) -> jax.Array:
    """Rows of group g of x [R, D] times w[g] of w [G, D, F] -> [R, F], in the dtype of both; gradients are products of the same kind.

    `group_sizes` int32 [G]; groups lie one after another and may be empty; rows past the last give zero and have no gradient. `alignment`
    promises that every size, and R, is a multiple of it. Sums are float32. Raises ValueError for shapes or dtypes that do not match.
    """
    if x.ndim != 2 or w.ndim != 3 or x.shape[1] != w.shape[1] or group_sizes.shape != w.shape[:1] or x.dtype != w.dtype:
        got = f"x {x.dtype}{list(x.shape)}, w {w.dtype}{list(w.shape)}, group_sizes {list(group_sizes.shape)}"
        raise ValueError(f"grouped_linear: {got} must be [R, D], [G, D, F], [G], x and w of one dtype")
    if x.shape[0] % alignment:
        raise ValueError(f"grouped_linear: alignment={alignment} does not divide the {x.shape[0]} rows")
    return _grouped_linear(alignment, implementation, *vary_alike(x, w, group_sizes))


def _product(alignment, implementation, x, w, sizes_G, transposed: bool) -> jax.Array:
    arguments = (x, w, sizes_G, alignment, transposed)
    return choose("grouped_linear", GROUPED_PRODUCT, implementation, *arguments)(*arguments)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _grouped_linear(alignment, implementation, x_RD, w_GDF, sizes_G):
    return _product(alignment, implementation, x_RD, w_GDF, sizes_G, transposed=False)


def _fwd(alignment, implementation, x_RD, w_GDF, sizes_G):
    return _grouped_linear(alignment, implementation, x_RD, w_GDF, sizes_G), (x_RD, w_GDF, sizes_G)


def _bwd(alignment, implementation, residuals, dy_RF):
    x_RD, w_GDF, sizes_G = residuals
    arguments = (x_RD, dy_RF, sizes_G, alignment)
    dw_GDF = choose("grouped_linear", GROUPED_WEIGHT_GRADIENT, implementation, *arguments)(*arguments)
    return _product(alignment, implementation, dy_RF, w_GDF, sizes_G, transposed=True), dw_GDF, None


_grouped_linear.defvjp(_fwd, _bwd)

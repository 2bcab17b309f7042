"""A Linear for each group of rows, with gradients, and the tables of its products' implementations."""

import functools

import jax
import jax.numpy as jnp

from kernels_pallas._compat import vary_alike
from kernels_pallas.examples import COLUMNS, few, groups, normal
from kernels_pallas.grouped_linear import mosaic_gpu_sm90, reference
from kernels_pallas.implementations import PREFERRED, Operation, anything, choose

INSTEAD = (
    "XLA multiplies instead, off TPUs every row with every group's matrix; bfloat16 and arrays that are not empty "
    "avoid it"
)


def _small(x: jax.Array, w: jax.Array, sizes_G: jax.Array, alignment: int, transposed: bool) -> tuple:
    sizes, rows = groups(w.shape[0], x.shape[0], alignment)
    w_shape = (
        (len(sizes), few(w.shape[1], COLUMNS), w.shape[2])
        if transposed
        else (len(sizes), w.shape[1], few(w.shape[2], COLUMNS))
    )
    return normal(0, (rows, x.shape[1]), x.dtype), normal(1, w_shape, w.dtype), sizes, alignment, transposed


def _small_weight_gradient(x: jax.Array, dy: jax.Array, sizes_G: jax.Array, alignment: int) -> tuple:
    sizes, rows = groups(sizes_G.shape[0], x.shape[0], alignment)
    return *(normal(i, (rows, few(y.shape[1], COLUMNS)), y.dtype) for i, y in enumerate((x, dy))), sizes, alignment


GROUPED_PRODUCT = Operation(
    "grouped_linear",
    {
        "xla": (reference.grouped_product, anything),
        "mosaic_gpu_sm90": (mosaic_gpu_sm90.grouped_product, lambda x, w, *_: mosaic_gpu_sm90.reason(x, w)),
    },
    _small,
    instead=INSTEAD,
)
GROUPED_WEIGHT_GRADIENT = Operation(
    "grouped_linear's weight gradient",
    {
        "xla": (reference.grouped_weight_gradient, anything),
        "mosaic_gpu_sm90": (mosaic_gpu_sm90.grouped_weight_gradient, lambda x, dy, *_: mosaic_gpu_sm90.reason(x, dy)),
    },
    _small_weight_gradient,
    instead=INSTEAD,
)


def kernel_alignment(device: str, dtype: jnp.dtype) -> int | None:
    """The alignment with which the kernel for a kind of device moves no rows; None if it has no kernel for `dtype`."""
    has_kernel = PREFERRED.get(device) == "mosaic_gpu_sm90" and dtype == mosaic_gpu_sm90.BF16
    return mosaic_gpu_sm90.TILE_M if has_kernel else None


def grouped_linear(
    x: jax.Array,
    w: jax.Array,
    group_sizes: jax.Array,
    *,
    alignment: int = 1,
    implementation: str | tuple[str, ...] | None = None,
) -> jax.Array:
    """Rows of group g of x [R, D] times w[g] of w [G, D, F] -> [R, F], in the dtype of both; gradients are products of
    the same kind.

    `group_sizes` is int32 [G]. Groups follow one another from row 0 and may be empty; rows past the last group give
    zero and have no gradient. The caller promises that `alignment` divides every size and R. Sums are float32. Raises
    ValueError for shapes or dtypes that do not match.
    """
    if x.ndim != 2 or w.ndim != 3 or x.shape[1] != w.shape[1] or group_sizes.shape != w.shape[:1] or x.dtype != w.dtype:
        got = f"x {x.dtype}{list(x.shape)}, w {w.dtype}{list(w.shape)}, group_sizes {list(group_sizes.shape)}"
        raise ValueError(f"grouped_linear: {got} must be [R, D], [G, D, F], [G], x and w of one dtype")
    if x.shape[0] % alignment:
        raise ValueError(f"grouped_linear: alignment={alignment} does not divide the {x.shape[0]} rows")
    return _grouped_linear(alignment, implementation, *vary_alike(x, w, group_sizes))


def grouped_product(
    x_RK: jax.Array,
    w: jax.Array,
    sizes_G: jax.Array,
    alignment: int,
    *,
    transposed: bool = False,
    implementation: str | tuple[str, ...] | None = None,
) -> jax.Array:
    """Rows of group g times w[g], w [G, K, N], or, `transposed`, times w[g] transposed, w [G, N, K]: [R, N]; zero past
    the last group."""
    arguments = (x_RK, w, sizes_G, alignment, transposed)
    return choose(GROUPED_PRODUCT, implementation, *arguments)(*arguments)


def grouped_weight_gradient(
    x_RD: jax.Array,
    dy_RF: jax.Array,
    sizes_G: jax.Array,
    alignment: int,
    *,
    implementation: str | tuple[str, ...] | None = None,
) -> jax.Array:
    """x[group g] transposed times dy[group g]: [G, D, F]; zero for an empty group."""
    arguments = (x_RD, dy_RF, sizes_G, alignment)
    return choose(GROUPED_WEIGHT_GRADIENT, implementation, *arguments)(*arguments)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _grouped_linear(alignment, implementation, x_RD, w_GDF, sizes_G):
    return grouped_product(x_RD, w_GDF, sizes_G, alignment, implementation=implementation)


def _fwd(alignment, implementation, x_RD, w_GDF, sizes_G):
    return _grouped_linear(alignment, implementation, x_RD, w_GDF, sizes_G), (x_RD, w_GDF, sizes_G)


def _bwd(alignment, implementation, residuals, dy_RF):
    x_RD, w_GDF, sizes_G = residuals
    dx_RD = grouped_product(dy_RF, w_GDF, sizes_G, alignment, transposed=True, implementation=implementation)
    return dx_RD, grouped_weight_gradient(x_RD, dy_RF, sizes_G, alignment, implementation=implementation), None


_grouped_linear.defvjp(_fwd, _bwd)

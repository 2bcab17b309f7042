"""The grouped product against a loop over groups in float64, both ways it is computed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.precision.grouped import alignment, grouped_matmul

GROUP_SIZES = [[8, 16, 0, 24], [0, 0, 48, 0], [8, 8, 8, 8], [48, 0, 0, 0], [0, 0, 0, 0]]
R, D, F = 48, 5, 3


@pytest.fixture(scope="module", params=[1, 8], ids=["ragged", "blocked"])
def product(request):
    """Compiled (x, w, sizes, dy) -> (y, dx, dw)."""

    def call(x_RD, w_EDF, sizes_E, dy_RF):
        y_RF, pull = jax.vjp(
            lambda x, w: grouped_matmul(x, w, sizes_E, request.param, jax.lax.Precision.HIGHEST), x_RD, w_EDF
        )
        return y_RF, *pull(dy_RF)

    return jax.jit(call, compiler_options={"xla_backend_optimization_level": 0})


@pytest.mark.parametrize("sizes", GROUP_SIZES)
def test_equals_a_loop_over_groups(product, sizes):
    rng = np.random.default_rng(0)
    x, w, dy = rng.normal(size=(R, D)), rng.normal(size=(4, D, F)), rng.normal(size=(R, F))
    used = sum(sizes)
    dy[used:], x[used:] = 0, 0  # rows past the last group hold nothing
    y, dx, dw = (
        np.asarray(a, np.float64) for a in product(*(np.float32(a) for a in (x, w)), np.int32(sizes), np.float32(dy))
    )
    start = 0
    for group, size in enumerate(sizes):
        rows = slice(start, start + size)
        np.testing.assert_allclose(y[rows], x[rows] @ w[group], atol=1e-5)
        np.testing.assert_allclose(dx[rows], dy[rows] @ w[group].T, atol=1e-5)
        np.testing.assert_allclose(dw[group], x[rows].T @ dy[rows], atol=1e-5)
        start += size
    np.testing.assert_allclose(y[used:], 0, atol=1e-6)


def test_ragged_takes_any_group_sizes():
    rng = np.random.default_rng(1)
    x, w = rng.normal(size=(9, D)).astype(np.float32), rng.normal(size=(3, D, F)).astype(np.float32)
    y = grouped_matmul(jnp.asarray(x), jnp.asarray(w), jnp.asarray([2, 0, 7]), 1, jax.lax.Precision.HIGHEST)
    np.testing.assert_allclose(y, np.concatenate([x[:2] @ w[0], x[2:] @ w[2]]), atol=1e-5)


@pytest.mark.parametrize(
    ("rows", "groups", "device", "dtype", "expected"),
    [
        (1, 8, "cpu", "float32", 8),
        (256, 8, "cpu", "float32", 16),
        (1024, 16, "cpu", "float32", 32),
        (8192, 8, "cpu", "bfloat16", 128),
        (100_000, 4, "cpu", "float32", 128),
        (8192, 8, "tpu", "bfloat16", 1),
        (8192, 8, "sm90", "bfloat16", 128),
        (8192, 8, "sm90", "float32", 256),
        (8192, 8, "sm80", "bfloat16", 256),
        (1_000_000, 8, "sm100", "bfloat16", 1024),
    ],
)
def test_alignment(rows, groups, device, dtype, expected):
    assert alignment(rows, groups, device, jnp.dtype(dtype)) == expected


def test_products_that_share_rows_keep_them_once():
    """Gate and up read the same rows: a second copy would be the largest thing that a layer of experts keeps."""
    x, w, sizes = (
        jax.ShapeDtypeStruct((64, 48), jnp.float32),
        jax.ShapeDtypeStruct((4, 48, 24), jnp.float32),
        jnp.full(4, 16),
    )

    def pull_back(x, gate, up):
        return jax.vjp(lambda gate, up: grouped_matmul(x, gate, sizes, 8) + grouped_matmul(x, up, sizes, 8), gate, up)[
            1
        ]

    kept = [leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(pull_back, x, w, w))]
    assert sum(np.prod(shape) == 64 * 48 for shape in kept) == 1

"""Grouped products against a loop over groups, exact and in float64."""

import fp8_oracles as oracle
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import (
    Accumulation,
    Quantizer,
    Unsupported,
    fp8_grouped_matmul,
    fp8_grouped_weight_gradient,
    quantize,
    quantize_block,
    quantize_tile,
    quantize_transposed,
)
from kernels_pallas.grouped import layout, reference

R, N, K = 150, 70, 320  # tiles and blocks are cut off
RAGGED = [[60, 0, 57, 33], [0, 0, 0, 150], [1, 1, 1, 1], [0, 0, 0, 0], [150, 0, 0, 0], [0, 149, 0, 0], [7, 127, 1, 0]]
ALIGNED = [[128, 0, 256, 0], [0, 128, 0, 128], [384, 0, 0, 0], [0, 0, 0, 0]]  # of 384 rows


def grouped(a, b, sizes, alignment=1, accumulation=Accumulation()):
    static = dict(alignment=alignment, out_dtype=jnp.float32, accumulation=accumulation)
    return np.asarray(oracle.call(fp8_grouped_matmul, a, b, jnp.asarray(sizes), **static))


def loop(a_RK, b_GNK, sizes):
    """The products of the groups in float64; zero past the last group."""
    y_RN = np.zeros((a_RK.shape[0], b_GNK.shape[1]))
    for rows, b_NK in zip(oracle.slices(sizes), b_GNK, strict=True):
        y_RN[rows] = a_RK[rows] @ b_NK.T
    return y_RN


def check_integers(sizes, num_rows=R, alignment=1, tile=(1, 128), accumulation=Accumulation()):
    """Bit-equal to the loop in float64, which is exact."""
    a = oracle.small_integers(num_rows, K, 0, tile)
    b = oracle.small_integers(N, K, 1, (128, 128), groups=(len(sizes),))
    np.testing.assert_array_equal(
        grouped(a, b, sizes, alignment, accumulation), loop(oracle.exact(a), oracle.exact(b), sizes)
    )


@pytest.mark.parametrize("sizes", RAGGED, ids=str)
def test_ragged_groups_of_small_integers_are_exact(sizes):
    check_integers(sizes)


@pytest.mark.parametrize("sizes", ALIGNED, ids=str)
def test_aligned_groups_of_small_integers_are_exact(sizes):
    check_integers(sizes, num_rows=384, alignment=128)


def test_other_alignments_tiles_and_sums_are_exact_too():
    check_integers([8, 0, 24, 16], num_rows=56, alignment=8)
    check_integers([0, 1, 0], num_rows=1)
    check_integers([60, 0, 57, 33], tile=(128, 128))
    check_integers([60, 0, 57, 33], accumulation=Accumulation(None, "fp22_register"))


@pytest.mark.parametrize("kind", ["normal", "outlier_channels", "outlier_rows", "above_448", "zeros"])
def test_within_bounds_of_float64(kind):
    sizes = [60, 0, 57, 20]
    x, w = oracle.matrix(kind, R, K), oracle.matrix("normal", 4 * N, K, 1).reshape(4, N, K)
    a, b = oracle.call(quantize_tile, x), oracle.call(quantize_block, w)
    got, a64, b64 = grouped(a, b, sizes), oracle.exact(a), oracle.exact(b)
    assert np.all(
        np.abs(got - loop(a64, b64, sizes)) <= 200 * oracle.ROUNDOFF * loop(np.abs(a64), np.abs(b64), sizes) + 1e-30
    )
    meant = loop(x.astype(np.float64), w.astype(np.float64), sizes)
    for rows in oracle.slices(sizes):
        assert oracle.calc_diff(got[rows], meant[rows]) < 1e-3


def test_deep():
    a, b, sizes = oracle.small_integers(9, 4096, 0), oracle.small_integers(5, 4096, 1, (128, 128), groups=(2,)), [4, 5]
    np.testing.assert_array_equal(grouped(a, b, sizes), loop(oracle.exact(a), oracle.exact(b), sizes))


def weight_gradient(x, dy, sizes, accumulation=Accumulation(), alignment=128):
    static = dict(alignment=alignment, accumulation=accumulation)
    return np.asarray(oracle.call(fp8_grouped_weight_gradient, x, dy, jnp.asarray(sizes), **static))


def check_weight_gradient_integers(sizes, accumulation=Accumulation(), tile=(1, 128)):
    x, dy = oracle.small_integers(60, 384, 0, tile), oracle.small_integers(70, 384, 1)
    expected = [oracle.exact(x)[:, columns] @ oracle.exact(dy)[:, columns].T for columns in oracle.slices(sizes)]
    np.testing.assert_array_equal(weight_gradient(x, dy, sizes, accumulation), expected)


@pytest.mark.parametrize(
    "accumulation", [Accumulation(), Accumulation(None), Accumulation(256, "fp22_register")], ids=str
)
@pytest.mark.parametrize("sizes", ALIGNED, ids=str)
def test_weight_gradient_of_small_integers_is_exact(sizes, accumulation):
    check_weight_gradient_integers(sizes, accumulation)


def test_weight_gradient_with_coarse_scales():
    check_weight_gradient_integers(ALIGNED[0], tile=(128, 128))
    check_weight_gradient_integers(ALIGNED[0], tile=(60, 384))


def test_weight_gradient_within_bounds_of_float64():
    x, dy, sizes = oracle.matrix("normal", 384, 60), oracle.matrix("outlier_rows", 384, 70, 1), [128, 0, 256]
    got = weight_gradient(*(oracle.call(quantize_transposed, z) for z in (x, dy)), sizes)
    for group, rows in enumerate(oracle.slices(sizes)):
        assert oracle.calc_diff(got[group], x[rows].T.astype(np.float64) @ dy[rows]) < 1e-3


@pytest.mark.parametrize("promote_every", [128, None])
def test_a_nan_stays_in_its_group(promote_every):
    x, dy = oracle.matrix("normal", 256, 30), oracle.matrix("normal", 256, 20, 1)
    x[130, 3], dy[200, 5] = np.nan, np.inf
    spoilt = np.isnan(
        weight_gradient(
            *(oracle.call(quantize_transposed, z) for z in (x, dy)), [128, 128], Accumulation(promote_every)
        )
    )
    assert not spoilt[0].any() and spoilt[1, 3].all() and spoilt[1, :, 5].all() and spoilt[1].sum() == 30 + 20 - 1
    y = grouped(oracle.call(quantize_tile, x), oracle.call(quantize_block, np.ones((2, 8, 30), np.float32)), [131, 100])
    assert np.isnan(y[130]).all() and np.isfinite(np.delete(y, 130, axis=0)).all() and not y[231:].any()


@pytest.mark.parametrize("sizes", RAGGED, ids=str)
@pytest.mark.parametrize("block", [8, 128])
def test_padding_moves_each_group_to_a_multiple_of_the_block(sizes, block):
    padding = layout.pad_groups(jnp.asarray(sizes), R, block)
    start, targets = 0, []
    for size in sizes:
        targets += range(start, start + size)
        start += -(-size // block) * block
    num_padded = padding.source_P.size
    assert num_padded % block == 0 and num_padded >= start
    np.testing.assert_array_equal(padding.sizes_G, [-(-size // block) * block for size in sizes])
    np.testing.assert_array_equal(padding.target_R, targets + [num_padded] * (R - len(targets)))
    source = np.full(num_padded, R)
    source[targets] = np.arange(len(targets))
    np.testing.assert_array_equal(padding.source_P, source)


@pytest.mark.parametrize(
    ("num_rows", "num_groups", "fields", "block"),
    [
        (1000, 4, {}, 64),  # half a mean group is 125
        (1024, 4, {}, 128),
        (4096, 4, {}, 128),
        (5, 7, {}, 8),
        (1024, 4, {"share": 4}, 64),
        (4096, 4, {"smallest": 32, "largest": 512}, 512),
        (8, 4, {"smallest": 32, "largest": 512}, 32),
    ],
)
def test_blocks_are_powers_of_two_at_or_below_a_share_of_a_mean_group(num_rows, num_groups, fields, block):
    assert layout.choose_block(num_rows, num_groups, **fields) == block


@pytest.mark.parametrize("scope", ["tile", "block", "tensor"])
def test_rows_keep_their_scales_where_they_go(scope):
    q = oracle.call(quantize, oracle.matrix("outlier_rows", 140, 200), quantizer=Quantizer(scope))
    rows = np.array([3, 139, 140, 0, 128])
    expected = np.concatenate([oracle.exact(q), np.zeros((1, 200))])[rows]
    np.testing.assert_array_equal(oracle.exact(layout.take_quantized(q, jnp.asarray(rows))), expected)


def test_group_boundaries_off_by_one_are_caught():
    pad, right = layout.pad_groups, layout.group_of
    with (
        oracle.planted(reference, "pad_groups", lambda sizes, *args: pad(sizes.at[0].add(1).at[2].add(-1), *args)),
        pytest.raises(AssertionError),
    ):
        check_integers(RAGGED[0])
    with oracle.planted(reference, "group_of", lambda rows, sizes: right(rows + 128, sizes)):
        with pytest.raises(AssertionError):
            check_integers(ALIGNED[0], num_rows=384, alignment=128)
        with pytest.raises(AssertionError):
            check_weight_gradient_integers(ALIGNED[0])


def test_requests_that_do_not_fit_are_refused():
    a, b = oracle.small_integers(130, 128, 0), oracle.small_integers(8, 128, 0, (128, 128), groups=(2,))
    with pytest.raises(ValueError, match=r"must be \[R, K\], \[G, N, K\], \[G\]"):
        fp8_grouped_matmul(a, b, jnp.array([1, 2, 3]))
    with pytest.raises(ValueError, match="alignment=128 does not divide the 130 rows"):
        fp8_grouped_matmul(a, b, jnp.array([1, 2]), alignment=128)
    with pytest.raises(ValueError, match="P a multiple of alignment=128"):
        fp8_grouped_weight_gradient(a.mT, a.mT, jnp.array([128, 2]))
    wide = oracle.small_integers(4, 384, 0, (1, 256))
    with pytest.raises(ValueError, match="lie across groups"):
        fp8_grouped_weight_gradient(wide, wide, jnp.array([384]), alignment=384)
    with pytest.raises(Unsupported, match="These would do it: .*xla"):
        fp8_grouped_matmul(a, b, jnp.array([1, 2]), implementation="triton")

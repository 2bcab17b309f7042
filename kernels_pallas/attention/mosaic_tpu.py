"""Attention on TPUs, through Pallas Mosaic. It was compiled and interpreted; no TPU has run it.

The algorithm is that of FlashAttention-2 (arXiv 2307.08691), as in `mosaic_gpu_sm90`, transposed. Scores are [keys,
queries], so that a query's maximum, sum, lse and δ lie along lanes, and maxima and sums over keys run over sublanes,
which is cheap. Results that are sums over keys come out transposed, and XLA transposes them back; heads must go before
positions anyway, for blocks of [positions, width].

Blocks of keys that no query of a block can see are neither copied nor computed: the index of the block to copy does not
change.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas._compat import output, priced
from kernels_pallas.attention.reference import MASKED
from kernels_pallas.tpu import LANES, block_of

BLOCKS = (512, 256, 128)  # of queries and of keys: the largest that divides the length
BF16 = jnp.dtype(jnp.bfloat16)
LOG2_E = math.log2(math.e)
SEMANTICS = pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"))


def reason(q: jax.Array, k: jax.Array, v: jax.Array) -> str | None:
    if {q.dtype, k.dtype, v.dtype} != {BF16}:
        return f"attends in bfloat16, not {q.dtype}, {k.dtype} and {v.dtype}"
    if q.shape[-1] % 64 or v.shape[-1] % 64 or max(q.shape[-1], v.shape[-1]) > 256:
        return f"takes heads of multiples of 64 up to 256, not {q.shape[-1]} and {v.shape[-1]}"
    if 0 in q.shape or q.shape[1] % LANES or k.shape[1] % LANES:
        return f"takes lengths that are multiples of {LANES}, not {q.shape[1]} and {k.shape[1]}"
    return None


def forward(q_BTHk, k_BSHk, v_BSHv, query_segments_BT, segments_BS, first, scale: float) -> tuple[jax.Array, jax.Array]:
    """-> o [B, T, H, v] and lse [B, H, T] to the base 2, float32."""
    sizes = Sizes(q_BTHk, v_BSHv)

    def body(
        first_ref,
        q_ref,
        k_ref,
        v_ref,
        query_segments_ref,
        segments_ref,
        o_ref,
        lse_ref,
        largest_ref,
        total_ref,
        sum_ref,
    ):
        i, j = pl.program_id(2), pl.program_id(3)

        @pl.when(j == 0)
        def _():
            largest_ref[...] = jnp.full_like(largest_ref, MASKED)
            total_ref[...], sum_ref[...] = jnp.zeros_like(total_ref), jnp.zeros_like(sum_ref)

        @pl.when(j <= sizes.last_keys(i, first_ref))
        def _():
            mask = sizes.visible(i, j, first_ref, query_segments_ref, segments_ref)
            s_SQ = jnp.where(mask, contract(k_ref[...], q_ref[...], 1, 1) * (scale * LOG2_E), MASKED)
            larger = jnp.maximum(largest_ref[...], jnp.max(s_SQ, axis=0, keepdims=True))
            p_SQ, shrink = jnp.exp2(s_SQ - larger), jnp.exp2(largest_ref[...] - larger)
            total_ref[...] = total_ref[...] * shrink + jnp.sum(p_SQ, axis=0, keepdims=True)
            sum_ref[...] = sum_ref[...] * shrink + contract(v_ref[...], p_SQ.astype(BF16), 0, 0)
            largest_ref[...] = larger

        @pl.when(j == sizes.key_blocks - 1)
        def _():
            o_ref[...] = (sum_ref[...] / total_ref[...]).astype(BF16)
            lse_ref[...] = largest_ref[...] + jnp.log2(total_ref[...])

    operands = (
        heads_first(q_BTHk),
        heads_first(k_BSHk),
        heads_first(v_BSHv),
        query_segments_BT[:, None],
        segments_BS[:, :, None],
    )
    specs = [sizes.queries(sizes.width), sizes.keys(sizes.width), sizes.keys(sizes.values), *sizes.segments()]
    results = sizes.transposed(sizes.values), sizes.rows()
    scratch = [(1, sizes.query_block), (1, sizes.query_block), (sizes.values, sizes.query_block)]
    o_BHvT, lse_BH1T = call(
        "attention", body, sizes.grid, first, operands, specs, results, scratch, sizes.flops(sizes.width + sizes.values)
    )
    return o_BHvT.transpose(0, 3, 1, 2), lse_BH1T[:, :, 0]


def query_gradient(
    q_BTHk, k_BSHk, v_BSHv, query_segments_BT, segments_BS, first, scale: float, do_BTHv, lse_BHT, delta_BHT
) -> jax.Array:
    """-> dq [B, T, H, k]."""
    sizes = Sizes(q_BTHk, v_BSHv)

    def body(
        first_ref, q_ref, k_ref, v_ref, query_segments_ref, segments_ref, do_ref, lse_ref, delta_ref, dq_ref, sum_ref
    ):
        i, j = pl.program_id(2), pl.program_id(3)

        @pl.when(j == 0)
        def _():
            sum_ref[...] = jnp.zeros_like(sum_ref)

        @pl.when(j <= sizes.last_keys(i, first_ref))
        def _():
            mask = sizes.visible(i, j, first_ref, query_segments_ref, segments_ref)
            s_SQ = contract(k_ref[...], q_ref[...], 1, 1) * (scale * LOG2_E)
            p_SQ = jnp.where(mask, jnp.exp2(s_SQ - lse_ref[...]), 0.0)
            ds_SQ = p_SQ * (contract(v_ref[...], do_ref[...], 1, 1) - delta_ref[...])
            sum_ref[...] += contract(k_ref[...], ds_SQ.astype(BF16), 0, 0)

        @pl.when(j == sizes.key_blocks - 1)
        def _():
            dq_ref[...] = (sum_ref[...] * scale).astype(BF16)

    operands = (
        heads_first(q_BTHk),
        heads_first(k_BSHk),
        heads_first(v_BSHv),
        query_segments_BT[:, None],
        segments_BS[:, :, None],
    )
    operands += heads_first(do_BTHv), lse_BHT[:, :, None], delta_BHT[:, :, None]
    specs = [sizes.queries(sizes.width), sizes.keys(sizes.width), sizes.keys(sizes.values), *sizes.segments()]
    specs += [sizes.queries(sizes.values), sizes.rows()[1], sizes.rows()[1]]
    flops, scratch = sizes.flops(2 * sizes.width + sizes.values), [(sizes.width, sizes.query_block)]
    (dq_BHkT,) = call(
        "attention_dq", body, sizes.grid, first, operands, specs, (sizes.transposed(sizes.width),), scratch, flops
    )
    return dq_BHkT.transpose(0, 3, 1, 2)


def key_and_value_gradients(
    q_BTHk, k_BSHk, v_BSHv, query_segments_BT, segments_BS, first, scale: float, do_BTHv, lse_BHT, delta_BHT
) -> tuple[jax.Array, jax.Array]:
    """-> dk [B, S, H, k], dv [B, S, H, v]."""
    sizes = Sizes(q_BTHk, v_BSHv, keys_first=True)

    def body(
        first_ref,
        q_ref,
        k_ref,
        v_ref,
        query_segments_ref,
        segments_ref,
        do_ref,
        lse_ref,
        delta_ref,
        dk_ref,
        dv_ref,
        key_sum_ref,
        value_sum_ref,
    ):
        j, i = pl.program_id(2), pl.program_id(3)

        @pl.when(i == 0)
        def _():
            key_sum_ref[...], value_sum_ref[...] = jnp.zeros_like(key_sum_ref), jnp.zeros_like(value_sum_ref)

        @pl.when(i >= sizes.first_queries(j, first_ref))
        def _():
            mask = sizes.visible(i, j, first_ref, query_segments_ref, segments_ref)
            s_SQ = contract(k_ref[...], q_ref[...], 1, 1) * (scale * LOG2_E)
            p_SQ = jnp.where(mask, jnp.exp2(s_SQ - lse_ref[...]), 0.0)
            ds_SQ = p_SQ * (contract(v_ref[...], do_ref[...], 1, 1) - delta_ref[...])
            value_sum_ref[...] += contract(p_SQ.astype(BF16), do_ref[...], 1, 0)
            key_sum_ref[...] += contract(ds_SQ.astype(BF16), q_ref[...], 1, 0)

        @pl.when(i == sizes.query_blocks - 1)
        def _():
            dk_ref[...], dv_ref[...] = (key_sum_ref[...] * scale).astype(BF16), value_sum_ref[...].astype(BF16)

    operands = (
        heads_first(q_BTHk),
        heads_first(k_BSHk),
        heads_first(v_BSHv),
        query_segments_BT[:, None],
        segments_BS[:, :, None],
    )
    operands += heads_first(do_BTHv), lse_BHT[:, :, None], delta_BHT[:, :, None]
    specs = [sizes.queries(sizes.width), sizes.keys(sizes.width), sizes.keys(sizes.values), *sizes.segments()]
    specs += [sizes.queries(sizes.values), sizes.rows()[1], sizes.rows()[1]]
    B, H, S = *sizes.grid[:2], sizes.key_blocks * sizes.key_block
    results = tuple(((B, H, S, width), sizes.keys(width), BF16) for width in (sizes.width, sizes.values))
    scratch = [(sizes.key_block, sizes.width), (sizes.key_block, sizes.values)]
    flops = sizes.flops(2 * (sizes.width + sizes.values))
    dk_BHSk, dv_BHSv = call("attention_dkv", body, sizes.grid, first, operands, specs, results, scratch, flops)
    return heads_first(dk_BHSk), heads_first(dv_BHSv)


class Sizes:
    """Sizes of blocks, and their grid: (sequence, head, queries, keys) or, with `keys_first`, (sequence, head, keys,
    queries)."""

    def __init__(self, q_BTHk: jax.Array, v_BSHv: jax.Array, keys_first: bool = False):
        (B, T, H, self.width), (S, self.values) = q_BTHk.shape, v_BSHv.shape[1::2]
        self.query_block, self.key_block = (next(block for block in BLOCKS if length % block == 0) for length in (T, S))
        self.query_blocks, self.key_blocks = T // self.query_block, S // self.key_block
        self.keys_first, self.shape = keys_first, (B, H, T)
        self.grid = (
            B,
            H,
            *((self.key_blocks, self.query_blocks) if keys_first else (self.query_blocks, self.key_blocks)),
        )

    def flops(self, width: int) -> int:
        """The FLOPs of products that are `width` wide in all, of the half of the scores that a causal mask leaves."""
        B, H, T = self.shape
        return B * H * T * self.key_blocks * self.key_block * width

    def last_keys(self, i: jax.Array, first_ref) -> jax.Array:
        """The last block of keys that a query of block i sees."""
        return jnp.minimum(block_of(first_ref[0] + (i + 1) * self.query_block - 1, self.key_block), self.key_blocks - 1)

    def first_queries(self, j: jax.Array, first_ref) -> jax.Array:
        """The first block of queries that sees keys of block j; beyond the last if none does."""
        return block_of(jnp.maximum(j * self.key_block - first_ref[0], 0), self.query_block)

    def visible(self, i: jax.Array, j: jax.Array, first_ref, query_segments_ref, segments_ref) -> jax.Array:
        """[keys, queries] bool: keys at or before the query's position and of its segment."""
        shape = self.key_block, self.query_block
        query = first_ref[0] + i * self.query_block + lax.broadcasted_iota(jnp.int32, shape, 1)
        key = j * self.key_block + lax.broadcasted_iota(jnp.int32, shape, 0)
        return (query >= key) & (query_segments_ref[...] == segments_ref[...])

    def _spec(self, shape: tuple[int | None, ...], where: Callable) -> pl.BlockSpec:
        """A block at where(sequence, head, block of queries, block of keys). It is not copied where nothing sees it."""

        def index(b, h, outer, inner, first_ref):
            if self.keys_first:
                return where(
                    b,
                    h,
                    jnp.clip(
                        inner,
                        jnp.minimum(self.first_queries(outer, first_ref), self.query_blocks - 1),
                        self.query_blocks - 1,
                    ),
                    outer,
                )
            return where(b, h, outer, jnp.minimum(inner, self.last_keys(outer, first_ref)))

        return pl.BlockSpec(shape, index)

    def queries(self, width: int) -> pl.BlockSpec:
        return self._spec((None, None, self.query_block, width), lambda b, h, i, j: (b, h, i, 0))

    def keys(self, width: int) -> pl.BlockSpec:
        return self._spec((None, None, self.key_block, width), lambda b, h, i, j: (b, h, j, 0))

    def segments(self) -> tuple[pl.BlockSpec, pl.BlockSpec]:
        """The segments of queries, along lanes, and of keys, along sublanes."""
        return (
            self._spec((None, 1, self.query_block), lambda b, h, i, j: (b, 0, i)),
            self._spec((None, self.key_block, 1), lambda b, h, i, j: (b, j, 0)),
        )

    def transposed(self, width: int) -> tuple[tuple[int, ...], pl.BlockSpec, jnp.dtype]:
        """The shape, blocks and dtype of a result [B, H, width, T]."""
        B, H, T = self.shape
        return (
            (B, H, width, T),
            self._spec((None, None, width, self.query_block), lambda b, h, i, j: (b, h, 0, i)),
            BF16,
        )

    def rows(self) -> tuple[tuple[int, ...], pl.BlockSpec, jnp.dtype]:
        """The shape, blocks and dtype of a number for each query, [B, H, 1, T]."""
        B, H, T = self.shape
        return (
            (B, H, 1, T),
            self._spec((None, None, 1, self.query_block), lambda b, h, i, j: (b, h, 0, i)),
            jnp.dtype(jnp.float32),
        )


def call(name: str, body: Callable, grid: tuple[int, ...], first, operands, in_specs, results, scratch, flops: int):
    first = jnp.full((1,), first, jnp.int32)
    kernel = pl.pallas_call(
        body,
        out_shape=[output(shape, dtype, first, *operands) for shape, _, dtype in results],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=grid,
            in_specs=in_specs,
            out_specs=[spec for _, spec, _ in results],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        ),
        compiler_params=SEMANTICS,
        name=name,
    )
    with priced(flops, BF16, grid):
        return kernel(first, *operands)


def heads_first(x: jax.Array) -> jax.Array:
    """[B, T, H, ·] -> [B, H, T, ·], and back."""
    return x.swapaxes(1, 2)


def contract(a: jax.Array, b: jax.Array, of_a: int, of_b: int) -> jax.Array:
    """The product that sums over axis `of_a` of a and `of_b` of b, float32."""
    return lax.dot_general(a, b, (((of_a,), (of_b,)), ((), ())), preferred_element_type=jnp.float32)

"""Attention on NVIDIA Hopper, through Pallas Mosaic GPU. It was compiled and interpreted; no GPU has run it.

    s = q kᵀ scale, masked      p = exp(s - lse)    o = p v         lse = log Σ exp(s), over keys, 64 at a time
    ds = p (do vᵀ - δ) scale    dq = ds k           dk = dsᵀ q      dv = pᵀ do      δ = Σ o do

The algorithm is that of FlashAttention-2 (arXiv 2307.08691). Forward, each row keeps a running maximum and sum along
the keys, and scales its sums again when the maximum grows. Backward, the scores are computed again from lse, once for
dq, where a block of threads goes along the keys of its queries, and once for dk and dv, where it goes along the queries
of its keys. A block of threads has two warpgroups that compute, 64 rows each, and one that copies the next step into
shared memory. Exponentials and lse are to the base 2.

A query sees the keys at or before its own position and of its own segment; steps that no query of a block can see are
skipped. Arrays are read and written as [B, T, H, ·], without a transpose. Copies read zeros beyond an end, which the
mask hides, and write nothing there. A step reads with ordinary loads from a slot that the next copy fills:
`commit_smem` orders the two.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas._compat import load, output, plgpu, priced, vary_alike
from kernels_pallas.attention.reference import MASKED
from kernels_pallas.hopper import ROWS, tiled, unavailable

# One warpgroup holds ROWS queries and goes along their keys, KEYS at a time; or it holds ROWS keys and goes along their
# queries, QUERIES at a time: with 64, two sums of 64 rows and two blocks of scores do not fit its registers (compiled:
# it spills).
KEYS = 64
QUERIES = 32
BLOCK = 2 * ROWS
STAGES = 2  # steps in shared memory
BF16 = jnp.dtype(jnp.bfloat16)
LOG2_E = math.log2(math.e)


def reason(q: jax.Array, k: jax.Array, v: jax.Array) -> str | None:
    if missing := unavailable():
        return missing
    if {q.dtype, k.dtype, v.dtype} != {BF16}:
        return f"attends in bfloat16, not {q.dtype}, {k.dtype} and {v.dtype}"
    if q.shape[-1] not in (64, 128, 192) or v.shape[-1] not in (64, 128):
        widths = f"{q.shape[-1]} and {v.shape[-1]}"
        return f"takes heads of 64, 128 or 192 for queries and keys and of 64 or 128 for values, not {widths}"
    if 0 in q.shape or q.shape[1] % 8 or k.shape[1] % 8:
        return f"takes lengths that are multiples of 8, not {q.shape[1]} and {k.shape[1]}"
    return None


def forward(q_BTHk, k_BSHk, v_BSHv, query_segments_BT, segments_BS, first, scale: float) -> tuple[jax.Array, jax.Array]:
    """-> o [B, T, H, v] and lse [B, H, T] to the base 2, float32."""
    (B, T, H, width), (S, values) = q_BTHk.shape, v_BSHv.shape[1::2]

    def body(
        q_ref,
        k_ref,
        v_ref,
        query_segments_ref,
        segments_ref,
        first_ref,
        o_ref,
        lse_ref,
        q_smem,
        o_smem,
        seen_by_smem,
        lse_smem,
        barrier,
    ):
        b, h, warpgroup, start = coordinates()
        rows = pl.ds(start, ROWS)
        shape = ROWS, KEYS

        def compute(run):
            copies = (q_ref.at[b, rows, h], q_smem), (query_segments_ref.at[b, rows], seen_by_smem)
            fetch(copies, warpgroup, barrier)
            zero = lambda *shape: jnp.zeros(shape, jnp.float32)
            o = plgpu.layout_cast(zero(ROWS, values), plgpu.Layout.WGMMA)
            largest, total = (plgpu.layout_cast(zero(ROWS) + x, plgpu.Layout.WGMMA.reduce(1)) for x in (MASKED, 0.0))
            o, largest, total = run((o, largest, total))
            o_smem.at[warpgroup][...] = (o / along_rows(total, o.shape)).astype(BF16)
            lse_smem.at[warpgroup][...] = largest + jnp.log2(total)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(o_smem.at[warpgroup], o_ref.at[b, rows, h])
            plgpu.copy_smem_to_gmem(lse_smem.at[warpgroup], lse_ref.at[b, h, rows])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        def step(indices, k_slot, v_slot, segments_slot, carry):
            o, largest, total = carry
            mask = visible(
                first_ref[0] + start, indices[0] * KEYS, seen_by_smem.at[warpgroup], segments_slot, shape, queries=0
            )
            s = jnp.where(mask, product(shape, q_smem.at[warpgroup], k_slot.T) * (scale * LOG2_E), MASKED)
            larger = jnp.maximum(largest, jnp.max(s, axis=1))
            p, shrink = jnp.exp2(s - along_rows(larger, shape)), jnp.exp2(largest - larger)
            o = add_product(o * along_rows(shrink, o.shape), p.astype(BF16), v_slot)
            plgpu.commit_smem()
            return o, larger, total * shrink + jnp.sum(p, axis=1)

        last = jnp.minimum(first_ref[0] + (lax.axis_index("block") + 1) * BLOCK, S)
        pipeline(step, compute, pl.cdiv(last, KEYS), matrix(KEYS, width), matrix(KEYS, values), vector(KEYS))(
            k_ref.at[b, :, h], v_ref.at[b, :, h], segments_ref.at[b]
        )

    arrays = q_BTHk, k_BSHk, v_BSHv, query_segments_BT, segments_BS, _first(first)
    shapes = ((B, T, H, values), BF16), ((B, H, T), jnp.float32)
    scratch = [
        _rows(width, KEYS),
        _rows(values, KEYS),
        _vector(jnp.int32),
        _vector(jnp.float32),
        plgpu.Barrier(num_arrivals=2, num_barriers=2),
    ]
    return launch(body, (B, H, T), shapes, scratch, B * H * T * S * (width + values), arrays)


def query_gradient(
    q_BTHk, k_BSHk, v_BSHv, query_segments_BT, segments_BS, first, scale: float, do_BTHv, lse_BHT, delta_BHT
) -> jax.Array:
    """-> dq [B, T, H, k]."""
    (B, T, H, width), (S, values) = q_BTHk.shape, v_BSHv.shape[1::2]

    def body(
        q_ref, k_ref, v_ref, query_segments_ref, segments_ref, first_ref, do_ref, lse_ref, delta_ref,
        dq_ref, q_smem, do_smem, seen_by_smem, lse_smem, delta_smem, barrier,
    ):  # fmt: skip
        b, h, warpgroup, start = coordinates()
        rows = pl.ds(start, ROWS)
        shape = ROWS, KEYS

        def compute(run):
            copies = (
                (q_ref.at[b, rows, h], q_smem),
                (do_ref.at[b, rows, h], do_smem),
                (query_segments_ref.at[b, rows], seen_by_smem),
                (lse_ref.at[b, h, rows], lse_smem),
                (delta_ref.at[b, h, rows], delta_smem),
            )
            fetch(copies, warpgroup, barrier)
            dq = run(plgpu.layout_cast(jnp.zeros((ROWS, width), jnp.float32), plgpu.Layout.WGMMA))
            q_smem.at[warpgroup][...] = (dq * scale).astype(BF16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_smem.at[warpgroup], dq_ref.at[b, rows, h])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        def step(indices, k_slot, v_slot, segments_slot, dq):
            s = product(shape, q_smem.at[warpgroup], k_slot.T) * (scale * LOG2_E)
            p = jnp.exp2(s - along_rows(load(lse_smem.at[warpgroup], plgpu.Layout.WGMMA.reduce(1)), shape))
            p = jnp.where(
                visible(
                    first_ref[0] + start, indices[0] * KEYS, seen_by_smem.at[warpgroup], segments_slot, shape, queries=0
                ),
                p,
                0.0,
            )
            dp = product(shape, do_smem.at[warpgroup], v_slot.T)
            ds = p * (dp - along_rows(load(delta_smem.at[warpgroup], plgpu.Layout.WGMMA.reduce(1)), shape))
            dq = add_product(dq, ds.astype(BF16), k_slot)
            plgpu.commit_smem()
            return dq

        last = jnp.minimum(first_ref[0] + (lax.axis_index("block") + 1) * BLOCK, S)
        pipeline(step, compute, pl.cdiv(last, KEYS), matrix(KEYS, width), matrix(KEYS, values), vector(KEYS))(
            k_ref.at[b, :, h], v_ref.at[b, :, h], segments_ref.at[b]
        )

    arrays = q_BTHk, k_BSHk, v_BSHv, query_segments_BT, segments_BS, _first(first), do_BTHv, lse_BHT, delta_BHT
    scratch = [_rows(width, KEYS), _rows(values, KEYS), _vector(jnp.int32), _vector(jnp.float32), _vector(jnp.float32)]
    scratch.append(plgpu.Barrier(num_arrivals=5, num_barriers=2))
    flops = B * H * T * S * (2 * width + values)
    return launch(body, (B, H, T), (((B, T, H, width), BF16),), scratch, flops, arrays)[0]


def key_and_value_gradients(
    q_BTHk, k_BSHk, v_BSHv, query_segments_BT, segments_BS, first, scale: float, do_BTHv, lse_BHT, delta_BHT
) -> tuple[jax.Array, jax.Array]:
    """-> dk [B, S, H, k], dv [B, S, H, v]."""
    (B, T, H, width), (S, values) = q_BTHk.shape, v_BSHv.shape[1::2]

    def body(
        q_ref, k_ref, v_ref, query_segments_ref, segments_ref, first_ref, do_ref, lse_ref, delta_ref,
        dk_ref, dv_ref, k_smem, v_smem, segments_smem, barrier,
    ):  # fmt: skip
        b, h, warpgroup, start = coordinates()
        rows = pl.ds(start, ROWS)
        shape = ROWS, QUERIES
        skipped = lax.div(jnp.maximum(lax.axis_index("block") * BLOCK - first_ref[0], 0), jnp.int32(QUERIES))

        def compute(run):
            copies = (
                (k_ref.at[b, rows, h], k_smem),
                (v_ref.at[b, rows, h], v_smem),
                (segments_ref.at[b, rows], segments_smem),
            )
            fetch(copies, warpgroup, barrier)
            dk, dv = run(
                tuple(plgpu.layout_cast(jnp.zeros((ROWS, n), jnp.float32), plgpu.Layout.WGMMA) for n in (width, values))
            )
            k_smem.at[warpgroup][...], v_smem.at[warpgroup][...] = (dk * scale).astype(BF16), dv.astype(BF16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(k_smem.at[warpgroup], dk_ref.at[b, rows, h])
            plgpu.copy_smem_to_gmem(v_smem.at[warpgroup], dv_ref.at[b, rows, h])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        def step(indices, q_slot, do_slot, seen_by_slot, lse_slot, delta_slot, carry):
            dk, dv = carry
            s = product(shape, k_smem.at[warpgroup], q_slot.T) * (scale * LOG2_E)
            p = jnp.exp2(s - along_columns(load(lse_slot, plgpu.Layout.WGMMA.reduce(0)), shape))
            first_query = first_ref[0] + (skipped + indices[0]) * QUERIES
            p = jnp.where(
                visible(first_query, start, seen_by_slot, segments_smem.at[warpgroup], shape, queries=1), p, 0.0
            )
            dv = add_product(dv, p.astype(BF16), do_slot)
            dp = product(shape, v_smem.at[warpgroup], do_slot.T)
            ds = p * (dp - along_columns(load(delta_slot, plgpu.Layout.WGMMA.reduce(0)), shape))
            dk = add_product(dk, ds.astype(BF16), q_slot)
            plgpu.commit_smem()
            return dk, dv

        steps = jnp.maximum(pl.cdiv(T, QUERIES) - skipped, 0)
        specs = (
            matrix(QUERIES, width, skipped),
            matrix(QUERIES, values, skipped),
            *(vector(QUERIES, skipped) for _ in range(3)),
        )
        pipeline(step, compute, steps, *specs)(
            q_ref.at[b, :, h], do_ref.at[b, :, h], query_segments_ref.at[b], lse_ref.at[b, h], delta_ref.at[b, h]
        )

    arrays = q_BTHk, k_BSHk, v_BSHv, query_segments_BT, segments_BS, _first(first), do_BTHv, lse_BHT, delta_BHT
    scratch = [
        _rows(width, QUERIES),
        _rows(values, QUERIES),
        _vector(jnp.int32),
        plgpu.Barrier(num_arrivals=3, num_barriers=2),
    ]
    shapes = ((B, S, H, width), BF16), ((B, S, H, values), BF16)
    return launch(body, (B, H, S), shapes, scratch, 2 * B * H * T * S * (width + values), arrays)


def launch(body: Callable, sizes: tuple[int, int, int], shapes, scratch, flops: int, arrays):
    """Runs body(*inputs, *outputs, *scratch) for each sequence, head and block of 128 rows. `flops` are those of a
    causal mask: half of all."""
    grid = (*sizes[:2], pl.cdiv(sizes[2], BLOCK))
    kernel = plgpu.kernel(
        body,
        out_type=[output(shape, dtype, *arrays) for shape, dtype in shapes],
        grid=grid,
        grid_names=("sequence", "head", "block"),
        num_threads=3,
        thread_name="warpgroup",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup, approx_math=True),
    )
    with priced(flops, BF16, grid):
        results = kernel(*arrays)
    return vary_alike(*results, *arrays)[: len(shapes)]  # jax 0.10 forgets along which mesh axes the outputs differ


def _first(first) -> jax.Array:
    return jnp.full((1,), first, jnp.int32)


def _rows(columns: int, step: int) -> object:
    """Shared memory for the rows of both warpgroups, in the layout of a step's rows."""
    return plgpu.SMEM((2, ROWS, columns), BF16, transforms=tiled(step, BF16))


def _vector(dtype) -> object:
    return plgpu.SMEM((2, ROWS), dtype)


def matrix(rows: int, columns: int, skipped: jax.Array | int = 0):
    """One step of `rows` rows, which a pipeline copies."""
    return plgpu.BlockSpec(
        (rows, columns), lambda i: (skipped + i, 0), transforms=tiled(rows, BF16), memory_space=plgpu.SMEM
    )


def vector(rows: int, skipped: jax.Array | int = 0):
    return plgpu.BlockSpec((rows,), lambda i: (skipped + i,), memory_space=plgpu.SMEM)


def pipeline(step: Callable, compute: Callable, steps: jax.Array, *specs):
    return plgpu.emit_pipeline_warp_specialized(
        step,
        grid=(steps,),
        in_specs=list(specs),
        max_concurrent_steps=STAGES,
        memory_registers=32,
        wg_axis="warpgroup",
        num_compute_wgs=2,
        compute_context=compute,
    )


def coordinates():
    """The sequence, the head, the warpgroup, and the first row of this warpgroup."""
    warpgroup = lax.axis_index("warpgroup")
    return (
        lax.axis_index("sequence"),
        lax.axis_index("head"),
        warpgroup,
        lax.axis_index("block") * BLOCK + warpgroup * ROWS,
    )


def fetch(copies, warpgroup, barrier) -> None:
    """Copies to this warpgroup's rows of shared memory, and waits for the copies."""
    for source, target in copies:
        plgpu.copy_gmem_to_smem(source, target.at[warpgroup], barrier.at[warpgroup])
    plgpu.barrier_wait(barrier.at[warpgroup])


def product(shape: tuple[int, int], left, right) -> jax.Array:
    def multiply(accumulator):
        plgpu.wgmma(accumulator, left, right)
        return accumulator[...]

    return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))


def add_product(total: jax.Array, left: jax.Array, right) -> jax.Array:
    """total + left right, with `left` in registers."""
    return pl.run_state(lambda accumulator: plgpu.wgmma(accumulator, left, right))(plgpu.ACC.init(total))


def along_rows(x: jax.Array, shape: tuple[int, int]) -> jax.Array:
    return lax.broadcast_in_dim(x, shape, [0])


def along_columns(x: jax.Array, shape: tuple[int, int]) -> jax.Array:
    return lax.broadcast_in_dim(x, shape, [1])


def visible(
    first_query: jax.Array, first_key: jax.Array, query_segments, segments, shape: tuple[int, int], queries: int
) -> jax.Array:
    """The mask of `shape`: keys at or before the query's position and of its segment. `queries` is the axis of the
    queries."""
    axes = queries, 1 - queries
    query, key = (
        start + plgpu.layout_cast(lax.broadcasted_iota(jnp.int32, shape, axis), plgpu.Layout.WGMMA)
        for start, axis in zip((first_query, first_key), axes, strict=True)
    )
    of_query, of_key = (
        lax.broadcast_in_dim(load(x, plgpu.Layout.WGMMA.reduce(1 - axis)), shape, [axis])
        for x, axis in zip((query_segments, segments), axes, strict=True)
    )
    return (query >= key) & (of_query == of_key)

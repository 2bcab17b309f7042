"""Attention against jax.nn.softmax in float32 and its derivative by JAX: XLA's, and Hopper's and TPUs' interpreted and
compiled."""

import functools

import hopper
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tpu_cases

from kernels_pallas import Unsupported, attention, targets
from kernels_pallas.attention import mosaic_gpu_sm90, mosaic_tpu, reference

# B, T, S, H, widths of keys and values, first
CASES = [
    pytest.param(1, 128, 128, 1, 64, 64, 0, id="one-block"),
    pytest.param(2, 136, 136, 1, 192, 128, 0, id="nothing-divides"),
    pytest.param(1, 72, 200, 1, 128, 64, 128, id="queries-in-the-middle"),
    pytest.param(1, 8, 8, 2, 64, 64, 0, id="short"),
]
# Lengths of whole lanes, in blocks of 128 and of 256.
TPU_CASES = [
    pytest.param(2, 384, 384, 1, 192, 128, 0, id="several-blocks"),
    pytest.param(1, 128, 512, 2, 64, 64, 256, id="queries-in-the-middle"),
]


def operands(B, T, S, H, width, values, first, documents=3):
    rng = np.random.default_rng(0)
    q, k, v, do = (
        rng.normal(size=shape) for shape in ((B, T, H, width), (B, S, H, width), (B, S, H, values), (B, T, H, values))
    )
    segments = np.sort(rng.integers(0, documents, (B, S)).astype(np.int32))
    return (
        [np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64) for x in (q, k, v, do)],
        segments[:, first : first + T],
        segments,
    )


def exact(numbers, query_segments, segments, first):
    """o, dq, dk and dv from float32, whose errors are small against those of bfloat16."""
    *qkv, do = (jnp.asarray(x, jnp.float32) for x in numbers)
    einsum = functools.partial(jnp.einsum, precision="highest")

    def call(q, k, v):
        s = einsum("BTHk,BSHk->BHTS", q, k) * q.shape[-1] ** -0.5
        p = jax.nn.softmax(
            jnp.where(reference.causal_mask(query_segments, segments, first)[:, None], s, -jnp.inf), axis=-1
        )
        return einsum("BHTS,BSHv->BTHv", p, v)

    o, pull = jax.vjp(call, *qkv)
    return [np.asarray(x, np.float64) for x in (o, *pull(do))]


def forward_and_backward(numbers, query_segments, segments, first, implementation):
    *qkv, do = (jnp.asarray(x, jnp.bfloat16) for x in numbers)

    def call(do, *qkv):
        attend = functools.partial(
            attention, scale=qkv[0].shape[-1] ** -0.5, first=first, implementation=implementation
        )
        o, pull = jax.vjp(lambda *qkv: attend(*qkv, query_segments, segments), *qkv)
        return o, *pull(do)

    return [np.asarray(x, np.float64) for x in jax.jit(call)(do, *qkv)]


def check(results, expected):
    """Compares within roundings to bfloat16, 2^-9 each: of the results, of p and ds in their sums, and of o in δ."""
    for got, wanted in zip(results, expected, strict=True):
        assert np.sqrt(np.mean((got - wanted) ** 2)) <= 2.0**-7 * np.sqrt(np.mean(wanted**2))
        assert np.max(np.abs(got - wanted)) <= 2.0**-6 * np.max(np.abs(wanted))


@pytest.mark.parametrize("B, T, S, H, width, values, first", CASES)
def test_xla(B, T, S, H, width, values, first):
    given = *operands(B, T, S, H, width, values, first), first
    check(forward_and_backward(*given, "xla"), exact(*given))


@hopper.interprets
@pytest.mark.usefixtures("interpretable")
@pytest.mark.parametrize("B, T, S, H, width, values, first", CASES)
def test_hopper(B, T, S, H, width, values, first):
    given = *operands(B, T, S, H, width, values, first), first
    with hopper.interpreted():
        results = forward_and_backward(*given, hopper.SM90)
    check(results, exact(*given))


@pytest.mark.parametrize("B, T, S, H, width, values, first", TPU_CASES)
def test_tpu(B, T, S, H, width, values, first):
    given = *operands(B, T, S, H, width, values, first), first
    with tpu_cases.pltpu.force_tpu_interpret_mode(tpu_cases.EVALUATED):
        results = forward_and_backward(*given, "mosaic_tpu")
    check(results, exact(*given))


def test_in_a_simulated_tpu():
    """The simulator copies, and shows reads of memory that was never written and past an end."""
    numbers, query_segments, segments = operands(1, 128, 256, 1, 64, 64, 128)
    given = [jnp.asarray(x, jnp.bfloat16) for x in numbers[:3]]
    attend = functools.partial(attention, scale=0.125, first=128, implementation="mosaic_tpu")
    o = tpu_cases.run(lambda *qkv: attend(*qkv, query_segments, segments), *given, interpreter=tpu_cases.SIMULATED)
    check([np.asarray(o, np.float64)], exact(numbers, query_segments, segments, 128)[:1])


@pytest.mark.parametrize("error", ["sees the next key", "one block too few"])
def test_planted_errors_on_tpu_are_seen(error, monkeypatch):
    given = *operands(1, 256, 256, 1, 64, 64, 0), 0
    monkeypatch.setattr(mosaic_tpu, "BLOCKS", (128,))
    if error == "one block too few":
        monkeypatch.setattr(mosaic_tpu.Sizes, "last_keys", lambda self, i, first_ref: i - 1)
    else:
        iota = jax.lax.broadcasted_iota
        monkeypatch.setattr(
            mosaic_tpu.lax, "broadcasted_iota", lambda dtype, shape, axis: iota(dtype, shape, axis) + axis
        )
    with tpu_cases.pltpu.force_tpu_interpret_mode(tpu_cases.EVALUATED):
        results = forward_and_backward(*given, "mosaic_tpu")
    with pytest.raises(AssertionError):
        check(results, exact(*given))


@tpu_cases.on_every_chip
def test_compiles_for_tpus(topology):
    """MLA's heads: two products forward, three and four back, in bfloat16."""
    q, v = (jax.ShapeDtypeStruct((1, 1024, 4, width), jnp.bfloat16) for width in (192, 128))
    segments = jax.ShapeDtypeStruct((1, 1024), jnp.int32)

    def function(q, k, v, segments):
        o, pull = jax.vjp(
            lambda *qkv: attention(*qkv, segments, segments, scale=0.1, implementation="mosaic_tpu"), q, k, v
        )
        return o, *pull(o)

    program = tpu_cases.lower(topology, function, q, q, v, segments, sharded=4)
    assert tpu_cases.multiplied(program) == {"bf16"}
    assert sorted(text.count("tpu.matmul") for text in tpu_cases.kernel_texts(program)) == [2, 3, 4]
    program.compile()


@hopper.interprets
@pytest.mark.usefixtures("interpretable")
@pytest.mark.parametrize("error", ["sees the next key", "sees other segments", "powers of two instead of e"])
def test_planted_errors_are_seen(error, monkeypatch):
    given = *operands(1, 136, 136, 1, 64, 64, 0), 0
    if error == "powers of two instead of e":
        monkeypatch.setattr(mosaic_gpu_sm90, "LOG2_E", 1.0)
    else:
        visible = mosaic_gpu_sm90.visible

        def wrong(first_query, first_key, query_segments, segments, shape, queries):
            if error == "sees the next key":
                return visible(first_query + 1, first_key, query_segments, segments, shape, queries)
            return visible(
                first_query, first_key, segments if queries == 0 else query_segments, segments, shape, queries
            )

        monkeypatch.setattr(mosaic_gpu_sm90, "visible", wrong)
    with hopper.interpreted():
        results = forward_and_backward(*given, hopper.SM90)
    with pytest.raises(AssertionError):
        check(results, exact(*given))


@hopper.interprets
@pytest.mark.usefixtures("interpretable")
def test_race_detector_sees_a_missing_fence(monkeypatch):
    monkeypatch.setattr(mosaic_gpu_sm90.plgpu, "commit_smem", lambda: None)
    numbers, query_segments, segments = operands(1, 8, 200, 1, 64, 64, 192)
    q, k, v, _ = (jnp.asarray(x, jnp.bfloat16) for x in numbers)
    with hopper.interpreted(races=True):
        jax.block_until_ready(
            attention(q, k, v, query_segments, segments, scale=1.0, first=192, implementation=hopper.SM90)
        )


@hopper.compiles
@pytest.mark.parametrize(
    "name, depth",
    [("forward", 192 + 64), ("query_gradient", 192 + 128 + 64), ("key_and_value_gradients", 192 + 128 + 2 * 32)],
)
def test_machine_code(name, depth):
    """MLA's heads: as many matrix instructions, each 16 deep, as the products of one step take, and nothing spilled."""
    B, T, H, struct = 2, 4096, 16, jax.ShapeDtypeStruct
    q, v = (struct((B, T, H, width), jnp.bfloat16) for width in (192, 128))
    segments, row = struct((B, T), jnp.int32), struct((B, H, T), jnp.float32)
    backward = () if name == "forward" else (v, row, row)

    def function(q, k, v, query_segments, segments, *backward):
        return getattr(mosaic_gpu_sm90, name)(q, k, v, query_segments, segments, 0, 0.1, *backward)

    kernel = hopper.compiled(targets.H200, function, q, q, v, segments, segments, *backward)
    assert kernel.bf16_products == depth // 16
    if kernel.instructions is not None:
        assert (
            kernel.instructions["HGMMA"] == depth // 16
            and kernel.instructions["LDL"] == kernel.instructions["STL"] == 0
        )


SHAPES = dict(q=(1, 16, 2, 192), k=(1, 24, 2, 192), v=(1, 24, 2, 128), query_segments=(1, 16), segments=(1, 24))


@pytest.mark.parametrize(
    "changes, error, message",
    [
        (
            dict(v=(1, 16, 2, 128)),
            ValueError,
            r"v bfloat16\[1, 16, 2, 128\].* must be \[B, T, H, k\], \[B, S, H, k\], \[B, S, H, v\]",
        ),
        (dict(segments=(1, 16)), ValueError, r"segments int32\[1, 16\]"),
        (dict(v=(1, 24, 2, 96)), Unsupported, "of 64 or 128 for values, not 192 and 96.*These would do it: xla"),
        (dict(q=(1, 15, 2, 192), query_segments=(1, 15)), Unsupported, "multiples of 8, not 15 and 24"),
    ],
)
def test_what_does_not_fit_is_refused(changes, error, message):
    given = {
        name: jnp.zeros(shape, jnp.int32 if "segments" in name else jnp.bfloat16)
        for name, shape in (SHAPES | changes).items()
    }
    with pytest.raises(error, match=message):
        attention(**given, scale=1.0, implementation=hopper.SM90)


@pytest.mark.parametrize(
    "implementation, shape, dtype, message",
    [
        (hopper.SM90, (1, 8, 1, 64), jnp.float32, "attends in bfloat16, not float32"),
        ("mosaic_tpu", (1, 128, 1, 64), jnp.float32, "attends in bfloat16, not float32"),
        (
            "mosaic_tpu",
            (1, 192, 1, 64),
            jnp.bfloat16,
            "multiples of 128, not 192 and 192.*These would do it: xla, mosaic_gpu_sm90",
        ),
        ("mosaic_tpu", (1, 128, 1, 96), jnp.bfloat16, "multiples of 64 up to 256, not 96 and 96"),
    ],
)
def test_unsupported(implementation, shape, dtype, message):
    q, segments = jnp.zeros(shape, dtype), jnp.zeros(shape[:2], jnp.int32)
    with pytest.raises(Unsupported, match=message):
        attention(q, q, q, segments, segments, scale=1.0, implementation=implementation)

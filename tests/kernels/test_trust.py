"""Comparison of a kernel with its reference before its first use: wrong kernels are planted under every operation and
replaced, right ones are left alone."""

import functools
import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import multihost_utils
from jax.sharding import PartitionSpec as P
from tpu_cases import EVALUATED, pltpu

import kernels_pallas as kp
from kernels_pallas import implementations, trust
from kernels_pallas.attention import api as attention_api
from kernels_pallas.attention import reference as attention_reference
from kernels_pallas.grouped import api as grouped_api
from kernels_pallas.grouped_linear import api as grouped_linear_api
from kernels_pallas.matmul import api as matmul_api
from kernels_pallas.quantize import api as quantize_api

KERNEL = "mosaic_tpu"


@pytest.fixture(autouse=True)
def on_a_tpu_that_has_never_run(monkeypatch, tmp_path):
    """This CPU calls itself a TPU, and nothing was compared on it before."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(trust.SKIP, raising=False)
    monkeypatch.setattr(implementations, "device_kind", lambda device=None: "tpu")
    monkeypatch.setattr(trust, "_verdicts", {})
    monkeypatch.setattr(trust, "_said", set())


def x(seed, *shape, dtype=jnp.bfloat16):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def tiles(seed, *shape):
    return kp.quantize(x(seed, *shape), kp.Quantizer(), implementation="xla")


SIZES = jnp.asarray([100, 0, 28], jnp.int32)
SEGMENTS = jnp.asarray(np.repeat([[1, 2]], 64, axis=1), jnp.int32)
# Operation and a call of it; the last two come at a gradient alone.
CASES = {
    "matmul": (matmul_api.MATMUL, lambda i=None: kp.fp8_matmul(tiles(0, 40, 256), tiles(1, 24, 256), implementation=i)),
    "grouped": (
        grouped_api.GROUPED_MATMUL,
        lambda i=None: kp.fp8_grouped_matmul(tiles(0, 128, 256), tiles(1, 3, 24, 256), SIZES, implementation=i),
    ),
    "grouped weight gradient": (
        grouped_api.GROUPED_WEIGHT_GRADIENT,
        lambda i=None: kp.fp8_grouped_weight_gradient(
            tiles(0, 24, 256), tiles(1, 40, 256), jnp.asarray([128, 128]), implementation=i
        ),
    ),
    "quantize": (quantize_api.QUANTIZE, lambda i=None: kp.quantize_block(x(0, 130, 200), implementation=i)),
    "quantize transposed": (
        quantize_api.QUANTIZE_TRANSPOSED,
        lambda i=None: kp.quantize_transposed(x(0, 130, 200), implementation=i),
    ),
    "requantize transposed": (
        quantize_api.REQUANTIZE_TRANSPOSED,
        lambda i=None: kp.requantize_transposed(tiles(0, 130, 200), implementation=i),
    ),
    "swiglu": (
        quantize_api.SWIGLU_QUANTIZE,
        lambda i=None: kp.swiglu_quantize(x(0, 130, 200), x(1, 130, 200), implementation=i),
    ),
    "grouped linear": (
        grouped_linear_api.GROUPED_PRODUCT,
        lambda i=None: kp.grouped_linear(x(0, 128, 32), x(1, 3, 32, 24), SIZES, implementation=i),
    ),
    "grouped linear's gradient": (
        grouped_linear_api.GROUPED_WEIGHT_GRADIENT,
        lambda i=None: jax.grad(lambda w: jnp.sum(kp.grouped_linear(x(0, 128, 32), w, SIZES, implementation=i) ** 2))(
            x(1, 3, 32, 24)
        ),
    ),
    "attention": (
        attention_api.ATTENTION,
        lambda i=None: kp.attention(
            *(x(j, 1, 128, 2, 64) for j in range(3)), SEGMENTS, SEGMENTS, scale=0.1, implementation=i
        ),
    ),
}
on_every_operation = pytest.mark.parametrize("case", CASES)


def plant(monkeypatch, operation, change=lambda y: y):
    """Puts the reference with a changed result under the kernel's name; returns a list that grows by one for each
    call."""
    calls, reference = [], operation.implementations["xla"][0]

    def kernel(*arguments):
        calls.append(1)
        return change(reference(*arguments))

    monkeypatch.setitem(operation.implementations, KERNEL, (kernel, lambda *_: None))
    return calls


def scaled(y):
    """Makes a result 2% too large; of a QTensor its scales."""
    return kp.QTensor(y.values, y.scales * 1.02, y.tile) if isinstance(y, kp.QTensor) else (y * 1.02).astype(y.dtype)


def corner(y):
    """Makes the last number NaN."""
    return jax.tree.map(lambda z: z.at[(-1,) * z.ndim].set(jnp.nan) if z.dtype != jnp.int32 else z, y)


def same(got, wanted):
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32)), got, wanted
    )


@on_every_operation
def test_a_right_kernel_runs_and_nothing_is_said(case, monkeypatch, caplog):
    operation, call = CASES[case]
    calls = plant(monkeypatch, operation)
    jax.block_until_ready(jax.jit(lambda: call())())
    assert len(calls) == 2 and len(trust._agreed_before()) >= 1  # compared, then used
    assert not [record for record in caplog.records if operation.name in record.getMessage() and "gradient" not in case]
    same(jax.jit(lambda: call())(), jax.jit(lambda: call("xla"))())


@on_every_operation
@pytest.mark.parametrize("change", [scaled, corner])
def test_a_wrong_kernel_is_replaced_and_reported(case, change, monkeypatch, caplog):
    """Its results are not used, and one warning names the operation, the call and the versions."""
    operation, call = CASES[case]
    wanted = jax.jit(lambda: call("xla"))()
    calls = plant(monkeypatch, operation, change)
    for _ in range(2):
        same(jax.jit(lambda: call())(), wanted)
    assert len(calls) == 1
    (said,) = [
        record for record in caplog.records if record.getMessage().startswith(f"WARNING: {operation.name}: {KERNEL}")
    ]
    assert said.levelno == logging.WARNING and "off by" in said.getMessage() or "inf" in said.getMessage()
    assert (
        f"jax {jax.__version__}" in said.getMessage()
        and "report" in said.getMessage()
        and "DEEPSEEK_JAX_KERNEL_CHECK=0" in said.getMessage()
    )


def test_a_kernel_that_fails_is_replaced(monkeypatch, caplog):
    operation, call = CASES["matmul"]

    def fails(*_):
        raise RuntimeError("no such instruction\nand much more")

    monkeypatch.setitem(operation.implementations, KERNEL, (fails, lambda *_: None))
    same(call(), call("xla"))
    assert "it fails with RuntimeError: no such instruction)" in caplog.text
    with pytest.raises(RuntimeError, match="no such instruction"):
        call(KERNEL)  # by its own name it runs as it is


def test_a_gradient_alone_that_is_wrong_is_found(monkeypatch, caplog):
    """Attention whose result is right and whose gradient by the keys is not."""
    right = attention_reference.attention
    wrong = jax.custom_vjp(right, nondiff_argnums=(6,))

    def fwd(*operands):
        return right(*operands), operands[:-1]

    def bwd(scale, operands, do):
        dq, dk, dv = jax.vjp(lambda *qkv: right(*qkv, *operands[3:], scale), *operands[:3])[1](do)
        return dq, (0.97 * dk).astype(dk.dtype), dv, None, None, None

    wrong.defvjp(fwd, bwd)
    monkeypatch.setitem(attention_api.ATTENTION.implementations, KERNEL, (wrong, lambda *_: None))
    CASES["attention"][1]()
    assert "result 2" in caplog.text and "attention: mosaic_tpu is not to be trusted" in caplog.text


def test_inside_a_mesh_and_a_gradient(monkeypatch):
    """Compared while a `shard_map` under `jit` and `grad` is traced, on the CPU's own first device; a scan's body
    too."""
    calls = plant(monkeypatch, matmul_api.MATMUL)
    for operation in (quantize_api.QUANTIZE, quantize_api.QUANTIZE_TRANSPOSED, quantize_api.REQUANTIZE_TRANSPOSED):
        plant(monkeypatch, operation)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("data",))

    def loss(w, x):
        def local(x, w):
            return jax.lax.scan(lambda y, _: (kp.fp8_linear(y, w), None), x, None, length=2)[0]

        return jnp.sum(jax.shard_map(local, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"))(x, w))

    given = x(0, 64, 128, dtype=jnp.float32), x(1, 128, 128, dtype=jnp.float32)
    got = jax.jit(jax.grad(loss))(*reversed(given))
    assert len(calls) > 1 and trust._verdicts and not any(trust._verdicts.values())
    monkeypatch.setenv(trust.SKIP, "0")
    same(got, jax.jit(jax.grad(lambda w, x: loss(w, x)))(*reversed(given)))


def test_what_agreed_is_kept_for_the_next_process(monkeypatch, tmp_path):
    calls = plant(monkeypatch, matmul_api.MATMUL)
    path, call = tmp_path / "kernels_pallas" / "agreed.json", CASES["matmul"][1]
    call()
    first = json.loads(path.read_text())
    assert len(first) == 1 and len(calls) == 2 and [p.name for p in path.parent.iterdir()] == ["agreed.json"]
    trust._verdicts.clear()  # another process
    call()
    assert len(calls) == 3
    for damage in ("", "[1, 2", '{"a": 1}', "\xff"):
        path.write_text(damage, encoding="latin-1")
        trust._verdicts.clear()
        before = len(calls)
        call()
        assert len(calls) == before + 2 and json.loads(path.read_text()) == first


@pytest.mark.parametrize("changed", ["device", "jax", "source", "dtype", "width"])
def test_another_device_version_dtype_or_width_is_compared_anew(changed, monkeypatch):
    calls, out, width = plant(monkeypatch, matmul_api.MATMUL), {}, 256
    CASES["matmul"][1]()
    trust._verdicts.clear()
    if changed == "device":
        monkeypatch.setattr(trust, "_device", lambda: type("Device", (), {"device_kind": "TPU v99"}))
    elif changed == "jax":
        monkeypatch.setattr(jax, "__version__", "99.0")
    elif changed == "source":
        monkeypatch.setattr(trust, "_version", lambda: "another")
    elif changed == "dtype":
        out = {"out_dtype": jnp.float32}
    else:
        width = 384
    kp.fp8_matmul(tiles(0, 40, width), tiles(1, 24, width), **out)
    assert len(calls) == 4


def test_nothing_is_compared_if_told_so_or_where_the_hardware_is_not_there(monkeypatch):
    calls = plant(monkeypatch, matmul_api.MATMUL, scaled)
    call, order = CASES["matmul"][1], implementations.preferred("tpu")
    with monkeypatch.context() as patch:
        patch.setenv(trust.SKIP, "0")
        call()
    with trust.unchecked():
        call()
    monkeypatch.setattr(implementations, "device_kind", lambda device=None: "cpu")  # a dry run: compiled here for a TPU
    call(order)
    assert len(calls) == 3 and not trust._verdicts


def test_all_processes_decide_alike(monkeypatch):
    """A kernel that is wrong on one process is replaced on all."""
    calls = plant(monkeypatch, matmul_api.MATMUL)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "process_allgather", lambda wrong: np.array([bool(wrong), True]))
    call = CASES["matmul"][1]
    same(call(), call("xla"))
    assert len(calls) == 1 and "another process" in next(iter(trust._verdicts.values()))


def test_a_kernel_that_is_passed_over_is_said_once(monkeypatch, caplog):
    """The warning says what the kernel does not support and what avoids that."""
    q = kp.quantize(x(0, 40, 256), kp.Quantizer(scope="tensor"))
    kp.quantize(x(0, 40, 256), kp.Quantizer(scope="tensor"))
    assert q.tile == (40, 256)
    assert (
        caplog.text.count("quantize: mosaic_tpu scales tiles and blocks, not whole tensors. XLA quantizes instead") == 1
    )
    kp.quantize(x(0, 40, 256), kp.Quantizer(scope="tensor"), implementation="xla")
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    "case", [case for case, (operation, _) in CASES.items() if KERNEL in operation.implementations]
)
def test_the_real_kernels_pass(case, monkeypatch, caplog):
    """The interpreted kernels agree with their references on the inputs made for them. XLA's own kernel computes
    `grouped_linear` on TPUs."""
    operation, call = CASES[case]
    monkeypatch.setattr(trust, "_apart", lambda function: function())
    with pltpu.force_tpu_interpret_mode(EVALUATED), jax.disable_jit(False):
        jax.block_until_ready(functools.partial(call)())
    assert [verdict for key, verdict in trust._verdicts.items() if f" of {operation.name} on" in key] == [None]
    assert "WARNING" not in caplog.text


V3 = kp.QTensor(
    jax.ShapeDtypeStruct((65537, 7168), jnp.float8_e4m3fn), jax.ShapeDtypeStruct((65537, 56), jnp.float32), (1, 128)
)


def test_inputs_are_small_and_keep_widths():
    """For a call with V3's shapes they have a few hundred rows, the call's last tile, and the call's K."""
    a, b, *_ = matmul_api.MATMUL.small(V3, V3, None, jnp.bfloat16)
    assert (
        a.shape == (513, 7168)
        and a.scales.shape == (513, 56)
        and b.shape == (2049, 7168)
        and a.values.dtype == jnp.float8_e4m3fn
    )
    # no two tiles alike
    assert len({piece.tobytes() for piece in np.split(np.asarray(a.values[:512], np.float32), 56, axis=1)}) == 56
    q, k, v, do, query_segments, segments = attention_api.ATTENTION.small(
        *(jax.ShapeDtypeStruct((8, n, 128, w), jnp.bfloat16) for n, w in ((1024, 192), (4096, 192), (4096, 128)))
    )
    assert (q.shape, k.shape, v.shape, do.shape) == (
        (1, 256, 2, 192),
        (1, 256, 2, 192),
        (1, 256, 2, 128),
        (1, 256, 2, 128),
    )
    np.testing.assert_array_equal(query_segments, segments)
    assert set(segments.ravel()) == {1, 2}
    for alignment, count, rows in ((1, 256, 4096), (128, 8, 65536), (128, 1, 128), (128, 2, 256), (1, 3, 5)):
        x_RK, w, sizes, *_ = grouped_linear_api.GROUPED_PRODUCT.small(
            jax.ShapeDtypeStruct((rows, 64), jnp.bfloat16),
            jax.ShapeDtypeStruct((count, 64, 32), jnp.bfloat16),
            None,
            alignment,
            False,
        )
        assert (
            w.shape[0] == len(sizes) == min(count, 3)
            and x_RK.shape[0] >= sizes.sum() > 0
            and not np.any(sizes % alignment)
        )
        assert x_RK.shape[0] <= 640 and x_RK.shape[0] % alignment == 0

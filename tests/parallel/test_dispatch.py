"""Tokens to their experts and back: every way of sending them is the same function, and none of them loses a token."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from meshes import assert_close, jit, mesh_ops

from deepseek_jax.model import moe
from deepseek_jax.model.config import MLAConfig, ModelConfig, MoEConfig
from deepseek_jax.model.moe import Experts
from deepseek_jax.model.ops import Ops
from deepseek_jax.parallel import dispatch
from deepseek_jax.precision import get_precision
from kernels_pallas import dequantize, quantize_tile

B, T, D, E, K, F = 8, 5, 128, 8, 3, 4
CONFIG = ModelConfig(8, D, 1, 8, MLAConfig(1, 2, 2, 2, 2), MoEConfig(E, K, F), init_std=0.1)
RNG = np.random.default_rng(0)
WEIGHTS = {
    "gate": RNG.normal(size=(E, D, F)) / 8,
    "up": RNG.normal(size=(E, D, F)) / 8,
    "down": RNG.normal(size=(E, F, D)),
}
X, GATES, DY = (jnp.float32(RNG.normal(size=shape)) for shape in ((B, T, D), (B, T, K), (B, T, D)))
IDS = {
    "random": np.argsort(RNG.random((B, T, E)), axis=-1)[..., :K],
    "all to one device": np.broadcast_to([0, 1, 0], (B, T, K)),
    "all to one expert": np.full((B, T, K), 6),
    "one device for each": np.broadcast_to(np.arange(B)[:, None, None], (B, T, K)),
}


def ragged_on_cpu(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """`lax.ragged_all_to_all` from its documentation, for a backend that has none: peer p's slice for me, where p
    says."""
    me = jax.lax.axis_index(axis_name)
    everything = [jax.lax.all_gather(a, axis_name) for a in (operand, input_offsets, send_sizes, output_offsets)]
    row = jnp.arange(output.shape[0])
    for peer_operand, starts, sizes, targets in zip(*(list(a) for a in everything), strict=True):
        start, size, target = starts[me], sizes[me], targets[me]
        inside = (row >= target) & (row < target + size)
        source = jnp.where(inside, row - target + start, 0)
        output = jnp.where(inside.reshape(-1, *(1,) * (operand.ndim - 1)), peer_operand[source], output)
    del recv_sizes
    return output


def experts_call(ops: Ops):
    """Compiled (ids) -> (y, overflows, gradients of weights, x and gates)."""
    module = Experts(CONFIG, ops)

    def call(ids, params, x, gates):
        def apply(params, x, gates):
            return module.apply({"params": params}, x, ids, gates)

        y, pull, overflows = jax.vjp(apply, params, x, gates, has_aux=True)
        return y, overflows, pull(DY)

    compiled = jit(call)
    weights = jax.tree.map(jnp.float32, WEIGHTS)
    return lambda ids: compiled(jnp.int32(ids), weights, X, GATES)


@pytest.fixture(scope="module")
def reference():
    return experts_call(Ops())


@pytest.mark.parametrize("exchange", ["padded", "ragged", "gather"])
@pytest.mark.parametrize("experts", ["expert", ("expert", "fsdp")], ids=str)
def test_every_exchange_is_the_same_function(exchange, experts, reference, monkeypatch):
    """Experts divided by one axis of the mesh, or by two, whichever comes first."""
    monkeypatch.setattr(dispatch.lax, "ragged_all_to_all", ragged_on_cpu)
    call = experts_call(
        mesh_ops({"fsdp": 2, "expert": 4}, rules={"experts": experts}, exchange=exchange, buffer_factor=1.0)
    )
    overflowed = {}
    for name, ids in IDS.items():
        y, overflows, gradients = call(ids)
        want, _, want_gradients = reference(ids)
        assert_close((y, gradients), (want, want_gradients), 2e-6)
        overflowed[name] = int(overflows)
    # Five tokens on a device, fifteen pairs: a padded buffer has room for all of them, a ragged one on the device they
    # all go to has room for four times fifteen.
    assert overflowed == dict.fromkeys(IDS, 0)


@pytest.mark.parametrize("exchange", ["padded", "ragged"])
@pytest.mark.parametrize("rows", [1, 4])
def test_buffers_that_overflow_take_rounds_and_lose_nothing(exchange, rows, reference, monkeypatch):
    monkeypatch.setattr(dispatch.lax, "ragged_all_to_all", ragged_on_cpu)
    monkeypatch.setattr(dispatch, "buffer_slots", lambda pairs, peers, factor: rows)
    call = experts_call(mesh_ops({"fsdp": 2, "expert": 4}, exchange=exchange))
    for name, ids in IDS.items():
        y, overflows, gradients = call(ids)
        want, _, want_gradients = reference(ids)
        assert_close((y, gradients), (want, want_gradients), 2e-6)
        if name.startswith("all to one"):
            # every sender, or the receiver in each of two groups
            assert int(overflows) == (8 if exchange == "padded" else 2)


def test_tokens_that_are_not_divided(reference):
    """Three rows on eight devices: everybody has them all, and the experts' shares are summed."""
    x, ids, gates = X[:3], jnp.int32(IDS["random"][:3]), GATES[:3]

    def call(ops):
        module = Experts(CONFIG, ops)
        params = jax.tree.map(jnp.float32, WEIGHTS)
        grad = jax.value_and_grad(
            lambda params, x: jnp.sum(module.apply({"params": params}, x, ids, gates)[0] * DY[:3]), argnums=(0, 1)
        )
        return jit(grad)(params, x)

    assert_close(call(mesh_ops({"fsdp": 2, "tensor": 2, "expert": 2})), call(Ops()), 5e-6)


def test_tiles_are_e4m3_with_powers_of_two():
    """Against ml_dtypes' own rounding, written out; outliers, zeros and tiny numbers included."""
    x = np.float32(RNG.normal(size=(6, 384)) * np.array([1, 1e-3, 1e3, 1e-6, 0, 1])[:, None])
    x[5, 200] = 1e4
    q = quantize_tile(jnp.asarray(x), power_of_two=True)
    values, scales = q.values, q.scales
    assert values.dtype == jnp.float8_e4m3fn and scales.shape == (6, 3)
    for row in range(6):
        for tile in range(3):
            part = x[row, tile * 128 : tile * 128 + 128].astype(np.float64)
            scale = 2.0 ** np.ceil(np.log2(max(np.abs(part).max(), 1e-4) / 448))
            assert float(scales[row, tile]) == scale
            np.testing.assert_array_equal(
                values[row, tile * 128 : tile * 128 + 128].astype(np.float32),
                (part / scale).astype(np.float32).astype(ml_dtypes.float8_e4m3fn).astype(np.float32),
            )
    back = np.asarray(dequantize(q))
    tiles = np.abs(x).reshape(6, 3, 128).max(-1).repeat(128, -1).reshape(6, 384)
    assert np.all(np.abs(back - x) <= np.maximum(tiles, 1e-4) * 2**-4)


def test_fp8_dispatch_rounds_the_way_there_and_not_the_way_back(reference):
    """Forward: the experts see rounded tokens. Backward: they see rounded gradients, and the tokens' gradient comes
    back exact."""
    call = experts_call(mesh_ops({"fsdp": 2, "expert": 4}, dtype="fp8"))
    ids = IDS["random"]
    y, _, gradients = call(ids)
    want, _, want_gradients = reference(ids)
    rounded = dequantize(quantize_tile(X, power_of_two=True))

    def exact(x):
        module = Experts(CONFIG, Ops())
        return module.apply({"params": jax.tree.map(jnp.float32, WEIGHTS)}, x, jnp.int32(ids), GATES)[0]

    assert_close(y, jit(exact)(rounded), 2e-6)
    assert np.abs(np.asarray(y - want)).max() > 1e-3
    relative = [
        float(jnp.linalg.norm(g - w) / jnp.linalg.norm(w))
        for g, w in zip(jax.tree.leaves(gradients), jax.tree.leaves(want_gradients), strict=True)
    ]
    assert max(relative) < 0.06 and min(relative) > 1e-4


def test_fp8_dispatch_of_gradients_is_rounded_once_on_their_way_to_the_experts():
    """Each pair's gradient, gate times dy, arrives in E4M3 at its expert, where weights' and tokens' gradients are made
    of it; nothing else is rounded."""
    ids = IDS["random"].reshape(B * T, K)
    _, _, (d_weights, dx, d_gates) = experts_call(mesh_ops({"fsdp": 2, "expert": 4}, dtype="fp8"))(IDS["random"])

    def oracle(weights, x_ND, gates_NK, dy_ND):
        rounded = dequantize(quantize_tile(x_ND, power_of_two=True))
        y_NKD, pull_back = jax.vjp(lambda w, x: moe.dense_experts(Ops(), w, x, jnp.int32(ids)), weights, rounded)
        pairs = (gates_NK[..., None] * dy_ND[:, None]).reshape(-1, D)
        sent = dequantize(quantize_tile(pairs, power_of_two=True, min_amax=1e-30)).reshape(y_NKD.shape)
        return *pull_back(sent), jnp.einsum("NKD,ND->NK", y_NKD, dy_ND)

    weights = tuple(jnp.float32(WEIGHTS[name]) for name in ("gate", "up", "down"))
    (gate, up, down), dx_ND, d_gates_NK = jit(oracle)(
        weights, X.reshape(-1, D), GATES.reshape(-1, K), DY.reshape(-1, D)
    )
    wanted = {"gate": gate, "up": up, "down": down}, dx_ND.reshape(X.shape), d_gates_NK.reshape(GATES.shape)
    assert_close((d_weights, dx, d_gates), wanted, 1e-5)


def test_experts_in_fp8_multiply_the_numbers_that_came(monkeypatch):
    """V3 §3.3.3: what is sent in E4M3 is what the first products read; it is not rounded a second time, to scales that
    are no powers of two."""

    def first_operand(ops, weights, x_ND, ids_NK):
        x = ops.expert_tokens(x_ND)
        return jnp.where((ids_NK < weights[0].shape[0])[..., None], dequantize(x.quantized)[:, None], 0)

    monkeypatch.setitem(moe.IMPLEMENTATIONS, "grouped", first_operand)
    precision = dataclasses.replace(get_precision("fp8_deepseek"), compute_dtype=jnp.dtype(jnp.float32))
    y, *_ = experts_call(mesh_ops({"fsdp": 2, "expert": 4}, precision=precision, dtype="fp8"))(IDS["random"])
    assert_close(y, dequantize(quantize_tile(X, power_of_two=True)) * jnp.sum(GATES, axis=-1, keepdims=True), 2e-6)

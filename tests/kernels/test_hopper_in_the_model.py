"""The network's attention and experts in bfloat16: their Hopper kernels, interpreted, against XLA."""

import functools

import hopper
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.model.attention import LatentAttention
from deepseek_jax.model.attention_core import Tokens, self_attention
from deepseek_jax.model.config import MLAConfig, ModelConfig, MoEConfig
from deepseek_jax.model.moe import Experts
from deepseek_jax.model.ops import Ops
from deepseek_jax.parallel.mesh import MeshConfig, build_mesh
from deepseek_jax.parallel.sharding import MeshOps
from kernels_pallas import attention
from kernels_pallas._compat import plgpu


def value_and_gradients(module, x, *rest):
    """y and the gradients of its sum with weights, by every parameter and x."""
    params = module.init(jax.random.key(0), x, *rest)["params"]
    weights = jax.random.normal(jax.random.key(1), x.shape)

    def loss(params, x):
        y = module.apply({"params": params}, x, *rest)[0]
        return jnp.sum(y * weights), y

    (_, y), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(params, x)
    return jax.tree.leaves((y, gradients))


def check(module, *arguments):
    """Compares two results in bfloat16, which rounds by 2^-9, several times one after another."""
    with hopper.interpreted():
        results = value_and_gradients(module(Ops("bfloat16", target="sm90")), *arguments)
    for got, expected in zip(results, value_and_gradients(module(Ops("bfloat16")), *arguments), strict=True):
        got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
        assert np.linalg.norm(got - expected) <= 2.0**-6 * np.linalg.norm(expected)


@hopper.interprets
@pytest.mark.usefixtures("interpretable")
def test_attention():
    config = MLAConfig(num_heads=2, kv_lora_rank=32, qk_nope_head_dim=32, qk_rope_head_dim=32, v_head_dim=64)
    moe = MoEConfig(num_experts=4, top_k=2, intermediate_size=32)
    model = ModelConfig(32, 32, 1, 32, attention=config, moe=moe, init_std=0.3)
    positions = np.broadcast_to(np.arange(24, dtype=np.int32), (2, 24))
    segments = np.repeat(np.array([[1, 2, 0], [1, 1, 1]], np.int32), 8, axis=1)
    x = jax.random.normal(jax.random.key(2), (2, 24, 32), jnp.bfloat16)
    check(functools.partial(LatentAttention, model), x, Tokens(positions, segments))


@hopper.interprets
def test_experts():
    rng = np.random.default_rng(0)
    ids, gates = rng.integers(0, 3, (1, 40, 2)), rng.random((1, 40, 2)).astype(np.float32)
    x = jax.random.normal(jax.random.key(2), (1, 40, 32), jnp.bfloat16)
    attention = MLAConfig(num_heads=2, kv_lora_rank=32, qk_nope_head_dim=32, qk_rope_head_dim=32, v_head_dim=64)
    model = ModelConfig(32, 32, 1, 32, attention=attention, moe=MoEConfig(4, 2, 16), init_std=0.3)
    check(functools.partial(Experts, model), x, jnp.asarray(ids, jnp.int32), jnp.asarray(gates))


@pytest.mark.skipif(plgpu is None, reason="needs jax.experimental.pallas.mosaic_gpu (jax 0.10: install absl-py)")
@pytest.mark.parametrize(
    "sizes, of_a_device",
    [
        ({"fsdp": 2, "tensor": 4}, (2, 64, 2, 192)),
        ({"fsdp": 2, "context": 4}, (2, 16, 8, 192)),
        ({"expert": 8}, (4, 64, 8, 192)),
    ],
)
def test_a_mesh_divides_sequences_and_heads(sizes, of_a_device, monkeypatch):
    """Traced only: each device's kernel gets its sequences, its queries and its heads; four sequences do not divide
    among eight."""
    seen = []

    def noted(q, *rest, **options):
        seen.append(q.shape)
        return attention(q, *rest, **options)

    monkeypatch.setattr("deepseek_jax.model.attention_core.attention", noted)
    ops = MeshOps("bfloat16", target="sm90", mesh=build_mesh(MeshConfig(**sizes).sizes, {}, jax.devices()))
    q, v = (jax.ShapeDtypeStruct((4, 64, 8, *shape), jnp.bfloat16) for shape in ((192,), (128,)))
    segments = jax.ShapeDtypeStruct((4, 64), jnp.int32)

    def loss(q, k, v, segments):
        return jnp.sum(self_attention(ops, 0.1, q[:, :, :, None], segments, (k, v)).astype(jnp.float32))

    dq, dk, dv = jax.eval_shape(jax.grad(loss, argnums=(0, 1, 2)), q, q, v, segments)
    assert seen[-1] == of_a_device and (dq.shape, dk.shape, dv.shape) == (q.shape, q.shape, v.shape)

"""Products that are kernels: each device multiplies its rows, and where `tensor` divides whole tiles, its part of the
product."""

import dataclasses
import math
import re
import traceback

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import jit, mesh_ops

from deepseek_jax.model.config import MLAConfig, ModelConfig, MoEConfig
from deepseek_jax.model.layers import Linear
from deepseek_jax.model.moe import Experts
from deepseek_jax.model.ops import Ops
from deepseek_jax.precision import get_precision
from kernels_pallas import fp8_linear, quantize_block
from kernels_pallas.linear import vjp

X, W = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(2, 32, 256), (256, 384)]))
FP8 = dataclasses.replace(get_precision("fp8_deepseek"), compute_dtype=jnp.dtype(jnp.float32))
ONE = Ops(FP8)
MESHES = {
    "rows": {"fsdp": 8},
    "tensor": {"fsdp": 2, "tensor": 2, "expert": 2},
    "tensor cuts tiles": {"tensor": 4, "data": 2},
    "sequences": {"context": 4, "fsdp": 2},
}


def experts_config(num_experts, width):
    moe = MoEConfig(num_experts, top_k=2, intermediate_size=width)
    return ModelConfig(8, 256, 1, 8, MLAConfig(1, 2, 2, 2, 2), moe, init_std=0.1)


def multiply(x, w):
    return jax.vmap(fp8_linear, (0, None))(x, w) if x.ndim == 3 else fp8_linear(x, w)


def product(ops: Ops, axes, x, w):
    """x W as kernels would multiply it: on a mesh each device its part."""
    return (multiply if ops is ONE else ops.by_tokens(multiply, w, axes, x))(x, w)


def call(ops: Ops, axes, x, w):
    def loss(x, w):
        y = product(ops, axes, x, w)
        return jnp.sum(jnp.sin(y)), y

    (_, y), (dx, dw) = jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(x, w)
    return y, dx, dw


@pytest.mark.parametrize("names", [("embed", "heads"), ("ffn", "embed")])
@pytest.mark.parametrize("mesh", MESHES)
def test_equals_one_device(mesh, names):
    """The weights' gradient scales 128 rows together, of which each device has others: it is near, and the rest is
    equal."""
    x = X if mesh == "sequences" else X.reshape(-1, 256)
    (y, dx, dw), (one_y, one_dx, one_dw) = call(mesh_ops(MESHES[mesh]), names, x, W), call(ONE, names, x, W)
    np.testing.assert_allclose(y, one_y, atol=2e-4)
    # sin turns the last bit of y into another E4M3 number of dy
    np.testing.assert_allclose(dx, one_dx, atol=0.02 * np.abs(one_dx).max())
    assert jnp.linalg.norm(dw - one_dw) < 0.06 * jnp.linalg.norm(one_dw)


@pytest.mark.parametrize("names", [("embed", "heads"), ("ffn", "embed")])
@pytest.mark.parametrize("mesh, tile", [("rows", 128), ("tensor", 128), ("tensor", 256)])
def test_quantized_weights(mesh, tile, names):
    w = quantize_block(W, size=tile)
    ops = mesh_ops(MESHES[mesh])
    got = jit(lambda w, x: product(ops, names, x, w))(w, X.reshape(-1, 256))
    np.testing.assert_allclose(got, fp8_linear(X.reshape(-1, 256), w), atol=2e-4)


def gathered(fn, *args) -> dict[str, int]:
    """The largest number of elements that a compiled program gathers, by their type."""
    text, largest = jit(fn).lower(*args).compile().as_text(), {}
    for dtype, dims in re.findall(r"= (\w+)\[([\d,]+)\]\S* all-gather", text):
        largest[dtype] = max(largest.get(dtype, 0), math.prod(map(int, dims.split(","))))
    return largest


def test_a_linear_in_fp8_on_a_mesh_is_eight_calls(monkeypatch):
    """A reader follows one Linear from its module to the product of the kernels through few functions."""
    called = []

    def product(static, a, b, sizes_G, out_dtype):
        ours = [
            frame
            for frame in traceback.extract_stack()
            if "/deepseek_jax/" in frame.filename or "/kernels_pallas/" in frame.filename
        ]
        called.append([frame.name for frame in ours])
        return jnp.zeros((a.shape[0], b.shape[0]), out_dtype)

    monkeypatch.setattr(vjp, "matmul", product)
    ops = mesh_ops({"fsdp": 2, "tensor": 4}, precision=get_precision("fp8_deepseek"), target="tpu")
    linear = Linear(experts_config(2, 8), ops, 384, ("embed", "heads"))
    jax.eval_shape(lambda x: linear.apply({"params": {"kernel": W}}, x), X)
    assert 1 <= len(called[0]) < 8, called[0]  # and the product itself


@pytest.mark.parametrize(
    "name, sizes", [("linear", {"fsdp": 2, "data": 4}), ("linear", {"fsdp": 8}), ("experts", {"fsdp": 2, "expert": 4})]
)
def test_weights_travel_in_eight_bits(name, sizes):
    """Each device quantizes its part before it is gathered, to the same numbers, be its part whole blocks or a quarter
    of one."""
    x, (ids, gates) = X.reshape(8, 8, 256), (jnp.arange(8 * 8 * 2).reshape(8, 8, 2) % 5, jnp.full((8, 8, 2), 0.5))

    def call(ops):
        def loss(w, x):
            if name == "linear":
                w, axes = w["gate"][0], ("embed", "ffn")
                w = FP8.weight(w, "linear", ops.local_shape(w.shape, axes))
                return jnp.sum(jnp.sin(product(ops, axes, x.reshape(-1, 256), w)))
            y, _ = Experts(experts_config(8, 256), ops).apply({"params": w}, x, ids, gates)
            return jnp.sum(jnp.sin(y))

        into, out = ("experts", "embed", "expert_ffn"), ("experts", "expert_ffn", "embed")
        w = {
            key: 0.1 * jax.random.normal(jax.random.key(i), (8, 256, 256))
            for i, key in enumerate(("gate", "up", "down"))
        }
        if ops is not ONE:
            w = {key: jax.device_put(x, ops.sharding(out if key == "down" else into, x.shape)) for key, x in w.items()}
        step = jax.value_and_grad(loss, argnums=(0, 1))
        return jit(step)(w, x), gathered(step, w, x)

    ((loss, (dw, dx)), moved), ((one_loss, (one_dw, one_dx)), _) = call(mesh_ops(sizes, precision=FP8)), call(ONE)
    matrices = 1 if name == "linear" else 8 // sizes.get("expert", 1)
    # XLA has no collectives in eight bits on CPU and widens them
    eight_bits = moved.pop("f8e4m3fn", 0) or moved.pop("f16")
    assert eight_bits == matrices * 256 * 256 and moved["f32"] <= matrices * 4
    np.testing.assert_allclose(loss, one_loss, rtol=1e-5)
    np.testing.assert_allclose(dx, one_dx, atol=0.02 * np.abs(one_dx).max())
    for got, want in zip(jax.tree.leaves(dw), jax.tree.leaves(one_dw), strict=True):
        assert jnp.linalg.norm(got - want) <= 0.06 * jnp.linalg.norm(want)


@pytest.mark.parametrize("width, tile", [(192, 128), (256, 128), (384, 128), (768, 256)])
def test_quantized_experts_are_not_cut_within_a_tile(width, tile):
    """Two devices share an expert's width: 256 in whole tiles, the others not."""
    shapes = {"gate": (4, 128, width), "up": (4, 128, width), "down": (4, width, 128)}
    w = {key: jax.random.normal(jax.random.key(i), shape) for i, (key, shape) in enumerate(shapes.items())}
    w["down"] *= 2.0 ** (jnp.arange(width) // 64)[:, None]
    w = {key: quantize_block(x, size=tile) for key, x in w.items()}
    x, ids, gates = X[:1, :16, :128].reshape(2, 8, 128), jnp.arange(2 * 8 * 2).reshape(2, 8, 2) % 4, jnp.ones((2, 8, 2))

    def call(ops):
        experts = Experts(experts_config(4, width), ops)
        return jit(lambda w, *inputs: experts.apply({"params": w}, *inputs)[0])(w, x, ids, gates)

    one = call(ONE)
    assert np.isfinite(one).all()
    np.testing.assert_allclose(
        call(mesh_ops({"expert": 2, "tensor": 2, "fsdp": 2}, precision=FP8)), one, atol=1e-4 * np.abs(one).max()
    )

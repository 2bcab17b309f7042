"""Products that are kernels: each device multiplies its rows, and where `tensor` divides whole tiles, its part of the product."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import jit, placement

from deepseek_jax.model.placement import Placement
from kernels_pallas import fp8_linear, quantize_block

X, W = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(2, 32, 256), (256, 384)]))
MESHES = {
    "rows": {"fsdp": 8},
    "tensor": {"fsdp": 2, "tensor": 2, "expert": 2},
    "tensor cuts tiles": {"tensor": 4, "data": 2},
    "sequences": {"context": 4, "fsdp": 2},
}


def multiply(x, w):
    return jax.vmap(fp8_linear, (0, None))(x, w) if x.ndim == 3 else fp8_linear(x, w)


def call(where: Placement, names, x, w):
    def loss(x, w):
        y = where.multiply(multiply, w, names, x)
        return jnp.sum(jnp.sin(y)), y

    (_, y), (dx, dw) = jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(x, w)
    return y, dx, dw


@pytest.mark.parametrize("names", [("embed", "heads"), ("ffn", "embed")])
@pytest.mark.parametrize("mesh", MESHES)
def test_equals_one_device(mesh, names):
    """The weights' gradient scales 128 rows together, of which each device has others: it is near, and the rest is equal."""
    x = X if mesh == "sequences" else X.reshape(-1, 256)
    (y, dx, dw), (one_y, one_dx, one_dw) = call(placement(MESHES[mesh]), names, x, W), call(Placement(), names, x, W)
    np.testing.assert_allclose(y, one_y, atol=2e-4)
    np.testing.assert_allclose(dx, one_dx, atol=0.02 * np.abs(one_dx).max())  # sin turns the last bit of y into another E4M3 number of dy
    assert jnp.linalg.norm(dw - one_dw) < 0.06 * jnp.linalg.norm(one_dw)


@pytest.mark.parametrize("names", [("embed", "heads"), ("ffn", "embed")])
@pytest.mark.parametrize("mesh", ["rows", "tensor"])
def test_quantised_weights(mesh, names):
    w = quantize_block(W)
    where = placement(MESHES[mesh])
    got = jit(lambda w, x: where.multiply(multiply, w, names, x))(w, X.reshape(-1, 256))
    np.testing.assert_allclose(got, fp8_linear(X.reshape(-1, 256), w), atol=2e-4)

"""What the tests of kernels share."""

import jax.numpy as jnp
import pytest

from kernels_pallas.attention import mosaic_gpu_sm90


@pytest.fixture
def interpretable(monkeypatch):
    """Attention, for an interpreter that knows no matrix instruction whose left side lies in registers."""

    def add_product(total, left, right):
        return total + jnp.dot(left.astype(jnp.float32), right[...].astype(jnp.float32), precision="highest")

    monkeypatch.setattr(mosaic_gpu_sm90, "add_product", add_product)

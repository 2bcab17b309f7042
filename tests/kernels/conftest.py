"""Fixtures of the kernels' tests."""

import jax.numpy as jnp
import pytest

from kernels_pallas.attention import mosaic_gpu_sm90


@pytest.fixture
def interpretable(monkeypatch):
    """Replaces a matrix instruction of the attention kernels that the interpreter does not know: its left side lies in
    registers."""

    def add_product(total, left, right):
        return total + jnp.dot(left.astype(jnp.float32), right[...].astype(jnp.float32), precision="highest")

    monkeypatch.setattr(mosaic_gpu_sm90, "add_product", add_product)

"""Linears whose every step is a Hopper kernel: interpreted against XLA, forward and backward."""

import hopper
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import fp8_grouped_linear, fp8_grouped_swiglu_linear, fp8_linear
from kernels_pallas.linear import vjp
from kernels_pallas.qtensor import QTensor

SIZES = jnp.array([3, 0, 34], jnp.int32)


def normal(seed, shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def results(function, implementation, args):
    """The result, and the gradients of all float arguments for a cotangent of normal numbers."""

    @jax.jit
    def call(*args):
        floats = [arg for arg in args if arg.dtype != jnp.int32]
        y, pull_back = jax.vjp(
            lambda *floats: function(*floats, *args[len(floats) :], implementation=implementation), *floats
        )
        return y, *pull_back(normal(9, y.shape))

    return jax.tree.map(np.asarray, call(*args))


CASES = {
    "linear": (fp8_linear, (normal(0, (40, 200)), normal(1, (200, 72)))),
    "grouped": (fp8_grouped_linear, (normal(0, (40, 136)), normal(1, (3, 136, 72)), SIZES)),
}


@hopper.interprets
@pytest.mark.parametrize("case", CASES)
def test_forward_and_backward(case):
    """Quantized alike and multiplied exactly, in another order: 1e-6 of the largest is a few roundings of float32."""
    function, args = CASES[case]
    with hopper.interpreted():
        kernels = results(function, hopper.SM90, args)
    for kernel, expected in zip(kernels, results(function, "xla", args), strict=True):
        np.testing.assert_allclose(kernel, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


@hopper.interprets
def test_swiglu():
    """silu may differ in its last bit, and so a number in E4M3 by its last of four: of 72 such, rarely one."""
    args = normal(0, (40, 72)), normal(1, (40, 72)), normal(2, (3, 72, 136)), SIZES
    with hopper.interpreted():
        kernels = results(fp8_grouped_swiglu_linear, hopper.SM90, args)
    for kernel, expected in zip(kernels, results(fp8_grouped_swiglu_linear, "xla", args), strict=True):
        assert np.linalg.norm(kernel - expected) < 1e-2 * np.linalg.norm(expected)


@hopper.interprets
def test_scales_off_by_one_tile_are_seen(monkeypatch):
    requantize = vjp.requantize_transposed

    def off_by_one(q, quantizer, **how):
        right = requantize(q, quantizer, **how)
        return QTensor(right.values, jnp.roll(right.scales, 1, axis=0), right.tile)

    function, args = CASES["linear"]
    _, _, expected = results(function, "xla", args)
    monkeypatch.setattr(vjp, "requantize_transposed", off_by_one)
    with hopper.interpreted():
        _, _, dw = results(function, hopper.SM90, args)
    assert np.linalg.norm(dw - expected) > 0.05 * np.linalg.norm(expected)

"""Linears whose every step is a TPU kernel: interpreted against XLA, inside `shard_map`, and compiled for each
generation of TPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from tpu_cases import MULTIPLIED, kernel_texts, lower, multiplied, normal, on_every_chip, run, whole_numbers

from kernels_pallas import fp8_grouped_linear, fp8_grouped_swiglu_linear, fp8_linear, fp8_matmul

SIZES = jnp.array([3, 0, 40], jnp.int32)


def with_gradients(function, *args):
    """The result, and the gradients of all float arguments for a cotangent of normal numbers."""
    floats = [arg for arg in args if arg.dtype != jnp.int32]
    y, pull_back = jax.vjp(lambda *floats: function(*floats, *args[len(floats) :]), *floats)
    return y, *pull_back(normal(9, y.shape, y.dtype))


@pytest.mark.parametrize(
    "function, args",
    [
        (fp8_linear, (normal(0, (40, 200)), normal(1, (200, 130)))),
        (fp8_grouped_linear, (normal(0, (45, 130)), normal(1, (3, 130, 72)), SIZES)),
    ],
)
def test_forward_and_backward(function, args):
    """Quantized alike and multiplied exactly, in another order: 1e-6 of the largest is a few roundings of float32."""

    def results(name):
        return run(lambda *args: with_gradients(functools.partial(function, implementation=name), *args), *args)

    kernels, reference = results("mosaic_tpu"), results("xla")
    for kernel, expected in zip(kernels, reference, strict=True):
        np.testing.assert_allclose(kernel, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


def test_swiglu_forward():
    """silu may differ in its last bit, and so a number in E4M3 by its last of four: of 72 such, rarely one."""
    args = normal(0, (45, 72)), normal(1, (45, 72)), normal(2, (3, 72, 130)), SIZES
    kernel, expected = (
        run(functools.partial(fp8_grouped_swiglu_linear, implementation=name), *args) for name in ("mosaic_tpu", "xla")
    )
    assert np.linalg.norm(kernel - expected) < 1e-2 * np.linalg.norm(expected)


@pytest.mark.parametrize(
    "split, out_spec, accepted", [((0, 1), "data", True), ((), None, True), ((0,), None, False), ((1,), None, False)]
)
def test_results_vary_where_operands_do(split, out_spec, accepted):
    """The result of an operand that differs between devices differs between them too. Lowered for any TPU."""
    a, b = whole_numbers(0, (64, 256), (1, 128)), whole_numbers(1, (64, 256), (1, 128))
    specs = dict(
        in_specs=tuple(PartitionSpec("data" if index in split else None) for index in range(2)),
        out_specs=PartitionSpec(out_spec),
    )
    mesh = jax.sharding.Mesh(jax.devices()[:2], ("data",))
    multiply = jax.shard_map(lambda a, b: fp8_matmul(a, b, implementation="mosaic_tpu"), mesh=mesh, **specs)
    if accepted:
        assert "tpu_custom_call" in jax.jit(multiply).trace(a, b).lower(lowering_platforms=("tpu",)).as_text()
    else:
        with pytest.raises(ValueError, match="out_specs"):
            jax.jit(multiply).trace(a, b)


@on_every_chip
def test_compiles_forward_and_backward(topology):
    """Four experts on each device, their tokens split: two quantizations forward and four back, and three products."""
    x, sizes, w = (
        jax.ShapeDtypeStruct((1024, 2048), jnp.bfloat16),
        jax.ShapeDtypeStruct((4,), jnp.int32),
        jax.ShapeDtypeStruct((4, 2048, 512), jnp.float32),
    )

    def linear(x, sizes, w):
        y, pull_back = jax.vjp(
            lambda x, w: fp8_grouped_linear(x, w, sizes, alignment=128, implementation="mosaic_tpu"), x, w
        )
        dx, dw = pull_back(y)
        return dx, jax.lax.pcast(dw, "data", to="varying")

    program = lower(topology, linear, x, sizes, w, sharded=2)
    assert multiplied(program) == {MULTIPLIED[topology]}
    assert len(kernel_texts(program)) == 9
    program.compile()

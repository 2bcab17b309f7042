"""Operands and results of each policy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from deepseek_jax.errors import ConfigError
from deepseek_jax.model.moe import dense_experts
from deepseek_jax.model.ops import Ops
from deepseek_jax.precision import PRECISIONS, get_precision
from kernels_pallas import swiglu


@pytest.mark.parametrize(("name", "compute"), [("float32", jnp.float32), ("bfloat16", jnp.bfloat16)])
def test_dtypes(name, compute):
    r = get_precision(name)
    x, w = jnp.ones((2, 3), jnp.float32), jnp.ones((3, 4), jnp.float32)
    assert r.name == name and r.param_dtype == jnp.float32 and r.compute_dtype == compute
    assert r.linear(x, w).dtype == compute
    assert r.einsum("ab,bc->ac", x, w).dtype == jnp.float32
    grouped = jax.eval_shape(lambda: r.grouped_linear(x, w[None], jnp.asarray([2]), 1))
    assert grouped.dtype == compute and grouped.shape == (2, 4)
    gradient = jax.eval_shape(jax.grad(lambda w: jnp.sum(r.linear(x, w).astype(jnp.float32))), w)
    assert gradient.dtype == jnp.float32


def test_products_round_as_the_name_says():
    x = jnp.asarray([[1.0, 2**-9]])  # in bfloat16, 1 + 2^-9 is 1
    w = jnp.asarray([[1.0], [1.0]])
    assert float(get_precision("float32").linear(x, w)[0, 0]) == 1 + 2**-9
    assert float(get_precision("bfloat16").linear(x, w)[0, 0]) == 1.0
    assert (
        float(get_precision("bfloat16").einsum("ab,bc->ac", x, w)[0, 0]) == 1 + 2**-9
    )  # summed and returned in float32


def products(jaxpr):
    """The dtypes of the operands of every matrix product in a program, and of its result."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield tuple(str(variable.aval.dtype) for variable in (*equation.invars, *equation.outvars))
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from products(inner)


def test_gradients_of_einsum_multiply_in_the_compute_dtype_too():
    """Matrix units take twice as long over float32 as over bfloat16, and jax's own rule would multiply float32. Sums
    are float32, rounded nowhere."""
    x, w, dy = (
        jax.random.normal(jax.random.key(i), shape, jnp.float32)
        for i, shape in enumerate([(4, 8, 64), (64, 16), (4, 8, 16)])
    )

    def gradients(name):
        return jax.grad(lambda x, w: jnp.sum(get_precision(name).einsum("...D,DV->...V", x, w) * dy), argnums=(0, 1))

    rounded, exact = (jax.jit(gradients(name))(x, w) for name in ("bfloat16", "float32"))
    forward, *backward = products(jax.make_jaxpr(gradients("bfloat16"))(x, w).jaxpr)
    assert forward == ("bfloat16", "bfloat16", "float32") and len(backward) >= 2
    assert set(backward) == {forward}
    for ours, theirs, operand in zip(rounded, exact, (dy @ w.T, jnp.einsum("abD,abV->DV", x, dy)), strict=True):
        assert ours.dtype == jnp.float32
        np.testing.assert_allclose(theirs, operand, rtol=1e-5, atol=1e-5)
        assert jnp.linalg.norm(ours - theirs) < 2**-8 * jnp.linalg.norm(theirs)
        assert not np.array_equal(ours, ours.astype(jnp.bfloat16).astype(jnp.float32))


def swiglu_operands():
    """gate and up in bfloat16, and silu(gate) · up in float64 rounded once to bfloat16."""
    gate, up = (jax.random.normal(jax.random.key(i), (64, 128), jnp.bfloat16) for i in (0, 1))
    gate64, up64 = (np.asarray(x, np.float64) for x in (gate, up))
    return gate, up, (gate64 / (1 + np.exp(-gate64)) * up64).astype(ml_dtypes.bfloat16)


def test_swiglu_is_rounded_once_in_every_product():
    """Linear, experts group by group, and experts by definition: float32 between, not one rounding for each
    operation."""
    gate, up, rounded_once = swiglu_operands()
    gate64 = np.asarray(gate, np.float64)
    # of an expert whose weights are the identity
    squared = (gate64 / (1 + np.exp(-gate64)) * gate64).astype(ml_dtypes.bfloat16)
    r, identity, size = get_precision("bfloat16"), jnp.eye(128, dtype=jnp.bfloat16), jnp.asarray([64])
    outputs = {
        "linear": r.swiglu_linear(gate, up, identity),
        "grouped": r.grouped_swiglu_linear(gate, up, identity[None], size, 1),
        "dense": dense_experts(Ops(r), (identity[None],) * 3, gate, jnp.zeros((64, 1), int))[:, 0],
    }
    in_bfloat16 = jax.nn.silu(gate) * up
    assert np.mean(np.asarray(in_bfloat16) != rounded_once) > 0.1  # the control: rounded after every operation
    for name, output in outputs.items():
        assert np.mean(np.asarray(output) != (squared if name == "dense" else rounded_once)) < 0.001, name


def test_swiglu_is_the_same_number_in_bfloat16_and_in_fp8():
    """So that FP8's curve against bfloat16's compares products alone. In FP8 two ways lead to the down projection's
    input."""
    gate, up, rounded_once = swiglu_operands()
    fp8, w = get_precision("fp8_deepseek"), jax.random.normal(jax.random.key(2), (128, 16), jnp.float32)
    expected = dataclasses.replace(fp8, keep_swiglu_input=False).linear(jnp.asarray(rounded_once), w)
    for r in (fp8, dataclasses.replace(fp8, keep_swiglu_input=False)):
        difference = np.abs(np.asarray(r.swiglu_linear(gate, up, w) - expected, np.float32))
        assert np.mean(difference > 0) < 0.05 and difference.max() < 0.2


def test_swiglu_keeps_its_operands_alone():
    """The gradient is that of the float32 function, and nothing in float32 is kept for it."""
    gate, up, _ = swiglu_operands()
    h, pull_back = jax.vjp(swiglu, gate, up)
    assert {(x.dtype.name, x.shape) for x in jax.tree.leaves(pull_back)} == {
        ("bfloat16", (64, 128))
    } and h.dtype == jnp.bfloat16
    exact = jax.vjp(lambda gate, up: jax.nn.silu(gate) * up, *(x.astype(jnp.float32) for x in (gate, up)))[1](
        jnp.ones((64, 128))
    )
    for ours, theirs in zip(pull_back(jnp.ones_like(h)), exact, strict=True):
        np.testing.assert_array_equal(ours, theirs.astype(jnp.bfloat16))


@pytest.mark.parametrize("equation", ["...c,cb->...b", "...D,DV->...V", "...a,ba->...b"])
def test_leading_axes_get_letters_of_their_own(equation):
    """Whatever letters the equation uses, in the product and in its gradients."""
    a, b = np.random.default_rng(0).normal(size=(2, 3, 4)), np.random.default_rng(1).normal(size=(4, 5))
    b = b.T if "ba" in equation else b
    y, pull_back = jax.vjp(functools.partial(get_precision("float32").einsum, equation), jnp.float32(a), jnp.float32(b))
    np.testing.assert_allclose(y, np.einsum(equation, a, b), rtol=1e-5, atol=1e-5)
    da, db = pull_back(jnp.ones_like(y))
    ones = np.ones(y.shape)
    np.testing.assert_allclose(da, ones @ (b if "ba" in equation else b.T), rtol=1e-5, atol=1e-5)
    expected = np.tensordot(a, ones, ((0, 1), (0, 1)))
    np.testing.assert_allclose(db, expected.T if "ba" in equation else expected, rtol=1e-5, atol=1e-5)


def test_recipes_are_static_arguments():
    assert (
        hash(get_precision("float32")) == hash(get_precision("float32"))
        and get_precision("float32") == PRECISIONS["float32"]
    )
    assert get_precision("float32") != get_precision("bfloat16")
    assert np.dtype(get_precision("float32").compute_dtype) == np.float32


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(ConfigError, match="config.precision='bfloat61': did you mean 'bfloat16'"):
        get_precision("bfloat61")

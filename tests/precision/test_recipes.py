"""What each recipe multiplies with and what it returns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.errors import ConfigError
from deepseek_jax.precision import RECIPES, recipe


@pytest.mark.parametrize(("name", "compute"), [("float32", jnp.float32), ("bfloat16", jnp.bfloat16)])
def test_dtypes(name, compute):
    r = recipe(name)
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
    assert float(recipe("float32").linear(x, w)[0, 0]) == 1 + 2**-9
    assert float(recipe("bfloat16").linear(x, w)[0, 0]) == 1.0
    assert float(recipe("bfloat16").einsum("ab,bc->ac", x, w)[0, 0]) == 1 + 2**-9  # summed and returned in float32


def products(jaxpr):
    """The dtypes of the operands of every matrix product in a program, and of its result."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield tuple(str(variable.aval.dtype) for variable in (*equation.invars, *equation.outvars))
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from products(inner)


def test_gradients_of_einsum_multiply_in_the_compute_dtype_too():
    """Matrix units take twice as long over float32 as over bfloat16, and jax's own rule would multiply float32. Sums are float32, rounded nowhere."""
    x, w, dy = (jax.random.normal(jax.random.key(i), shape, jnp.float32) for i, shape in enumerate([(4, 8, 64), (64, 16), (4, 8, 16)]))

    def gradients(name):
        return jax.grad(lambda x, w: jnp.sum(recipe(name).einsum("...D,DV->...V", x, w) * dy), argnums=(0, 1))

    rounded, exact = (jax.jit(gradients(name))(x, w) for name in ("bfloat16", "float32"))
    forward, *backward = products(jax.make_jaxpr(gradients("bfloat16"))(x, w).jaxpr)
    assert forward == ("bfloat16", "bfloat16", "float32") and len(backward) >= 2
    assert set(backward) == {forward}
    for ours, theirs, operand in zip(rounded, exact, (dy @ w.T, jnp.einsum("abD,abV->DV", x, dy)), strict=True):
        assert ours.dtype == jnp.float32
        np.testing.assert_allclose(theirs, operand, rtol=1e-5, atol=1e-5)
        assert jnp.linalg.norm(ours - theirs) < 2**-8 * jnp.linalg.norm(theirs)
        assert not np.array_equal(ours, ours.astype(jnp.bfloat16).astype(jnp.float32))


def test_recipes_are_static_arguments():
    assert hash(recipe("float32")) == hash(recipe("float32")) and recipe("float32") == RECIPES["float32"]
    assert recipe("float32") != recipe("bfloat16")
    assert np.dtype(recipe("float32").compute_dtype) == np.float32


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(ConfigError, match="unknown precision 'bfloat61'.*did you mean 'bfloat16'"):
        recipe("bfloat61")

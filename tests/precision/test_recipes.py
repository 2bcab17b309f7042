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


def test_recipes_are_static_arguments():
    assert hash(recipe("float32")) == hash(recipe("float32")) and recipe("float32") == RECIPES["float32"]
    assert recipe("float32") != recipe("bfloat16")
    assert np.dtype(recipe("float32").compute_dtype) == np.float32


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(ConfigError, match="unknown precision 'bfloat61'.*did you mean 'bfloat16'"):
        recipe("bfloat61")

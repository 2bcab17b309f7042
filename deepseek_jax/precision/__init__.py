"""Which matrix product runs in which number format, by recipe name.

A recipe is what the network multiplies with. Master weights are float32 in every recipe; `compute_dtype` is what
activations are and what the products read. Norms, softmax, routing, logits and losses are float32 whatever the recipe.
"""

import dataclasses

import jax
import jax.numpy as jnp

from deepseek_jax.errors import ConfigError, nearest
from deepseek_jax.precision.grouped import grouped_matmul, row_block


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A named number format for the network's products. Hashable, so that it can be a static argument."""

    name: str
    param_dtype: jnp.dtype
    compute_dtype: jnp.dtype
    matmul_precision: jax.lax.Precision

    def linear(self, x: jax.Array, w_DF: jax.Array) -> jax.Array:
        """x [..., D] times w [D, F] in the compute dtype.

        Give x as [N, D] where you can: with two batch axes XLA's CPU backend computes the weights' gradient twice as slowly.
        """
        return jnp.matmul(x.astype(self.compute_dtype), w_DF.astype(self.compute_dtype), precision=self.matmul_precision)

    def einsum(self, equation: str, *operands: jax.Array) -> jax.Array:
        """An activation-by-activation product (attention): operands in the compute dtype, result in float32."""
        operands = [x.astype(self.compute_dtype) for x in operands]
        return jnp.einsum(equation, *operands, precision=self.matmul_precision, preferred_element_type=jnp.float32)

    def row_block(self, rows: int, num_groups: int, platform: str) -> int:
        """Row count that groups are padded to for `grouped_linear` on "cpu", "gpu" or "tpu"; 1 means no padding."""
        return row_block(rows, num_groups, platform)

    def grouped_linear(self, x_RD: jax.Array, w_EDF: jax.Array, group_sizes_E: jax.Array, block: int) -> jax.Array:
        """Rows of group e times w[e]; groups lie one after another, each a multiple of `block` rows long."""
        x_RD, w_EDF = x_RD.astype(self.compute_dtype), w_EDF.astype(self.compute_dtype)
        return grouped_matmul(x_RD, w_EDF, group_sizes_E, block, self.matmul_precision)


RECIPES = {
    "float32": Recipe("float32", jnp.dtype(jnp.float32), jnp.dtype(jnp.float32), jax.lax.Precision.HIGHEST),
    "bfloat16": Recipe("bfloat16", jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16), jax.lax.Precision.DEFAULT),
}


def recipe(name: str) -> Recipe:
    """The recipe called `name`; raises ConfigError with the nearest name."""
    if name not in RECIPES:
        raise ConfigError(f"unknown precision {name!r}: {nearest(name, RECIPES)}")
    return RECIPES[name]

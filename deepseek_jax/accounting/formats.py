"""What a number format saves: bytes of the weights that are multiplied and of the activations that are kept, under each recipe.

Master weights, gradients and moments are `memory.training_state_bytes`."""

import math

import jax
import jax.numpy as jnp

from deepseek_jax.interop.tensors import tensor_table
from deepseek_jax.model.config import ModelConfig
from deepseek_jax.model.transformer import Transformer, abstract_variables
from deepseek_jax.precision import FP8Recipe, Recipe


def weight_bytes(config: ModelConfig, recipe: Recipe, with_duplicates: bool = False) -> int:
    """Bytes of the weights as the recipe multiplies with them: under FP8 as released, matrices in E4M3 with a float32 scale for each block
    of 128 × 128 and the rest in bfloat16. Routers' biases are float32. `with_duplicates` counts what a released MTP module repeats."""
    total = 0
    for spec in tensor_table(config):
        if spec.duplicate and not with_duplicates:
            continue
        if spec.is_router_bias:
            total += 4 * math.prod(spec.shape)
        elif isinstance(recipe, FP8Recipe) and spec.quantised:
            total += math.prod(spec.shape) + 4 * math.prod(spec.scale_shape)
        else:
            total += recipe.compute_dtype.itemsize * math.prod(spec.shape)
    return total


def activation_bytes(config: ModelConfig, recipe: Recipe, rows: int, length: int) -> dict[str, int]:
    """Bytes that the layers keep for the backward pass, by dtype, for tokens [rows, length] and without recomputation; weights not counted.

    The network is differentiated abstractly: nothing is allocated. Attention's scores are recomputed, and not among them.
    """
    model = Transformer(config.replace(remat="none", attention_chunk=length // 2), recipe)
    variables = abstract_variables(Transformer(config))

    def hidden(params, others, tokens_BT):
        return model.apply({**others, "params": params}, tokens_BT).hidden_BTD

    def kept(params, others, tokens_BT):
        return jax.vjp(lambda params: hidden(params, others, tokens_BT), params)[1]

    others = {name: value for name, value in variables.items() if name != "params"}
    tokens_BT = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    weights = {x.shape for x in jax.tree.leaves(variables["params"])}  # in whatever format
    totals: dict[str, int] = {}
    for x in jax.tree.leaves(jax.eval_shape(kept, variables["params"], others, tokens_BT)):
        if x.shape not in weights:
            totals[x.dtype.name] = totals.get(x.dtype.name, 0) + math.prod(x.shape) * x.dtype.itemsize
    return totals

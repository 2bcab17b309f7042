"""Bytes by number format: of the weights that are multiplied and of the activations that are kept, under each
precision.

Master weights, gradients and moments are in `memory.training_state_bytes`.
"""

import math
from collections import Counter

import jax
import jax.numpy as jnp

from deepseek_jax.interop.tensors import tensor_table
from deepseek_jax.model.config import ModelConfig
from deepseek_jax.model.ops import Ops
from deepseek_jax.model.runtime import RuntimeConfig
from deepseek_jax.model.transformer import Transformer, abstract_variables
from deepseek_jax.precision import FP8Precision, Precision


def weight_bytes(config: ModelConfig, precision: Precision, with_duplicates: bool = False) -> int:
    """Bytes of the weights as the precision multiplies with them.

    Under FP8 they are as released: matrices in E4M3 with a float32 scale for each block of 128 × 128, the rest in
    bfloat16. Routers' biases are float32. `with_duplicates` also counts the tensors that a released MTP module repeats.
    """
    total = 0
    for spec in tensor_table(config):
        if spec.duplicate and not with_duplicates:
            continue
        if spec.is_router_bias:
            total += 4 * math.prod(spec.shape)
        elif isinstance(precision, FP8Precision) and spec.quantized:
            total += math.prod(spec.shape) + 4 * math.prod(spec.scale_shape)
        else:
            total += precision.compute_dtype.itemsize * math.prod(spec.shape)
    return total


def activation_bytes(config: ModelConfig, precision: Precision, sequences: int, length: int) -> dict[str, int]:
    """Bytes that the layers keep for the backward pass, by dtype, for tokens [sequences, length] and without
    recomputation, on a GPU without kernels of ours.

    Counted is the growth from `sequences` to twice as many, so that weights and the padding of experts' groups cancel.
    The network is differentiated abstractly: nothing is allocated. Attention's scores are recomputed and not counted.
    """
    model = Transformer(config, Ops(precision, RuntimeConfig(attention_chunk=length // 2), target="gpu"))
    variables = abstract_variables(Transformer(config))

    def kept(sequences: int) -> Counter[str]:
        def pull_back(params, others, tokens_BT):
            return jax.vjp(lambda params: model.apply({**others, "params": params}, tokens_BT).hidden_BTD, params)[1]

        others = {name: value for name, value in variables.items() if name != "params"}
        arrays = jax.eval_shape(
            pull_back, variables["params"], others, jax.ShapeDtypeStruct((sequences, length), jnp.int32)
        )
        totals: Counter[str] = Counter()
        for x in jax.tree.leaves(arrays):
            totals[x.dtype.name] += math.prod(x.shape) * x.dtype.itemsize
        return totals

    return dict(kept(2 * sequences) - kept(sequences))

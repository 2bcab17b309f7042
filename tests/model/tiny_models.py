"""Tiny networks for the tests of `model`: configs, random variables without a compile, and compiled calls shared by
modules."""

import functools
import zlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.model.config import GQAConfig, MLAConfig, ModelConfig, MoEConfig, RopeConfig, YarnConfig
from deepseek_jax.model.ops import Ops
from deepseek_jax.model.transformer import Transformer, abstract_variables

# Unoptimized code: these programs run a few times on a few numbers, so that compiling them is what costs time.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

YARN = RopeConfig(yarn=YarnConfig(factor=4.0, original_max_position_embeddings=8, beta_fast=2.0, mscale_all_dim=1.0))
MHA, GQA, MQA = GQAConfig(4, 4, 8), GQAConfig(4, 2, 8), GQAConfig(4, 1, 8)


def tiny_mla(**changes) -> MLAConfig:
    fields = dict(num_heads=2, kv_lora_rank=8, qk_nope_head_dim=6, qk_rope_head_dim=8, v_head_dim=5, q_lora_rank=10)
    return MLAConfig(**(fields | changes))


def tiny_moe(**changes) -> MoEConfig:
    fields = dict(num_experts=8, top_k=3, intermediate_size=6, num_shared_experts=1, num_groups=4, topk_groups=2)
    return MoEConfig(**(fields | dict(routed_scaling_factor=2.5) | changes))


def tiny_config(**changes) -> ModelConfig:
    """One dense and two MoE layers under MLA with YaRN, two MTP modules: every architectural piece of V3."""
    fields = dict(
        vocab_size=37, hidden_size=16, num_layers=3, intermediate_size=24, attention=tiny_mla(), moe=tiny_moe()
    )
    return ModelConfig(**(fields | dict(first_k_dense=1, rope=YARN, mtp_depth=2) | changes))


def random_like(tree, seed: int = 0):
    """Numbers for a tree of shapes (boxed or not), each leaf drawn from its own path: norms near 1, biases near 0,
    weights of std 0.3."""

    def leaf(path, shape):
        name = jax.tree_util.keystr(path)
        values = np.random.default_rng([seed, zlib.crc32(name.encode())]).normal(size=shape.shape)
        values = 1 + 0.2 * values if "scale" in name else 0.1 * values if "bias" in name else 0.3 * values
        return jnp.asarray(values, shape.dtype)

    return jax.tree_util.tree_map_with_path(leaf, nn.meta.unbox(tree))


@functools.cache
def variables(config: ModelConfig):
    return random_like(abstract_variables(Transformer(config)))


@functools.cache
def forward(config: ModelConfig, precision: str = "float32"):
    """Compiled (variables, tokens, segment_ids, positions, expert_ids=None) -> (Output with MTP, logits)."""
    model = Transformer(config, Ops(precision))

    def call(variables, tokens_BT, segment_ids_BT, positions_BT, expert_ids_LBTK=None):
        arguments = dict(segment_ids_BT=segment_ids_BT, positions_BT=positions_BT, expert_ids_LBTK=expert_ids_LBTK)
        output = model.apply(variables, tokens_BT, mtp=True, **arguments)
        return output, model.apply(variables, output.hidden_BTD, method="unembed")

    return jit(call)


def batch(seed: int = 0, rows: int = 2, length: int = 11, vocab: int = 37):
    """(tokens, segment_ids, positions) of full single-document rows."""
    tokens = np.random.default_rng(seed).integers(1, vocab, (rows, length)).astype(np.int32)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
    return tokens, np.ones_like(tokens), positions

"""One tiny network with every piece on, one with grouped-query attention, and the compiled functions all tests
share."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.generation import SamplingConfig, generate
from deepseek_jax.generation.generate import advance, finish, start
from deepseek_jax.model.config import GQAConfig, MLAConfig, ModelConfig, MoEConfig, RopeConfig, YarnConfig
from deepseek_jax.model.transformer import Transformer, abstract_variables

V, P, N = 40, 6, 11
EOS, PAD = 3, 0
LENGTHS = np.asarray([6, 1, 4, 3], np.int32)
SAMPLING = SamplingConfig(max_new_tokens=N, eos_id=EOS, pad_id=PAD, temperature=1.3, top_k=30, top_p=0.97)

# Sizes that differ from one another, so that a shape names its axes.
MLA = ModelConfig(
    vocab_size=V,
    hidden_size=32,
    num_layers=3,
    intermediate_size=48,
    attention=MLAConfig(
        num_heads=5, q_lora_rank=22, kv_lora_rank=26, qk_nope_head_dim=10, qk_rope_head_dim=6, v_head_dim=14
    ),
    moe=MoEConfig(
        num_experts=8,
        top_k=3,
        intermediate_size=16,
        num_shared_experts=1,
        num_groups=4,
        topk_groups=2,
        routed_scaling_factor=1.5,
    ),
    first_k_dense=1,
    rope=RopeConfig(yarn=YarnConfig(factor=4.0, original_max_position_embeddings=8, mscale_all_dim=1.0)),
    mtp_depth=1,
)
GQA = MLA.replace(attention=GQAConfig(num_heads=4, num_kv_heads=2, head_dim=10), moe=None, mtp_depth=0, num_layers=2)


class Case(NamedTuple):
    """A network, four prompts of different lengths and compiled entry points; `rollout` is `generate` made of its two
    halves."""

    model: Transformer
    variables: Any
    prompts_BP: np.ndarray

    def start(self, prompts, lengths, seed=0, sampling=SAMPLING, **kwargs):
        return _start(
            self.model,
            self.variables,
            jnp.asarray(prompts),
            jnp.asarray(lengths),
            jax.random.key(seed),
            sampling,
            **kwargs,
        )

    def advance(self, state, steps, sampling=SAMPLING):
        return _advance(self.model, self.variables, state, sampling, steps)

    def rollout(self, prompts, lengths, **kwargs):
        return finish(self.advance(self.start(prompts, lengths, return_experts=True, **kwargs), N))

    def generate(self, prompts, lengths, seed=0, sampling=SAMPLING, **kwargs):
        return _generate(
            self.model,
            self.variables,
            jnp.asarray(prompts),
            jnp.asarray(lengths),
            jax.random.key(seed),
            sampling,
            **kwargs,
        )

    def forward(self, tokens_BT, segment_ids_BT, positions_BT, expert_ids_LBTK=None):
        """Logits [B, T, V] of one full forward pass, and the experts it chose."""
        return _forward(self.model, self.variables, tokens_BT, segment_ids_BT, positions_BT, expert_ids_LBTK)


STATIC = ("model", "sampling", "samples_per_prompt", "return_experts")
_start = jax.jit(start, static_argnames=STATIC)
_advance = jax.jit(advance, static_argnames=("model", "sampling"))
_generate = jax.jit(generate, static_argnames=STATIC)


@functools.partial(jax.jit, static_argnums=0)
def _forward(model, variables, tokens_BT, segment_ids_BT, positions_BT, expert_ids_LBTK):
    output = model.apply(
        variables, tokens_BT, segment_ids_BT=segment_ids_BT, positions_BT=positions_BT, expert_ids_LBTK=expert_ids_LBTK
    )
    routing = output.routing
    return model.apply(
        variables, output.hidden_BTD, method="unembed"
    ), None if routing is None else routing.expert_ids_LBTK


def build_case(config: ModelConfig) -> Case:
    """Random weights without a compilation. Norm scales and router biases differ from their initial values, so that a
    path that leaves one of them out gives other numbers."""
    model, random = Transformer(config), np.random.default_rng(0)

    def fill(path, x):
        return jnp.asarray(0.3 * random.normal(size=x.shape) + ("scale" in str(path[-1])), x.dtype)

    variables = jax.tree_util.tree_map_with_path(fill, abstract_variables(model))
    prompts = random.integers(4, V, size=(len(LENGTHS), P)).astype(np.int32)
    return Case(model, variables, np.where(np.arange(P) < LENGTHS[:, None], prompts, PAD))

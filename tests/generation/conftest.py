"""One tiny network with every piece on (and one with grouped-query attention), and compiled functions shared by all tests."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.generation import SamplingConfig, generate
from deepseek_jax.model.config import GQAConfig, MLAConfig, ModelConfig, MoEConfig, RopeConfig, YarnConfig
from deepseek_jax.model.transformer import Transformer, init_variables

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
    attention=MLAConfig(num_heads=5, q_lora_rank=22, kv_lora_rank=18, qk_nope_head_dim=10, qk_rope_head_dim=6, v_head_dim=14),
    moe=MoEConfig(
        num_experts=8, top_k=3, intermediate_size=16, num_shared_experts=1, num_groups=4, topk_groups=2, routed_scaling_factor=1.5
    ),
    first_k_dense=1,
    rope=RopeConfig(yarn=YarnConfig(factor=4.0, original_max_position_embeddings=8, mscale_all_dim=1.0)),
    mtp_depth=1,
    init_std=0.3,
)
GQA = MLA.replace(attention=GQAConfig(num_heads=4, num_kv_heads=2, head_dim=10), moe=None, mtp_depth=0, num_layers=2)


class Case(NamedTuple):
    model: Transformer
    variables: Any
    prompts_BP: np.ndarray

    def generate(self, prompts, lengths, seed=0, sampling=SAMPLING, **kwargs):
        return _generate(self.model, self.variables, jnp.asarray(prompts), jnp.asarray(lengths), jax.random.key(seed), sampling, **kwargs)

    def forward(self, tokens_BT, segment_ids_BT, positions_BT, expert_ids_LBTK=None):
        """Logits [B, T, V] of one full forward pass, and the experts it chose."""
        return _forward(self.model, self.variables, tokens_BT, segment_ids_BT, positions_BT, expert_ids_LBTK)


_generate = jax.jit(generate, static_argnames=("model", "sampling", "samples_per_prompt", "return_experts"))


@functools.partial(jax.jit, static_argnums=0)
def _forward(model, variables, tokens_BT, segment_ids_BT, positions_BT, expert_ids_LBTK):
    output = model.apply(
        variables, tokens_BT, segment_ids_BT=segment_ids_BT, positions_BT=positions_BT, expert_ids_LBTK=expert_ids_LBTK
    )
    routing = output.routing
    return model.apply(variables, output.hidden_BTD, method="unembed"), None if routing is None else routing.expert_ids_LBTK


def _case(config):
    model = Transformer(config)
    variables = init_variables(model, jax.random.key(0))
    if "router_bias" in variables:  # biases that change choices, so that a decode without them would show
        bias = lambda b: 0.3 * jax.random.normal(jax.random.key(5), b.shape)
        variables = {**variables, "router_bias": jax.tree.map(bias, variables["router_bias"])}
    prompts = np.random.default_rng(0).integers(4, V, size=(len(LENGTHS), P)).astype(np.int32)
    return Case(model, variables, np.where(np.arange(P) < LENGTHS[:, None], prompts, PAD))


@pytest.fixture(scope="session")
def mla():
    return _case(MLA)


@pytest.fixture(scope="session")
def gqa():
    return _case(GQA)


@pytest.fixture(scope="session", params=["mla", "gqa"])
def case(request):
    return request.getfixturevalue(request.param)

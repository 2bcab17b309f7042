"""An attention with a module of its own, one cached array and a logical axis of its own: everything else follows from
its config class."""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import batch, forward, jit, tiny_config, variables

from deepseek_jax.accounting.counts import count_parameters
from deepseek_jax.accounting.flops import forward_flops_per_token
from deepseek_jax.accounting.memory import cache_elements_per_token
from deepseek_jax.errors import CheckpointError, ConfigError
from deepseek_jax.interop import config_to_hf
from deepseek_jax.model.attention_core import Tokens, causal_mask, masked_softmax
from deepseek_jax.model.cache import init_cache, write
from deepseek_jax.model.config import AttentionConfig, MoEConfig
from deepseek_jax.model.layers import Linear
from deepseek_jax.model.moe import MoE
from deepseek_jax.model.ops import Ops
from deepseek_jax.model.transformer import Transformer, logical_axes
from deepseek_jax.parallel.mesh import MeshConfig
from deepseek_jax.parallel.rules import build_rules, check_divisible, divide


class SharedAttention(nn.Module):
    """H query heads over one vector per token that is key and value alike; no positions."""

    config: object
    ops: Ops

    @nn.compact
    def __call__(self, x_BTD, tokens: Tokens, cache_entry=None):
        attention, ops = self.config.attention, self.ops
        heads, dim = attention.num_heads, attention.dim
        q_BTF = Linear(self.config, ops, heads * dim, ("embed", "heads"), name="q")(x_BTD)
        new_BTk = Linear(self.config, ops, dim, ("embed", "shared_kv"), name="kv")(x_BTD)
        if cache_entry is None:
            kv_BSk, mask_BTS = new_BTk, causal_mask(tokens.segment_ids_BT, tokens.segment_ids_BT, 0)
        else:
            kv_BSk, mask_BTS = jnp.concatenate([*cache_entry, new_BTk], axis=1), tokens.cached_and_new_mask()
        q_BTHk = q_BTF.reshape(*x_BTD.shape[:2], heads, dim)
        probs_BHTS = masked_softmax(ops.einsum("BTHk,BSk->BHTS", q_BTHk, kv_BSk) * dim**-0.5, mask_BTS[:, None])
        out_BTF = ops.einsum("BHTS,BSk->BTHk", probs_BHTS, kv_BSk).reshape(*x_BTD.shape[:2], heads * dim)
        y_BTD = Linear(self.config, ops, x_BTD.shape[-1], ("heads", "embed"), name="o")(out_BTF)
        return y_BTD, (new_BTk,)


@dataclasses.dataclass(frozen=True)
class Shared(AttentionConfig):
    sharding_rules: ClassVar[dict[str, str]] = {"shared_kv": "tensor"}

    num_heads: int = 4
    dim: int = 6

    module = SharedAttention
    num_key_heads = property(lambda self: self.num_heads)
    rotary_dim = 0
    qk_head_dim = property(lambda self: self.dim)
    cache_dims = property(lambda self: {"kv": self.dim})
    pair_flops = property(lambda self: 4 * self.num_heads * self.dim)


@dataclasses.dataclass(frozen=True)
class HalvedMoE(MoEConfig):
    """A feed-forward with a module of its own."""

    @property
    def module(self):
        return Halved


class Halved(MoE):
    @nn.compact
    def __call__(self, *arguments):
        y_BTD, routing = super().__call__(*arguments)
        return y_BTD / 2, routing


CONFIG = tiny_config(attention=Shared())


def test_decoding_through_its_cache_equals_whole_sequences():
    tokens, segments, positions = batch()
    output, logits = forward(CONFIG)(variables(CONFIG), tokens, segments, positions)
    model, cache = Transformer(CONFIG), init_cache(CONFIG, 2, 12, jnp.float32)
    assert {name: [entry.shape for entry in entries] for name, entries in cache.entries.items()} == {
        "dense_layers": [(1, 2, 12, 6)],
        "moe_layers": [(2, 2, 12, 6)],
    }

    def step(variables, tokens, positions, cache):
        new = model.apply(variables, tokens, positions_BT=positions, cache=cache)
        return model.apply(variables, new.hidden_BTD, method="unembed")

    cache = write(cache, jax.tree.map(lambda entry: entry[:, :, :9], output.latents), positions[:, :9], 0)
    got = jit(step)(variables(CONFIG), tokens[:, 9:], positions[:, 9:], cache)
    np.testing.assert_allclose(got, logits[:, 9:], atol=1e-5)


def test_its_figures_are_its_own():
    parameters = 2 * 4 * 6 * 16 + 16 * 6  # q and o, kv
    assert count_parameters(CONFIG).main["attention"] == 3 * parameters
    assert cache_elements_per_token(3, CONFIG.attention) == 18
    scores = forward_flops_per_token(CONFIG, 100) - forward_flops_per_token(CONFIG, 20)
    assert scores == 3 * (4 * 4 * 6) * (50 - 10)


def test_its_own_axis_is_divided_by_its_own_rule():
    axes = logical_axes(Transformer(CONFIG))["params"]["dense_layers"]["attn"]["kv"]["kernel"]
    sizes = {"data": 1, "fsdp": 2, "expert": 1, "context": 1, "tensor": 2}
    rules = dict(build_rules((), CONFIG.attention.sharding_rules))
    assert divide(rules, sizes, tuple(axes), (1, 16, 6)) == ((), ("fsdp",), ("tensor",))
    with pytest.raises(ConfigError, match="logical axis 'shared_kv' has no rule"):
        divide(dict(build_rules()), sizes, tuple(axes), (1, 16, 6))
    assert "does not divide the attention heads=4" in check_divisible(sizes | {"tensor": 8}, MeshConfig(), CONFIG)


def test_it_cannot_be_exported():
    with pytest.raises(CheckpointError, match=r"kind '.*:Shared' has no Hugging Face names"):
        config_to_hf(CONFIG)


def test_a_feed_forward_may_have_its_own_module():
    fields = {name: value for name, value in dataclasses.asdict(CONFIG.moe).items() if name != "kind"}
    halved = CONFIG.from_dict(CONFIG.to_dict() | {"moe": fields | {"kind": f"{__name__}:HalvedMoE"}})
    assert type(halved.moe) is HalvedMoE
    arguments = variables(CONFIG), *batch()
    (a, _), (b, _) = forward(CONFIG)(*arguments), forward(halved)(*arguments)
    assert np.abs(a.hidden_BTD - b.hidden_BTD).max() > 1e-3

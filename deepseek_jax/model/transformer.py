"""The network: embedding, dense blocks, MoE blocks, final norm, head, and the multi-token-prediction modules."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from deepseek_jax.model.attention_core import Tokens
from deepseek_jax.model.auxiliary import LOSSES, METRICS
from deepseek_jax.model.cache import Cache
from deepseek_jax.model.config import ModelConfig, MoEConfig
from deepseek_jax.model.layers import Linear, RMSNorm, SwiGLU
from deepseek_jax.model.mtp import MTPModule, shift_left
from deepseek_jax.model.ops import Ops
from deepseek_jax.model.router import RoutingStats

REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


RESIDUAL = ("batch", "length", None)  # logical axes of a hidden state [B, T, D]


@flax.struct.dataclass
class Output:
    """The results of a forward call. Only those that are used are computed."""

    hidden_BTD: jax.Array  # after the final norm; `unembed` makes logits of it
    mtp_hidden: tuple[jax.Array, ...]  # per MTP module k = 1, 2, …: [B, T, D], position i predicts token i+k+1
    routing: RoutingStats | None  # stacked over the MoE layers
    mtp_routing: RoutingStats | None  # stacked over the MTP modules
    latents: dict[str, tuple[jax.Array, ...]]  # what a cache keeps of these tokens (see model/cache.py)


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x)); the feed-forward is a MoE where `moe` is given."""

    config: ModelConfig
    ops: Ops
    moe: MoEConfig | None

    @nn.compact
    def __call__(self, x_BTD, tokens: Tokens, cache_entry, expert_ids_BTK):
        """-> x [B, T, D], (RoutingStats of this layer or None, the cache arrays of the new tokens)."""
        config, ops = self.config, self.ops
        attention = config.attention.module(config, ops, name="attn")
        y_BTD, latents = attention(RMSNorm(config.rms_norm_eps, name="attn_norm")(x_BTD), tokens, cache_entry)
        x_BTD = ops.shard(x_BTD + y_BTD, *RESIDUAL)

        normed_BTD = RMSNorm(config.rms_norm_eps, name="ffn_norm")(x_BTD)
        if self.moe is None:
            ffn = SwiGLU(config, ops, config.intermediate_size, name="ffn")
            y_BTD, routing = ffn(normed_BTD), None
        else:
            moe = self.moe.module(config, ops, name="ffn")
            y_BTD, routing = moe(normed_BTD, tokens.segment_ids_BT > 0, expert_ids_BTK)
        return ops.shard(x_BTD + y_BTD, *RESIDUAL), (routing, latents)


class Transformer(nn.Module):
    """DeepSeek's network. `ops` has the number format of its products and the devices that they run on.

    Call: tokens [B, T] int32;
      segment_ids [B, T] int32, 0 = padding, attention stays inside a segment (default: one document);
      positions [B, T] int32 (default: 0 … T-1);
      cache: attend also to what it holds, in the absorbed form; it is read, never written;
      expert_ids [L, B, T, K] int32: route every MoE layer as given instead of choosing;
      mtp: also run the MTP modules.
    Returns an `Output`.
    """

    config: ModelConfig
    ops: Ops = Ops()

    def setup(self):
        config = self.config
        ops, runtime = self.ops, self.ops.runtime
        normal = nn.initializers.normal(config.init_std)
        self.embed = nn.Embed(
            config.vocab_size,
            config.hidden_size,
            param_dtype=ops.precision.param_dtype,
            embedding_init=nn.with_logical_partitioning(normal, ("vocab", "embed")),
        )
        if not config.tie_embeddings:
            self.head = Linear(config, ops, config.vocab_size, ("embed", "vocab"))
        self.final_norm = RMSNorm(config.rms_norm_eps)

        def block(looped: bool):
            """`Block` under the remat policy. Outside a loop XLA must be kept from merging the recomputation with the
            forward pass."""
            layer = ops.wrap_layer(Block)
            if runtime.remat == "none":
                return layer
            return nn.remat(layer, policy=REMAT_POLICIES[runtime.remat], prevent_cse=not looped)

        def stack(length, moe):
            return nn.scan(
                block(looped=runtime.scan_unroll < length),
                variable_axes={"params": 0, "router_bias": 0, LOSSES: 0, METRICS: 0},
                split_rngs={"params": True},
                in_axes=(nn.broadcast, 0, 0),
                length=length,
                unroll=min(runtime.scan_unroll, length),
                metadata_params={nn.PARTITION_NAME: "layers"},
            )(config, ops, moe)

        if config.num_dense_layers:
            self.dense_layers = stack(config.num_dense_layers, None)
        if config.num_moe_layers:
            self.moe_layers = stack(config.num_moe_layers, config.moe)
        self.mtp = [MTPModule(config, ops, block(looped=False), name=f"mtp_{k}") for k in range(config.mtp_depth)]

    def __call__(
        self,
        tokens_BT: jax.Array,
        *,
        segment_ids_BT: jax.Array | None = None,
        positions_BT: jax.Array | None = None,
        cache: Cache | None = None,
        expert_ids_LBTK: jax.Array | None = None,
        mtp: bool = False,
    ) -> Output:
        if mtp and cache is not None:
            raise ValueError("mtp=True with a cache: the MTP modules keep no cache; run them over whole sequences")
        if segment_ids_BT is None:
            segment_ids_BT = jnp.ones_like(tokens_BT)
        if positions_BT is None:
            positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        positions_BT = jnp.maximum(positions_BT, 0)  # padding may be marked -1
        tokens = Tokens(positions_BT, segment_ids_BT, None if cache is None else cache.positions_BS)

        x_BTD = self._embed(tokens_BT)
        routing, latents = None, {}
        if self.config.num_dense_layers:
            entry = None if cache is None else cache.entries["dense_layers"]
            x_BTD, (_, latents["dense_layers"]) = self.dense_layers(x_BTD, tokens, entry, None)
        if self.config.num_moe_layers:
            entry = None if cache is None else cache.entries["moe_layers"]
            x_BTD, (routing, latents["moe_layers"]) = self.moe_layers(x_BTD, tokens, entry, expert_ids_LBTK)
        hidden_BTD = self.final_norm(x_BTD)

        mtp_hidden, mtp_routing = (), None
        if (mtp or self.is_initializing()) and self.mtp:
            mtp_hidden, mtp_routing = self._predict_ahead(hidden_BTD, tokens_BT, tokens)
        return Output(hidden_BTD, mtp_hidden, routing, mtp_routing, latents)

    def _embed(self, tokens_BT):
        return self.ops.shard(self.ops.embed(self.embed.embedding, tokens_BT), *RESIDUAL)

    def _predict_ahead(self, state_BTD, tokens_BT, tokens: Tokens):
        """Runs the chain of MTP modules. Module k has an input where token i+k is in the same document (V3 eq. 22:
        positions 1 to T-k). The other positions are padding to it: they get the embedding of token 0, and no position
        that counts sees them."""
        heads, routings = [], []
        for k, module in enumerate(self.mtp, start=1):
            same_BT = shift_left(tokens.segment_ids_BT, k) == tokens.segment_ids_BT
            ahead_BT = jnp.where(same_BT, shift_left(tokens_BT, k), 0)
            own = tokens.replace(segment_ids_BT=jnp.where(same_BT, tokens.segment_ids_BT, 0))
            state_BTD, head_BTD, routing = module(state_BTD, self._embed(ahead_BT), own)
            heads.append(head_BTD)
            routings.append(routing)
        if self.config.moe is None:
            return tuple(heads), None
        return tuple(heads), jax.tree.map(lambda *x: jnp.stack(x), *routings)

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """Logits, float32 [..., V], of hidden states [..., D] (main or MTP: they share the head)."""
        if self.config.tie_embeddings:
            return self.ops.einsum("...D,VD->...V", hidden, self.embed.embedding)  # eq. 23
        return self.ops.einsum("...D,DV->...V", hidden, self.head.weight(hidden.shape[-1]))  # eq. 23


def _boxed_init(model: Transformer, rng: jax.Array):
    model = model.clone(ops=Ops(model.ops.precision))  # variables are the same on any devices

    def everything(module: Transformer, tokens_BT):
        return module.unembed(module(tokens_BT, mtp=True).hidden_BTD)

    return model.init(rng, jnp.zeros((1, 2), jnp.int32), method=everything, mutable=("params", "router_bias"))


def init_variables(model: Transformer, rng: jax.Array, shardings: Any = None) -> dict[str, Any]:
    """Random weights {"params", "router_bias"}: normal with the config's init_std, norms 1, biases 0 (V3 §4.2).

    `shardings`, a tree like them, says where each is made.
    """
    # Dozens of small samplers: on CPU, optimizing their code takes far longer than running it once.
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    init = jax.jit(
        lambda rng: nn.meta.unbox(_boxed_init(model, rng)), compiler_options=options, out_shardings=shardings
    )
    return init(rng)


def abstract_variables(model: Transformer) -> dict[str, Any]:
    """The same tree of jax.ShapeDtypeStruct; nothing is allocated."""
    return nn.meta.unbox(jax.eval_shape(lambda: _boxed_init(model, jax.random.key(0))))


def logical_axes(model: Transformer) -> Mapping[str, Any]:
    """The same tree of PartitionSpecs of logical axis names, which `parallel` maps to mesh axes."""
    return nn.get_partition_spec(jax.eval_shape(lambda: _boxed_init(model, jax.random.key(0))))

"""DeepSeekMoE: routed experts plus shared experts (V3 eqs. 12-16). No token is ever dropped."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from deepseek_jax.model.config import ModelConfig
from deepseek_jax.model.layers import SwiGLU
from deepseek_jax.model.ops import Ops
from deepseek_jax.model.permute import permute, sort_by_expert, unpermute
from deepseek_jax.model.router import ROUTERS, RoutingStats
from deepseek_jax.registry import resolve
from kernels_pallas import PreQuantized, swiglu

Weights = tuple[jax.Array, jax.Array, jax.Array]  # gate [E, D, F], up [E, D, F], down [E, F, D]


def grouped_experts(ops: Ops, weights: Weights, x_ND: jax.Array | PreQuantized, expert_ids_NK: jax.Array) -> jax.Array:
    """FFN_i(x) for each of a token's K experts i: [N, K, D]; zero for expert E or more.

    Tokens are sorted by expert, each expert multiplies its own group, and the results go back to their tokens.
    """
    gate_EDF, up_EDF, down_EFD = weights
    num_experts = gate_EDF.shape[0]
    alignment = ops.alignment(expert_ids_NK.size, num_experts)
    order, sizes_E = sort_by_expert(expert_ids_NK, num_experts, alignment)
    x_RD = jax.tree.map(lambda x: permute(x, order), ops.expert_tokens(x_ND))
    gate_RF, up_RF = (ops.grouped_linear(x_RD, w_EDF, sizes_E, alignment) for w_EDF in (gate_EDF, up_EDF))
    return unpermute(ops.grouped_swiglu_linear(gate_RF, up_RF, down_EFD, sizes_E, alignment), order)


def dense_experts(ops: Ops, weights: Weights, x_ND: jax.Array | PreQuantized, expert_ids_NK: jax.Array) -> jax.Array:
    """The same with every token through every expert: the oracle."""
    precision = ops.precision
    x_ND, *weights = map(precision.dense, (x_ND, *weights))

    def expert(gate_DF, up_DF, down_FD):
        gate_NF, up_NF = (precision.linear(x_ND, w_DF, "experts") for w_DF in (gate_DF, up_DF))
        return precision.linear(swiglu(gate_NF, up_NF), down_FD, "experts")

    y_END = jax.vmap(expert)(*weights)
    return jnp.einsum("END,NKE->NKD", y_END, jax.nn.one_hot(expert_ids_NK, len(y_END)))


IMPLEMENTATIONS = {"grouped": grouped_experts, "dense": dense_experts}


def combine(y_NKD: jax.Array, gates_NK: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Σ_i g_i FFN_i(x) over a token's K experts, in float32: [N, D] in `dtype`."""
    return jnp.einsum("NKD,NK->ND", y_NKD.astype(jnp.float32), gates_NK).astype(dtype)  # eq. 12


class Experts(nn.Module):
    """E SwiGLU experts, each token's K results weighted by its gates.

    Call: x [B, T, D], expert_ids [B, T, K], gates [B, T, K] -> y [B, T, D], overflows (see `Ops.experts`).
    """

    config: ModelConfig
    ops: Ops

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, expert_ids_BTK: jax.Array, gates_BTK: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        moe, ops, width = self.config.moe, self.ops, x_BTD.shape[-1]
        into, out = ("experts", "embed", "expert_ffn"), ("experts", "expert_ffn", "embed")

        def weight(name, shape, axes):
            init = nn.with_logical_partitioning(nn.initializers.normal(self.config.init_std), axes)
            return self.param(name, init, (moe.num_experts, *shape), ops.precision.param_dtype)

        weights = (
            weight("gate", (width, moe.intermediate_size), into),
            weight("up", (width, moe.intermediate_size), into),
            weight("down", (moe.intermediate_size, width), out),
        )

        def apply(weights, x_ND, expert_ids_NK):
            return IMPLEMENTATIONS[ops.runtime.experts](ops, weights, x_ND, expert_ids_NK)

        return ops.experts(apply, combine, weights, (into, into, out), x_BTD, expert_ids_BTK, gates_BTK)


class MoE(nn.Module):
    """Routed plus shared experts.

    Call: x [B, T, D], valid [B, T], expert_ids [B, T, K] to replay or None
    -> y [B, T, D], RoutingStats of this layer.
    """

    config: ModelConfig
    ops: Ops

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, valid_BT: jax.Array, expert_ids_BTK: jax.Array | None = None
    ) -> tuple[jax.Array, RoutingStats]:
        config, moe = self.config, self.config.moe
        router = resolve(ROUTERS, moe.router, "MoEConfig.router")(config, name="router")
        gates_BTK, routing = router(x_BTD, valid_BT, expert_ids_BTK)
        y_BTD, overflows = Experts(config, self.ops, name="experts")(x_BTD, routing.expert_ids_LBTK, gates_BTK)
        if moe.num_shared_experts:
            shared = SwiGLU(config, self.ops, moe.num_shared_experts * moe.intermediate_size, name="shared")
            y_BTD += shared(x_BTD)  # eq. 12
        return y_BTD, routing.replace(overflows_L=overflows)

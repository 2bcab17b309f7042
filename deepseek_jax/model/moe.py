"""DeepSeekMoE: routed experts plus shared experts (V3 eqs. 12-16). No token is ever dropped.

Tokens are laid out expert by expert, multiplied group by group and gathered back (see `rows`).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from deepseek_jax.model.config import MoEConfig
from deepseek_jax.model.layers import SwiGLU
from deepseek_jax.model.placement import Placement
from deepseek_jax.model.router import ROUTERS, RoutingStats
from deepseek_jax.model.rows import from_rows, lay_out, to_rows
from deepseek_jax.precision import Precision
from deepseek_jax.registry import resolve
from kernels_pallas import PreQuantized, swiglu

Weights = tuple[jax.Array, jax.Array, jax.Array]  # gate [E, D, F], up [E, D, F], down [E, F, D]


def grouped_experts(
    precision: Precision, kind: str, weights: Weights, x_ND: jax.Array | PreQuantized, expert_ids_NK: jax.Array
) -> jax.Array:
    """Each token through its K SwiGLU experts, each expert over its own rows alone: [N, K, D]; zero for expert E or
    more."""
    gate_EDF, up_EDF, down_EFD = weights
    block = precision.row_block(expert_ids_NK.size, gate_EDF.shape[0], kind)
    layout, sizes_E = lay_out(expert_ids_NK, gate_EDF.shape[0], block)
    x_RD = precision.rows(x_ND, lambda x: to_rows(x, layout), kind)
    gate_RF, up_RF = (precision.grouped_linear(x_RD, w_EDF, sizes_E, block, kind) for w_EDF in (gate_EDF, up_EDF))
    return from_rows(precision.grouped_swiglu_linear(gate_RF, up_RF, down_EFD, sizes_E, block, kind), layout)


def dense_experts(
    precision: Precision, kind: str, weights: Weights, x_ND: jax.Array | PreQuantized, expert_ids_NK: jax.Array
) -> jax.Array:
    """The same with every token through every expert: the oracle."""
    del kind
    x_ND, *weights = map(precision.dense, (x_ND, *weights))

    def expert(gate_DF, up_DF, down_FD):
        gate_NF, up_NF = (precision.linear(x_ND, w_DF, "experts") for w_DF in (gate_DF, up_DF))
        return precision.linear(swiglu(gate_NF, up_NF), down_FD, "experts")

    y_END = jax.vmap(expert)(*weights)
    return jnp.einsum("END,NKE->NKD", y_END, jax.nn.one_hot(expert_ids_NK, len(y_END)))


IMPLEMENTATIONS = {"grouped": grouped_experts, "dense": dense_experts}


class Experts(nn.Module):
    """E SwiGLU experts, each token's K results weighted by its gates.

    Call: x [B, T, D], expert_ids [B, T, K], gates [B, T, K] -> y [B, T, D], overflows (see `Placement.experts`).
    """

    config: MoEConfig
    init_std: float
    precision: Precision
    placement: Placement

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, expert_ids_BTK: jax.Array, gates_BTK: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        config, precision = self.config, self.precision
        width, features = x_BTD.shape[-1], config.intermediate_size

        def weight(name, shape, axes):
            init = nn.with_logical_partitioning(nn.initializers.normal(self.init_std), axes)
            w = self.param(name, init, (config.num_experts, *shape), precision.param_dtype)
            return precision.weight(w, "experts", self.placement.part(w.shape, axes))

        into, out = ("experts", "embed", "expert_ffn"), ("experts", "expert_ffn", "embed")
        weights = (
            weight("gate", (width, features), into),
            weight("up", (width, features), into),
            weight("down", (features, width), out),
        )

        def apply(weights, x_ND, expert_ids_NK):
            return IMPLEMENTATIONS[config.implementation](
                precision, self.placement.device_kind, weights, x_ND, expert_ids_NK
            )

        return self.placement.experts(apply, weights, (into, into, out), x_BTD, expert_ids_BTK, gates_BTK)


class MoE(nn.Module):
    """Routed plus shared experts.

    Call: x [B, T, D], valid [B, T], expert_ids [B, T, K] to replay or None
    -> y [B, T, D], RoutingStats of this layer.
    """

    config: MoEConfig
    init_std: float
    precision: Precision
    placement: Placement

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, valid_BT: jax.Array, expert_ids_BTK: jax.Array | None = None
    ) -> tuple[jax.Array, RoutingStats]:
        config = self.config
        router = resolve(ROUTERS, config.router, "MoEConfig.router")(config, self.init_std, name="router")
        gates_BTK, routing = router(x_BTD, valid_BT, expert_ids_BTK)
        experts = Experts(config, self.init_std, self.precision, self.placement, name="experts")
        y_BTD, overflows = experts(x_BTD, routing.expert_ids_LBTK, gates_BTK)
        if config.num_shared_experts:
            shared_width = config.num_shared_experts * config.intermediate_size
            y_BTD += SwiGLU(shared_width, self.init_std, self.precision, self.placement, name="shared")(x_BTD)
        return y_BTD, routing.replace(overflows_L=overflows)

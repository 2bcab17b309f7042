"""DeepSeekMoE: routed experts plus shared experts (V3 eqs. 12-16). No token is ever dropped.

Tokens are laid out expert by expert, multiplied group by group and gathered back. Both moves are gathers, forward and
backward: every row of the layout has one source and every token exactly `top_k` rows, so that no scatter is needed.
"""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from deepseek_jax.model.config import MoEConfig
from deepseek_jax.model.layers import SwiGLU
from deepseek_jax.model.router import Router
from deepseek_jax.precision import Recipe


@flax.struct.dataclass
class Layout:
    """N·K (token, expert) pairs in R rows, sorted by expert, each expert's group padded to a multiple of a block."""

    rows_NK: jax.Array  # int32, the row of a token's k-th expert
    pairs_R: jax.Array  # int32, the pair n·K + k in a row; N·K in padded rows
    group_sizes_E: jax.Array  # int32, padded


def lay_out(expert_ids_NK: jax.Array, num_experts: int, block: int) -> Layout:
    """Assigns rows to pairs. R = N·K rounded up so that any distribution over experts fits: nothing is dropped."""
    pairs = expert_ids_NK.size
    num_rows = pairs if block == 1 else -(-(pairs + num_experts * (block - 1)) // block) * block
    experts_J = expert_ids_NK.reshape(-1)
    order_J = jnp.argsort(experts_J, stable=True).astype(jnp.int32)
    counts_E = jnp.sum(experts_J[:, None] == jnp.arange(num_experts), axis=0, dtype=jnp.int32)
    sizes_E = -(-counts_E // block) * block
    sorted_experts_J = experts_J[order_J]
    shift_E = (jnp.cumsum(sizes_E) - sizes_E) - (jnp.cumsum(counts_E) - counts_E)
    rows_of_sorted_J = jnp.arange(pairs, dtype=jnp.int32) + shift_E[sorted_experts_J]
    rows_J = jnp.zeros(pairs, jnp.int32).at[order_J].set(rows_of_sorted_J, unique_indices=True)
    pairs_R = jnp.full(num_rows, pairs, jnp.int32).at[rows_of_sorted_J].set(order_J, unique_indices=True)
    return Layout(rows_J.reshape(expert_ids_NK.shape), pairs_R, sizes_E)


@jax.custom_vjp
def to_rows(x_ND: jax.Array, layout: Layout) -> jax.Array:
    """Token vectors [N, D] -> rows [R, D]; padded rows are zero."""
    top_k = layout.rows_NK.shape[1]
    padded_ND = jnp.concatenate([x_ND, jnp.zeros_like(x_ND[:1])])
    return padded_ND[layout.pairs_R // top_k]


def _to_rows_bwd(layout, dx_RD):
    return jnp.sum(dx_RD[layout.rows_NK], axis=1), None


to_rows.defvjp(lambda x_ND, layout: (to_rows(x_ND, layout), layout), _to_rows_bwd)


@jax.custom_vjp
def from_rows(y_RD: jax.Array, layout: Layout) -> jax.Array:
    """Rows [R, D] -> each token's K results [N, K, D]."""
    return y_RD[layout.rows_NK]


def _from_rows_bwd(layout, dy_NKD):
    flat = dy_NKD.reshape(-1, dy_NKD.shape[-1])
    return jnp.concatenate([flat, jnp.zeros_like(flat[:1])])[layout.pairs_R], None


from_rows.defvjp(lambda y_RD, layout: (from_rows(y_RD, layout), layout), _from_rows_bwd)


class Experts(nn.Module):
    """E SwiGLU experts, each token's K results weighted by its gates: x [N, D], ids [N, K], gates [N, K] -> [N, D]."""

    config: MoEConfig
    init_std: float
    precision: Recipe

    @nn.compact
    def __call__(self, x_ND: jax.Array, expert_ids_NK: jax.Array, gates_NK: jax.Array) -> jax.Array:
        config, precision = self.config, self.precision
        experts, width, features = config.num_experts, x_ND.shape[1], config.intermediate_size

        def weight(name, shape, axes):
            init = nn.with_logical_partitioning(nn.initializers.normal(self.init_std), ("experts", *axes))
            return self.param(name, init, (experts, *shape), precision.param_dtype)

        gate_EDF = weight("gate", (width, features), ("embed", "expert_ffn"))
        up_EDF = weight("up", (width, features), ("embed", "expert_ffn"))
        down_EFD = weight("down", (features, width), ("expert_ffn", "embed"))

        if config.implementation == "dense":
            hidden_NEF = nn.silu(precision.einsum("ND,EDF->NEF", x_ND, gate_EDF)) * precision.einsum("ND,EDF->NEF", x_ND, up_EDF)
            y_NED = precision.einsum("NEF,EFD->NED", hidden_NEF, down_EFD)
            gates_NE = jnp.sum(jax.nn.one_hot(expert_ids_NK, experts) * gates_NK[..., None], axis=1)
            return jnp.einsum("NED,NE->ND", y_NED, gates_NE).astype(x_ND.dtype)

        block = precision.row_block(expert_ids_NK.size, experts)
        layout = lay_out(expert_ids_NK, experts, block)
        x_RD = to_rows(x_ND, layout)

        def grouped(x, w):
            return precision.grouped_linear(x, w, layout.group_sizes_E, block)

        y_RD = grouped(nn.silu(grouped(x_RD, gate_EDF)) * grouped(x_RD, up_EDF), down_EFD)
        y_NKD = from_rows(y_RD, layout)
        return jnp.einsum("NKD,NK->ND", y_NKD.astype(jnp.float32), gates_NK).astype(x_ND.dtype)


class MoE(nn.Module):
    """Routed plus shared experts: x [B, T, D] -> y [B, T, D], (expert_ids [B, T, K], counts [B, E], probs [B, E], tokens [B])."""

    config: MoEConfig
    init_std: float
    precision: Recipe

    @nn.compact
    def __call__(self, x_BTD: jax.Array, valid_BT: jax.Array, expert_ids_BTK: jax.Array | None = None):
        config = self.config
        gates_BTK, expert_ids_BTK, sums = Router(config, self.init_std, name="router")(x_BTD, valid_BT, expert_ids_BTK)
        flat_ids_NK, flat_gates_NK = (a.reshape(-1, config.top_k) for a in (expert_ids_BTK, gates_BTK))
        x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
        y_ND = Experts(config, self.init_std, self.precision, name="experts")(x_ND, flat_ids_NK, flat_gates_NK)
        if config.num_shared_experts:
            shared_width = config.num_shared_experts * config.intermediate_size
            y_ND += SwiGLU(shared_width, self.init_std, self.precision, name="shared")(x_ND)
        return y_ND.reshape(x_BTD.shape), (expert_ids_BTK, *sums)

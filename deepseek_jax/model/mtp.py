"""Multi-token prediction (V3 §2.2): module k predicts the token k+1 places ahead and keeps the causal chain."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from deepseek_jax.model.config import ModelConfig
from deepseek_jax.model.layers import Linear, RMSNorm
from deepseek_jax.model.ops import Ops


def shift_left(x_BT: jax.Array, k: int) -> jax.Array:
    """x[:, i+k] at i of an array [B, T]; zeros past the end."""
    k = min(k, x_BT.shape[1])
    return jnp.pad(x_BT[:, k:], ((0, 0), (0, k)))


class MTPModule(nn.Module):
    """h'_i = M [RMSNorm(Emb(t_{i+k})); RMSNorm(h_i)], then one block (V3 eqs. 21-23).

    The embedding comes first, as in the released weights; the report's eq. 21 prints the other order. The hidden state
    of the first module is the main model's after its final norm, as the released weights expect; later modules take
    the state of the one before. Returns (state for the next module, state for the shared head, routing of its block).
    """

    config: ModelConfig
    ops: Ops
    block: type[nn.Module]

    @nn.compact
    def __call__(self, hidden_BTD: jax.Array, embedding_BTD: jax.Array, tokens):
        config = self.config

        def norm(name):
            return RMSNorm(config.rms_norm_eps, name=name)

        joined = jnp.concatenate([norm("embed_norm")(embedding_BTD), norm("hidden_norm")(hidden_BTD)], axis=-1)
        projection = Linear(config, self.ops, config.hidden_size, ("mtp_input", "embed"), "mtp_projection", name="proj")
        block = self.block(config, self.ops, config.moe, name="block")
        state_BTD, (routing, _) = block(projection(joined), tokens, None, None)  # eqs. 21, 22
        return state_BTD, norm("final_norm")(state_BTD), routing

"""Attention by its definition; also what runs where there is no kernel, with its scores in memory."""

import jax
import jax.numpy as jnp

MASKED = -1e30  # finite: a row that sees nothing stays finite


def visible(query_segments_BT: jax.Array, segments_BS: jax.Array, first) -> jax.Array:
    """[B, 1, T, S] bool: queries at places first … first+T-1 see keys at or before their own place, of their
    segment."""
    earlier_TS = first + jnp.arange(query_segments_BT.shape[1])[:, None] >= jnp.arange(segments_BS.shape[1])
    return (earlier_TS & (query_segments_BT[:, :, None] == segments_BS[:, None, :]))[:, None]


def attention(q_BTHk, k_BSHk, v_BSHv, query_segments_BT, segments_BS, first, scale: float) -> jax.Array:
    """-> [B, T, H, v] in the dtype of v. The sum of weights divides the result, not the weights, which are rounded to
    that dtype as in the kernels."""
    s_BHTS = jnp.einsum("BTHk,BSHk->BHTS", q_BTHk, k_BSHk, preferred_element_type=jnp.float32) * scale
    s_BHTS = jnp.where(visible(query_segments_BT, segments_BS, first), s_BHTS, MASKED)
    p_BHTS = jnp.exp(s_BHTS - jax.lax.stop_gradient(jnp.max(s_BHTS, axis=-1, keepdims=True)))
    o_BTHv = jnp.einsum("BHTS,BSHv->BTHv", p_BHTS.astype(v_BSHv.dtype), v_BSHv, preferred_element_type=jnp.float32)
    return (o_BTHv / jnp.sum(p_BHTS, axis=-1).swapaxes(1, 2)[..., None]).astype(v_BSHv.dtype)

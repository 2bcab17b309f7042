"""Attention by its definition, and its gradients by the formulas that the kernels compute with."""

import math

import jax
import jax.numpy as jnp

MASKED = -1e30  # finite: a row that sees nothing stays finite


def visible(query_segments_BT: jax.Array, segments_BS: jax.Array, first) -> jax.Array:
    """[B, 1, T, S] bool: queries at places first … first+T-1 see keys at or before their own place, of their segment."""
    earlier_TS = first + jnp.arange(query_segments_BT.shape[1])[:, None] >= jnp.arange(segments_BS.shape[1])
    return (earlier_TS & (query_segments_BT[:, :, None] == segments_BS[:, None, :]))[:, None]


def forward(q_BTHk, k_BSHk, v_BSHv, query_segments_BT, segments_BS, first, scale: float) -> tuple[jax.Array, jax.Array]:
    """-> o [B, T, H, v] in the dtype of v, and lse [B, H, T] to the base 2, float32."""
    s_BHTS = jnp.einsum("BTHk,BSHk->BHTS", q_BTHk, k_BSHk, preferred_element_type=jnp.float32) * scale
    s_BHTS = jnp.where(visible(query_segments_BT, segments_BS, first), s_BHTS, MASKED)
    largest_BHT = jnp.max(s_BHTS, axis=-1)
    p_BHTS = jnp.exp(s_BHTS - largest_BHT[..., None])
    total_BHT = jnp.sum(p_BHTS, axis=-1)
    o_BTHv = jnp.einsum("BHTS,BSHv->BTHv", p_BHTS.astype(v_BSHv.dtype), v_BSHv, preferred_element_type=jnp.float32)
    return (o_BTHv / total_BHT.swapaxes(1, 2)[..., None]).astype(v_BSHv.dtype), (largest_BHT + jnp.log(total_BHT)) * math.log2(math.e)


def _scores(q_BTHk, k_BSHk, v_BSHv, query_segments_BT, segments_BS, first, scale: float, do_BTHv, lse_BHT, delta_BHT):
    """-> p and ds without its scale, [B, H, T, S] float32."""
    s_BHTS = jnp.einsum("BTHk,BSHk->BHTS", q_BTHk, k_BSHk, preferred_element_type=jnp.float32) * (scale * math.log2(math.e))
    p_BHTS = jnp.where(visible(query_segments_BT, segments_BS, first), jnp.exp2(s_BHTS - lse_BHT[..., None]), 0)
    dp_BHTS = jnp.einsum("BTHv,BSHv->BHTS", do_BTHv, v_BSHv, preferred_element_type=jnp.float32)
    return p_BHTS, p_BHTS * (dp_BHTS - delta_BHT[..., None])


def query_gradient(q_BTHk, k_BSHk, *rest) -> jax.Array:
    """-> dq [B, T, H, k]."""
    scale = rest[4]
    ds_BHTS = _scores(q_BTHk, k_BSHk, *rest)[1].astype(k_BSHk.dtype)
    return (jnp.einsum("BHTS,BSHk->BTHk", ds_BHTS, k_BSHk, preferred_element_type=jnp.float32) * scale).astype(q_BTHk.dtype)


def key_and_value_gradients(q_BTHk, k_BSHk, v_BSHv, *rest) -> tuple[jax.Array, jax.Array]:
    """-> dk [B, S, H, k], dv [B, S, H, v]."""
    scale, do_BTHv = rest[3], rest[4]
    p_BHTS, ds_BHTS = (x.astype(q_BTHk.dtype) for x in _scores(q_BTHk, k_BSHk, v_BSHv, *rest))
    dk_BSHk = jnp.einsum("BHTS,BTHk->BSHk", ds_BHTS, q_BTHk, preferred_element_type=jnp.float32) * scale
    dv_BSHv = jnp.einsum("BHTS,BTHv->BSHv", p_BHTS, do_BTHv, preferred_element_type=jnp.float32)
    return dk_BSHk.astype(k_BSHk.dtype), dv_BSHv.astype(v_BSHv.dtype)

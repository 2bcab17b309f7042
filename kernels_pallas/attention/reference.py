"""Attention by its definition: softmax(q kᵀ · scale) v, with its scores in memory."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

MASKED = -1e30  # finite, so that a query with nothing to see (padding) stays finite


def causal_mask(query_segments_BT: jax.Array, segments_BS: jax.Array, first: jax.Array | int) -> jax.Array:
    """[B, T, S] bool: queries at positions first … first+T-1 see keys at or before their own, of the same segment."""
    positions_T = first + jnp.arange(query_segments_BT.shape[1])
    earlier_TS = positions_T[:, None] >= jnp.arange(segments_BS.shape[1])
    return earlier_TS & (query_segments_BT[:, :, None] == segments_BS[:, None, :])


def attend(
    einsum: Callable[..., jax.Array],
    q_BGgTk: jax.Array,
    k_BGSk: jax.Array,
    v_BGSv: jax.Array,
    mask_BTS: jax.Array,
    scale: float,
) -> jax.Array:
    """softmax(q kᵀ scale) v where the mask allows, g query heads to each of G key-value heads: [B, G, g, T, v] float32
    (V3 eq. 10).

    `einsum(equation, a, b)` multiplies in its own dtype and returns float32. The g heads' queries are R = g·T rows of
    one product, and the sum of weights divides the result rather than the weights: on a CPU both together take a third
    off forward and backward.
    """
    B, G, g, T, _ = q_BGgTk.shape
    bias_B1RS = jnp.tile(jnp.where(mask_BTS, 0.0, MASKED), (1, g, 1))[:, None]
    scores_BGRS = einsum("BGRk,BGSk->BGRS", q_BGgTk.reshape(B, G, g * T, -1), k_BGSk) * scale + bias_B1RS
    weights_BGRS = jnp.exp(scores_BGRS - jax.lax.stop_gradient(jnp.max(scores_BGRS, axis=-1, keepdims=True)))
    out_BGRv = einsum("BGRS,BGSv->BGRv", weights_BGRS, v_BGSv) / jnp.sum(weights_BGRS, axis=-1, keepdims=True)  # eq. 10
    return out_BGRv.reshape(B, G, g, T, -1)


def attention(q_BTHk, k_BSHk, v_BSHv, query_segments_BT, segments_BS, first, scale: float) -> jax.Array:
    """-> [B, T, H, v] in the dtype of v, to which the weights are rounded before they are multiplied, as in the
    kernels."""

    def einsum(equation, a, b):
        return jnp.einsum(equation, a.astype(b.dtype), b, preferred_element_type=jnp.float32)

    q_BH1Tk, k_BHSk, v_BHSv = q_BTHk.swapaxes(1, 2)[:, :, None], k_BSHk.swapaxes(1, 2), v_BSHv.swapaxes(1, 2)
    mask_BTS = causal_mask(query_segments_BT, segments_BS, first)
    return attend(einsum, q_BH1Tk, k_BHSk, v_BHSv, mask_BTS, scale)[:, :, 0].swapaxes(1, 2).astype(v_BSHv.dtype)

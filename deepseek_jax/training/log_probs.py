"""Log-probabilities of tokens under the network, with the logits of a few tokens at a time."""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from deepseek_jax.model.transformer import Transformer

KEPT = "log_probs"  # what of `log_probs` is worth keeping where logits are computed again: two numbers a token


@jax.custom_vjp
def log_probs(logits_BTV: jax.Array, targets_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """log p(target) and the entropy of p = softmax(logits): float32 [B, T] each, of float32 logits [B, T, V] and int32
    targets."""
    return _log_probs_fwd(logits_BTV, targets_BT)[0]


def _log_probs_fwd(logits_BTV, targets_BT):
    shift_BT1 = jnp.max(logits_BTV, axis=-1, keepdims=True)
    weights_BTV = jnp.exp(logits_BTV - shift_BT1)
    sum_BT = jnp.sum(weights_BTV, axis=-1)
    # of the logits, over p; in the same pass as the sum
    mean_BT = jnp.sum(weights_BTV * (logits_BTV - shift_BT1), axis=-1) / sum_BT
    normalizer_BT = checkpoint_name(jnp.log(sum_BT) + shift_BT1[..., 0], KEPT)
    entropy_BT = checkpoint_name(jnp.log(sum_BT) - mean_BT, KEPT)
    logp_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0] - normalizer_BT
    return (logp_BT, entropy_BT), (logits_BTV, targets_BT, normalizer_BT, entropy_BT)


def _log_probs_bwd(residuals, cotangents):
    """∂ log p(t) = 1[v = t] - p(v) and ∂H = -p(v) (log p(v) + H): one pass over the logits, where jax's own rule
    scatters into an array of their size."""
    logits_BTV, targets_BT, normalizer_BT, entropy_BT = residuals
    dlogp_BT1, dentropy_BT1 = (x_BT[..., None] for x_BT in cotangents)
    logp_BTV = logits_BTV - normalizer_BT[..., None]
    target_BTV = jnp.arange(logits_BTV.shape[-1], dtype=targets_BT.dtype) == targets_BT[..., None]
    p_BTV = jnp.exp(logp_BTV)
    return dlogp_BT1 * (target_BTV - p_BTV) - dentropy_BT1 * p_BTV * (logp_BTV + entropy_BT[..., None]), None


log_probs.defvjp(_log_probs_fwd, _log_probs_bwd)


def token_log_probs(
    model: Transformer, variables, hidden_BTD: jax.Array, targets_BT: jax.Array, chunk: int, temperature: float = 1.0
) -> tuple[jax.Array, jax.Array]:
    """log p(target) and entropy of the next-token distribution softmax(logits / temperature), float32 [B, T] each.

    The float32 logits are divided, as sampling does it: hidden states of another dtype would be rounded once more.
    Works on about `chunk` tokens at a time (on each device, of those it holds) and recomputes their logits in the
    backward pass: no array of tokens x vocabulary exists, forward or backward. Chunk i takes every `num_chunks`-th
    position, so that a batch or a length divided among devices is divided in every chunk too.
    """
    batch, length, _ = hidden_BTD.shape
    num_chunks = min(length, -(-batch * length // (chunk * model.ops.token_shards)))
    width = -(-length // num_chunks)

    @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names(KEPT))
    def one(chunk_inputs):
        hidden_BCD, targets_BC = chunk_inputs
        logits_BCV = model.apply(variables, hidden_BCD, method="unembed")
        return log_probs(logits_BCV if temperature == 1 else logits_BCV / temperature, targets_BC)

    def split(x_BT):
        padding = ((0, 0), (0, num_chunks * width - length)) + ((0, 0),) * (x_BT.ndim - 2)
        x_NBC = jnp.moveaxis(jnp.pad(x_BT, padding).reshape(batch, width, num_chunks, *x_BT.shape[2:]), 2, 0)
        return model.ops.shard(x_NBC, None, "batch", "length", *(None,) * (x_BT.ndim - 2))

    def join(x_NBC):
        return jnp.moveaxis(x_NBC, 0, 2).reshape(batch, num_chunks * width)[:, :length]

    if num_chunks == 1:
        return one((hidden_BTD, targets_BT))
    logp_NBC, entropy_NBC = jax.lax.map(one, (split(hidden_BTD), split(targets_BT)))
    return join(logp_NBC), join(entropy_NBC)

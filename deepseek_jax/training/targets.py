"""Targets of next-token and multi-token prediction in packed batches, and the counts that losses are divided by.

A batch is a mapping of int32 arrays [B, T]: tokens, segment_ids (0 is padding), positions and loss_mask.
"""

from collections.abc import Mapping

import flax.struct
import jax
import jax.numpy as jnp

from deepseek_jax.model.mtp import shift_left


@flax.struct.dataclass
class Denominators:
    """Counts of a global batch, at least 1 each, by which the sums of its microbatches are divided."""

    targets_K: jax.Array  # float32 [1 + D]: targets one place ahead, two places ahead, …
    tokens_K: jax.Array  # float32 [1 + D]: tokens, tokens that have another one place ahead, …
    sequences_K: jax.Array  # float32 [1 + D]: sequences that hold such tokens


def targets(batch: Mapping[str, jax.Array], ahead: int) -> tuple[jax.Array, jax.Array]:
    """The token `ahead` places on, int32 [B, T], and float32 [B, T]: 1 where it is in the same document and trained on.

    Documents are contiguous, so equal segment ids at both ends mean that everything between is the same document.
    """
    mask_BT = has_token_ahead(batch, ahead) & (shift_left(batch["loss_mask"], ahead) > 0)
    return shift_left(batch["tokens"], ahead), mask_BT.astype(jnp.float32)


def has_token_ahead(batch: Mapping[str, jax.Array], ahead: int) -> jax.Array:
    """Bool [B, T]: tokens with another `ahead` places on in the same document."""
    segments_BT = batch["segment_ids"]
    return (shift_left(segments_BT, ahead) == segments_BT) & (segments_BT > 0)


def denominators(batch: Mapping[str, jax.Array], mtp_depth: int) -> Denominators:
    """Counts over a whole batch; at least 1 each, so that a batch without targets has loss 0."""
    target_counts = [jnp.sum(targets(batch, ahead)[1]) for ahead in range(1, mtp_depth + 2)]
    counts = valid_counts(jnp.stack([has_token_ahead(batch, k) for k in range(mtp_depth + 1)]))
    return Denominators(jnp.maximum(jnp.stack(target_counts), 1.0), *counts)


def valid_counts(valid_KBT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The numbers of valid tokens and of sequences that hold any: float32 [K] each, at least 1."""
    tokens_K = jnp.sum(valid_KBT, axis=(1, 2), dtype=jnp.float32)
    sequences_K = jnp.sum(jnp.any(valid_KBT, axis=2), axis=1, dtype=jnp.float32)
    return jnp.maximum(tokens_K, 1.0), jnp.maximum(sequences_K, 1.0)

"""Sampling: from logits to the next token of each sequence.

The order is temperature, then top-k, then top-p over what top-k left. Tokens of equal logit are treated alike: where
the k-th largest logit or the border of the nucleus falls on a tie, every tied token stays, so the sets never depend on
the order of the vocabulary and may hold more than k tokens.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from deepseek_jax.ranges import above, at_least, check


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """Sampling of completions; static, so a change compiles a new program.

    `temperature=0` is greedy, `top_k=0` and `top_p=1` are off. A sequence stops at `eos_id`, or at any of several (a
    negative id never stops), and is filled with `pad_id` from there on.
    """

    max_new_tokens: int
    eos_id: int | tuple[int, ...]
    pad_id: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        check(
            self,
            "SamplingConfig.",
            max_new_tokens=at_least(1),
            top_k=at_least(0, why="0 turns it off"),
            top_p=above(0, at_most=1, why="1 turns it off"),
        )
        if self.temperature != 0:
            check(self, "SamplingConfig.", temperature=at_least(1e-5, below=math.inf, why="or 0, which is greedy"))

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return self.eos_id if isinstance(self.eos_id, tuple) else (self.eos_id,)


def are_finite(logits_BV: jax.Array) -> jax.Array:
    """bool [B]: True for logits that can be sampled from. -inf excludes a token; NaN, +inf or nothing but -inf make a
    distribution unusable."""
    return jnp.isfinite(jnp.max(logits_BV, axis=-1))


def keep_top_k(logits_BV: jax.Array, top_k: int) -> jax.Array:
    """`logits_BV` with everything below the `top_k`-th largest logit of a sequence set to -inf."""
    kth_B1 = jax.lax.top_k(logits_BV, min(top_k, logits_BV.shape[-1]))[0][:, -1:]
    return jnp.where(logits_BV >= kth_B1, logits_BV, -jnp.inf)


def keep_top_p(logits_BV: jax.Array, top_p: float) -> jax.Array:
    """`logits_BV` outside the nucleus set to -inf: the smallest set of most probable tokens that together reach
    `top_p`."""
    descending_BV = jnp.sort(logits_BV, axis=-1, descending=True)
    probs_BV = jax.nn.softmax(descending_BV, axis=-1)
    mass_before_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV
    # The most probable token has no mass before it, but a tiny top_p must not lose it to rounding.
    inside_BV = (mass_before_BV < top_p).at[:, 0].set(True)
    border_B1 = jnp.min(jnp.where(inside_BV, descending_BV, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits_BV >= border_B1, logits_BV, -jnp.inf)


def log_probs(logits_BV: jax.Array, sampling: SamplingConfig) -> jax.Array:
    """Log-probabilities [B, V] of the distribution that is sampled: normalized, -inf for tokens it excludes.

    Args:
      logits_BV: float32 [B, V].
      sampling: greedy gives the whole mass to the largest logit (the first of equals).
    """
    if sampling.temperature == 0:
        best_B = jnp.argmax(logits_BV, axis=-1)
        return jnp.where(jax.nn.one_hot(best_B, logits_BV.shape[-1], dtype=bool), 0.0, -jnp.inf)
    if sampling.temperature != 1:
        logits_BV = logits_BV / sampling.temperature
    if sampling.top_k > 0:
        logits_BV = keep_top_k(logits_BV, sampling.top_k)
    if sampling.top_p < 1:
        logits_BV = keep_top_p(logits_BV, sampling.top_p)
    return jax.nn.log_softmax(logits_BV, axis=-1)


def draw(uniform_B: jax.Array, logp_BV: jax.Array) -> jax.Array:
    """One token id per sequence, int32 [B], by inverting the cumulative sum of normalized log-probabilities.

    `uniform_B` in [0, 1) is a sequence's only randomness: one number a token is far cheaper than V Gumbel numbers. It
    has 23 bits, so probabilities below 1e-7 are only approximate. A token of probability zero is never drawn.
    """
    probs_BV = jnp.exp(logp_BV)
    # Sums taken in parallel need not be monotone to the last bit: masking keeps excluded tokens out even then.
    cdf_BV = jnp.where(probs_BV > 0, jnp.cumsum(probs_BV, axis=-1), 0.0)
    threshold_B1 = uniform_B[:, None] * jnp.max(cdf_BV, axis=-1, keepdims=True)
    return jnp.argmax(cdf_BV > threshold_B1, axis=-1).astype(jnp.int32)


def sample(uniform_B: jax.Array, logits_BV: jax.Array, sampling: SamplingConfig) -> tuple[jax.Array, jax.Array]:
    """The next token of each sequence and its log-probability under the distribution that is sampled.

    Args:
      uniform_B: float32 in [0, 1); unused when greedy.
      logits_BV: float32 [B, V]; logits that are not finite give meaningless tokens (see `are_finite`).

    Returns:
      tokens_B int32, logp_B float32; greedy log-probabilities are 0.
    """
    if sampling.temperature == 0:
        tokens_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
        return tokens_B, jnp.zeros(tokens_B.shape, jnp.float32)
    logp_BV = log_probs(logits_BV, sampling)
    tokens_B = draw(uniform_B, logp_BV)
    return tokens_B, jnp.take_along_axis(logp_BV, tokens_B[:, None], axis=-1)[:, 0]

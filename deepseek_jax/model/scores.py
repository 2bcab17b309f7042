"""Scores of experts (V3 eq. 15, V2 eq. 22) and of groups of experts, by a name of ours or a function of the user's own.

A score takes float32 logits [..., E] to affinities [..., E], none of them negative: gates (eq. 13) and balance losses
(eq. 19) divide by their sum. A group score takes biased scores [..., groups, experts of a group] to [..., groups].
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from deepseek_jax.errors import ConfigError
from deepseek_jax.registry import resolve

SCORES = {
    "sigmoid": jax.nn.sigmoid,  # eq. 15
    "softmax": functools.partial(jax.nn.softmax, axis=-1),  # V2 eq. 22
}

GROUP_SCORES = {
    "top2_sum": lambda biased_GE: jnp.sum(jax.lax.top_k(biased_GE, 2)[0], axis=-1),  # V3 §2.1.2
    "max": lambda biased_GE: jnp.max(biased_GE, axis=-1),  # V2 §2.2.2
}


def group_scores(biased_GE: jax.Array, group_score: str) -> jax.Array:
    """The score of each group of experts from biased scores [..., groups, experts of a group]: [..., groups]."""
    return resolve(GROUP_SCORES, group_score, "MoEConfig.group_score")(biased_GE)


def scores(logits_E: jax.Array, scoring: str) -> jax.Array:
    """The affinity of tokens to experts from float32 logits [..., E]: float32 [..., E].

    Raises ConfigError for a function of the user's own that `_check_score` refuses. At other logits than it looks at, a
    negative score becomes NaN, so that the step is skipped and counted instead of trained on.
    """
    score = resolve(SCORES, scoring, "MoEConfig.scoring")
    if scoring in SCORES:
        return score(logits_E)
    _check_score(score, scoring)
    scores_E = score(logits_E)
    return jnp.where(scores_E >= 0, scores_E, jnp.nan)


@functools.cache
def _check_score(score: Callable[[jax.Array], jax.Array], name: str) -> None:
    """Raises ConfigError unless a score of logits from -100 to 100 has their shape, is float32, finite and not
    negative, and has a finite gradient."""
    with jax.ensure_compile_time_eval():
        logits_NE = jnp.linspace(-100.0, 100.0, 12 * 17).reshape(12, 17)
        logits_NE = jnp.concatenate([logits_NE, logits_NE.reshape(17, 12).T])  # alike, and far apart
        scores_NE, pullback = jax.vjp(score, logits_NE)
        if scores_NE.shape != logits_NE.shape or scores_NE.dtype != jnp.float32:
            raise ConfigError(
                f"MoEConfig.scoring={name!r}: float32{list(logits_NE.shape)} gave {scores_NE.dtype}"
                f"{list(scores_NE.shape)}; a score is a function of float32 logits [..., E] to float32 scores [..., E]"
            )
        (gradient_NE,) = pullback(jnp.ones_like(scores_NE))
        for what, values_NE, good_NE in (
            ("score", scores_NE, jnp.isfinite(scores_NE) & (scores_NE >= 0)),
            ("gradient", gradient_NE, jnp.isfinite(gradient_NE)),
        ):
            if not good_NE.all():
                where = tuple(int(i) for i in jnp.argwhere(~good_NE)[0])
                raise ConfigError(
                    f"MoEConfig.scoring={name!r}: the {what} at a logit of {logits_NE[where]:.1f} is "
                    f"{values_NE[where]}; scores have to be 0 or more with a finite gradient, since gates and balance "
                    "losses divide by their sum"
                )

"""The GRPO loss, one pure function per equation, in float32.

Axes: B completions, N completion tokens. `mask_BN` is 1 on the real tokens of a completion, its end-of-sequence token
included. `logp_BN` is log pi_theta, `old_logp_BN` the log-probability the sampler drew the token with (the behavior
policy pi_old, temperature applied), `ref_logp_BN` that of the reference policy. Values outside the mask may be
anything, NaN included: they are replaced before they enter a formula, so that they can't reach the gradient either.
"""

import jax
import jax.numpy as jnp

from deepseek_jax.rl.config import GRPOConfig

LOG_RATIO_LIMIT = 20.0  # exp(20) is finite in float32, and far beyond any clip range


def log_ratio(logp_BN: jax.Array, other_logp_BN: jax.Array, mask_BN: jax.Array) -> jax.Array:
    """log(pi / pi_other) per token, 0 outside the mask, clamped to +-20."""
    real_BN = mask_BN > 0
    difference_BN = jnp.where(real_BN, logp_BN, 0.0).astype(jnp.float32) - jnp.where(
        real_BN, other_logp_BN, 0.0
    ).astype(jnp.float32)
    return jnp.clip(difference_BN, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def policy_ratio(log_ratio_BN: jax.Array, mask_BN: jax.Array, level: str) -> jax.Array:
    """pi_theta / pi_old: "token" r_t (DeepSeekMath eq. 3), or "sequence" exp(mean_t log r_t) for every token (GSPO)."""
    if level == "token":
        return jnp.exp(log_ratio_BN)  # GRPO: ratio
    if level == "sequence":
        return jnp.broadcast_to(jnp.exp(_sequence_mean(log_ratio_BN, mask_BN))[:, None], log_ratio_BN.shape)
    raise ValueError(f"level={level!r}: 'token' or 'sequence'")


def clipped_surrogate(
    ratio_BN: jax.Array, advantages: jax.Array, clip_low: float, clip_high: float, dual_clip: float | None = None
) -> jax.Array:
    """min(r A, clip(r, 1 - low, 1 + high) A) per token (DeepSeekMath eq. 3); to be maximized.

    With `low` >= 1 the lower bound is never active: R1's epsilon of 10 clips at ratio 11 only. `dual_clip` = c > 1
    bounds the term by c A where A < 0, where r A is otherwise unbounded.
    """
    advantages_BN = per_token(advantages)
    clipped_BN = jnp.clip(ratio_BN, 1.0 - clip_low, 1.0 + clip_high)
    surrogate_BN = jnp.minimum(ratio_BN * advantages_BN, clipped_BN * advantages_BN)  # GRPO: clip
    if dual_clip is not None:
        surrogate_BN = jnp.where(advantages_BN < 0, jnp.maximum(surrogate_BN, dual_clip * advantages_BN), surrogate_BN)
    return surrogate_BN


def per_token(advantages: jax.Array) -> jax.Array:
    """Advantages as they multiply tokens: [B, N] stays, [B] becomes [B, 1]."""
    return advantages if advantages.ndim == 2 else advantages[:, None]


def kl_divergence(
    logp_BN: jax.Array, ref_logp_BN: jax.Array, old_logp_BN: jax.Array, mask_BN: jax.Array, estimator: str
) -> jax.Array:
    """Per-token estimate of KL(pi_theta || pi_ref), with u = log(pi_ref / pi_theta), 0 outside the mask.

    "k1": -u. "k2": u^2 / 2. "k3": e^u - u - 1 >= 0 (DeepSeekMath eq. 4). "unbiased_k3": (pi_theta / pi_old) times k3
    (V3.2 §3.1). Its gradient is that of the true KL for any pi_old; k3's is not. The gradient of k1 as a loss has
    expectation 0 on policy, so log k1 or put it into a reward.
    """
    u_BN = log_ratio(ref_logp_BN, logp_BN, mask_BN)
    if estimator == "k1":
        return -u_BN
    if estimator == "k2":
        return 0.5 * u_BN**2
    k3_BN = jnp.expm1(u_BN) - u_BN  # GRPO: KL
    if estimator == "k3":
        return k3_BN
    if estimator == "unbiased_k3":
        return jnp.exp(log_ratio(logp_BN, old_logp_BN, mask_BN)) * k3_BN
    raise ValueError(f"estimator={estimator!r}: 'k1', 'k2', 'k3' or 'unbiased_k3'")


def off_policy_mask(log_ratio_BN: jax.Array, advantages: jax.Array, mask_BN: jax.Array, delta: float) -> jax.Array:
    """V3.2's M: 0 where A < 0 in a completion with mean_t log(pi_old / pi_theta) > delta, else 1. float32, no gradient:
    [B, 1] for advantages [B], [B, N] for those of tokens."""
    drift_B = -_sequence_mean(jax.lax.stop_gradient(log_ratio_BN), mask_BN)
    return 1.0 - ((per_token(advantages) < 0) & (drift_B[:, None] > delta)).astype(jnp.float32)


def aggregate(x_BN: jax.Array, mask_BN: jax.Array, counted_B: jax.Array, mode: str) -> jax.Array:
    """One number from per-token terms; completions that are not `counted_B` (bool) add no denominator.

    "sequence_mean": mean over completions of the token mean (DeepSeekMath eq. 3). "token_mean": sum over all tokens /
    number of tokens (DAPO eq. 8). "constant": sum / (completions x N), N the token budget (Dr. GRPO), so that a token
    weighs the same in a short answer and in a long one. Completions without a token are never counted.
    """
    mask_BN = mask_BN.astype(jnp.float32)
    x_BN = jnp.where(mask_BN > 0, x_BN, 0.0)
    counted_B = (counted_B & (mask_BN.sum(1) > 0)).astype(jnp.float32)
    if mode == "sequence_mean":
        return _sequence_mean(x_BN, mask_BN).sum() / jnp.maximum(counted_B.sum(), 1.0)  # GRPO: mean
    if mode == "token_mean":
        return x_BN.sum() / jnp.maximum((mask_BN.sum(1) * counted_B).sum(), 1.0)
    if mode == "constant":
        return x_BN.sum() / jnp.maximum(counted_B.sum() * x_BN.shape[1], 1.0)
    raise ValueError(f"mode={mode!r}: 'sequence_mean', 'token_mean' or 'constant'")


def grpo_loss(
    config: GRPOConfig,
    logp_BN: jax.Array,
    old_logp_BN: jax.Array,
    advantages: jax.Array,
    mask_BN: jax.Array,
    ref_logp_BN: jax.Array | None = None,
    finished_B: jax.Array | None = None,
    live_B: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """-J of DeepSeekMath eq. 3 and its relatives, as `config` says: a scalar to minimize, and metrics.

    `advantages` are those of completions [B] or of tokens [B, N]. `ref_logp_BN` is needed where `config.kl_in_loss`,
    `finished_B` (end-of-sequence reached) where `config.mask_truncated`, `live_B` (see `Advantages`) where
    `config.denominator == "live"`. Gradients flow only through `logp_BN`. At the first update of a rollout every ratio
    is 1 and the loss is close to 0 while its gradient is not; watch the reward, not the loss.

    Metrics are scalars: loss, pg_loss, kl (where it is measured), clip_low_fraction, clip_high_fraction,
    dual_clip_fraction, ratio_mean, ratio_min, ratio_max, log_ratio_abs_mean, off_policy_fraction (of completions),
    tokens.
    """
    old_logp_BN, advantages_BN = jax.lax.stop_gradient((old_logp_BN, per_token(advantages).astype(jnp.float32)))
    mask_BN = mask_BN.astype(jnp.float32)
    if config.mask_truncated:
        mask_BN = mask_BN * finished_B.astype(jnp.float32)[:, None]
    every_B = jnp.ones(mask_BN.shape[:1], bool)
    counted_B = live_B if config.denominator == "live" else every_B
    clip_low, clip_high = config.clip_epsilon

    log_ratio_BN = log_ratio(logp_BN, old_logp_BN, mask_BN)
    ratio_BN = policy_ratio(log_ratio_BN, mask_BN, config.ratio)
    surrogate_BN = clipped_surrogate(ratio_BN, advantages_BN, clip_low, clip_high, config.dual_clip)
    kept_BN = jnp.ones_like(advantages_BN)
    if config.off_policy_delta is not None:
        kept_BN = off_policy_mask(log_ratio_BN, advantages_BN, mask_BN, config.off_policy_delta)
    pg_loss = -aggregate(surrogate_BN * kept_BN, mask_BN, counted_B, config.aggregation)

    loss, kl = pg_loss, {}
    if config.kl_in_loss:
        ref_logp_BN = jax.lax.stop_gradient(ref_logp_BN)
        kl_BN = kl_divergence(logp_BN, ref_logp_BN, old_logp_BN, mask_BN, config.kl_estimator)
        kl = {"kl": aggregate(kl_BN, mask_BN, every_B, config.aggregation)}
        loss += config.kl_coefficient * kl["kl"]  # GRPO: loss

    negative_BN = advantages_BN < 0
    tokens = mask_BN.sum()

    def token_share(x_BN):
        return (x_BN * mask_BN).sum() / jnp.maximum(tokens, 1.0)

    metrics = {
        "loss": loss,
        "pg_loss": pg_loss,
        **kl,
        "clip_low_fraction": token_share((ratio_BN < 1.0 - clip_low) & negative_BN),
        "clip_high_fraction": token_share((ratio_BN > 1.0 + clip_high) & (advantages_BN > 0)),
        "dual_clip_fraction": token_share((ratio_BN > (config.dual_clip or jnp.inf)) & negative_BN),
        "ratio_mean": token_share(ratio_BN),
        "ratio_min": jnp.where(tokens > 0, jnp.where(mask_BN > 0, ratio_BN, jnp.inf).min(), 1.0),
        "ratio_max": jnp.where(tokens > 0, jnp.where(mask_BN > 0, ratio_BN, -jnp.inf).max(), 1.0),
        "log_ratio_abs_mean": token_share(jnp.abs(log_ratio_BN)),
        "off_policy_fraction": 1.0 - kept_BN.min(1).mean(),
        "tokens": tokens,
    }
    return loss, jax.lax.stop_gradient(metrics)


def _sequence_mean(x_BN: jax.Array, mask_BN: jax.Array) -> jax.Array:
    real_BN = mask_BN > 0
    return jnp.where(real_BN, x_BN, 0.0).sum(1) / jnp.maximum(real_BN.sum(1), 1)

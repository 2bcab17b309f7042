"""The loss and its gradient against a reference in plain Python loops and float64, differentiated numerically."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.rl import losses
from deepseek_jax.rl.config import GRPOConfig

LENGTHS = [5, 2, 4, 1, 3, 5]
N = 5


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    shape = (len(LENGTHS), N)
    logp = -rng.uniform(0.1, 3.0, shape)
    return {
        "logp": logp,
        "old": logp + rng.normal(0, 0.35, shape),
        "ref": logp + rng.normal(0, 0.7, shape),
        "advantages": np.array([1.3, -0.7, 0.4, -1.6, 0.0, -0.9]),
        "mask": (np.arange(N) < np.array(LENGTHS)[:, None]).astype(np.float64),
        "finished": np.array([True, True, False, True, True, False]),
        "live": np.array([True, True, True, True, False, False]),
    }


def reference_loss(config, logp, old, ref, advantages, mask, finished, live):
    """DeepSeekMath eq. 3 and its variants, one token at a time."""
    sequences = []
    for i in range(len(logp)):
        tokens = [t for t in range(logp.shape[1]) if mask[i, t] and (finished[i] or not config.mask_truncated)]
        if not tokens:
            continue
        drift = sum(logp[i, t] - old[i, t] for t in tokens) / len(tokens)
        policy, kl = [], []
        for t in tokens:
            token_ratio = math.exp(logp[i, t] - old[i, t])
            ratio = token_ratio if config.ratio == "token" else math.exp(drift)
            clipped = min(max(ratio, 1 - config.clip_epsilon[0]), 1 + config.clip_epsilon[1])
            term = min(ratio * advantages[i], clipped * advantages[i])
            if config.dual_clip is not None and advantages[i] < 0:
                term = max(term, config.dual_clip * advantages[i])
            if config.off_policy_delta is not None and advantages[i] < 0 and -drift > config.off_policy_delta:
                term = 0.0
            policy.append(-term)
            q = math.exp(ref[i, t] - logp[i, t])
            k3 = q - math.log(q) - 1
            kl.append(
                {"k1": -math.log(q), "k2": math.log(q) ** 2 / 2, "k3": k3, "unbiased_k3": token_ratio * k3}[
                    config.kl_estimator
                ]
            )
        sequences.append((policy, kl, live[i]))

    def combine(part, counted):
        total_tokens = sum(len(s[0]) for s in counted)
        if config.aggregation == "sequence_mean":
            return sum(sum(s[part]) / len(s[part]) for s in sequences) / len(counted)
        if config.aggregation == "token_mean":
            return sum(sum(s[part]) for s in sequences) / total_tokens
        return sum(sum(s[part]) for s in sequences) / (len(counted) * N)

    counted = [s for s in sequences if s[2]] if config.denominator == "live" else sequences
    return combine(0, counted) + config.kl_coefficient * combine(1, sequences)


def check(config, batch):
    names = ("old", "ref", "advantages", "mask", "finished", "live")
    fixed = [batch[name] for name in names]
    logp = batch["logp"]
    expected = reference_loss(config, logp, *fixed)
    gradient = np.zeros_like(logp)
    step = 1e-6
    for i, t in itertools.product(*map(range, logp.shape)):
        bump = np.zeros_like(logp)
        bump[i, t] = step
        gradient[i, t] = (reference_loss(config, logp + bump, *fixed) - reference_loss(config, logp - bump, *fixed)) / (
            2 * step
        )

    old, ref, advantages, mask, finished, live = (
        jnp.asarray(x, jnp.float32 if x.dtype == float else bool) for x in fixed
    )

    def loss(logp):
        return losses.grpo_loss(config, logp, old, advantages, mask, ref, finished, live)

    (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(jnp.asarray(logp, jnp.float32))
    np.testing.assert_allclose(value, expected, rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(grads, gradient, rtol=2e-4, atol=2e-5)
    return value, metrics, grads


AGGREGATIONS = ("sequence_mean", "token_mean", "constant")
COMBINATIONS = list(itertools.product(AGGREGATIONS, ("token", "sequence"), ("k1", "k2", "k3", "unbiased_k3")))


@pytest.mark.parametrize("aggregation,ratio,estimator", COMBINATIONS)
def test_loss_and_gradient(batch, aggregation, ratio, estimator):
    config = GRPOConfig(
        aggregation=aggregation, ratio=ratio, kl_estimator=estimator, kl_coefficient=0.3, clip_epsilon=(0.2, 0.28)
    )
    check(config, batch)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize(
    "options",
    [
        {"denominator": "live"},
        {"mask_truncated": True},
        {"mask_truncated": True, "denominator": "live", "ratio": "sequence"},
        {"dual_clip": 1.1, "clip_epsilon": (0.2, 0.05)},
        {"off_policy_delta": -0.04},  # the last completion has drifted further than that, the other bad ones have not
        {"clip_epsilon": (10.0, 10.0)},
        {"kl_coefficient": 0.0},
    ],
    ids=lambda o: "-".join(o),
)
def test_options(batch, aggregation, options):
    check(GRPOConfig(**{"aggregation": aggregation, "kl_coefficient": 0.3, **options}), batch)


def test_the_first_update_has_no_loss_but_a_gradient(batch):
    logp, mask = jnp.asarray(batch["logp"], jnp.float32), jnp.ones((len(LENGTHS), N))
    advantages = jnp.array([1.0, -1.0, 2.0, -2.0, 0.5, -0.5])

    def loss(logp_BN):
        return losses.grpo_loss(GRPOConfig(), logp_BN, logp, advantages, mask, logp)

    (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(logp)
    assert abs(float(value)) < 1e-6 and float(jnp.abs(grads).max()) > 0.01
    assert float(metrics["ratio_min"]) == float(metrics["ratio_max"]) == 1.0 and float(metrics["kl"]) == 0.0
    assert (np.sign(grads) == -np.sign(advantages)[:, None]).all(), (
        "descent must raise the probability of what was better than its group"
    )


def test_dead_completions_have_no_gradient(batch):
    def loss(logp):
        return losses.grpo_loss(
            GRPOConfig(kl_coefficient=0.0), logp, batch["old"], jnp.asarray(batch["advantages"]), batch["mask"]
        )[0]

    grads = jax.grad(loss)(jnp.asarray(batch["logp"], jnp.float32))
    assert not np.asarray(grads)[4].any() and np.asarray(grads)[0].any()


def test_nothing_outside_the_mask_reaches_loss_or_gradient(batch):
    config = GRPOConfig(kl_coefficient=0.3, kl_estimator="unbiased_k3", off_policy_delta=0.05)
    mask = jnp.asarray(batch["mask"], jnp.float32)

    def run(outside):
        spoilt = [
            jnp.where(mask > 0, jnp.asarray(batch[name], jnp.float32), outside) for name in ("logp", "old", "ref")
        ]
        return jax.value_and_grad(
            lambda logp: losses.grpo_loss(config, logp, spoilt[1], jnp.asarray(batch["advantages"]), mask, spoilt[2])[0]
        )(spoilt[0])

    clean, spoilt = run(0.0), run(jnp.nan)
    assert float(clean[0]) == float(spoilt[0]) and bool(jnp.isfinite(spoilt[0]))
    np.testing.assert_array_equal(clean[1], spoilt[1])


def test_a_batch_of_truncated_completions_gives_nothing_and_harms_nothing(batch):
    config = GRPOConfig(mask_truncated=True, denominator="live")
    arrays = [jnp.asarray(batch[name], jnp.float32) for name in ("logp", "old", "advantages", "mask", "ref")]
    none = jnp.zeros(len(LENGTHS), bool)
    (value, metrics), grads = jax.value_and_grad(
        lambda x: losses.grpo_loss(config, x, *arrays[1:], none, none), has_aux=True
    )(arrays[0])
    assert float(value) == 0.0 and not np.asarray(grads).any() and all(np.isfinite(m) for m in metrics.values())


def test_extreme_ratios_stay_finite():
    logp, old = jnp.array([[0.0, -500.0]]), jnp.array([[-500.0, 0.0]])
    for estimator in ("k1", "k2", "k3", "unbiased_k3"):
        config = GRPOConfig(kl_estimator=estimator, clip_epsilon=(10.0, 10.0))
        value, grads = jax.value_and_grad(
            lambda x, c=config: losses.grpo_loss(c, x, old, jnp.array([1.0]), jnp.ones((1, 2)), old)[0]
        )(logp)
        assert bool(jnp.isfinite(value)) and bool(jnp.isfinite(grads).all())


def test_epsilon_ten_clips_only_at_eleven():
    ratio = jnp.array([[0.001, 1.0, 10.9, 11.5]])
    up = losses.clipped_surrogate(ratio, jnp.array([1.0]), 10.0, 10.0)
    np.testing.assert_allclose(up, [[0.001, 1.0, 10.9, 11.0]], rtol=1e-6)
    down = losses.clipped_surrogate(ratio, jnp.array([-1.0]), 10.0, 10.0)
    np.testing.assert_allclose(down, -ratio, rtol=1e-6)


def test_off_policy_mask_leaves_the_kl_term(batch):
    arrays = [jnp.asarray(batch[name], jnp.float32) for name in ("logp", "old", "advantages", "mask", "ref")]
    free = losses.grpo_loss(GRPOConfig(), *arrays)[1]
    masked = losses.grpo_loss(GRPOConfig(off_policy_delta=-100.0), *arrays)[1]
    assert float(masked["off_policy_fraction"]) == pytest.approx(3 / 6)
    assert float(masked["kl"]) == float(free["kl"]) and float(masked["pg_loss"]) != float(free["pg_loss"])


def test_clip_fractions():
    logp, old = jnp.log(jnp.array([[0.5, 1.0, 2.0], [0.5, 1.0, 2.0]])), jnp.zeros((2, 3))
    metrics = losses.grpo_loss(GRPOConfig(kl_coefficient=0.0), logp, old, jnp.array([1.0, -1.0]), jnp.ones((2, 3)))[1]
    assert float(metrics["clip_high_fraction"]) == pytest.approx(1 / 6) and float(
        metrics["clip_low_fraction"]
    ) == pytest.approx(1 / 6)
    assert float(metrics["ratio_max"]) == pytest.approx(2.0) and float(metrics["ratio_min"]) == pytest.approx(0.5)


def test_k3_is_never_negative():
    logp, ref = -5 * jax.random.uniform(jax.random.key(0), (2, 8, 64))
    mask = jnp.ones_like(logp)
    assert float(losses.kl_divergence(logp, ref, logp, mask, "k3").min()) >= 0
    assert float(jnp.abs(losses.kl_divergence(logp, logp, logp, mask, "k3")).max()) == 0


def test_unbiased_kl_has_the_gradient_of_the_exact_kl():
    """Over all outcomes of a categorical distribution, weighted with a behavior policy that is neither of the two."""
    old, ref, logits = jax.random.normal(jax.random.key(1), (3, 6))
    old, ref = jax.nn.log_softmax(old), jax.nn.log_softmax(ref)
    mask = jnp.ones((1, 6))

    def exact(x):
        logp = jax.nn.log_softmax(x)
        return (jnp.exp(logp) * (logp - ref)).sum()

    def expected(x, estimator):
        return (
            jnp.exp(old) * losses.kl_divergence(jax.nn.log_softmax(x)[None], ref[None], old[None], mask, estimator)[0]
        ).sum()

    truth = jax.grad(exact)(logits)
    np.testing.assert_allclose(jax.grad(expected)(logits, "unbiased_k3"), truth, atol=1e-5)
    assert float(jnp.abs(jax.grad(expected)(logits, "k3") - truth).max()) > 0.01

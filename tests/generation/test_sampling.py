"""Sampling distributions against a NumPy oracle that sorts, and draws against the distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.errors import ConfigError
from deepseek_jax.generation.sampling import SamplingConfig, are_finite, draw, log_probs, sample

V = 50


def config(**kwargs):
    return SamplingConfig(max_new_tokens=4, eos_id=1, pad_id=0, **kwargs)


def logits(rows=40, seed=0, scale=2.0):
    return (np.random.default_rng(seed).normal(size=(rows, V)) * scale).astype(np.float32)


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def oracle(row, temperature=1.0, top_k=0, top_p=1.0):
    """Probabilities of one row in float64, by sorting."""
    row = row.astype(np.float64) / temperature
    if top_k:
        row = np.where(row >= np.sort(row)[::-1][min(top_k, V) - 1], row, -np.inf)
    if top_p < 1:
        order = np.argsort(-row, kind="stable")
        size = int(np.searchsorted(np.cumsum(softmax(row)[order]), top_p)) + 1
        row = np.where(row >= row[order[size - 1]], row, -np.inf)
    return softmax(row)


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(temperature=0.7),
        dict(top_k=1),
        dict(top_k=7),
        dict(top_k=10 * V),
        dict(top_p=1e-9),
        dict(top_p=0.5),
        dict(top_p=0.95),
        dict(temperature=1.6, top_k=9, top_p=0.8),
    ],
    ids=str,
)
def test_distribution_equals_sorting_oracle(options):
    x = logits()
    logp = np.asarray(log_probs(jnp.asarray(x), config(**options)))
    expected = np.stack([oracle(row, **options) for row in x])
    np.testing.assert_array_equal(np.isfinite(logp), expected > 0)
    np.testing.assert_allclose(np.exp(logp), expected, rtol=2e-5, atol=1e-9)
    np.testing.assert_allclose(np.exp(logp).sum(-1), 1, atol=1e-5)


def test_ties_at_the_border_all_stay():
    row = np.full((1, V), -3.0, np.float32)
    row[0, [4, 20, 33]] = 2.0
    row[0, 8] = 4.0
    for options in (dict(top_k=2), dict(top_p=0.87)):  # token 8 has 70%, the tied ones 9.5% each
        kept = np.flatnonzero(np.isfinite(log_probs(jnp.asarray(row), config(**options))[0]))
        assert kept.tolist() == [4, 8, 20, 33], options


def test_greedy_is_a_point_mass_on_the_first_maximum():
    x = logits(rows=5)
    x[2, [7, 30]] = 50.0
    tokens, logp = sample(jnp.zeros(5), jnp.asarray(x), config(temperature=0.0))
    assert tokens.tolist() == x.argmax(-1).tolist() and tokens[2] == 7
    assert not np.any(logp)
    distribution = np.exp(log_probs(jnp.asarray(x), config(temperature=0.0)))
    np.testing.assert_array_equal(distribution, np.eye(V)[x.argmax(-1)])


def test_log_probabilities_of_the_drawn_token():
    x, options = logits(), dict(temperature=0.6, top_k=12, top_p=0.9)
    tokens, logp = sample(jax.random.uniform(jax.random.key(3), len(x)), jnp.asarray(x), config(**options))
    np.testing.assert_allclose(
        np.exp(logp), [oracle(row, **options)[t] for row, t in zip(x, tokens, strict=True)], rtol=2e-5
    )


def test_rows_that_can_be_sampled_from():
    x = np.zeros((6, V), np.float32)
    x[1, 3], x[2, 3], x[3, 3], x[4], x[5, 1:] = np.nan, np.inf, -np.inf, -np.inf, -np.inf
    assert are_finite(jnp.asarray(x)).tolist() == [True, False, False, True, False, True]


def test_frequencies():
    rows, options = 40_000, dict(temperature=1.5, top_p=0.9)
    x = logits(rows=1, seed=5)
    expected = oracle(x[0], **options)
    logp = jnp.broadcast_to(log_probs(jnp.asarray(x), config(**options)), (rows, V))
    counts = np.bincount(draw(jax.random.uniform(jax.random.key(1), rows), logp), minlength=V)
    assert counts[expected == 0].sum() == 0
    support = expected > 0
    chi2 = np.sum((counts[support] - rows * expected[support]) ** 2 / (rows * expected[support]))
    freedom = support.sum() - 1
    assert chi2 < freedom + 4 * np.sqrt(2 * freedom), (chi2, freedom)


def test_excluded_tokens_are_never_drawn_at_the_edges_of_the_uniform():
    logp = jnp.log(jnp.asarray([0.0, 0.5, 0.0, 0.5, 0.0]))
    for uniform, token in ((0.0, 1), (0.5 - 2.0**-23, 1), (0.5, 3), (1 - 2.0**-23, 3)):
        assert draw(jnp.full(1, uniform, jnp.float32), logp[None]).tolist() == [token]
    borders = jnp.concatenate([border + jnp.arange(-50, 50) * 2.0**-23 for border in (0.5, 1 - 51 * 2.0**-23)])
    tokens = draw(borders, jnp.broadcast_to(logp, (len(borders), 5)))
    assert set(tokens.tolist()) == {1, 3} and np.all(np.diff(tokens) >= 0)


def test_no_sort_unless_a_filter_is_on():
    def primitives(**options):
        return {
            e.primitive.name for e in jax.make_jaxpr(lambda x: log_probs(x, config(**options)))(jnp.zeros((2, V))).eqns
        }

    assert not primitives(temperature=0.5) & {"sort", "top_k"}
    assert "top_k" in primitives(top_k=3)
    assert "sort" in str(jax.make_jaxpr(lambda x: log_probs(x, config(top_p=0.5)))(jnp.zeros((2, V))))


@pytest.mark.parametrize(
    "options",
    [
        dict(temperature=-1.0),
        dict(temperature=float("nan")),
        dict(temperature=1e-45),
        dict(top_k=-1),
        dict(top_p=0.0),
        dict(top_p=1.1),
    ],
    ids=str,
)
def test_bad_options(options):
    with pytest.raises(ConfigError, match=f"SamplingConfig.{next(iter(options))}="):
        config(**options)
    with pytest.raises(ConfigError, match="max_new_tokens=0"):
        SamplingConfig(max_new_tokens=0, eos_id=1, pad_id=0)

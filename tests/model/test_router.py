"""Scores, group-limited choice and gates, against brute force and under shifts of the correction bias."""

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import jit, tiny_config

from deepseek_jax.model import router
from deepseek_jax.model.config import MoEConfig
from deepseek_jax.model.router import Router, choose_experts, gate_values, scores

V3 = MoEConfig(num_experts=32, top_k=4, intermediate_size=8, num_groups=8, topk_groups=4, routed_scaling_factor=2.5)
V2 = MoEConfig(
    num_experts=24,
    top_k=5,
    intermediate_size=8,
    num_groups=6,
    topk_groups=2,
    group_score="max",
    scoring="softmax",
    norm_topk_prob=False,
)
PLAIN = MoEConfig(num_experts=16, top_k=3, intermediate_size=8)
ALL_GROUPS = MoEConfig(num_experts=16, top_k=3, intermediate_size=8, num_groups=4, topk_groups=4)
CONFIGS = [V3, V2, PLAIN, ALL_GROUPS]


def brute_force_choice(biased_E, config):
    """One token: rank the groups, rank the experts of the best ones."""
    size = config.num_experts // config.num_groups
    best = 2 if config.group_score == "top2_sum" else 1
    group_scores = [sum(sorted(biased_E[g * size : (g + 1) * size])[-best:]) for g in range(config.num_groups)]
    kept = sorted(range(config.num_groups), key=lambda g: -group_scores[g])[: config.topk_groups]
    allowed = [e for g in kept for e in range(g * size, (g + 1) * size)]
    return sorted(allowed, key=lambda e: -biased_E[e])[: config.top_k], kept


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("offset", [0.0, -5.0])
def test_choice_equals_brute_force(config, offset):
    biased_NE = (np.random.default_rng(0).normal(size=(200, config.num_experts)) + offset).astype(np.float32)
    ids_NK = np.asarray(choose_experts(jnp.asarray(biased_NE), config))
    for biased_E, ids_K in zip(biased_NE, ids_NK, strict=True):
        expected, kept = brute_force_choice(biased_E, config)
        assert ids_K.tolist() == expected
        assert set(ids_K // (config.num_experts // config.num_groups)) <= set(kept)
    assert ids_NK.dtype == np.int32


def router_call(config):
    """Compiled Router whose kernel is the identity, so that its logits are its input."""
    module = Router(tiny_config(moe=config))
    kernel = jnp.eye(config.num_experts)

    def call(x_NE, bias_E):
        variables = {"params": {"kernel": kernel}, "router_bias": {"bias": bias_E}}
        gates, routing = module.apply(variables, x_NE[None], jnp.ones((1, x_NE.shape[0]), bool), None)
        return gates[0], routing.expert_ids_LBTK[0]

    return jit(call)


@pytest.mark.parametrize("config", [V3, V2])
def test_shifting_all_biases_changes_nothing(config, monkeypatch):
    """Scores and biases on a 1/1024 grid make the shift exact, so that ids and gates have to be the same bits."""
    monkeypatch.setattr(router, "scores", lambda logits, scoring: logits)
    call, rng = router_call(config), np.random.default_rng(1)
    scores_NE = (rng.integers(1, 1024, (256, config.num_experts)) / 1024).astype(np.float32)
    bias_E = (rng.integers(-200, 200, config.num_experts) / 1024).astype(np.float32)
    gates, ids = call(scores_NE, bias_E)
    assert np.any(np.asarray(ids) != np.asarray(call(scores_NE, np.zeros_like(bias_E))[1]))  # the bias does choose
    for shift in (5.0, -5.0, 64.0, -64.0):
        shifted_gates, shifted_ids = call(scores_NE, bias_E + np.float32(shift))
        np.testing.assert_array_equal(ids, shifted_ids)
        np.testing.assert_array_equal(gates, shifted_gates)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_bias_chooses_in_float32_and_stays_out_of_the_gates(dtype):
    """Biases near 5 that differ by less than bfloat16 can tell (its spacing there is 0.03)."""
    rng = np.random.default_rng(2)
    x_NE = jnp.asarray(rng.normal(size=(64, 16)), dtype)
    bias_E = (5 + 0.002 * rng.permutation(16)).astype(np.float32)
    gates, ids = router_call(PLAIN)(x_NE, bias_E)
    scores_NE = 1 / (1 + np.exp(-np.asarray(x_NE, np.float64)))
    expected_ids = np.argsort(-(scores_NE + bias_E), axis=1)[:, :3]
    np.testing.assert_array_equal(ids, expected_ids)
    chosen = np.take_along_axis(scores_NE, expected_ids, axis=1)
    np.testing.assert_allclose(gates, chosen / chosen.sum(1, keepdims=True), rtol=1e-6)
    assert gates.dtype == jnp.float32
    equal_NE = jnp.zeros((1, 16), dtype)  # equal scores: the order is the biases' alone
    assert router_call(PLAIN)(equal_NE, bias_E)[1][0].tolist() == np.argsort(-bias_E)[:3].tolist()


@pytest.mark.parametrize("config", [V3, V2, PLAIN])
@pytest.mark.parametrize("where", ["score", "bias", "infinite bias"])
def test_what_is_not_a_number_never_routes_in_silence(config, where):
    """A NaN wins every top-k, and a bias never enters a gate: the token's gates are NaN, so that its loss is and the
    update counts it."""
    x_NE, bias_E = np.zeros((2, config.num_experts), np.float32), np.zeros(config.num_experts, np.float32)
    if where == "score":
        x_NE[1, 3] = np.nan
    else:
        bias_E[3] = np.nan if where == "bias" else -np.inf
    gates, ids = router_call(config)(x_NE, bias_E)
    assert np.isnan(gates).all(axis=1).tolist() == [where != "score", True]
    assert np.all((np.asarray(ids) >= 0) & (np.asarray(ids) < config.num_experts))


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("factor", [1.0, 2.5])
def test_gate_values(normalize, factor):
    config = MoEConfig(
        num_experts=6, top_k=2, intermediate_size=4, norm_topk_prob=normalize, routed_scaling_factor=factor
    )
    scores_E = jnp.asarray([0.1, 0.2, 0.3, 0.6, 0.5, 0.9])
    gates = gate_values(scores_E, jnp.asarray([3, 1]), config)
    expected = np.array([0.6, 0.2]) / (0.8 if normalize else 1.0) * factor
    np.testing.assert_allclose(gates, expected, rtol=1e-6)


def test_scores():
    logits = np.array([[-1.0, 0.0, 2.0]], np.float32)
    np.testing.assert_allclose(scores(jnp.asarray(logits), "sigmoid"), 1 / (1 + np.exp(-logits)), rtol=1e-6)
    np.testing.assert_allclose(scores(jnp.asarray(logits), "softmax"), np.exp(logits) / np.exp(logits).sum(), rtol=1e-6)

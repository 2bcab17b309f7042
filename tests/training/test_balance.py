"""Balance losses against the report's equations written out, the bias update, and MaxVio."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.model.config import MLAConfig, ModelConfig, MoEConfig
from deepseek_jax.model.router import Router, gate_values, routing_stats
from deepseek_jax.training.balance import (
    BALANCE_LOSSES,
    batch_balance_loss,
    load_metrics,
    max_violation,
    sequence_balance_loss,
    update_bias,
)

E = 6


def eqs_17_to_20(scores_TE, ids_TK):
    """V3's Σ f_i P_i of one sequence, as printed."""
    (T, N_r), K_r = scores_TE.shape, ids_TK.shape[1]
    total = 0.0
    for i in range(N_r):
        f_i = N_r / (K_r * T) * sum(i in ids_TK[t] for t in range(T))
        P_i = sum(scores_TE[t, i] / scores_TE[t].sum() for t in range(T)) / T
        total += f_i * P_i
    return total


def routed(top_k, seed=0, layers=2, rows=3, length=7):
    rng = np.random.default_rng(seed)
    scores = rng.random((layers, rows, length, E)).astype(np.float32)
    ids = np.argsort(rng.random((layers, rows, length, E)), axis=-1)[..., :top_k].astype(np.int32)
    valid = np.ones((rows, length), bool)
    valid[1, 4:] = False
    valid[2] = False  # a row of padding alone
    return scores, ids, valid


def stats_of(scores, ids, valid):
    layers = [
        routing_stats(jnp.asarray(s), jnp.asarray(i), jnp.asarray(valid)) for s, i in zip(scores, ids, strict=True)
    ]
    return jax.tree.map(lambda *of_layers: jnp.stack(of_layers), *layers)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_losses_are_the_published_sums_and_ignore_padding(top_k):
    scores, ids, valid = routed(top_k)
    stats = stats_of(scores, ids, valid)
    by_sequence = [
        [eqs_17_to_20(scores[layer, b][valid[b]], ids[layer, b][valid[b]]) for b in range(2)] for layer in range(2)
    ]
    np.testing.assert_allclose(sequence_balance_loss(stats, top_k), np.mean(by_sequence, axis=1), rtol=1e-5)
    np.testing.assert_allclose(BALANCE_LOSSES["expert"](stats, top_k), np.mean(by_sequence, axis=1), rtol=1e-5)
    by_batch = [eqs_17_to_20(scores[layer][valid], ids[layer][valid]) for layer in range(2)]
    np.testing.assert_allclose(batch_balance_loss(stats, top_k), by_batch, rtol=1e-5)

    scores[:, ~valid], ids[:, ~valid] = 0.9, ids[:, ~valid][:, ::-1]
    for before, after in zip(jax.tree.leaves(stats), jax.tree.leaves(stats_of(scores, ids, valid)), strict=True):
        if before.ndim < 4:
            np.testing.assert_array_equal(before, after)
    assert float(jnp.sum(stats.counts_LBE)) == 2 * valid.sum() * top_k


@pytest.mark.parametrize("top_k", [1, 2, 4, 6])
def test_uniform_scores_give_exactly_one(top_k):
    _, ids, valid = routed(top_k, seed=1)
    stats = stats_of(np.full((2, 3, 7, E), 0.25, np.float32), ids, valid)
    np.testing.assert_allclose(sequence_balance_loss(stats, top_k), 1.0, rtol=1e-6)
    np.testing.assert_allclose(batch_balance_loss(stats, top_k), 1.0, rtol=1e-6)


def test_collapse_onto_one_expert_costs_more():
    scores = np.full((1, 1, 7, E), 0.01, np.float32)
    scores[..., 2] = 1.0
    ids = np.full((1, 1, 7, 1), 2, np.int32)
    np.testing.assert_allclose(
        sequence_balance_loss(stats_of(scores, ids, np.ones((1, 7), bool)), 1), [E / 1.05], rtol=1e-5
    )


def test_a_token_whose_scores_are_all_zero_breaks_nothing():
    """A sigmoid below -104 is 0 in float32: such a token counts as a token, and its probabilities as 0."""
    scores, ids, valid = routed(2, seed=2)
    scores[0, 0, 3] = 0.0
    by_sequence = [0.0, 0.0]
    for row, length in ((0, 7), (1, 4)):
        T, frequencies = length, np.bincount(ids[0, row, :length].ravel(), minlength=E)
        shares = [s / s.sum() if s.sum() else np.zeros(E) for s in scores[0, row, :length].astype(np.float64)]
        by_sequence[row] = np.sum(E * frequencies / (2 * T) * np.sum(shares, axis=0) / T)
    np.testing.assert_allclose(
        sequence_balance_loss(stats_of(scores, ids, valid), 2)[0], np.mean(by_sequence), rtol=1e-5
    )

    def probs(scores):
        return jnp.sum(jnp.sin(routing_stats(scores, jnp.asarray(ids[0]), jnp.asarray(valid)).probs_LBE))

    def gates(scores):
        return jnp.sum(
            jnp.sin(gate_values(scores, jnp.asarray(ids[0]), MoEConfig(num_experts=E, top_k=2, intermediate_size=4)))
        )

    for function in (probs, gates):
        assert np.all(np.isfinite(jax.grad(function)(jnp.asarray(scores[0])))), function.__name__


def test_loss_and_gradient_do_not_depend_on_the_bias():
    """With the choice held fixed. Unequal biases: a softmax over biased scores would hide equal ones."""
    moe = MoEConfig(num_experts=E, top_k=2, intermediate_size=4)
    model = ModelConfig(8, 4, 1, 8, MLAConfig(1, 2, 2, 2, 2), moe)
    rng = np.random.default_rng(3)
    x = rng.normal(size=(2, 5, 4)).astype(np.float32)
    kernel = rng.normal(size=(4, E)).astype(np.float32)
    ids = np.argsort(rng.random((2, 5, E)), axis=-1)[..., :2].astype(np.int32)

    def loss(kernel, bias):
        variables = {"params": {"kernel": kernel}, "router_bias": {"bias": bias}}
        _, stats = Router(model).apply(variables, x, jnp.ones((2, 5), bool), ids)
        return sequence_balance_loss(jax.tree.map(lambda x: x[None], stats), 2)[0]

    value_and_grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    first, (grad_kernel, grad_bias) = value_and_grads(kernel, np.zeros(E, np.float32))
    second, (grad_kernel_2, _) = value_and_grads(kernel, rng.normal(size=E).astype(np.float32))
    assert first == second
    np.testing.assert_array_equal(grad_kernel, grad_kernel_2)
    assert np.abs(grad_kernel).max() > 1e-3 and not np.any(grad_bias)


@pytest.mark.parametrize("start", [0.0, 0.5, 1.0, 5.0, -5.0])
def test_bias_moves_by_exactly_the_rate(start):
    bias = jnp.full((2, 4), start, jnp.float32)
    counts = jnp.asarray([[9.0, 1.0, 5.0, 5.0], [0.0, 0.0, 0.0, 0.0]])
    rate = np.float32(0.001)
    moved = np.asarray(update_bias(bias, counts, 0.001))
    assert moved.dtype == np.float32
    np.testing.assert_array_equal(moved[0], np.float32(start) + np.array([-rate, rate, 0, 0], np.float32))
    np.testing.assert_array_equal(moved[1], bias[1])  # a layer without tokens
    assert moved[0, 0] != start


def test_zero_sum_update_keeps_the_sum():
    counts = jnp.asarray([[10.0, 1.0, 1.0, 1.0]])
    plain = update_bias(jnp.zeros((1, 4)), counts, 0.1)
    np.testing.assert_allclose(plain, [[-0.1, 0.1, 0.1, 0.1]], rtol=1e-6)
    zero_sum = update_bias(jnp.zeros((1, 4)), counts, 0.1, zero_sum=True)
    np.testing.assert_allclose(zero_sum, [[-0.15, 0.05, 0.05, 0.05]], rtol=1e-6)
    assert float(jnp.sum(zero_sum)) == pytest.approx(0, abs=1e-7)


def test_the_load_of_each_expert_is_relative_to_its_routers_mean():
    """Dense stacks come as matrices, single routers as vectors, and routers count different numbers of tokens."""
    loads = {"moe_layers": jnp.asarray([[2.0, 6.0], [1.0, 1.0]]), "mtp_0": jnp.asarray([9.0, 1.0])}
    metrics = load_metrics(loads)
    np.testing.assert_allclose(metrics["expert_load"], [[0.5, 1.5], [1.0, 1.0], [1.8, 0.2]], rtol=1e-6)
    np.testing.assert_allclose(metrics["max_violation_per_layer"], [0.5, 0.0, 0.8], rtol=1e-6)
    assert float(metrics["max_violation_mean"]) == pytest.approx(1.3 / 3)
    assert float(metrics["max_violation_max"]) == pytest.approx(0.8)


def test_max_violation():
    counts = jnp.asarray([[2.0, 2.0, 2.0, 2.0], [8.0, 0.0, 0.0, 0.0], [3.0, 1.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    np.testing.assert_allclose(max_violation(counts), [0.0, 3.0, 0.5, 0.0], atol=1e-6)

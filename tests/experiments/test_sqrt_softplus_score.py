"""experiments/ablations/sqrt_softplus_score.py: the score, its gradient and its gates, against float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sqrt_softplus_score import get_config, sqrt_softplus

from deepseek_jax.errors import ConfigError
from deepseek_jax.model.config import ModelConfig
from deepseek_jax.model.router import Router
from deepseek_jax.model.scores import scores
from deepseek_jax.training.balance import sequence_balance_loss
from deepseek_jax.training.config import TrainConfig

LOGITS = np.concatenate([np.linspace(-170, 170, 3401), [-20.0001, -20.0, -19.9999]]).astype(np.float32)


def exact(x):
    """sqrt(log(1 + exp(x))) in float64."""
    return np.sqrt(np.logaddexp(0.0, x.astype(np.float64)))


def test_score_and_gradient_are_those_of_float64():
    x = LOGITS.astype(np.float64)
    np.testing.assert_allclose(sqrt_softplus(jnp.asarray(LOGITS)), exact(LOGITS), rtol=2e-6)
    gradient = jax.vmap(jax.grad(sqrt_softplus))(jnp.asarray(LOGITS))
    np.testing.assert_allclose(gradient, np.exp(-np.logaddexp(0.0, -x)) / (2 * exact(LOGITS)), rtol=2e-6)


@pytest.mark.parametrize("logit", [-1e4, -200.0, -100.0, 100.0, 1e4])
def test_far_logits_have_finite_scores_and_gradients(logit):
    score, gradient = jax.value_and_grad(sqrt_softplus)(jnp.float32(logit))
    assert float(score) == pytest.approx(exact(np.float64(logit)), rel=1e-5, abs=1e-38)
    assert np.isfinite(gradient) and 0 <= float(gradient) < 0.5


def as_it_is_written(logits_E):
    return jnp.sqrt(jax.nn.softplus(logits_E))


def as_log_and_exp(logits_E):
    return jnp.sqrt(jnp.log(1 + jnp.exp(logits_E)))


@pytest.mark.parametrize("name", ["as_it_is_written", "as_log_and_exp"])
def test_the_traps_of_the_score_are_refused_before_the_first_compile(name):
    with pytest.raises(ConfigError, match=f"{name}': the (score|gradient) at a logit of -?[0-9.]+ is (nan|inf)"):
        jax.eval_shape(lambda x: scores(x, f"test_sqrt_softplus_score:{name}"), jnp.zeros((3, 8)))


def test_the_experiment_routes_by_the_score():
    """Gates are the scores of the chosen divided by their sum, and so are the probabilities of the balance loss."""
    config = get_config()
    model = ModelConfig.from_dict(config.model)
    assert TrainConfig.from_dict(config.pretrain.train).steps == 100
    moe = dataclasses.replace(model.moe, num_experts=8, top_k=3, routed_scaling_factor=1.5, correction_bias=False)
    logits = np.random.default_rng(0).normal(size=(2, 16, 8)).astype(np.float32) * 10
    logits[0, 3] = -100 + np.arange(8)
    variables = {"params": {"kernel": jnp.eye(8)}}
    router = Router(model.replace(moe=moe))
    gates, stats = jax.jit(lambda x: router.apply(variables, x, jnp.ones((2, 16), bool), None))(logits)
    wanted = exact(logits)
    chosen = np.argsort(-wanted, axis=-1)[..., :3]
    np.testing.assert_array_equal(stats.expert_ids_LBTK, chosen)
    best = np.take_along_axis(wanted, chosen, axis=-1)
    # `normalized` divides by 1e-18 at least: below that, a token hardly has experts
    np.testing.assert_allclose(gates, 1.5 * best / np.maximum(best.sum(-1, keepdims=True), 1e-18), rtol=1e-5)
    probs = wanted / np.maximum(wanted.sum(-1, keepdims=True), 1e-18)
    counts = np.stack([np.bincount(ids.ravel(), minlength=8) for ids in chosen])
    loss = np.mean(np.sum(8 / (3 * 16) * counts * probs.mean(1), axis=-1))
    layers = jax.tree.map(lambda x: x[None], stats)
    np.testing.assert_allclose(sequence_balance_loss(layers, 3), [loss], rtol=1e-5)

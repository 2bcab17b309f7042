"""experiments/ablations/router_z_loss.py: the loss and its gradient against float64, in the router and in the total."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from router_z_loss import ZLossRouter, get_config

from deepseek_jax.errors import ConfigError
from deepseek_jax.model.auxiliary import LOSSES, METRICS
from deepseek_jax.model.config import ModelConfig
from deepseek_jax.model.router import Router
from deepseek_jax.model.transformer import Transformer, abstract_variables
from deepseek_jax.training.config import TrainConfig
from deepseek_jax.training.objective import loss_fn

MODEL = ModelConfig.from_dict(get_config().model)
D, E = MODEL.hidden_size, MODEL.moe.num_experts


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 12, D)).astype(np.float32)
    valid = np.ones((2, 12), bool)
    valid[1, 5:] = False
    x[1, 5:] *= 100  # padding, which would weigh more than all tokens
    return x, valid, rng.normal(size=(D, E)).astype(np.float32)


def routed(router, kernel, x, valid):
    variables = {"params": {"kernel": kernel}, "router_bias": {"bias": jnp.zeros(E)}}
    return router(MODEL).apply(variables, x, valid, None, mutable=(LOSSES, METRICS))


def test_loss_and_gradient_are_those_of_float64(inputs):
    x, valid, kernel = inputs
    (gates, stats), returned = jax.jit(functools.partial(routed, ZLossRouter))(kernel, x, valid)
    logits = x[valid].astype(np.float64) @ kernel.astype(np.float64)
    logsumexp = np.log(np.exp(logits).sum(-1))
    loss, metric = returned[LOSSES]["router_z"], returned[METRICS]["router_logsumexp"]
    assert (float(loss.count), loss.per) == (17, "token")
    assert float(loss.total) == pytest.approx((logsumexp**2).sum(), rel=1e-6)
    assert float(metric.total / metric.count) == pytest.approx(logsumexp.mean(), rel=1e-6)

    gradient = jax.jit(jax.grad(lambda k: routed(ZLossRouter, k, x, valid)[1][LOSSES]["router_z"].total))(kernel)
    softmax = np.exp(logits - logsumexp[:, None])
    wanted = x[valid].T.astype(np.float64) @ (2 * logsumexp[:, None] * softmax)
    np.testing.assert_allclose(gradient, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())

    (plain_gates, plain_stats), nothing = jax.jit(functools.partial(routed, Router))(kernel, x, valid)
    np.testing.assert_array_equal(gates, plain_gates)
    jax.tree.map(np.testing.assert_array_equal, stats, plain_stats)
    assert nothing == {}


@pytest.mark.parametrize("size", [100.0, -100.0, 1e4])
def test_far_logits_have_finite_losses_and_gradients(size):
    x = np.zeros((1, 1, D), np.float32)
    x[0, 0, 0] = size
    kernel = np.zeros((D, E), np.float32)
    kernel[0] = np.linspace(0.5, 1, E)

    def total(kernel):
        return routed(ZLossRouter, kernel, x, np.ones((1, 1), bool))[1][LOSSES]["router_z"].total

    value, gradient = jax.jit(jax.value_and_grad(total))(kernel)
    logits = size * kernel[0].astype(np.float64)
    assert float(value) == pytest.approx(np.logaddexp.reduce(logits) ** 2, rel=1e-5)
    assert np.all(np.isfinite(gradient)) and np.any(gradient)


def test_the_experiment_weighs_it():
    """Its two MoE layers return one number, that the config weighs by 0.001; a misspelled name is refused."""
    config = get_config()
    objective = TrainConfig.from_dict(config.pretrain.train).objective
    assert objective.auxiliary == (("router_z", 1e-3),)
    model = Transformer(MODEL)
    variables = jax.tree.map(
        lambda leaf: jnp.asarray(np.random.default_rng(leaf.size).normal(size=leaf.shape) * 0.1, leaf.dtype),
        abstract_variables(model),
    )
    ones = np.ones((2, 8), np.int32)
    batch = {
        "tokens": np.arange(16, dtype=np.int32).reshape(2, 8),
        "segment_ids": ones,
        "positions": np.cumsum(ones, axis=1) - 1,
        "loss_mask": ones,
    }

    def call(objective):
        return loss_fn(model, objective, variables["params"], variables["router_bias"], batch, jnp.int32(0))

    unweighed = dataclasses.replace(objective, auxiliary=())
    (with_it, aux), (without, _) = jax.jit(lambda: (call(objective), call(unweighed)))()
    assert float(with_it - without) == pytest.approx(1e-3 * float(aux.losses["router_z"]), rel=1e-2)
    assert float(aux.losses["router_z"]) > 2 * np.log(E)  # (log E)² where all logits are 0
    assert float(aux.metrics["router_logsumexp"].count) == 2 * 16
    misspelled = dataclasses.replace(objective, auxiliary=(("router_s", 1e-3),))
    with pytest.raises(ConfigError, match="'router_s': did you mean 'router_z'"):
        jax.eval_shape(lambda: call(misspelled))

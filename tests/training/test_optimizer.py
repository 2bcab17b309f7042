"""AdamW against its equations, what decays, and how moments are stored."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from deepseek_jax.errors import ConfigError
from deepseek_jax.model.transformer import abstract_variables
from deepseek_jax.training.optimizer import OptimizerConfig, build_optimizer, decayed
from deepseek_jax.training.schedules import Schedule, Segment

PARAMS = {"kernel": jnp.array([[1.0, -2.0], [0.5, 3.0]]), "norm": {"scale": jnp.array([1.0, 1.0])}}


def run(config, steps=3):
    """Parameters after some steps with gradients of norm above and below the clip, and the optimizer state."""
    optimizer = build_optimizer(config)

    @jax.jit
    def step(params, state, size):
        updates, state = optimizer.update(jax.tree.map(lambda p: size * jnp.sin(p), params), state, params)
        return jax.tree.map(jnp.add, params, updates), state

    params, state = PARAMS, optimizer.init(PARAMS)
    for i in range(steps):
        params, state = step(params, state, 0.1 * 10.0**i)
    return params, state


def adamw(config, steps=3):
    """The same in numpy, from the papers: clip, moments, bias correction, decoupled decay."""
    params = {"kernel": np.array(PARAMS["kernel"], np.float64), "scale": np.array(PARAMS["norm"]["scale"], np.float64)}
    mu, nu = ({k: np.zeros_like(v) for k, v in params.items()} for _ in range(2))
    for i in range(steps):
        grads = {k: 0.1 * 10.0**i * np.sin(v) for k, v in params.items()}
        norm = np.sqrt(sum(np.sum(g**2) for g in grads.values()))
        for k, g in grads.items():
            g = g * min(1.0, config.clip_norm / norm)
            mu[k] = config.b1 * mu[k] + (1 - config.b1) * g
            nu[k] = config.b2 * nu[k] + (1 - config.b2) * g**2
            adam = mu[k] / (1 - config.b1 ** (i + 1)) / (np.sqrt(nu[k] / (1 - config.b2 ** (i + 1))) + config.eps)
            decay = config.weight_decay * params[k] if k == "kernel" else 0.0
            params[k] = params[k] - float(config.learning_rate(i)) * (adam + decay)
    return params


def test_adamw_is_the_published_one():
    config = OptimizerConfig(learning_rate=Schedule(0.0, (Segment("linear", 2, 0.01),)))
    assert (config.b1, config.b2, config.weight_decay, config.clip_norm) == (0.9, 0.95, 0.1, 1.0)
    ours, theirs = run(config)[0], adamw(config)
    np.testing.assert_allclose(ours["kernel"], theirs["kernel"], rtol=1e-5)
    np.testing.assert_allclose(ours["norm"]["scale"], theirs["scale"], rtol=1e-5)


def test_matrices_decay_and_norms_do_not(model):
    flags = jax.tree_util.tree_leaves_with_path(decayed(abstract_variables(model)["params"]))
    kept = {"/".join(key.key for key in path) for path, flag in flags if not flag}
    assert all(name.endswith("norm/scale") for name in kept)
    assert {"final_norm/scale", "moe_layers/attn_norm/scale", "mtp_0/embed_norm/scale"} <= kept
    pulled = {"/".join(key.key for key in path) for path, flag in flags if flag}
    assert {"embed/embedding", "head/kernel", "moe_layers/ffn/router/kernel", "moe_layers/ffn/experts/gate"} <= pulled


def test_bfloat16_moments_are_stored_small_and_change_little():
    (full, full_state), (half, half_state) = (
        run(OptimizerConfig(Schedule(0.01), moment_dtype=d)) for d in ("float32", "bfloat16")
    )
    dtypes = {x.dtype for x in jax.tree.leaves((half_state[1].mu, half_state[1].nu))}
    assert dtypes == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in jax.tree.leaves((full_state[1].mu, full_state[1].nu))} == {jnp.dtype("float32")}
    assert half["kernel"].dtype == jnp.float32
    np.testing.assert_allclose(half["kernel"], full["kernel"], atol=3e-4)
    assert not np.array_equal(half["kernel"], full["kernel"])


def test_bfloat16_moments_decay_in_float32():
    """A step reads what is stored, computes in float32 and rounds once: decayed in bfloat16, a moment would be rounded
    twice."""
    grads = np.random.default_rng(0).normal(size=(4, 16, 16)).astype(np.float32)
    optimizer = build_optimizer(OptimizerConfig(Schedule(0.01), moment_dtype="bfloat16", clip_norm=float("inf")))
    params = {"kernel": jnp.zeros((16, 16))}
    state = optimizer.init(params)
    mu = nu = np.zeros((16, 16), np.float32)
    for g in grads:
        state = optimizer.update({"kernel": jnp.asarray(g)}, state, params)[1]
        mu, nu = (np.float32(b) * m + np.float32(1 - b) * x for b, m, x in ((0.9, mu, g), (0.95, nu, g * g)))
        mu, nu = (m.astype(ml_dtypes.bfloat16).astype(np.float32) for m in (mu, nu))
    for ours, theirs in ((state[1].mu, mu), (state[1].nu, nu)):
        assert np.mean(np.asarray(ours["kernel"], np.float32) != theirs) < 0.02


@pytest.mark.parametrize(
    ("field", "value"), [("moment_dtype", "bf16"), ("b2", 1.0), ("weight_decay", -0.1), ("clip_norm", 0.0)]
)
def test_bad_optimizers_are_refused(field, value):
    with pytest.raises(ConfigError, match=f"optimizer.{field}"):
        OptimizerConfig(**{field: value})

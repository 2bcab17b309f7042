"""The same weights and the same batch give the same loss and gradients on one device and on every mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import CONFIG, MESHES, MODEL, assert_close, jit, on, placed, placed_batch

from deepseek_jax.model.auxiliary import auxiliary_loss, auxiliary_metric
from deepseek_jax.model.ops import Ops
from deepseek_jax.model.router import Router
from deepseek_jax.model.runtime import RuntimeConfig
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.parallel.arrays import variables_sharding
from deepseek_jax.precision import get_precision
from deepseek_jax.training.objective import ObjectiveConfig, loss_fn
from deepseek_jax.training.optimizer import OptimizerConfig, build_optimizer
from deepseek_jax.training.schedules import Schedule
from deepseek_jax.training.state import create_state, state_from_variables
from deepseek_jax.training.step import make_train_step

OBJECTIVE = ObjectiveConfig(balance_alpha=0.01, loss_chunk=16)
REPORTED = dataclasses.replace(OBJECTIVE, auxiliary=(("router_z", 0.01), ("sequence", 0.1)))


class ReportingRouter(Router):
    """Returns a loss per token, one per sequence and a metric."""

    def route(self, logits_BTE, valid_BT, expert_ids_BTK):
        largest_BT = jnp.max(logits_BTE, axis=-1)
        auxiliary_loss(self, "router_z", jnp.square(jax.nn.logsumexp(logits_BTE, axis=-1)), valid_BT)
        auxiliary_loss(self, "sequence", jnp.max(jnp.where(valid_BT, largest_BT, 0), axis=1), jnp.any(valid_BT, axis=1))
        auxiliary_metric(self, "largest_logit", largest_BT, valid_BT)
        return super().route(logits_BTE, valid_BT, expert_ids_BTK)


REPORTING = MODEL.clone(
    config=CONFIG.replace(moe=dataclasses.replace(CONFIG.moe, router="test_sharded_equals_unsharded:ReportingRouter"))
)


def loss_and_gradients(model, objective=OBJECTIVE):
    variables = placed(model)

    def call(params, router_bias, batch):
        loss = functools.partial(loss_fn, model, objective)
        (value, aux), grads = jax.value_and_grad(loss, has_aux=True)(
            params, router_bias, batch, jnp.zeros((), jnp.int32)
        )
        return value, (aux.losses, aux.metrics), aux.loads, aux.overflows, grads

    return jit(call)(variables["params"], variables["router_bias"], placed_batch(model))


def recomputing(model):
    return model.clone(ops=dataclasses.replace(model.ops, runtime=RuntimeConfig(remat="full")))


@pytest.fixture(scope="module")
def one_device():
    return loss_and_gradients(recomputing(on(None, REPORTING)), REPORTED)


CASES = {
    **{name: (sizes, {}) for name, sizes in MESHES.items()},
    "gathered tokens": ({"fsdp": 2, "expert": 4}, {"exchange": "gather"}),
    "two microbatches": ({"fsdp": 2, "expert": 2, "tensor": 2}, {"dual_batch": True}),
    "experts not divided": ({"fsdp": 2, "expert": 4}, {"rules": {"experts": None}}),
    "experts and vocabulary over axes of tokens and others": (
        {"fsdp": 2, "expert": 2, "tensor": 2},
        {"rules": {"experts": ("expert", "tensor"), "expert_ffn": ("fsdp", "tensor"), "vocab": ("tensor", "fsdp")}},
    ),
    "an axis of length and heads": (
        {"fsdp": 2, "tensor": 2, "context": 2},
        {"rules": {"length": ("context", "tensor")}},
    ),
    "experts across nodes": ({"data": 2, "expert": 4}, {"dcn": {"data": 2, "expert": 2}}),
}


@pytest.mark.parametrize("name", CASES)
def test_loss_and_every_gradient(name, one_device):
    sizes, options = CASES[name]
    model = recomputing(on(sizes, REPORTING, **options))
    got = loss_and_gradients(model, REPORTED)
    assert {"router_z", "sequence"} <= set(got[1][0]) and set(got[1][1]) == {"largest_logit"}
    for x, y in zip(jax.tree.leaves(got[2]), jax.tree.leaves(one_device[2]), strict=True):
        np.testing.assert_array_equal(x, y)  # the same experts were chosen
    assert_close((got[:2], got[4]), (one_device[:2], one_device[4]))
    wanted = variables_sharding(model)["params"]
    weights = placed(model)["params"]
    assert jax.tree.all(jax.tree.map(lambda w, s: w.sharding.is_equivalent_to(s, w.ndim), weights, wanted))
    divided = [w for w in jax.tree.leaves(weights) if not w.sharding.is_fully_replicated]
    assert bool(divided) == (name != "data8")


def test_fp8():
    """The same choices, scales and roundings; only the gradients of experts' weights take scales over rows, which lie
    in another order."""
    precision = dataclasses.replace(get_precision("fp8_deepseek"), compute_dtype=jnp.dtype(jnp.float32))
    model = Transformer(CONFIG.replace(mtp_depth=0), Ops(precision))
    got, want = (loss_and_gradients(on(sizes, model)) for sizes in ({"fsdp": 2, "expert": 4}, None))
    jax.tree.map(np.testing.assert_array_equal, got[2], want[2])
    apart = jax.tree.map(lambda x, y: float(jnp.linalg.norm(x - y) / jnp.linalg.norm(y)), got[4], want[4])
    for path, distance in jax.tree_util.tree_leaves_with_path(apart):
        assert distance < (0.06 if "experts" in jax.tree_util.keystr(path) else 1e-5), path
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)


def test_no_token_is_lost_where_everything_goes_to_one_expert():
    """Biases that force every token to the same experts: buffers overflow on every device, and nothing changes but the
    time."""

    def forced(model):
        variables = placed(model)
        biases = jax.tree.map(
            lambda b: jnp.zeros_like(b).at[..., 0].set(30.0).at[..., 1].set(20.0).at[..., 2].set(10.0),
            variables["router_bias"],
        )
        call = jit(jax.value_and_grad(functools.partial(loss_fn, model, OBJECTIVE), has_aux=True))
        (value, aux), grads = call(variables["params"], biases, placed_batch(model), jnp.zeros((), jnp.int32))
        return value, aux, grads

    _, aux, grads = forced(on(None))
    value, sharded_aux, sharded_grads = forced(on({"fsdp": 2, "expert": 4}, buffer_factor=1.0))
    load = np.asarray(aux.loads["moe_layers"][0])
    assert np.count_nonzero(load) == CONFIG.moe.top_k and int(aux.overflows) == 0
    assert int(sharded_aux.overflows) > 0
    assert_close((sharded_aux.losses, sharded_grads), (aux.losses, grads))


def test_bias_is_the_same_on_every_device_after_a_hundred_steps():
    """Every device's copy, bit for bit, is what the loads of the whole global batch make of it."""
    model, gamma = on({"fsdp": 2, "expert": 4}), 0.01
    optimizer = build_optimizer(OptimizerConfig(learning_rate=Schedule(0.003)))
    step = make_train_step(model, OBJECTIVE, optimizer, Schedule(0.003), Schedule(gamma), microbatch=0)
    state, batch = create_state(model, optimizer, jax.random.key(0)), placed_batch(model)
    for _ in range(100):
        state, metrics = step(state, batch)
    assert int(state.step) == 100 and np.isfinite(metrics["loss"])
    for bias in jax.tree.leaves(state.router_bias):
        copies = [np.asarray(shard.data).view(np.int32) for shard in bias.addressable_shards]
        assert len(copies) == 8 and np.any(copies[0])
        for copy in copies[1:]:
            np.testing.assert_array_equal(copy, copies[0])
        moves = np.asarray(bias) / gamma
        np.testing.assert_allclose(moves, np.round(moves), atol=1e-3)  # whole steps of γ: no mean of devices' signs


def one_step(sizes, rules, microbatch):
    """The state's shardings before a step; the state and the metrics after it."""
    optimizer = build_optimizer(OptimizerConfig(learning_rate=Schedule(0.01), eps=1e-3))
    model = on(sizes, rules=rules)
    step = make_train_step(model, OBJECTIVE, optimizer, Schedule(0.01), Schedule(0.01), microbatch=microbatch)
    state = state_from_variables(model, placed(model), optimizer, jax.random.key(0))
    places = jax.tree.map(lambda x: x.sharding, state)
    return places, *step(state, placed_batch(model))


@pytest.fixture(scope="module")
def one_device_step():
    return one_step(None, {}, 0)


@pytest.mark.parametrize("rules", [{}, {"embed": None, "optimizer.embed": ("fsdp", "expert")}], ids=["zero3", "zero1"])
def test_a_step_in_microbatches_keeps_every_array_in_its_place(rules, one_device_step):
    """The state comes back as it went in, so that the next step is the same program; one step equals one device's."""
    places, state, metrics = one_step({"fsdp": 2, "expert": 2, "data": 2}, rules, 8)
    assert jax.tree.all(jax.tree.map(lambda x, place: x.sharding.is_equivalent_to(place, x.ndim), state, places))
    moment, weight = state.opt_state[1].mu["embed"]["embedding"], state.params["embed"]["embedding"]
    assert moment.sharding.shard_shape(moment.shape)[1] == CONFIG.hidden_size // 4
    assert weight.sharding.is_fully_replicated == bool(rules)
    _, one, reported = one_device_step
    assert_close(
        (metrics["loss"], metrics["grad_norm"], state.params, state.router_bias),
        (reported["loss"], reported["grad_norm"], one.params, one.router_bias),
        2e-5,
    )

"""The jitted step: accumulation, router bias, skipped steps, what it leaves alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from deepseek_jax.errors import ConfigError
from deepseek_jax.model.ops import Ops
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.training.balance import update_router_bias
from deepseek_jax.training.objective import ObjectiveConfig
from deepseek_jax.training.optimizer import OptimizerConfig, build_optimizer
from deepseek_jax.training.schedules import Schedule, Segment
from deepseek_jax.training.state import TrainState, create_state, state_from_variables
from deepseek_jax.training.step import guarded_update, make_train_step

POISON = 66  # a token whose embedding is made infinite
LENGTH = 16
CONFIG = OptimizerConfig(learning_rate=Schedule(0.0, (Segment("linear", 4, 0.02),)))
GAMMA = Schedule(0.01, (Segment("constant", 3, 0.01), Segment("constant", 1, 0.0)))  # 0 from step 3 on


@pytest.fixture(scope="module")
def small(model):
    """One MoE layer and one MTP module."""
    return Transformer(model.config.replace(mtp_depth=1))


@pytest.fixture(scope="module")
def optimizer():
    return build_optimizer(CONFIG)


@pytest.fixture(scope="module")
def steps(small, optimizer):
    """The step on the whole batch, and in microbatches of two sequences."""
    objective = ObjectiveConfig(balance_alpha=0.01)
    return {m: make_train_step(small, objective, optimizer, CONFIG.learning_rate, GAMMA, microbatch=m) for m in (0, 2)}


@pytest.fixture
def state(small, optimizer):
    return create_state(small, optimizer, jax.random.key(0))


@pytest.fixture(scope="module")
def batch(pack, document):
    """Microbatches with very different numbers of targets: rows 0 and 2 are short, rows 1 and 3 long."""
    batch = pack([[document(3, 1)], [document(16, 2)], [document(2, 3)], [document(9, 4), document(7, 5)]], LENGTH)
    batch["loss_mask"][1, :4] = 0
    return batch


def copies(tree):
    return jax.tree.map(np.array, tree)


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_accumulation_is_one_big_batch(steps, state, small, optimizer, batch):
    again = create_state(small, optimizer, jax.random.key(0))
    for _ in range(2):  # the learning rate is 0 in the first
        state, whole = steps[0](state, batch)
        again, parts = steps[2](again, batch)
        assert set(whole) == set(parts)
        for name, value in whole.items():
            np.testing.assert_allclose(parts[name], value, rtol=1e-5, atol=1e-7, err_msg=name)
    equal(copies(state.router_bias), copies(again.router_bias))
    for x, y in zip(jax.tree.leaves(state.opt_state), jax.tree.leaves(again.opt_state), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)
    # Adam divides by the gradient's size: where that is rounding error, so is the update.
    for x, y in zip(jax.tree.leaves(state.params), jax.tree.leaves(again.params), strict=True):
        assert np.mean(np.abs(x - y) > 1e-5) < 0.01


def test_learns_in_fp8(small, optimizer, batch):
    """The whole step, MTP and AdamW included; master weights stay float32."""
    model = Transformer(small.config, Ops("fp8_deepseek"))
    step = make_train_step(
        model, ObjectiveConfig(balance_alpha=0.01), optimizer, CONFIG.learning_rate, GAMMA, microbatch=2
    )
    state, losses = create_state(model, optimizer, jax.random.key(0)), []
    for _ in range(30):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.6 * losses[0] and int(state.skipped) == 0
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(state.params))


def test_learns_and_moves_every_bias(steps, state, batch):
    losses, before = [], copies((state.params, state.router_bias))
    for _ in range(30):
        state, metrics = steps[0](state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.6 * losses[0]
    assert int(state.step) == 30 and int(state.skipped) == 0
    changed = jax.tree.map(lambda a, b: not np.array_equal(a, b), before, copies((state.params, state.router_bias)))
    assert all(jax.tree.leaves(changed)), changed


def test_bias_update_opposes_the_load():
    bias = {
        "moe_layers": {"ffn": {"router": {"bias": jnp.zeros((2, 3))}}},
        "mtp_0": {"bias": jnp.zeros(3)},
        "mtp_1": {"bias": jnp.ones(3)},
    }
    loads = {"moe_layers": jnp.array([[6.0, 3.0, 0.0], [1.0, 1.0, 4.0]]), "mtp_0": jnp.array([2.0, 5.0, 2.0])}
    new = update_router_bias(bias, loads, 0.25)
    assert new["moe_layers"]["ffn"]["router"]["bias"].tolist() == [[-0.25, 0, 0.25], [0.25, 0.25, -0.25]]
    assert new["mtp_0"]["bias"].tolist() == [0.25, -0.25, 0.25]
    assert new["mtp_1"]["bias"].tolist() == [1, 1, 1]  # a module that did not run
    zero_sum = update_router_bias(bias, loads, 0.25, zero_sum=True)
    assert float(jnp.sum(zero_sum["mtp_0"]["bias"])) == pytest.approx(0, abs=1e-7)


def test_no_optimizer_leaf_and_no_decay_for_the_bias(steps, state, batch):
    """γ is 0 from step 3 on while decay goes on: the bias stays bit for bit."""
    assert jax.tree.structure(state.opt_state[1].mu) == jax.tree.structure(state.params)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state.opt_state)]
    assert paths and not any("bias" in path for path in paths)
    for _ in range(3):
        state, _ = steps[0](state, batch)
    bias = copies(state.router_bias)
    assert all(np.any(x) for x in jax.tree.leaves(bias))
    for _ in range(3):
        state, metrics = steps[0](state, batch)
    assert float(metrics["bias_update_speed"]) == 0
    equal(copies(state.router_bias), bias)


@pytest.mark.parametrize("microbatch", [0, 2])
def test_a_step_that_is_not_finite_is_skipped_and_counted(steps, small, state, optimizer, batch, microbatch):
    poisoned = {name: array.copy() for name, array in batch.items()}
    poisoned["tokens"][1, 7] = POISON
    variables = state.variables
    variables["params"]["embed"]["embedding"] = variables["params"]["embed"]["embedding"].at[POISON].set(jnp.inf)
    state = state_from_variables(small, variables, optimizer, state.rng)
    state, _ = steps[microbatch](state, batch)
    before = copies((state.params, state.router_bias, state.opt_state))
    state, metrics = steps[microbatch](state, poisoned)
    assert not np.isfinite(metrics["loss"])
    equal(copies((state.params, state.router_bias, state.opt_state)), before)
    assert (int(state.step), int(state.skipped), int(metrics["skipped"])) == (2, 1, 1)
    state, metrics = steps[microbatch](state, batch)
    assert np.isfinite(metrics["loss"]) and int(state.skipped) == 1
    assert float(metrics["learning_rate"]) == pytest.approx(0.005)  # the second update, though the third step
    assert not np.array_equal(copies(state.params)["head"]["kernel"], before[0]["head"]["kernel"])


@pytest.mark.parametrize(
    ("loss", "gradient", "counts"),
    [
        (1.0, 1.0, True),
        (1.0, jnp.nan, False),
        (1.0, -jnp.inf, False),
        (jnp.nan, 1.0, False),
        (jnp.inf, 1.0, False),
        (1.0, 3e38, False),
    ],
)
def test_loss_and_gradient_have_to_be_finite_each(loss, gradient, counts):
    """One bad number in one gradient is enough; 3e38 is finite and its square, in the norm, is not."""
    optimizer = optax.adam(0.1)
    params = {"a": jnp.ones(3), "b": jnp.ones(2)}
    state = TrainState(
        jnp.int32(7), params, {"r": jnp.zeros(2)}, optimizer.init(params), jax.random.key(0), jnp.int32(2)
    )
    gradients = {"a": jnp.ones(3), "b": jnp.array([1.0, gradient])}
    before = copies((state.params, state.router_bias, state.opt_state))
    new, _ = guarded_update(
        state, optimizer, jnp.float32(loss), gradients, {"r": jnp.array([1.0, 3.0])}, jnp.float32(0.5)
    )
    assert (int(new.step), int(new.skipped)) == (8, 2 if counts else 3)
    if counts:
        assert new.router_bias["r"].tolist() == [0.5, -0.5] and not np.array_equal(new.params["a"], before[0]["a"])
    else:
        equal(copies((new.params, new.router_bias, new.opt_state)), before)


@pytest.mark.parametrize("microbatch", [0, 2])
def test_logged_loads_are_the_choices_counted_one_by_one(steps, small, state, batch, microbatch):
    """Of the router of the layer, then of the MTP module's, which has no input at a document's last token."""
    output = small.apply(
        state.variables, batch["tokens"], segment_ids_BT=batch["segment_ids"], positions_BT=batch["positions"], mtp=True
    )
    counts = np.zeros((2, 4))
    for router, (routing, ahead) in enumerate(((output.routing, 0), (output.mtp_routing, 1))):
        choices = np.asarray(routing.expert_ids_LBTK)[0]
        for row, segments in enumerate(batch["segment_ids"]):
            for i, segment in enumerate(segments):
                if segment and i + ahead < len(segments) and segments[i + ahead] == segment:
                    counts[router, choices[row, i]] += 1
    assert counts.sum(axis=1).tolist() == [2 * 37, 2 * (37 - 5)] and np.any(counts[0] != counts[0, 0])
    _, metrics = steps[microbatch](state, batch)
    np.testing.assert_allclose(metrics["expert_load"], counts / counts.mean(axis=1, keepdims=True), rtol=1e-6)
    violations = counts.max(axis=1) / counts.mean(axis=1) - 1
    np.testing.assert_allclose(metrics["max_violation_per_layer"], violations, rtol=1e-5)
    assert float(metrics["max_violation_mean"]) == pytest.approx(violations.mean(), rel=1e-5)
    assert float(metrics["max_violation_max"]) == pytest.approx(violations.max(), rel=1e-5)
    assert float(metrics["tokens"]) == 3 + 16 + 2 + 16


def test_the_state_is_donated_and_given_weights_are_not(steps, small, state, optimizer, batch):
    given = state.variables
    mine = state_from_variables(small, given, optimizer, state.rng)
    steps[0](mine, batch)
    assert mine.params["head"]["kernel"].is_deleted()
    assert not given["params"]["head"]["kernel"].is_deleted()


def test_a_microbatch_that_does_not_divide_is_refused(small, optimizer, state, batch):
    step = make_train_step(small, ObjectiveConfig(), optimizer, CONFIG.learning_rate, GAMMA, microbatch=3)
    with pytest.raises(ConfigError, match="microbatch=3 does not divide the 4 sequences"):
        step(state, batch)

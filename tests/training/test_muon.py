"""Muon against an implementation in numpy and optax's; which parameters it updates; and its runs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from deepseek_jax.errors import CheckpointError, ConfigError
from deepseek_jax.model.config import GQAConfig, MLAConfig, ModelConfig, MoEConfig
from deepseek_jax.model.ops import Ops
from deepseek_jax.model.runtime import RuntimeConfig
from deepseek_jax.model.transformer import Transformer, abstract_variables, init_variables
from deepseek_jax.training.checkpoints import Checkpoints
from deepseek_jax.training.muon import NEWTON_SCHULZ, MuonConfig, newton_schulz
from deepseek_jax.training.objective import ObjectiveConfig
from deepseek_jax.training.optimizer import OptimizerConfig, build_optimizer, updated_by
from deepseek_jax.training.schedules import Schedule
from deepseek_jax.training.state import abstract_state, state_from_variables
from deepseek_jax.training.step import make_train_step

MODEL = Transformer(
    ModelConfig(
        vocab_size=40,
        hidden_size=16,
        num_layers=2,
        intermediate_size=24,
        attention=MLAConfig(num_heads=2, kv_lora_rank=8, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5),
        moe=MoEConfig(num_experts=4, top_k=2, intermediate_size=12, num_shared_experts=1),
        init_std=0.1,
    ),
    Ops(runtime=RuntimeConfig(experts="dense")),
)
RATE = Schedule(0.01)
CONFIG = OptimizerConfig(RATE, name="muon", clip_norm=float("inf"))
V4 = dataclasses.replace(CONFIG, muon=MuonConfig(update_rms=0.18, newton_schulz="v4"))
UP = "moe_layers/ffn/experts/up"  # [L, E, D, F]


def flat(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(x)
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }


@functools.cache
def start():
    return init_variables(MODEL, jax.random.key(0))["params"]


def gradients(seed):
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda p: random.normal(size=p.shape).astype(np.float32), start())


@functools.cache
def steps(config, count):
    """-> (parameters after `count` steps with random gradients, the optimizer's state)."""
    if count == 0:
        return start(), build_optimizer(config, MODEL).init(start())
    params, state = steps(config, count - 1)
    updates, state = compiled(config)(gradients(count), state, params)
    return optax.apply_updates(params, updates), state


@functools.cache
def compiled(config):
    return jax.jit(build_optimizer(config, MODEL).update)


def direction(config, name):
    """The first update of one stack, without learning rate and decay."""
    before, after = flat(start())[name], flat(steps(config, 1)[0])[name]
    return (before - after) / float(config.learning_rate(0)) - config.weight_decay * before


def numpy_muon(config, weights, gradients):
    """One matrix [A, B], in float64, from Moonlight's equations 1-4."""
    momentum, mu = np.zeros(weights.shape), config.muon.momentum
    for gradient in np.asarray(gradients, np.float64):
        momentum = mu * momentum + gradient
        x = gradient + mu * momentum
        x = x / np.sqrt(np.sum(x**2))
        for a, b, c in NEWTON_SCHULZ[config.muon.newton_schulz]:
            x = a * x + b * x @ x.T @ x + c * x @ x.T @ x @ x.T @ x
        update = config.muon.update_rms * np.sqrt(max(weights.shape)) * x
        weights = weights - float(config.learning_rate(0)) * (update + config.weight_decay * weights)
    return weights


@pytest.mark.parametrize("config", [CONFIG, V4], ids=["moonlight", "v4"])
def test_two_steps_equal_numpy_for_every_matrix(config):
    """Also of [L, D, F] and [L, E, D, F]: each matrix by itself. Embedding, head and norms take AdamW's step."""
    ours, before = flat(steps(config, 2)[0]), flat(start())
    grads = [flat(gradients(seed)) for seed in (1, 2)]
    adamw = flat(steps(OptimizerConfig(RATE, clip_norm=float("inf")), 2)[0])
    rules = updated_by(config.name, MODEL.config)
    assert len(rules["muon"]) == 11 and len(rules["adamw"]) == 6
    for name in rules["adamw"]:
        np.testing.assert_allclose(ours[name], adamw[name], atol=1e-8, err_msg=name)
    for name in rules["muon"]:
        for index in np.ndindex(before[name].shape[:-2]):
            theirs = numpy_muon(config, np.float64(before[name][index]), [g[name][index] for g in grads])
            np.testing.assert_allclose(ours[name][index], theirs, atol=2e-6, err_msg=name)


def singular_values(update_LEDF):
    return np.linalg.svd(update_LEDF, compute_uv=False)


@pytest.mark.parametrize(("config", "low", "high"), [(CONFIG, 0.65, 1.21), (V4, 0.995, 1.005)], ids=["moonlight", "v4"])
def test_singular_values_of_an_update(config, low, high):
    """Five fast iterations leave them in a band around 1, V4's last two bring them to 1: in every expert of every
    layer. The root mean square of the update is what `update_rms` says, up to that band."""
    update_LEDF, rms = direction(config, UP), config.muon.update_rms
    singular_LEK = singular_values(update_LEDF / (rms * np.sqrt(16)))
    assert singular_LEK.shape == (2, 4, 12)
    assert low < singular_LEK.min() and singular_LEK.max() < high
    np.testing.assert_allclose(np.sqrt(np.mean(update_LEDF**2, axis=(-2, -1))), rms, rtol=1 - low)


def test_another_division_into_matrices_would_be_seen():
    """A stack taken for one matrix, or experts for columns: the experts' singular values are far from 1."""
    gradient_LEDF = gradients(1)["moe_layers"]["ffn"]["experts"]["up"]
    whole = newton_schulz(NEWTON_SCHULZ["v4"], gradient_LEDF.reshape(-1, 12)).reshape(gradient_LEDF.shape)
    columns = np.moveaxis(newton_schulz(NEWTON_SCHULZ["v4"], np.moveaxis(gradient_LEDF, 1, 3)), 3, 1)
    for wrong in (whole, columns):
        assert singular_values(wrong).min() < 0.5
    right = newton_schulz(NEWTON_SCHULZ["v4"], gradient_LEDF)
    np.testing.assert_allclose(singular_values(right), 1, atol=0.005)


def test_the_first_step_is_that_of_optax():
    """With dimension numbers for the stacks. From the second step on optax corrects the momentum's bias."""
    labels = updated_by("muon", MODEL.config)["muon"]
    dims = jax.tree_util.tree_map_with_path(
        lambda path, _: (
            optax.contrib.MuonDimensionNumbers(-2, -1)
            if jax.tree_util.keystr(path, simple=True, separator="/") in labels
            else None
        ),
        start(),
    )
    theirs = optax.contrib.muon(1.0, consistent_rms=0.2, muon_weight_dimension_numbers=dims)
    updates = flat(jax.jit(lambda g, p: theirs.update(g, theirs.init(p), p)[0])(gradients(1), start()))
    for name in labels:
        np.testing.assert_allclose(direction(CONFIG, name), -updates[name], atol=1e-4)


def test_which_parameters_muon_updates():
    """Every matrix but embedding and head; routers and the MTP projection are among them, norms' scales are not."""
    mtp = MODEL.clone(config=MODEL.config.replace(mtp_depth=1, first_k_dense=1, attention=GQAConfig(2, 1, 8)))
    for model in (MODEL, mtp):
        rules = updated_by("muon", model.config)
        norms = {name for name in flat(abstract_variables(model)["params"]) if name.endswith("norm/scale")}
        assert rules["adamw"].keys() == norms | {"embed/embedding", "head/kernel"}
        assert {"moe_layers/ffn/router/kernel", UP} <= rules["muon"].keys()
    assert {"mtp_0/proj/kernel", "mtp_0/block/ffn/experts/up", "dense_layers/attn/k/kernel"} <= rules["muon"].keys()
    assert updated_by("adamw", MODEL.config).keys() == {"adamw"}


def test_a_matrix_has_one_moment_and_bfloat16_rounds_it():
    sizes = {rule: sum(numbers.values()) for rule, numbers in updated_by("muon", MODEL.config).items()}
    half = dataclasses.replace(CONFIG, moment_dtype="bfloat16")
    for config, dtype in ((CONFIG, "float32"), (half, "bfloat16")):
        moments = [x for x in jax.tree.leaves(steps(config, 2)[1]) if x.ndim]
        assert sum(x.size for x in moments) == sizes["muon"] + 2 * sizes["adamw"]
        assert {x.dtype for x in moments} == {jnp.dtype(dtype)}
    full, rounded = (flat(steps(config, 2)[0]) for config in (CONFIG, half))
    apart = max(np.max(np.abs(full[name] - rounded[name])) for name in full)
    assert 0 < apart < 1e-3  # a tenth of the largest update


def test_matrices_decay_and_zeros_stay_zero():
    """An expert that had no token does not move but for its decay, 0.1 of itself times the learning rate."""
    zeros = jax.tree.map(jnp.zeros_like, start())
    updates = flat(compiled(CONFIG)(zeros, steps(CONFIG, 0)[1], start())[0])
    np.testing.assert_allclose(updates[UP], -0.001 * flat(start())[UP], rtol=1e-6)
    assert not np.any(updates["final_norm/scale"])


def test_training_skips_and_goes_on(tmp_path):
    """The loss goes down; a step of infinite loss changes neither weights nor momentum; a run that is restored goes on
    bit for bit; another optimizer's state is refused."""
    optimizer = build_optimizer(dataclasses.replace(CONFIG, clip_norm=1.0), MODEL)
    step = make_train_step(MODEL, ObjectiveConfig(), optimizer, RATE, Schedule(0.0))
    tokens = np.random.default_rng(0).integers(0, 40, (4, 12)).astype(np.int32)
    ones = np.ones_like(tokens)
    positions = np.broadcast_to(np.arange(12, dtype=np.int32), tokens.shape)
    batch = {"tokens": tokens, "segment_ids": ones, "positions": positions, "loss_mask": ones}
    copy = functools.partial(jax.tree.map, jnp.copy)  # a step destroys the state it is given
    state, losses = (
        state_from_variables(MODEL, init_variables(MODEL, jax.random.key(0)), optimizer, jax.random.key(1)),
        [],
    )
    for _ in range(20):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 1

    broken = copy(state)
    broken.params["head"]["kernel"] = broken.params["head"]["kernel"].at[0, 0].set(jnp.nan)
    before = jax.tree.map(np.asarray, broken.opt_state)
    after, _ = step(broken, batch)
    jax.tree.map(np.testing.assert_array_equal, after.opt_state, before)
    assert int(after.skipped) == 1

    store = Checkpoints(tmp_path, MODEL.config)
    store.save(copy(state))
    store.wait()
    on, metrics = step(copy(state), batch)
    again, metrics_again = step(store.restore(abstract_state(MODEL, optimizer)).state, batch)
    jax.tree.map(np.testing.assert_array_equal, on.variables, again.variables)
    assert float(metrics["loss"]) == float(metrics_again["loss"])
    other = abstract_state(MODEL, build_optimizer(OptimizerConfig(RATE), MODEL))
    with pytest.raises(CheckpointError, match="does not fit this model and optimizer"):
        store.restore(other)
    store.close()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "muno"}, r"optimizer.name='muno': did you mean 'muon'"),
        ({"name": "nowhere.to:go"}, r"optimizer.name='nowhere.to:go': importing 'nowhere.to' failed"),
    ],
)
def test_unknown_optimizers_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        OptimizerConfig(**fields)


@pytest.mark.parametrize(("field", "value"), [("momentum", 1.0), ("update_rms", 0.0), ("newton_schulz", "v5")])
def test_bad_muons_are_refused(field, value):
    with pytest.raises(ConfigError, match=f"optimizer.muon.{field}"):
        MuonConfig(**{field: value})


def lion(config, model):
    """An optimizer of the user's own."""
    return optax.scale_by_lion(config.b1, config.b2)


def nothing(config, model):
    return None


def test_an_optimizer_of_ones_own():
    """Clipping, decay, the learning rate and bfloat16 moments surround it as they do the built-in ones."""
    config = OptimizerConfig(RATE, name=f"{__name__}:lion", moment_dtype="bfloat16")
    after, state = steps(config, 1)
    before, sign = flat(start())[UP], np.sign(flat(gradients(1))[UP])
    np.testing.assert_allclose(flat(after)[UP], before - 0.01 * (sign + 0.1 * before), atol=1e-6)
    assert {x.dtype for x in jax.tree.leaves(state) if x.ndim} == {jnp.dtype("bfloat16")}
    assert updated_by(config.name, MODEL.config).keys() == {f"{__name__}:lion"}
    with pytest.raises(ConfigError, match="returned None: it must be a function of"):
        build_optimizer(OptimizerConfig(name=f"{__name__}:nothing"), MODEL)

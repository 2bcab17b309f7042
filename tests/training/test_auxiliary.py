"""Losses and metrics that modules return by name, against sums in numpy over what the modules saw."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.errors import ConfigError
from deepseek_jax.model.attention import GroupedQueryAttention
from deepseek_jax.model.auxiliary import auxiliary_loss, auxiliary_metric
from deepseek_jax.model.config import GQAConfig, ModelConfig, MoEConfig
from deepseek_jax.model.ops import Ops
from deepseek_jax.model.router import Router
from deepseek_jax.model.runtime import RuntimeConfig
from deepseek_jax.model.transformer import Transformer, init_variables
from deepseek_jax.training.balance import sequence_balance_loss
from deepseek_jax.training.objective import ObjectiveConfig, loss_fn
from deepseek_jax.training.optimizer import OptimizerConfig, build_optimizer
from deepseek_jax.training.schedules import Schedule
from deepseek_jax.training.state import abstract_state, state_from_variables
from deepseek_jax.training.step import accumulate, make_train_step

SEEN = []  # (logits, valid) of every router and (sums, valid) of every attention that ran, in order


class ReportingRouter(Router):
    """Returns the square of each token's largest logit as a loss, the logit itself as a metric."""

    def route(self, logits_BTE, valid_BT, expert_ids_BTK):
        largest_BT = jnp.max(logits_BTE, axis=-1)
        jax.debug.callback(lambda *arrays: SEEN.append(arrays), logits_BTE, valid_BT)
        auxiliary_loss(self, "largest_logit", largest_BT**2, valid_BT)
        auxiliary_metric(self, "router_logit", largest_BT, valid_BT)
        return super().route(logits_BTE, valid_BT, expert_ids_BTK)


class ReportingAttention(GroupedQueryAttention):
    """Returns a number per sequence as a loss."""

    @nn.compact
    def __call__(self, x_BTD, tokens, cache_entry):
        sums_B, valid_B = jnp.sum(x_BTD**2, axis=(1, 2)), jnp.any(tokens.segment_ids_BT > 0, axis=1)
        jax.debug.callback(lambda *arrays: SEEN.append(arrays), sums_B, valid_B)
        auxiliary_loss(self, "attention_input", sums_B, valid_B)
        return super().__call__(x_BTD, tokens, cache_entry)


@dataclasses.dataclass(frozen=True)
class ReportingGQA(GQAConfig):
    @property
    def module(self):
        return ReportingAttention


MOE = MoEConfig(num_experts=4, top_k=2, intermediate_size=16, router="test_auxiliary:ReportingRouter")
CONFIG = ModelConfig(
    vocab_size=67,
    hidden_size=32,
    num_layers=3,
    first_k_dense=1,
    intermediate_size=32,
    attention=ReportingGQA(num_heads=2, num_kv_heads=1, head_dim=8),
    moe=MOE,
    mtp_depth=1,
    init_std=0.1,
)
PLAIN = ObjectiveConfig(balance="none", loss_chunk=16)
WEIGHED = dataclasses.replace(PLAIN, auxiliary=(("largest_logit", 0.5), ("attention_input", 0.03)))


@pytest.fixture(scope="module")
def reporting():
    return Transformer(CONFIG, Ops(runtime=RuntimeConfig(experts="dense")))


@pytest.fixture(scope="module")
def weights(reporting):
    return init_variables(reporting, jax.random.key(0))


@pytest.fixture(scope="module")
def batch(pack, document):
    """Documents of many lengths, one of them too short for the MTP module, and padding alone."""
    return pack([[document(16, 1)], [document(9, 2), document(7, 3)], [document(1, 4)], []], 16)


@pytest.fixture(scope="module")
def value_and_grad(reporting, weights):
    @functools.cache
    def compiled(objective):
        return jax.jit(jax.value_and_grad(functools.partial(loss_fn, reporting, objective), has_aux=True))

    def run(objective, batch):
        (value, aux), grads = compiled(objective)(weights["params"], weights["router_bias"], batch, 0)
        return float(value), aux, grads

    return run


def by_hand(seen, batch):
    """(largest_logit, attention_input, router_logit) in float64 from what every module saw."""
    segments = batch["segment_ids"]
    largest_logit = attention_input = router_logit = tokens = 0.0
    for values, valid in seen:
        values, valid = np.asarray(values, np.float64), np.asarray(valid)
        if values.ndim == 3:  # a router
            largest = values.max(axis=-1)[valid]
            largest_logit += (largest**2).sum() / valid.sum()
            router_logit, tokens = router_logit + largest.sum(), tokens + valid.sum()
        else:
            attention_input += values[valid].sum() / valid.sum()
    routers = [valid for values, valid in seen if np.ndim(values) == 3]
    one_ahead = np.pad(segments[:, 1:], ((0, 0), (0, 1))) == segments
    counts = [np.sum((segments > 0) & one_ahead), np.sum(segments > 0), np.sum(segments > 0)]
    assert sorted(np.sum(valid) for valid in routers) == counts
    return largest_logit, attention_input, router_logit / tokens


def test_values_are_sums_over_layers_and_mtp_modules_of_means_over_tokens_or_sequences(value_and_grad, batch):
    SEEN.clear()
    value, aux, _ = value_and_grad(WEIGHED, batch)
    jax.effects_barrier()
    assert len(SEEN) == 4 + 3  # attention of four blocks, routers of three
    largest_logit, attention_input, router_logit = by_hand(SEEN, batch)
    assert float(aux.losses["largest_logit"]) == pytest.approx(largest_logit, rel=1e-5)
    assert float(aux.losses["attention_input"]) == pytest.approx(attention_input, rel=1e-5)
    metric = aux.metrics["router_logit"]
    assert float(metric.total / metric.count) == pytest.approx(router_logit, rel=1e-5)
    plain, unweighed, _ = value_and_grad(PLAIN, batch)
    assert value - plain == pytest.approx(0.5 * largest_logit + 0.03 * attention_input, rel=1e-4)
    assert unweighed.losses["largest_logit"] == aux.losses["largest_logit"]  # logged, and adds nothing


def test_gradient_is_that_of_a_total_written_by_hand(reporting, weights, value_and_grad, batch):
    segments = batch["segment_ids"]
    valid = [segments > 0, (segments > 0) & (np.pad(segments[:, 1:], ((0, 0), (0, 1))) == segments)]
    tokens, sequences = [x.sum() for x in valid], [x.any(axis=1).sum() for x in valid]

    def total(params):
        variables = {"params": params, "router_bias": weights["router_bias"]}
        plain, _ = loss_fn(reporting, PLAIN, params, weights["router_bias"], batch, 0)
        _, returned = reporting.apply(
            variables,
            batch["tokens"],
            segment_ids_BT=batch["segment_ids"],
            positions_BT=batch["positions"],
            mtp=True,
            mutable=("auxiliary_losses",),
        )
        returned = returned["auxiliary_losses"]
        routers = jnp.sum(returned["moe_layers"]["ffn"]["router"]["largest_logit"].total) / tokens[0]
        inputs = [jnp.sum(returned[stack]["attn"]["attention_input"].total) for stack in ("dense_layers", "moe_layers")]
        inputs = sum(inputs) / sequences[0]
        block = returned["mtp_0"]["block"]
        routers += block["ffn"]["router"]["largest_logit"].total / tokens[1]
        inputs += block["attn"]["attention_input"].total / sequences[1]
        return plain + 0.5 * routers + 0.03 * inputs

    wanted = jax.jit(jax.grad(total))(weights["params"])
    got, plain = value_and_grad(WEIGHED, batch)[2], value_and_grad(PLAIN, batch)[2]
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5 * np.abs(y).max())
    router = got["moe_layers"]["ffn"]["router"]["kernel"] - plain["moe_layers"]["ffn"]["router"]["kernel"]
    assert np.abs(router).max() > 1e-3


def test_microbatches_add_up(reporting, weights, value_and_grad, batch):
    """Each holds another number of tokens, and one of them none."""
    state = state_from_variables(reporting, weights, build_optimizer(OptimizerConfig()), jax.random.key(0))
    loss, aux, grads = jax.jit(functools.partial(accumulate, reporting, WEIGHED, microbatch=1))(state, batch)
    whole_loss, whole_aux, whole_grads = value_and_grad(WEIGHED, batch)
    assert float(loss) == pytest.approx(whole_loss, rel=1e-5)
    summed, whole = (aux.losses, aux.metrics, grads), (whole_aux.losses, whole_aux.metrics, whole_grads)
    for x, y in zip(jax.tree.leaves(summed), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5 * np.abs(y).max())


def outputs(config, objective, batch):
    """The outputs of a train step as shapes: traced, not compiled."""
    model, optimizer = Transformer(config), build_optimizer(OptimizerConfig())
    step = make_train_step(model, objective, optimizer, Schedule(1e-3), Schedule(1e-3), microbatch=2)
    return jax.eval_shape(step, abstract_state(model, optimizer), batch)


def test_every_name_is_logged_as_one_number(batch):
    state, metrics = outputs(CONFIG, PLAIN, batch)
    for name in ("largest_logit", "attention_input", "router_logit", "cross_entropy", "mtp_1"):
        assert metrics[name].shape == () and metrics[name].dtype == jnp.float32
    assert set(state.variables) == {"params", "router_bias"}


class Clashing(Router):
    name_taken = "cross_entropy"

    def route(self, logits_BTE, valid_BT, expert_ids_BTK):
        auxiliary_loss(self, self.name_taken, logits_BTE[..., 0], valid_BT)
        return super().route(logits_BTE, valid_BT, expert_ids_BTK)


class ClashingWithTheLog(Clashing):
    name_taken = "grad_norm"


class Misshapen(Router):
    def route(self, logits_BTE, valid_BT, expert_ids_BTK):
        auxiliary_loss(self, "largest_logit", logits_BTE, valid_BT)
        return super().route(logits_BTE, valid_BT, expert_ids_BTK)


def routed_by(router):
    return CONFIG.replace(moe=dataclasses.replace(MOE, router=f"test_auxiliary:{router}"))


@pytest.mark.parametrize(
    ("config", "weights_of", "error", "message"),
    [
        (CONFIG, {"largest_logits": 1.0}, ConfigError, "objective.auxiliary has a weight of 1 for 'largest_logits': did"
         " you mean 'largest_logit'"),
        (CONFIG.replace(moe=dataclasses.replace(MOE, router="top_k"), attention=GQAConfig(2, 1, 8)),
         {"router_z": 0.001}, ConfigError, "'router_z': no module of this model returns an auxiliary loss"),
        (routed_by("Clashing"), {}, ConfigError, "called 'cross_entropy', which the log has already: rename it"),
        (routed_by("ClashingWithTheLog"), {}, ConfigError, "called 'grad_norm', which the log has already"),
        (routed_by("Misshapen"), {}, ValueError, r"Misshapen returns 'largest_logit' of shape \(1, 2, 4\) with valid"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused_before_the_first_compile(batch, config, weights_of, error, message):
    objective = dataclasses.replace(PLAIN, auxiliary=tuple(weights_of.items()))
    with pytest.raises(error, match=message):
        outputs(config, objective, batch)


def twice_the_sequence_loss(stats, top_k):
    return 2 * sequence_balance_loss(stats, top_k)


def one_number(stats, top_k):
    return jnp.sum(sequence_balance_loss(stats, top_k))


def test_a_balance_loss_of_ones_own(reporting, weights, batch):
    def balance(name):
        objective = dataclasses.replace(PLAIN, balance=name, balance_alpha=0.01)
        _, aux = loss_fn(reporting, objective, weights["params"], weights["router_bias"], batch, 0)
        return aux.losses["balance"]

    ours, own = jax.jit(lambda: (balance("sequence"), balance("test_auxiliary:twice_the_sequence_loss")))()
    assert float(own) == pytest.approx(2 * float(ours), rel=1e-6) and float(ours) > 0
    with pytest.raises(ConfigError, match=r"one_number' returned an array of shape \(\) for 3 routers"):
        jax.eval_shape(lambda: balance("test_auxiliary:one_number"))

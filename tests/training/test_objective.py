"""The loss against a plain reading of its equations, and the identities that masks and normalizers owe."""

import dataclasses
import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.errors import ConfigError
from deepseek_jax.training.log_probs import token_log_probs
from deepseek_jax.training.objective import ObjectiveConfig, loss_fn
from deepseek_jax.training.schedules import Schedule, deepseek_v3_mtp_weight
from deepseek_jax.training.targets import denominators, targets

LENGTH = 16
PLAIN = ObjectiveConfig(balance="none", loss_chunk=16)
BALANCED = ObjectiveConfig(balance="sequence", balance_alpha=0.01, loss_chunk=16)


@pytest.fixture(scope="module")
def value_and_grad(model, variables):
    """batch -> loss, aux, gradients, without balance loss."""
    loss = functools.partial(loss_fn, model, PLAIN)
    compiled = jax.jit(jax.value_and_grad(loss, has_aux=True))

    def run(batch):
        (value, aux), grads = compiled(variables["params"], variables["router_bias"], batch, 0)
        return float(value), aux, grads

    return run


@pytest.fixture(scope="module")
def logits(model, variables):
    """batch -> next-token logits and those of the MTP modules, and the routing of all layers."""

    @jax.jit
    def run(batch):
        output = model.apply(
            variables, batch["tokens"], segment_ids_BT=batch["segment_ids"], positions_BT=batch["positions"], mtp=True
        )
        hidden = (output.hidden_BTD, *output.mtp_hidden)
        return [model.apply(variables, h, method="unembed") for h in hidden], output.routing, output.mtp_routing

    return run


@pytest.fixture(scope="module")
def batch(pack, document):
    """Rows with one document, two, a short one with a masked prompt, and nothing at all."""
    batch = pack([[document(16, 1)], [document(9, 2), document(7, 3)], [document(5, 4)], []], LENGTH)
    batch["loss_mask"][2, :2] = 0
    return batch


def same(a, b, rtol=1e-5):
    """Gradient trees equal to float32 accuracy, each leaf by its own size."""
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=rtol * max(float(jnp.max(jnp.abs(y))), 1e-3))


def reference_cross_entropy(logits_BTV, batch, ahead):
    """Eq. by eq. in numpy: sum of -log p over the valid targets, and their number."""
    log_probs = np.asarray(jax.nn.log_softmax(logits_BTV.astype(jnp.float32)))
    total, count = 0.0, 0
    for b, t in np.ndindex(batch["tokens"].shape):
        if (
            t + ahead < LENGTH
            and len(set(batch["segment_ids"][b, t : t + ahead + 1])) == 1
            and batch["segment_ids"][b, t]
        ) and batch["loss_mask"][b, t + ahead]:
            total -= log_probs[b, t, batch["tokens"][b, t + ahead]]
            count += 1
    return total, count


def test_loss_is_the_sum_of_its_equations(batch, value_and_grad, logits):
    loss, aux, _ = value_and_grad(batch)
    values = []
    for ahead, logits_BTV in enumerate(logits(batch)[0], start=1):
        total, count = reference_cross_entropy(logits_BTV, batch, ahead)
        assert float(denominators(batch, 2).targets_K[ahead - 1]) == count
        values.append(total / count)
    np.testing.assert_allclose(
        [aux.losses["cross_entropy"], aux.losses["mtp_1"], aux.losses["mtp_2"]], values, rtol=1e-5
    )
    assert loss == pytest.approx(values[0] + 0.3 / 2 * (values[1] + values[2]), rel=1e-5)
    assert float(aux.tokens) == 16 + 16 + 5


def test_targets_stay_in_their_document_and_mask():
    batch = {
        "tokens": np.array([[10, 11, 12, 20, 21, 0]]),
        "segment_ids": np.array([[1, 1, 1, 2, 2, 0]]),
        "loss_mask": np.array([[1, 0, 1, 1, 1, 0]]),
    }
    tokens, mask = targets(batch, 1)
    assert mask.tolist() == [[0, 1, 0, 1, 0, 0]] and tokens[0, 1] == 12 and tokens[0, 3] == 21
    assert targets(batch, 2)[1].tolist() == [[1, 0, 0, 0, 0, 0]]


def test_two_packed_documents_are_the_two_alone(pack, document, value_and_grad):
    one, two = document(9, 5), document(7, 6)
    packed, alone = (
        value_and_grad(pack([[one, two], [], [], []], LENGTH)),
        value_and_grad(pack([[one], [two], [], []], LENGTH)),
    )
    assert packed[0] == pytest.approx(alone[0], rel=1e-5)
    assert {name: pytest.approx(float(v), rel=1e-5) for name, v in packed[1].losses.items()} == jax.tree.map(
        float, alone[1].losses
    )
    same(packed[2], alone[2])
    for name in alone[1].loads:
        np.testing.assert_array_equal(packed[1].loads[name], alone[1].loads[name])


def test_padding_adds_nothing(pack, document, value_and_grad):
    batch = pack([[document(9, 7)], [document(12, 8)], [], []], LENGTH)
    noisy = {name: array.copy() for name, array in batch.items()}
    padding = batch["segment_ids"] == 0
    noisy["tokens"][padding] = 17
    noisy["loss_mask"][padding] = 1
    (loss, aux, grads), (noisy_loss, noisy_aux, noisy_grads) = value_and_grad(batch), value_and_grad(noisy)
    assert loss == noisy_loss
    same(noisy_grads, grads, 1e-6)
    # top_k x tokens; module k has k less of each document
    assert sum(float(jnp.sum(x)) for x in aux.loads.values()) == 2 * (21 + (21 - 2) + (21 - 4))
    same(noisy_aux.loads, aux.loads, 0)


def test_doubled_batch_leaves_loss_and_gradients(pack, document, value_and_grad):
    rows = [[document(16, 9)], [document(9, 10), document(5, 11)]]
    single, double = value_and_grad(pack([*rows, [], []], LENGTH)), value_and_grad(pack(rows * 2, LENGTH))
    assert double[0] == pytest.approx(single[0], rel=1e-5)
    same(double[2], single[2])


def test_batch_without_targets_is_zero(pack, value_and_grad):
    loss, _, grads = value_and_grad(pack([[], [], [], []], LENGTH))
    assert loss == 0.0
    same(grads, jax.tree.map(jnp.zeros_like, grads))


@pytest.fixture(scope="module")
def balances(model, variables, batch):
    """Eqs. 17-20 of each router and row in numpy, float64, from what its block's norm gives it: routers x rows, NaN for
    a row without positions."""
    arguments = dict(segment_ids_BT=batch["segment_ids"], positions_BT=batch["positions"], mtp=True)
    of_modules = lambda module, _: "ffn_norm" in module.path and module.path[0].startswith("mtp")
    output, seen = model.apply(
        variables, batch["tokens"], **arguments, capture_intermediates=of_modules, mutable="intermediates"
    )
    rows = [np.sum(np.asarray(x, np.float64)[0], axis=-1) for x in (output.routing.counts_LBE,)]
    assert rows[0].tolist() == [32, 32, 10, 0]
    main = (
        np.asarray(output.routing.counts_LBE[0] * output.routing.probs_LBE[0], np.float64).sum(axis=-1)
        * 4
        / (2 * np.array([16, 16, 5, 1]) ** 2)
    )
    values = [np.where(rows[0] > 0, main, np.nan)]
    for k in (1, 2):
        module = lambda tree, k=k: tree[f"mtp_{k - 1}"]["block"]
        x_BTD = np.asarray(module(seen["intermediates"])["ffn_norm"]["__call__"][0], np.float64)
        router = module(variables["params"])["ffn"]["router"]["kernel"]
        scores_BTE = 1 / (1 + np.exp(-x_BTD @ np.asarray(router, np.float64)))
        chosen_BTK = np.argsort(
            -(scores_BTE + np.asarray(module(variables["router_bias"])["ffn"]["router"]["bias"])), axis=-1
        )[..., :2]
        values.append(np.full(4, np.nan))
        for b, segments in enumerate(batch["segment_ids"]):
            places = [t for t in range(LENGTH - k) if segments[t] and segments[t] == segments[t + k]]
            if places:
                f_E = 4 / (2 * len(places)) * np.bincount(chosen_BTK[b, places].ravel(), minlength=4)
                p_E = np.mean([scores_BTE[b, t] / scores_BTE[b, t].sum() for t in places], axis=0)
                values[-1][b] = f_E @ p_E
    return np.array(values)


@pytest.mark.parametrize("reduction, over_routers", [("sum", np.sum), ("mean", np.mean)])
def test_balance_loss_is_alpha_times_the_equations_of_every_router(
    model, variables, batch, value_and_grad, balances, reduction, over_routers
):
    """Mean over the rows that hold positions, then over layers as released code does (sum) or as the mean."""
    objective = dataclasses.replace(BALANCED, balance_reduction=reduction)
    arguments = (variables["params"], variables["router_bias"], batch, 0)
    total, aux = jax.jit(functools.partial(loss_fn, model, objective))(*arguments)
    assert balances.shape == (3, 4) and np.isnan(balances[:, 3]).all()
    assert float(aux.losses["balance"]) == pytest.approx(over_routers(np.nanmean(balances, axis=1)), rel=1e-5)
    assert float(total) - value_and_grad(batch)[0] == pytest.approx(0.01 * float(aux.losses["balance"]), rel=1e-3)


def test_layers_are_summed_as_in_released_code_by_default():
    assert ObjectiveConfig().balance_reduction == "sum"


def test_rows_too_short_for_a_module_count_in_its_balance_nowhere(model, variables, pack, document, logits):
    """Each router's mean is over the rows that it has a position in, of which rows of one and of two tokens are none
    for a module; microbatches of one row each add up to the batch."""
    batch = pack([[document(16, 1)], [document(2, 2)], [document(1, 3)], [document(9, 4), document(2, 5)]], LENGTH)
    loss = jax.jit(functools.partial(loss_fn, model, BALANCED))
    whole = denominators(batch, 2)
    assert whole.sequences_K.tolist() == [4, 3, 2]
    parts = [
        loss(variables["params"], variables["router_bias"], jax.tree.map(lambda x, b=b: x[b : b + 1], batch), 0, whole)[
            1
        ]
        for b in range(4)
    ]
    together = loss(variables["params"], variables["router_bias"], batch, 0)[1]
    assert sum(float(part.losses["balance"]) for part in parts) == pytest.approx(
        float(together.losses["balance"]), rel=1e-5
    )
    expected = 0.0
    for routing, rows in zip(logits(batch)[1:], ([[0, 1, 2, 3]], [[0, 1, 3], [0, 3]]), strict=True):
        for layer, held in enumerate(rows):
            tokens = np.asarray(routing.tokens_LB[layer], np.float64)
            assert np.flatnonzero(tokens).tolist() == held
            products = np.sum(np.asarray(routing.counts_LBE[layer] * routing.probs_LBE[layer], np.float64), axis=-1)
            expected += np.mean([4 / 2 * products[b] / tokens[b] ** 2 for b in held])
    assert float(together.losses["balance"]) == pytest.approx(expected, rel=1e-5)


def test_alpha_zero_is_no_balance_loss_at_all(model, variables, batch):
    def jaxpr(objective):
        arguments = (variables["params"], variables["router_bias"], batch, 0)
        return str(jax.make_jaxpr(lambda *a: loss_fn(model, objective, *a)[0])(*arguments))

    assert jaxpr(ObjectiveConfig(balance="sequence", balance_alpha=0.0)) == jaxpr(ObjectiveConfig(balance="none"))
    assert jaxpr(ObjectiveConfig(balance="sequence")) != jaxpr(ObjectiveConfig(balance="none"))


def test_mtp_weight_follows_the_step_and_zero_runs_no_module(model, variables, batch):
    def outputs(weight):
        objective = ObjectiveConfig(mtp_weight=weight)
        return jax.eval_shape(
            functools.partial(loss_fn, model, objective), variables["params"], variables["router_bias"], batch, 0
        )[1]

    assert set(outputs(deepseek_v3_mtp_weight()).loads) == {"moe_layers", "mtp_0", "mtp_1"}
    assert set(outputs(Schedule(0.0)).loads) == {"moe_layers"} and set(outputs(Schedule(0.0)).losses) == {
        "cross_entropy",
        "balance",
    }


@pytest.mark.parametrize("chunk", [1, 24, 1000])
def test_chunked_log_probs_and_their_gradients(model, variables, chunk):
    hidden_BTD = jax.random.normal(jax.random.key(1), (4, 15, 32))
    targets_BT = jax.random.randint(jax.random.key(2), (4, 15), 0, model.config.vocab_size)

    def whole(hidden_BTD):
        log_probs = jax.nn.log_softmax(model.apply(variables, hidden_BTD, method="unembed"))
        return jnp.take_along_axis(log_probs, targets_BT[..., None], -1)[..., 0], -jnp.sum(
            jnp.exp(log_probs) * log_probs, -1
        )

    def chunked(hidden_BTD):
        return token_log_probs(model, variables, hidden_BTD, targets_BT, chunk)

    def scalar(f):
        return lambda h: sum(jnp.sum(x * jnp.cos(jnp.arange(15.0))) for x in f(h))

    for ours, theirs in zip(jax.jit(chunked)(hidden_BTD), whole(hidden_BTD), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        jax.jit(jax.grad(scalar(chunked)))(hidden_BTD), jax.grad(scalar(whole))(hidden_BTD), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("chunk", [24, 1000])
def test_a_temperature_divides_float32_logits_not_bfloat16_hidden_states(model, variables, chunk):
    """As sampling does; hidden states divided in bfloat16 would be off by 2^-9 each, and so would first ratios."""
    hidden_BTD = jax.random.normal(jax.random.key(1), (4, 15, 32)).astype(jnp.bfloat16)
    targets_BT = jax.random.randint(jax.random.key(2), (4, 15), 0, model.config.vocab_size)
    logits_BTV = np.asarray(model.apply(variables, hidden_BTD, method="unembed"), np.float64) / 0.7
    expected_BTV = logits_BTV - np.log(np.exp(logits_BTV).sum(-1, keepdims=True))
    logp_BT, entropy_BT = token_log_probs(model, variables, hidden_BTD, targets_BT, chunk, 0.7)
    np.testing.assert_allclose(
        logp_BT, np.take_along_axis(expected_BTV, np.asarray(targets_BT)[..., None], -1)[..., 0], atol=1e-5
    )
    np.testing.assert_allclose(entropy_BT, -(np.exp(expected_BTV) * expected_BTV).sum(-1), atol=1e-5)


def largest_with_vocabulary(jaxpr, vocab):
    """The number of elements of the largest array with an axis of `vocab`, anywhere in a program."""
    largest = 0
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            shape = getattr(variable.aval, "shape", ())
            if vocab in shape:
                largest = max(largest, int(np.prod(shape)))
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            largest = max(largest, largest_with_vocabulary(inner, vocab))
    return largest


@pytest.mark.parametrize("chunk", [8, 16, 64])
def test_no_array_of_tokens_by_vocabulary(model, variables, batch, chunk):
    """With 64 tokens: `chunk` of them at a time. The whole batch at once is the control that the search finds the
    array."""
    vocab, head = model.config.vocab_size, variables["params"]["head"]["kernel"].size
    objective = ObjectiveConfig(loss_chunk=chunk)
    loss = jax.grad(lambda params: loss_fn(model, objective, params, variables["router_bias"], batch, 0)[0])
    found = largest_with_vocabulary(jax.make_jaxpr(loss)(variables["params"]).jaxpr, vocab)
    assert found == max(chunk * vocab, head)


def test_bad_objectives_are_refused():
    with pytest.raises(ConfigError, match="objective.balance='sequense'.*did you mean 'sequence'"):
        ObjectiveConfig(balance="sequense")
    with pytest.raises(ConfigError, match="objective.balance_reduction='max'.*'?sum"):
        ObjectiveConfig(balance_reduction="max")
    with pytest.raises(ConfigError, match="loss_chunk=0"):
        ObjectiveConfig(loss_chunk=0)

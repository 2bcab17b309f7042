"""The whole network: rematerialization, scanned layers, replay, cache, initialization, logical axes."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import GQA, batch, forward, jit, tiny_config, tiny_moe, variables

import deepseek_jax.model
import deepseek_jax.precision
from deepseek_jax.model.cache import init_cache, write
from deepseek_jax.model.ops import Ops
from deepseek_jax.model.presets import PRESETS, preset
from deepseek_jax.model.runtime import RuntimeConfig
from deepseek_jax.model.transformer import Transformer, abstract_variables, init_variables, logical_axes
from deepseek_jax.training.balance import sequence_balance_loss

CONFIG = tiny_config()
STACK = tiny_config(num_layers=2, first_k_dense=0, attention=GQA, moe=tiny_moe(num_shared_experts=0), mtp_depth=1)


@pytest.fixture(scope="module")
def plain():
    return loss_and_gradients()


def loss_and_gradients(runtime=RuntimeConfig()):
    model, (tokens, segments, positions) = Transformer(STACK, Ops(runtime=runtime)), batch()
    segments = np.array(segments)
    segments[1, 8:] = 0

    def loss(params):
        output = model.apply(
            {**variables(STACK), "params": params}, tokens, segment_ids_BT=segments, positions_BT=positions, mtp=True
        )
        balance = sum(jnp.mean(sequence_balance_loss(routing, 3)) for routing in (output.routing, output.mtp_routing))
        return jnp.mean(jnp.sin(output.hidden_BTD)) + jnp.mean(jnp.cos(output.mtp_hidden[0])) + balance, output

    (_, output), gradients = jit(jax.value_and_grad(loss, has_aux=True))(variables(STACK)["params"])
    return output, gradients


@pytest.mark.parametrize("changes", [{"remat": "full"}, {"remat": "dots", "scan_unroll": 2}], ids=str)
def test_remat_and_unrolling_change_neither_values_nor_counts(plain, changes):
    output, gradients = loss_and_gradients(RuntimeConfig(**changes))
    for got, want in zip(jax.tree.leaves((output, gradients)), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5, rtol=1e-4)
    for routing, layers, chosen in ((output.routing, 2, [33, 24]), (output.mtp_routing, 1, [30, 21])):
        np.testing.assert_array_equal(jnp.sum(routing.counts_LBE, axis=-1), np.tile(chosen, (layers, 1)))
    norms = jax.tree.map(lambda g: float(jnp.abs(g).max()), gradients)
    assert min(jax.tree.leaves(norms["moe_layers"])) > 1e-7 and min(jax.tree.leaves(norms["mtp_0"])) > 1e-7


@pytest.mark.parametrize("unroll", [1, 2])
def test_recomputation_outside_a_loop_is_kept_from_being_merged(unroll):
    model, tokens = Transformer(STACK, Ops(runtime=RuntimeConfig(remat="full", scan_unroll=unroll))), batch()[0]
    program = str(jax.make_jaxpr(lambda v: model.apply(v, tokens, mtp=True))(variables(STACK)))
    assert program.count("prevent_cse=True") == (1 if unroll == 1 else 2)  # the MTP module; the unrolled stack
    assert program.count("prevent_cse=False") == (1 if unroll == 1 else 0)  # the loop


def test_a_deep_network_traces_to_the_program_of_a_shallow_one():
    def size(layers):
        model = Transformer(CONFIG.replace(num_layers=layers), Ops(runtime=RuntimeConfig(remat="full")))
        tokens = jax.ShapeDtypeStruct((1, 4), jnp.int32)

        def loss(variables, tokens):
            return jnp.sum(model.apply(variables, tokens, mtp=True).hidden_BTD)

        jaxpr = jax.make_jaxpr(jax.grad(loss))(abstract_variables(model), tokens)
        assert sum(const.size for const in jaxpr.consts) < 50  # rotary frequencies, never a parameter
        return len(str(jaxpr))

    assert size(61) < 1.02 * size(3)


def test_replaying_ones_own_experts_changes_nothing():
    call, arguments = forward(CONFIG), batch()
    output, logits = call(variables(CONFIG), *arguments)
    replayed, replayed_logits = call(variables(CONFIG), *arguments, output.routing.expert_ids_LBTK)
    for got, want in zip(jax.tree.leaves((replayed, replayed_logits)), jax.tree.leaves((output, logits)), strict=True):
        np.testing.assert_array_equal(got, want)
    others = (output.routing.expert_ids_LBTK + 1) % 8
    assert np.abs(call(variables(CONFIG), *arguments, others)[1] - logits).max() > 1e-3


def test_padding_is_never_seen():
    tokens, segments, positions = (np.array(a) for a in batch())
    segments[:, 7:] = 0
    (a, logits), other = forward(CONFIG)(variables(CONFIG), tokens, segments, positions), tokens.copy()
    other[:, 7:] = 1
    b, other_logits = forward(CONFIG)(variables(CONFIG), other, segments, positions)
    np.testing.assert_allclose(logits[:, :7], other_logits[:, :7], atol=1e-5)
    assert np.isfinite(logits).all()
    np.testing.assert_array_equal(a.routing.counts_LBE, b.routing.counts_LBE)
    short = forward(CONFIG)(variables(CONFIG), tokens[:, :7], segments[:, :7], positions[:, :7])[1]
    np.testing.assert_allclose(logits[:, :7], short, atol=1e-5)


def test_cached_equals_whole_sequences():
    """Prefill of five tokens, then two at a time, through the model's cache; one row starts with two slots of
    padding."""
    model, tokens = Transformer(CONFIG), batch()[0]
    lead = np.array([0, 2])
    positions = np.arange(11)[None] - lead[:, None]
    segments = (positions >= 0).astype(np.int32)
    positions = np.where(segments == 1, positions, -1).astype(np.int32)
    output, logits = forward(CONFIG)(variables(CONFIG), tokens, segments, positions)

    def step(variables, tokens, segments, positions, cache):
        new = model.apply(variables, tokens, segment_ids_BT=segments, positions_BT=positions, cache=cache)
        return model.apply(variables, new.hidden_BTD, method="unembed"), new

    step, cache = jit(step), init_cache(CONFIG, 2, 12, jnp.float32)
    assert {name: [entry.shape for entry in pair] for name, pair in cache.entries.items()} == {
        "dense_layers": [(1, 2, 12, 8), (1, 2, 12, 8)],
        "moe_layers": [(2, 2, 12, 8), (2, 2, 12, 8)],
    }
    cache = write(cache, jax.tree.map(lambda entry: entry[:, :, :5], output.latents), positions[:, :5], 0)
    for start in range(5, 11, 2):
        slots = slice(start, start + 2)
        got, new = step(variables(CONFIG), tokens[:, slots], segments[:, slots], positions[:, slots], cache)
        np.testing.assert_allclose(got, logits[:, slots], atol=1e-5)
        np.testing.assert_array_equal(new.routing.expert_ids_LBTK, output.routing.expert_ids_LBTK[:, :, slots])
        cache = write(cache, new.latents, positions[:, slots], start)
    np.testing.assert_array_equal(cache.positions_BS, np.pad(positions, ((0, 0), (0, 1)), constant_values=-1))


def test_tied_embeddings():
    config = CONFIG.replace(tie_embeddings=True)
    params = abstract_variables(Transformer(config))["params"]
    assert "head" not in params and "head" in abstract_variables(Transformer(CONFIG))["params"]
    hidden = np.random.default_rng(0).normal(size=(2, 16)).astype(np.float32)
    logits = Transformer(config).apply(variables(config), hidden, method="unembed")
    np.testing.assert_allclose(
        logits, hidden @ np.asarray(variables(config)["params"]["embed"]["embedding"]).T, atol=1e-5
    )


@pytest.fixture(scope="module")
def initial():
    config = CONFIG.replace(mtp_depth=1, init_std=0.02)
    return config, init_variables(Transformer(config), jax.random.key(0))


def test_initial_values(initial):
    config, initial = initial
    drawn, names = [], []
    for path, leaf in jax.tree_util.tree_leaves_with_path(initial):
        name, leaf = jax.tree_util.keystr(path), np.asarray(leaf)
        if "scale" in name:
            assert np.all(leaf == 1), name
        elif "bias" in name:
            assert np.all(leaf == 0) and leaf.dtype == np.float32, name
        else:
            spread = 5 / np.sqrt(2 * leaf.size)
            assert abs(leaf.std() / config.init_std - 1) < spread, name
            assert abs(leaf.mean() / config.init_std) < 5 / np.sqrt(leaf.size), name
            drawn.append(leaf.reshape(-1))
            names.append(name)
    everything = np.concatenate(drawn)
    assert len(everything) > 10_000 and len(np.unique(everything)) > 0.99 * len(everything)  # no two layers alike
    kurtosis = np.mean(everything**4) / np.mean(everything**2) ** 2
    # a normal distribution, not a truncated one
    assert abs(everything.std() / 0.02 - 1) < 0.03 and abs(kurtosis - 3) < 0.15


def test_abstract_variables_and_logical_axes_have_the_tree_of_the_variables(initial):
    config, initial = initial
    abstract, axes = abstract_variables(Transformer(config)), logical_axes(Transformer(config))
    assert jax.tree.map(lambda a: (a.shape, a.dtype), abstract) == jax.tree.map(lambda a: (a.shape, a.dtype), initial)
    spec = jax.sharding.PartitionSpec
    ranks = jax.tree.map(
        lambda a, shape: (len(a), len(shape.shape)), axes, abstract, is_leaf=lambda a: isinstance(a, spec)
    )
    for names, rank in jax.tree.leaves(ranks, is_leaf=lambda a: isinstance(a, tuple)):
        assert names == rank
    assert axes["params"]["moe_layers"]["ffn"]["experts"]["down"] == spec("layers", "experts", "expert_ffn", "embed")
    assert axes["params"]["mtp_0"]["proj"]["kernel"] == spec("mtp_input", "embed")


def test_router_biases_live_in_a_collection_of_their_own(initial):
    _, initial = initial
    assert set(initial) == {"params", "router_bias"}
    assert not any(
        "bias" in jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(initial["params"])
    )
    assert initial["router_bias"]["moe_layers"]["ffn"]["router"]["bias"].shape == (2, 8)
    assert initial["router_bias"]["mtp_0"]["block"]["ffn"]["router"]["bias"].shape == (8,)
    for config in (CONFIG.replace(moe=None), CONFIG.replace(moe=tiny_moe(correction_bias=False))):
        assert set(abstract_variables(Transformer(config))) == {"params"}


def test_no_model_name_decides_anything(monkeypatch):
    """A preset under another name is the same network, and the network's code names no model."""
    monkeypatch.setitem(PRESETS, "somebodys_ablation", PRESETS["v3_671b"])
    assert preset("somebodys_ablation") == preset("v3_671b")
    for package in (deepseek_jax.model, deepseek_jax.precision):
        for path in pathlib.Path(package.__file__).parent.glob("*.py"):
            if path.name != "presets.py":
                assert not any(
                    name in path.read_text() for name in (*PRESETS, "model_type", "deepseek_v3", "deepseek_v2")
                ), path


def test_models_are_static_arguments():
    assert Transformer(CONFIG) == Transformer(tiny_config()) and hash(Transformer(CONFIG)) == hash(
        Transformer(tiny_config())
    )

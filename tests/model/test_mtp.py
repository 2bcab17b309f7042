"""Multi-token prediction: which tokens a position sees, the order of its two inputs, borders of documents,
parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import batch, forward, tiny_config, variables

from deepseek_jax.model.attention_core import Tokens
from deepseek_jax.model.cache import init_cache
from deepseek_jax.model.mtp import shift_left
from deepseek_jax.model.presets import preset
from deepseek_jax.model.transformer import Block, Transformer, abstract_variables

CONFIG = tiny_config()


def influence(vars_, changed: int, seed: int = 0):
    """For the main stack and each MTP module, the positions whose hidden state another token at `changed` moves."""
    tokens, segments, positions = batch(seed)
    other = tokens.copy()
    other[:, changed] = (other[:, changed] + 7) % 37
    before, after = (forward(CONFIG)(vars_, t, segments, positions)[0] for t in (tokens, other))
    hidden = zip((before.hidden_BTD, *before.mtp_hidden), (after.hidden_BTD, *after.mtp_hidden), strict=True)
    return [set(np.flatnonzero(np.abs(np.asarray(a - b)).max(axis=(0, 2)) > 1e-6)) for a, b in hidden]


def test_module_k_sees_the_token_k_places_ahead_and_no_further():
    main, first, second = influence(variables(CONFIG), changed=6)
    assert main == {6, 7, 8, 9, 10}
    assert first == {5, 6, 7, 8, 9, 10}
    assert second == {4, 5, 6, 7, 8, 9, 10}


@pytest.mark.parametrize("zeroed", ["hidden", "embedding"])
def test_the_projection_reads_the_embedding_first(zeroed):
    """With the rows of the hidden state zeroed, only embeddings from token 1 on remain; with the others, none."""
    kernel = np.asarray(variables(CONFIG)["params"]["mtp_0"]["proj"]["kernel"]).copy()
    half = slice(CONFIG.hidden_size, None) if zeroed == "hidden" else slice(0, CONFIG.hidden_size)
    kernel[half] = 0
    changed = jax.tree.map(lambda leaf: leaf, variables(CONFIG))
    changed["params"]["mtp_0"]["proj"]["kernel"] = kernel
    if zeroed == "hidden":
        assert influence(changed, changed=0)[1] == set()
        assert 5 in influence(changed, changed=6)[1]
    else:
        assert influence(changed, changed=6)[1] == {6, 7, 8, 9, 10}


def test_the_chain_is_the_reports_equation_for_equation():
    """Eqs. 21-23 at depth 2, norms' scales unlike 1 and unlike each other: module 1 reads the main state after its
    final norm (as released weights do), module 2 the state of module 1 before its own; each projection reads both
    inputs through their norms."""
    tokens, segments, positions = batch(3)
    params = variables(CONFIG)["params"]
    model, projections = Transformer(CONFIG), lambda module, _: module.path[-1:] == ("proj",)
    output, seen = model.apply(
        variables(CONFIG),
        tokens,
        segment_ids_BT=segments,
        positions_BT=positions,
        mtp=True,
        capture_intermediates=projections,
        mutable="intermediates",
    )
    state_BTD, table = output.hidden_BTD, np.asarray(params["embed"]["embedding"])
    for k in (1, 2):
        module = params[f"mtp_{k - 1}"]

        def normed(x, name, module=module):
            x = np.asarray(x, np.float64)
            return (
                x
                / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + CONFIG.rms_norm_eps)
                * np.asarray(module[name]["scale"])
            )

        assert np.abs(np.asarray(module["embed_norm"]["scale"]) - module["hidden_norm"]["scale"]).min() > 0
        ahead = (
            table[np.asarray(shift_left(tokens, k))] * (np.arange(11) + k < 11)[:, None]
            + table[0] * (np.arange(11) + k >= 11)[:, None]
        )
        joined = np.concatenate([normed(ahead, "embed_norm"), normed(state_BTD, "hidden_norm")], axis=-1)
        projected = seen["intermediates"][f"mtp_{k - 1}"]["proj"]["__call__"][0]
        np.testing.assert_allclose(projected, joined @ np.asarray(module["proj"]["kernel"]), rtol=1e-4, atol=1e-4)
        valid = jnp.where(shift_left(segments, k) == segments, segments, 0)
        block = Block(CONFIG, model.ops, CONFIG.moe)
        collections = {
            "params": module["block"],
            "router_bias": variables(CONFIG)["router_bias"][f"mtp_{k - 1}"]["block"],
        }
        state_BTD = block.apply(collections, projected, Tokens(positions, valid), None, None)[0]
        np.testing.assert_allclose(output.mtp_hidden[k - 1], normed(state_BTD, "final_norm"), rtol=1e-4, atol=1e-4)


def documents():
    """Two documents of 6 and 4 tokens, each alone in a row, and both packed into one (another row repeats the
    first)."""
    tokens = np.random.default_rng(5).integers(1, 37, 10).astype(np.int32)
    alone, packed = (np.zeros((3, 2, 11), np.int32) for _ in range(2))
    for row, (start, stop) in enumerate(((0, 6), (6, 10))):
        length = stop - start
        alone[:, row, :length] = tokens[start:stop], np.ones(length), np.arange(length)
        packed[:, :, start:stop] = np.stack([tokens[start:stop], np.full(length, row + 1), np.arange(length)])[:, None]
    return alone, packed


def test_packed_documents_equal_the_documents_alone():
    alone, packed = documents()
    a, b = (forward(CONFIG)(variables(CONFIG), *arrays)[0] for arrays in (alone, packed))
    for k, (x, y) in enumerate(zip((a.hidden_BTD, *a.mtp_hidden), (b.hidden_BTD, *b.mtp_hidden), strict=True)):
        np.testing.assert_allclose(x[0, : 6 - k], y[0, : 6 - k], atol=1e-5)  # position i of module k has its token i+k
        np.testing.assert_allclose(x[1, : 4 - k], y[0, 6 : 10 - k], atol=1e-5)


def test_nothing_crosses_a_border():
    _, packed = documents()
    changed = packed.copy()
    changed[0, :, 6:10] = (changed[0, :, 6:10] + 5) % 37  # the second document
    changed[0, :, 10] = 9  # padding
    a, b = (forward(CONFIG)(variables(CONFIG), *arrays)[0] for arrays in (packed, changed))
    for x, y in zip((a.hidden_BTD, *a.mtp_hidden), (b.hidden_BTD, *b.mtp_hidden), strict=True):
        np.testing.assert_allclose(x[:, :6], y[:, :6], atol=1e-6)
        assert np.abs(np.asarray(x - y)[:, 6:10]).max() > 1e-3


def test_a_router_counts_the_positions_that_its_equation_has():
    """Documents of 6 and 4 tokens, packed or alone: all 10 in the main layers, 5 + 3 in the first module and 4 + 2 in
    the second (V3 eq. 22)."""
    alone, packed = documents()
    for arrays, rows in ((packed, [range(10), range(10)]), (alone, [range(6), range(4)])):
        output, _ = forward(CONFIG)(variables(CONFIG), *arrays)
        for routing, places in ((output.routing, (0, 0)), (output.mtp_routing, (1, 2))):
            for layer, ahead in enumerate(places):
                for row, tokens in enumerate(rows):
                    segments = arrays[1, row]
                    counted = [t for t in tokens if t + ahead < 11 and segments[t + ahead] == segments[t]]
                    assert len(counted) == len(tokens) - ahead * len(set(segments[list(tokens)]))
                    chosen = routing.expert_ids_LBTK[layer, row, np.array(counted)]
                    np.testing.assert_array_equal(
                        routing.counts_LBE[layer, row], np.bincount(np.ravel(chosen), minlength=8)
                    )
                    assert routing.tokens_LB[layer, row] == len(counted)
                    np.testing.assert_allclose(np.sum(routing.probs_LBE[layer, row]), len(counted), rtol=1e-5)


def test_parameters_of_a_module():
    """V3's module with its projection and norms (papers: 11,610,068,224), and nothing duplicated from the main
    model."""
    v3 = preset("v3_671b").replace(num_layers=4)
    with_mtp, without = (abstract_variables(Transformer(v3.replace(mtp_depth=depth))) for depth in (1, 0))
    module = [collection.pop("mtp_0") for collection in with_mtp.values()]
    assert sum(leaf.size for leaf in jax.tree.leaves(module)) == 11_610_068_224
    assert with_mtp == without


def test_depth_beyond_the_sequence():
    x = np.array([[1, 2, 3]])
    np.testing.assert_array_equal(shift_left(x, 1), [[2, 3, 0]])
    np.testing.assert_array_equal(shift_left(x, 5), [[0, 0, 0]])
    params = abstract_variables(Transformer(tiny_config(mtp_depth=4)))["params"]
    assert params["mtp_3"]["proj"]["kernel"].shape == (32, 16)


def test_modules_are_refused_over_a_cache():
    model, (tokens, *_) = Transformer(CONFIG), batch()
    cache = init_cache(CONFIG, 2, 4, np.float32)
    with pytest.raises(ValueError, match="the MTP modules keep no cache"):
        jax.eval_shape(lambda v: model.apply(v, tokens, cache=cache, mtp=True), variables(CONFIG))

"""Our network against transformers' DeepseekV3ForCausalLM and DeepseekV2ForCausalLM, random weights, float32; runs
where torch is.

transformers masks groups that were not selected with -inf, as we do, in the version of the `parity` extra; older ones
used 0.0, which chooses other experts where biased scores are negative (every third seed here).
"""

import functools

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import hf_models  # noqa: E402
import jax  # noqa: E402
import jax_side  # noqa: E402
from tiny_checkpoints import assert_same, random_variables  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from deepseek_jax.interop import export_folder, import_folder  # noqa: E402
from deepseek_jax.model.transformer import Transformer  # noqa: E402

SEEDS = (0, 1, 2)
TOLERANCE = 1e-4
WRONG = 1e-2  # what a wrong mapping must exceed


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """(case, seed) -> transformers' model, and our config and variables imported from the folder it saved."""

    @functools.cache
    def load(case, seed=0):
        folder = tmp_path_factory.mktemp(case) / "hf"
        model = hf_models.build(case, seed)
        model.save_pretrained(folder)
        return model, *import_folder(folder)

    return load


@pytest.mark.parametrize("case", ["v3", "v2"])
def test_experts_that_transformers_saves_as_one_tensor(load, tmp_path, case):
    model, config, variables = load(case)
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    fused_config, fused = import_folder(tmp_path / "fused")
    assert fused_config == config
    assert_same(fused, variables)


@pytest.mark.parametrize("case", hf_models.CASES)
def test_logits(load, case):
    for seed in SEEDS:
        model, config, variables = load(case, seed)
        tokens = jax_side.tokens(config.vocab_size, seed)
        expected = hf_models.logits(model, tokens)
        assert expected.std() > 0.5  # a network whose parts do nothing would prove nothing
        np.testing.assert_allclose(jax_side.logits(config, variables, tokens), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("case", ["v3", "v3_plain", "v2"])
def test_greedy_tokens_through_the_absorbed_cache(load, case):
    """Each of our 64 tokens is transformers' own choice after the prompt and the tokens before it."""
    for seed in SEEDS:
        model, config, variables = load(case, seed)
        prompts = jax_side.tokens(config.vocab_size, seed)
        ours = jax_side.greedy(config, variables, prompts)
        choices = hf_models.logits(model, np.concatenate([prompts, ours], axis=1)).argmax(-1)
        assert ours.shape[1] == 64 and len(np.unique(ours)) > 10
        np.testing.assert_array_equal(ours, choices[:, prompts.shape[1] - 1 : -1])


@pytest.mark.parametrize("case", hf_models.CASES)
def test_export_loads_in_transformers(load, case, tmp_path):
    model, config, variables = load(case)
    export_folder(config, variables, tmp_path / "hf", dtype="float32", max_shard_bytes=50_000)
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 1
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32, output_loading_info=True)
    absent = {name for name in info["missing_keys"] if "shared_experts" not in name or config.moe.num_shared_experts}
    assert type(loaded) is type(model) and not absent and not info["unexpected_keys"] and not info["mismatched_keys"]
    tokens = jax_side.tokens(config.vocab_size, 0)
    np.testing.assert_array_equal(hf_models.logits(loaded, tokens), hf_models.logits(model, tokens))


def _changed(variables, *path, change):
    if not path:
        return change(variables)
    return {**variables, path[0]: _changed(variables[path[0]], *path[1:], change=change)}


def _swap_gate_and_up(experts):
    return {**experts, "gate": experts["up"], "up": experts["gate"]}


def _rotary_columns_in_halves(config):
    def reorder(kernel):
        width = config.attention.qk_rope_head_dim
        halves = np.concatenate([np.arange(0, width, 2), np.arange(1, width, 2)])
        return np.concatenate([kernel[..., :-width], kernel[..., -width:][..., halves]], axis=-1)

    return reorder


@pytest.mark.parametrize(
    "control", ["gate and up swapped", "rotary columns in halves", "correction bias lost", "norm scale lost"]
)
def test_a_wrong_mapping_shows(load, control):
    """Negative control: with one of the classic mistakes, the same comparison fails."""
    model, config, variables = load("v3")
    layers = ("moe_layers",)
    wrong = {
        "gate and up swapped": (("params", *layers, "ffn", "experts"), _swap_gate_and_up),
        "rotary columns in halves": (("params", *layers, "attn", "kv_a", "kernel"), _rotary_columns_in_halves(config)),
        "correction bias lost": (("router_bias",), lambda tree: jax.tree.map(np.zeros_like, tree)),
        "norm scale lost": (("params", *layers, "attn", "q_a_norm", "scale"), np.ones_like),
    }[control]
    tokens = jax_side.tokens(config.vocab_size, 0)
    ours = jax_side.logits(config, _changed(variables, *wrong[0], change=wrong[1]), tokens)
    assert np.abs(ours - hf_models.logits(model, tokens)).max() > WRONG


def test_mtp_module(load, tmp_path, monkeypatch):
    """The exported MTP layer in transformers' own MtpModel gives our hidden states; with the halves of eh_proj swapped
    it does not."""
    modeling_layers = pytest.importorskip("transformers.modeling_layers")
    if not hasattr(modeling_layers, "MtpModel"):
        pytest.skip("this transformers has no MtpModel; 5.23 has")
    _, config, variables = load("v3")
    config = config.replace(mtp_depth=1)
    mtp = jax.tree.map(lambda x: 0.3 * x + (x.ndim == 1), random_variables(config))
    full = {kind: {**variables[kind], "mtp_0": mtp[kind]["mtp_0"]} for kind in variables}
    export_folder(config, full, tmp_path / "hf", dtype="float32")

    main = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    # transformers knows the MTP layer of the 61-layer release only.
    monkeypatch.setattr(main, "_keys_to_ignore_on_load_unexpected", [rf"model\.layers\.{config.num_layers}.*"])
    module = modeling_layers.MtpModel.from_pretrained(main)
    tokens = jax_side.tokens(config.vocab_size, 0)
    with torch.no_grad():
        hidden = main.model(torch.from_numpy(tokens).long()).last_hidden_state[:, :-1]
        ahead = torch.from_numpy(tokens).long()[:, 1:]
        positions = torch.arange(ahead.shape[1])[None]
        expected = module.forward_layer(0, hidden, positions, None, input_ids=ahead).numpy()

    model = Transformer(config)
    forward = jax.jit(lambda variables: model.apply(variables, tokens, mtp=True).mtp_hidden[0][:, :-1])
    np.testing.assert_allclose(forward(full), expected, rtol=0, atol=TOLERANCE)
    swapped = _changed(
        full, "params", "mtp_0", "proj", "kernel", change=lambda kernel: np.roll(kernel, len(kernel) // 2, axis=0)
    )
    assert np.abs(forward(swapped) - expected).max() > WRONG

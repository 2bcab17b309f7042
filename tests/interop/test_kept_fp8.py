"""Released FP8 weights run as they are: nothing is dequantized but what enters no FP8 product."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import traverse_util
from tiny_checkpoints import TINY, assert_same, random_variables

from deepseek_jax.errors import CheckpointError
from deepseek_jax.generation.__main__ import main
from deepseek_jax.interop import export_folder, import_folder, open_folder, precision_for
from deepseek_jax.interop.safetensors_io import read_tensor
from deepseek_jax.model.ops import Ops
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.parallel.arrays import variables_sharding
from deepseek_jax.parallel.mesh import MeshConfig, build_mesh
from deepseek_jax.parallel.sharding import MeshOps
from deepseek_jax.precision import get_precision
from kernels_pallas import QTensor, dequantize

CONFIG = TINY.replace(vocab_size=272, num_layers=2)
TOKENS = jax.random.randint(jax.random.key(0), (8, 6), 0, CONFIG.vocab_size)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Weights of a size that a network has."""
    path = tmp_path_factory.mktemp("kept") / "fp8"
    variables = jax.tree.map(lambda w: w * np.float32(0.1 if w.ndim > 1 else 1), random_variables(CONFIG))
    export_folder(CONFIG, variables, path, dtype="fp8")
    return path


def flat(variables):
    return traverse_util.flatten_dict(variables, is_leaf=lambda _, value: isinstance(value, QTensor))


def logits(model, variables):
    def call(variables):
        return model.apply(variables, model.apply(variables, TOKENS).hidden_BTD, method="unembed")

    return jax.jit(call, compiler_options={"xla_backend_optimization_level": 0})(variables)


def test_values_and_scales_are_those_of_the_files(folder):
    kept, plain = flat(import_folder(folder, "fp8")[1]), flat(import_folder(folder)[1])
    assert kept.keys() == plain.keys()
    for path, value in kept.items():
        if isinstance(value, QTensor):
            np.testing.assert_array_equal(dequantize(value), plain[path], err_msg="/".join(path))
        else:
            assert value.dtype == (np.float32 if path[0] == "router_bias" else ml_dtypes.bfloat16)
            np.testing.assert_array_equal(value, plain[path].astype(value.dtype), err_msg="/".join(path))
    stored = open_folder(folder).stored
    one = kept["params", "moe_layers", "ffn", "experts", "down"]
    name = "model.layers.1.mlp.experts.2.down_proj.weight"
    assert one.values.dtype == ml_dtypes.float8_e4m3fn and one.tile == (128, 128)
    whole = tuple(map(range, stored[name].shape))
    np.testing.assert_array_equal(one.values[0, 2].T.view(np.uint8), read_tensor(stored[name], whole).view(np.uint8))
    high = {
        path[-2]
        for path, value in kept.items()
        if not isinstance(value, QTensor) and value.ndim > 1 and path[-1] == "kernel"
    }
    assert high == {"head", "router", "proj"}  # as in the released checkpoints


def test_they_are_exported_as_they_are_stored(folder, tmp_path):
    """One matrix is trained further in bfloat16, as a user would; all else comes back byte for byte, from one device or
    a mesh. A wider file has the numbers that the import dequantizes."""
    config, kept = import_folder(folder, "fp8")
    export_folder(config, kept, tmp_path / "again", dtype="fp8")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()

    mesh = build_mesh(MeshConfig(fsdp=2, expert=4).sizes, {}, jax.devices())
    model = Transformer(config, MeshOps(PRECISION, mesh=mesh))
    placed = import_folder(folder, "fp8", shardings=lambda config: variables_sharding(model))[1]
    trained = np.asarray(dequantize(kept["params"]["dense_layers"]["attn"]["o"]["kernel"])) + 0.5
    placed["params"]["dense_layers"]["attn"]["o"]["kernel"] = trained
    export_folder(config, placed, tmp_path / "tuned", dtype="fp8")
    before, after = open_folder(folder).stored, open_folder(tmp_path / "tuned").stored
    changed = {
        name
        for name, tensor in before.items()
        if read_tensor(tensor, tuple(map(range, tensor.shape))).tobytes()
        != read_tensor(after[name], tuple(map(range, tensor.shape))).tobytes()
    }
    name = "model.layers.0.self_attn.o_proj.weight"
    assert before.keys() == after.keys() and changed == {name, f"{name}_scale_inv"}

    export_folder(config, kept, tmp_path / "wide", dtype="float32")
    wide, plain = flat(import_folder(tmp_path / "wide")[1]), flat(import_folder(folder)[1])
    for path, value in plain.items():
        np.testing.assert_array_equal(wide[path], value, err_msg="/".join(path))


def test_other_tiles_are_refused(folder, tmp_path):
    config, kept = import_folder(folder, "fp8")
    attention = kept["params"]["moe_layers"]["attn"]
    attention["o"]["kernel"] = dataclasses.replace(attention["o"]["kernel"], tile=(1, 128))
    with pytest.raises(CheckpointError, match=r"attn/o/kernel has a scale for each \(1, 128\).*\(128, 128\)"):
        export_folder(config, kept, tmp_path / "rows", dtype="fp8")


# Activations in float32, so that nothing but FP8 rounds.
PRECISION = dataclasses.replace(get_precision("fp8_deepseek"), compute_dtype=jnp.dtype(jnp.float32))


def distance(x, y):
    return float(jnp.linalg.norm(x - y) / jnp.linalg.norm(y))


def test_the_network_multiplies_with_them(folder):
    """As it does with weights that it quantizes itself: dequantized, they give the same values in the same blocks."""
    kept = jax.tree.map(jnp.asarray, import_folder(folder, "fp8")[1])
    plain = jax.tree.map(
        lambda w: dequantize(w) if isinstance(w, QTensor) else w, kept, is_leaf=lambda w: isinstance(w, QTensor)
    )
    model = Transformer(CONFIG, Ops(PRECISION))
    got = logits(model, kept)
    assert distance(got, logits(model, plain)) < 1e-5
    assert 1e-3 < distance(got, logits(Transformer(CONFIG), plain)) < 0.05


def test_they_land_in_their_shards_and_run_there(folder):
    mesh = build_mesh(MeshConfig(fsdp=2, expert=4).sizes, {}, jax.devices())
    single = Transformer(CONFIG, Ops(PRECISION))
    model = single.clone(ops=MeshOps(PRECISION, mesh=mesh))
    placed = import_folder(folder, "fp8", shardings=lambda config: variables_sharding(model))[1]
    kept = import_folder(folder, "fp8")[1]
    assert_same(jax.tree.map(np.asarray, _split(placed)), _split(kept))
    experts = placed["params"]["moe_layers"]["ffn"]["experts"]["gate"]
    assert {shard.data.shape for shard in experts.values.addressable_shards} == {
        (1, 1, CONFIG.hidden_size // 2, CONFIG.moe.intermediate_size)
    }
    assert {shard.data.shape[:2] for shard in experts.scales.addressable_shards} == {(1, 1)}
    assert distance(logits(model, placed), logits(single, jax.tree.map(jnp.asarray, kept))) < 1e-5


def _split(variables):
    parts = {}
    for path, value in flat(variables).items():
        parts |= (
            {(*path, "values"): value.values, (*path, "scales"): value.scales}
            if isinstance(value, QTensor)
            else {path: value}
        )
    return traverse_util.unflatten_dict(parts)


def test_generation_keeps_them(folder, tmp_path, monkeypatch, capsys):
    given = []

    def stream(model, variables, prompt_ids, rng, sampling):
        given.append((model.ops.precision, variables))
        yield list(b"ok")

    monkeypatch.setattr("deepseek_jax.generation.__main__.stream", stream)
    for precision in ("fp8_deepseek", "bfloat16"):
        main([f"--checkpoint={folder}", "--tokenizer=byte", "--prompt=ab", f"--precision={precision}"])
    hf = json.loads((folder / "config.json").read_text())
    hf["quantization_config"]["scale_fmt"] = "ue8m0"  # DeepSeek-V3.1's
    shutil.copytree(folder, tmp_path / "v3.1")
    (tmp_path / "v3.1" / "config.json").write_text(json.dumps(hf))
    main([f"--checkpoint={tmp_path / 'v3.1'}", "--tokenizer=byte", "--prompt=ab", "--precision=fp8_deepseek"])
    (eight, kept), (half, plain), (powers, _) = given
    assert powers == eight.with_powers_of_two() != eight
    assert (
        powers.quantization.input.power_of_two
        and powers.quantization.weight.power_of_two
        and powers.attention_output.input.power_of_two
    )
    assert precision_for(tmp_path / "v3.1", get_precision("bfloat16")) == get_precision("bfloat16")
    assert (eight, half) == (
        get_precision("fp8_deepseek"),
        get_precision("bfloat16"),
    ) and capsys.readouterr().out == 3 * "ok\n"
    assert isinstance(kept["params"]["moe_layers"]["attn"]["o"]["kernel"], QTensor)
    assert plain["params"]["moe_layers"]["attn"]["o"]["kernel"].dtype == jnp.float32

"""Export and import: what comes back, in which formats, with how much memory."""

import json
import math
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import traverse_util
from tiny_checkpoints import TINY, assert_same, random_variables

from deepseek_jax.interop import export_folder, import_folder, open_folder
from deepseek_jax.interop.safetensors_io import ShardWriter, read_header, read_tensor
from deepseek_jax.interop.tensors import tensor_table
from deepseek_jax.model.config import GQAConfig, RopeConfig


def test_float32_comes_back_bit_for_bit(folder, variables):
    config, back = import_folder(folder)
    assert config == TINY
    assert_same(back, variables)


@pytest.mark.parametrize(
    "config",
    [
        TINY.replace(mtp_depth=2, tie_embeddings=True),
        TINY.replace(moe=None, first_k_dense=3, mtp_depth=0),
        TINY.replace(
            attention=GQAConfig(4, 2, 8), moe=None, first_k_dense=3, mtp_depth=0, rope=RopeConfig(interleaved=False)
        ),
    ],
    ids=["mtp_2_tied", "dense", "gqa"],
)  # fmt: skip
def test_other_networks_come_back(config, tmp_path):
    variables = random_variables(config)
    export_folder(config, variables, tmp_path / "hf", dtype="float32")
    back_config, back = import_folder(tmp_path / "hf")
    assert back_config == config
    assert_same(back, variables)


def test_jax_arrays_export_like_numpy(folder, variables, tmp_path):
    export_folder(TINY, jax.tree.map(jnp.asarray, variables), tmp_path / "jax", dtype="float32")
    assert_same(import_folder(tmp_path / "jax")[1], import_folder(folder)[1])


def test_matrices_are_transposed_and_experts_separate(folder, variables):
    stored = open_folder(folder).stored
    params = variables["params"]
    for name, ours in {
        "model.embed_tokens.weight": params["embed"]["embedding"],
        "lm_head.weight": params["head"]["kernel"].T,
        "model.layers.0.mlp.up_proj.weight": params["dense_layers"]["ffn"]["up"]["kernel"][0].T,
        "model.layers.2.mlp.experts.3.down_proj.weight": params["moe_layers"]["ffn"]["experts"]["down"][1, 3].T,
        "model.layers.3.eh_proj.weight": params["mtp_0"]["proj"]["kernel"].T,
        "model.layers.3.embed_tokens.weight": params["embed"]["embedding"],
        "model.layers.3.shared_head.head.weight": params["head"]["kernel"].T,
        "model.layers.3.mlp.gate.e_score_correction_bias": variables["router_bias"]["mtp_0"]["block"]["ffn"]["router"][
            "bias"
        ],
    }.items():
        np.testing.assert_array_equal(read_tensor(stored[name]), ours, err_msg=name)


def test_shards_have_an_index_the_reference_agrees_with(folder, variables):
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 3 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    loaded = {}
    for shard in shards:
        tensors = safetensors.numpy.load_file(folder / shard)
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= 300_000
        assert all(index["weight_map"][name] == shard for name in tensors)
        loaded |= tensors
    assert loaded.keys() == index["weight_map"].keys() == {spec.name for spec in tensor_table(TINY)}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in loaded.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bfloat16_folder(variables, tmp_path, dtype):
    export_folder(TINY, variables, tmp_path / "hf", dtype="bfloat16")
    _, back = import_folder(tmp_path / "hf", dtype=dtype)
    rounded = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16).astype(dtype), variables["params"])
    assert_same(back, {"params": rounded, "router_bias": variables["router_bias"]})


def test_float16_folder(folder, variables):
    """No exporter writes float16, so one file is rewritten."""
    file = next(f for f in sorted(folder.glob("*.safetensors")) if "model.norm.weight" in read_header(f))
    tensors = safetensors.numpy.load_file(file)
    safetensors.numpy.save_file(tensors | {"model.norm.weight": tensors["model.norm.weight"].astype(np.float16)}, file)
    _, back = import_folder(folder)
    ours = variables["params"]["final_norm"]["scale"]
    np.testing.assert_array_equal(back["params"]["final_norm"]["scale"], ours.astype(np.float16).astype(np.float32))


def test_fp8_folder_has_the_released_layout(variables, tmp_path):
    export_folder(TINY, variables, tmp_path / "hf", dtype="fp8")
    opened = open_folder(tmp_path / "hf")
    assert opened.hf["quantization_config"]["weight_block_size"] == [128, 128]
    kv_a = "model.layers.1.self_attn.kv_a_proj_with_mqa.weight"
    assert (opened.stored[kv_a].dtype, opened.stored[kv_a].shape) == ("F8_E4M3", (30, 160))
    assert (opened.stored[kv_a + "_scale_inv"].dtype, opened.stored[kv_a + "_scale_inv"].shape) == ("F32", (1, 2))
    kept = {"embed_tokens", "enorm", "eh_proj", "head", "gate", "shared_head.norm", "input_layernorm", "q_a_layernorm"}
    for name, tensor in opened.stored.items():
        if name.removesuffix(".weight").endswith(tuple(kept)):
            assert tensor.dtype == "BF16", name


def test_fp8_folder_is_dequantized_block_by_block(variables, tmp_path):
    export_folder(TINY, variables, tmp_path / "hf", dtype="fp8")
    opened = open_folder(tmp_path / "hf")
    _, back = import_folder(tmp_path / "hf")
    # [144, 160]: four ragged blocks
    spec = next(spec for spec in opened.table if spec.name == "model.layers.0.mlp.gate_proj.weight")
    values, scales = read_tensor(opened.stored[spec.name]), read_tensor(opened.stored[spec.scale_name])
    block_of = np.ix_(np.arange(144) // 128, np.arange(160) // 128)
    expected = values.astype(np.float32) * scales[block_of]
    np.testing.assert_array_equal(back["params"]["dense_layers"]["ffn"]["gate"]["kernel"][0].T, expected)
    for path, ours in traverse_util.flatten_dict(variables).items():
        theirs = traverse_util.flatten_dict(back)[path]
        assert np.abs(theirs - ours).max() <= 2**-4 * np.abs(ours).max(), path


def test_peak_memory_is_the_result_and_about_one_tensor(tmp_path):
    config = TINY.replace(
        hidden_size=256, intermediate_size=2048, vocab_size=2000, num_layers=4, first_k_dense=3, mtp_depth=0
    )
    largest = 4 * 256 * 2048
    export_folder(config, random_variables(config), tmp_path / "warm_up", dtype="fp8")
    variables = random_variables(config)
    result = sum(leaf.nbytes for leaf in jax.tree.leaves(variables))
    assert result > 6 * largest
    tracemalloc.start()
    for dtype in ("float32", "bfloat16", "fp8"):
        tracemalloc.reset_peak()
        before, _ = tracemalloc.get_traced_memory()
        export_folder(config, variables, tmp_path / dtype, dtype=dtype)
        assert tracemalloc.get_traced_memory()[1] - before < 2 * largest, f"export {dtype}"
        tracemalloc.reset_peak()
        before, _ = tracemalloc.get_traced_memory()
        _, back = import_folder(tmp_path / dtype)
        peak = tracemalloc.get_traced_memory()[1] - before
        assert result <= peak < result + 2 * largest, f"import {dtype}"
        del back
    tracemalloc.stop()


def test_jax_takes_the_arrays_over_without_a_copy(folder):
    for leaf in jax.tree.leaves(import_folder(folder)[1]):
        assert jax.device_put(leaf).unsafe_buffer_pointer() == leaf.ctypes.data


def test_progress_counts_every_tensor(folder, tmp_path, variables):
    seen = []
    import_folder(folder, progress=lambda done, total: seen.append((done, total)))
    count = sum(not spec.duplicate for spec in tensor_table(TINY))
    assert seen == [(i, count) for i in range(1, count + 1)]


def test_companions_and_token_ids_are_carried(tmp_path, variables):
    (tmp_path / "tokenizer.json").write_text("{}")
    export_folder(
        TINY, variables, tmp_path / "hf", carried={"eos_token_id": 9}, companions=[tmp_path / "tokenizer.json"]
    )
    assert (tmp_path / "hf" / "tokenizer.json").read_text() == "{}"
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["eos_token_id"] == 9


def test_sizes_of_files_are_what_the_headers_say(folder):
    for file in folder.glob("*.safetensors"):
        tensors = read_header(file).values()
        assert file.stat().st_size == max(t.offset + t.nbytes for t in tensors)
        assert sum(t.nbytes for t in tensors) == sum(4 * math.prod(t.shape) for t in tensors)


def test_derived_and_empty_tensors_are_passed_over(folder, variables):
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": ("F32", (3,)),
        "model.layers.1.mlp.nothing.weight": ("F32", (0, 5)),
    }
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] |= dict.fromkeys(extra, "extra.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with ShardWriter(folder / "extra.safetensors", extra) as writer:
        for name, (_, shape) in extra.items():
            writer.write(name, np.zeros(shape, np.float32))
    opened = open_folder(folder)
    assert not opened.problems and "2 tensor(s)" in opened.notes[0]
    assert_same(import_folder(folder)[1], variables)


def test_promised_mtp_without_tensors_is_taken_as_none(tmp_path, variables):
    config = TINY.replace(mtp_depth=0)
    without = {kind: {name: tree for name, tree in variables[kind].items() if name != "mtp_0"} for kind in variables}
    export_folder(config, without, tmp_path / "hf", dtype="float32")
    hf = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps(hf | {"num_nextn_predict_layers": 1}))
    opened = open_folder(tmp_path / "hf")
    assert opened.config == config and "num_nextn_predict_layers=1" in opened.notes[0]
    assert_same(import_folder(tmp_path / "hf")[1], without)

"""Folders as other tools write them: what is left out is named once, what remains is the network that transformers
would load."""

import json
import logging

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import traverse_util
from tiny_checkpoints import TINY, assert_same, random_variables

from deepseek_jax.errors import CheckpointError
from deepseek_jax.interop import export_folder, import_folder, open_folder
from deepseek_jax.interop.safetensors_io import DTYPES, ShardWriter, read_header, read_tensor

WITHOUT_MTP = TINY.replace(mtp_depth=0)
EMBEDDING, HEAD, MTP_EMBEDDING = "model.embed_tokens.weight", "lm_head.weight", "model.layers.3.embed_tokens.weight"


@pytest.fixture
def single(tmp_path, variables):
    """A float32 export of TINY in one file."""
    export_folder(TINY, variables, tmp_path / "single", dtype="float32")
    return tmp_path / "single"


def change(folder, tensors=None, config=None):
    """Applies functions to the dictionaries of tensors and of fields, and saves them."""
    if config:
        fields = json.loads((folder / "config.json").read_text())
        config(fields)
        (folder / "config.json").write_text(json.dumps(fields))
    if tensors:
        held = safetensors.numpy.load_file(folder / "model.safetensors")
        tensors(held)
        safetensors.numpy.save_file(held, folder / "model.safetensors")


def main_model(variables):
    return {kind: {name: tree for name, tree in variables[kind].items() if name != "mtp_0"} for kind in variables}


def imported(folder, caplog):
    """config, variables, and the notes that were logged, each once."""
    with caplog.at_level(logging.WARNING, "deepseek_jax.interop"):
        config, variables = import_folder(folder)
    notes = [record.getMessage().partition(": ")[2] for record in caplog.records]
    assert len(set(notes)) == len(notes)
    return config, variables, notes


def test_without_the_field_the_mtp_module_is_read(single, variables, caplog):
    change(single, config=lambda fields: fields.pop("num_nextn_predict_layers"))
    config, back, notes = imported(single, caplog)
    assert config == TINY and notes == []
    assert_same(back, variables)


def test_mtp_tensors_that_config_json_denies_are_left_out(single, variables, caplog):
    change(single, config=lambda fields: fields.update(num_nextn_predict_layers=0))
    config, back, notes = imported(single, caplog)
    count = sum(name.startswith("model.layers.3.") for name in open_folder(single).stored)
    assert (
        config == WITHOUT_MTP
        and len(notes) == 1
        and notes[0].startswith(f"{count} tensor(s) of MTP modules were left out")
    )
    assert_same(back, main_model(variables))


def test_an_mtp_module_with_a_tensor_missing_is_left_out(single, variables, caplog):
    change(single, lambda held: held.pop("model.layers.3.eh_proj.weight"))
    config, back, notes = imported(single, caplog)
    assert config == WITHOUT_MTP
    assert (
        "module 1 is not whole (model.layers.3.eh_proj.weight: expected shape [160, 320], found no such tensor): taken "
        "as 0" in notes[0]
    )
    assert_same(back, main_model(variables))


def test_neither_field_nor_tensors_is_nothing_left_out(single, variables, caplog):
    def drop(held):
        for name in [name for name in held if name.startswith("model.layers.3.")]:
            del held[name]

    change(single, drop, lambda fields: fields.pop("num_nextn_predict_layers"))
    config, back, notes = imported(single, caplog)
    assert config == WITHOUT_MTP and notes == []
    assert_same(back, main_model(variables))


@pytest.mark.parametrize("name, copy", [(EMBEDDING, MTP_EMBEDDING), (HEAD, "model.layers.3.shared_head.head.weight")])
def test_fine_tuned_embedding_or_head_beside_the_old_copy(single, variables, caplog, name, copy):
    change(single, lambda held: held.update({name: held[name] * 2}))
    config, back, notes = imported(single, caplog)
    assert config == WITHOUT_MTP and notes[0].startswith(f"{copy} differs from the main model's")
    expected = main_model(variables)
    leaf = ("params", "embed", "embedding") if name == EMBEDDING else ("params", "head", "kernel")
    flat = traverse_util.flatten_dict(expected)
    assert_same(back, traverse_util.unflatten_dict(flat | {leaf: flat[leaf] * 2}))


def test_the_last_row_of_a_copy_is_compared_too(tmp_path, caplog):
    config = TINY.replace(vocab_size=1500)  # more rows than are compared at a time
    export_folder(config, random_variables(config), tmp_path / "hf", dtype="float32")
    assert imported(tmp_path / "hf", caplog)[0] == config
    change(tmp_path / "hf", lambda held: held[MTP_EMBEDDING].__setitem__((-1, -1), 7.0))
    assert imported(tmp_path / "hf", caplog)[0] == config.replace(mtp_depth=0)


def test_a_copy_in_fewer_bits_is_a_copy(single, variables, caplog):
    change(single, lambda held: held.update({MTP_EMBEDDING: held[MTP_EMBEDDING].astype(ml_dtypes.bfloat16)}))
    config, back, _ = imported(single, caplog)
    assert config == TINY
    assert_same(back, variables)


def test_layers_that_config_json_denies_are_no_mtp_modules(single):
    change(single, config=lambda fields: fields.update(num_hidden_layers=2))
    with pytest.raises(CheckpointError, match=r"model\.layers\.2\..*: expected no such tensor"):
        import_folder(single)


@pytest.fixture
def tied(tmp_path):
    config = WITHOUT_MTP.replace(tie_embeddings=True)
    variables = random_variables(config)
    export_folder(config, variables, tmp_path / "tied", dtype="float32")
    return tmp_path / "tied", config, variables


@pytest.mark.parametrize("missing", [HEAD, EMBEDDING])
def test_a_tied_matrix_may_be_stored_under_either_name(tied, caplog, missing):
    folder, config, variables = tied
    change(folder, lambda held: held.pop(missing))
    assert imported(folder, caplog)[0] == config
    assert_same(import_folder(folder)[1], variables)


def test_a_head_that_differs_from_what_it_is_tied_to_is_its_own(tied, caplog):
    """transformers does not tie them either."""
    folder, config, variables = tied
    change(folder, lambda held: held.update({HEAD: held[HEAD] + 1}))
    read, back, notes = imported(folder, caplog)
    assert (
        read == config.replace(tie_embeddings=False)
        and "tie_word_embeddings=true, but lm_head.weight differs" in notes[0]
    )
    np.testing.assert_array_equal(back["params"]["head"]["kernel"], variables["params"]["embed"]["embedding"].T + 1)


def test_buffers_and_fields_of_other_software_are_passed_over(single, variables, caplog):
    extra = {
        f"model.layers.{i}.self_attn.rotary_emb.{name}": np.ones(3, np.float32)
        for i in range(3)
        for name in ("inv_freq", "cos_cached")
    }
    change(
        single,
        lambda held: held.update(extra | {"model.rotary_emb.inv_freq": np.ones(3, np.float32)}),
        lambda fields: fields.update(unsloth_version="1"),
    )
    config, back, notes = imported(single, caplog)
    assert (
        config == TINY and [note[:9] for note in notes] == ["config.js", "7 tensor("] and "unsloth_version" in notes[0]
    )
    assert_same(back, variables)


def test_experts_in_one_tensor(single, variables, caplog):
    """As transformers 5 saves them with save_original_format=False."""

    def fuse(held):
        for layer in (1, 2, 3):
            experts = f"model.layers.{layer}.mlp.experts"
            gate, up, down = (
                [held.pop(f"{experts}.{e}.{name}_proj.weight") for e in range(4)] for name in ("gate", "up", "down")
            )
            held[f"{experts}.gate_up_proj"] = np.stack([np.concatenate(pair) for pair in zip(gate, up, strict=True)])
            held[f"{experts}.down_proj"] = np.stack(down)

    change(single, fuse)
    config, back, notes = imported(single, caplog)
    assert config == TINY and notes == []
    assert_same(back, variables)


def test_fused_experts_of_another_shape_are_refused(single):
    change(single, lambda held: held.update({"model.layers.1.mlp.experts.gate_up_proj": np.ones((4, 3), np.float32)}))
    with pytest.raises(CheckpointError, match=r"gate_up_proj: expected no such tensor, found F32 \[4, 3\]"):
        import_folder(single)


def test_dtype_and_architecture_names_do_not_matter(single, variables, caplog):
    def rename(fields):
        fields.pop("torch_dtype", None)
        fields.update(dtype="bfloat16", architectures=["MyDeepseekForCausalLM"], auto_map={"AutoConfig": "mine.Config"})

    change(single, config=rename)
    assert_same(imported(single, caplog)[1], variables)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_in_one_file(single, variables, dtype, caplog):
    change(single, lambda held: held.update({name: value.astype(dtype) for name, value in held.items()}))
    _, back, _ = imported(single, caplog)
    rounded = traverse_util.flatten_dict(variables)
    for path, value in traverse_util.flatten_dict(back).items():
        np.testing.assert_array_equal(value, rounded[path].astype(dtype).astype(np.float32), err_msg="/".join(path))


# ----------------------------------------------------------------------------------------------------------------------
# Numbers that are none.


def test_weights_that_are_no_numbers_are_named(single):
    def spoil(held):
        held["model.layers.1.mlp.experts.2.up_proj.weight"][3, 4:6] = np.nan
        held["model.norm.weight"][0] = -np.inf

    change(single, spoil)
    for dtype in ("float32", "bfloat16"):
        with pytest.raises(CheckpointError) as error:
            import_folder(single, dtype)
        assert "model.layers.1.mlp.experts.2.up_proj.weight: 2 of 5,120 numbers NaN or infinite" in str(error.value)
        assert "model.norm.weight: 1 of 160 numbers NaN or infinite" in str(error.value)
        assert str(error.value).count("numbers NaN") == 2


def test_a_number_too_large_for_bfloat16_is_named(single):
    change(single, lambda held: held["model.norm.weight"].__setitem__(0, 3.4e38))
    import_folder(single, "float32")
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight: 1 of 160 numbers NaN or infinite"):
        import_folder(single, "bfloat16")


def test_only_the_first_of_many_spoilt_tensors_are_read(single):
    change(single, lambda held: [value.fill(np.nan) for value in held.values()])
    with pytest.raises(CheckpointError) as error:
        import_folder(single)
    assert str(error.value).count("NaN or infinite") == 10


@pytest.mark.parametrize("dtype", ["float32", "fp8"])
def test_bad_scales_and_values_of_fp8_are_named(tmp_path, variables, dtype):
    export_folder(TINY, variables, tmp_path / "hf", dtype="fp8")
    file = tmp_path / "hf" / "model.safetensors"
    tensors = {name: (tensor.dtype, read_tensor(tensor)) for name, tensor in read_header(file).items()}
    scales = {"kv_a_proj_with_mqa": 0.0, "q_a_proj": -1.0, "o_proj": np.nan, "kv_b_proj": np.inf}
    for part, value in scales.items():
        tensors[f"model.layers.0.self_attn.{part}.weight_scale_inv"][1][0, 0] = value
    # both NaNs that E4M3 has
    tensors["model.layers.1.mlp.experts.0.up_proj.weight"][1].view(np.uint8)[0, :3] = (0x7F, 0xFF, 0x7F)
    with ShardWriter(file, {name: (kind, array.shape) for name, (kind, array) in tensors.items()}) as writer:
        for name, (kind, array) in tensors.items():
            writer.write(name, array.astype(DTYPES[kind]))
    with pytest.raises(CheckpointError) as error:
        import_folder(tmp_path / "hf", dtype)
    text = str(error.value)
    for part in scales:
        assert f"model.layers.0.self_attn.{part}.weight_scale_inv: 1 of " in text, part
    assert "numbers not above 0 or not finite" in text
    assert "model.layers.1.mlp.experts.0.up_proj.weight: 3 of 5,120 numbers NaN or infinite" in text


# of an FP8 block all is lost
@pytest.mark.parametrize("dtype, count", [("float32", 1), ("bfloat16", 1), ("fp8", 32 * 128)])
def test_an_export_names_weights_that_are_no_numbers(tmp_path, variables, dtype, count, caplog):
    flat = traverse_util.flatten_dict(variables)
    path = ("params", "moe_layers", "ffn", "experts", "up")
    flat[path] = flat[path].copy()
    flat[path][1, 2, 3, 4] = np.nan
    export_folder(TINY, traverse_util.unflatten_dict(flat), tmp_path / "hf", dtype=dtype)
    (record,) = caplog.records
    assert record.getMessage().endswith(
        f"\n  model.layers.2.mlp.experts.2.up_proj.weight: {count:,} numbers NaN or infinite"
    )


def test_scales_that_are_powers_of_two_stay_so_through_import_and_export(tmp_path, variables):
    """DeepSeek-V3.1's: what was rounded to FP8 once is not rounded again."""
    fp8 = {"quantization_config": {"quant_method": "fp8", "scale_fmt": "ue8m0"}}
    export_folder(TINY, variables, tmp_path / "first", dtype="fp8", carried=fp8)
    hf = json.loads((tmp_path / "first" / "config.json").read_text())
    assert hf["quantization_config"]["scale_fmt"] == "ue8m0"
    stored = read_header(tmp_path / "first" / "model.safetensors")
    scales = [read_tensor(tensor) for name, tensor in stored.items() if name.endswith("_scale_inv")]
    assert scales and all((np.frexp(scale)[0] == 0.5).all() for scale in scales)
    config, back = import_folder(tmp_path / "first")
    export_folder(config, back, tmp_path / "second", dtype="fp8", carried=hf)
    assert_same(import_folder(tmp_path / "second")[1], back)
    export_folder(config, back, tmp_path / "third", dtype="fp8")
    assert "scale_fmt" not in json.loads((tmp_path / "third" / "config.json").read_text())["quantization_config"]

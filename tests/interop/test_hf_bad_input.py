"""Every damaged or foreign folder is refused in words, and nothing half-written stays."""

import json
import os
import re

import numpy as np
import pytest
import safetensors.numpy
from tiny_checkpoints import TINY, random_variables

from deepseek_jax.atomic import atomic_folder
from deepseek_jax.errors import CheckpointError
from deepseek_jax.interop import export_folder, import_folder
from deepseek_jax.interop.safetensors_io import DTYPES, ShardWriter, read_header

NORM = "model.layers.1.input_layernorm.weight"
MATRIX = "model.layers.1.mlp.experts.2.up_proj.weight"


def shard_of(folder, name):
    return folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]


def rewrite(folder, change, shard_with=NORM):
    """Applies `change` to the dictionary of tensors of one shard and saves it with its index."""
    file = shard_of(folder, shard_with)
    tensors = safetensors.numpy.load_file(file)
    before = set(tensors)
    change(tensors)
    safetensors.numpy.save_file(tensors, file)
    index_file = folder / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    for name in before - set(tensors):
        del index["weight_map"][name]
    index["weight_map"] |= dict.fromkeys(tensors, file.name)
    index_file.write_text(json.dumps(index))


def refused(folder, message):
    with pytest.raises(CheckpointError, match=message):
        import_folder(folder)


def test_missing_tensor(folder):
    rewrite(folder, lambda tensors: tensors.pop(NORM))
    refused(folder, re.escape(f"{NORM}: expected shape [160], found no such tensor"))


def test_extra_tensor(folder):
    rewrite(folder, lambda tensors: tensors.update({"model.layers.1.mlp.extra.weight": np.ones((2, 3), np.float32)}))
    refused(folder, r"model\.layers\.1\.mlp\.extra\.weight: expected no such tensor, found F32 \[2, 3\]")


def test_wrong_shape(folder):
    rewrite(folder, lambda tensors: tensors.update({MATRIX: np.ones((160, 32), np.float32)}), MATRIX)
    refused(folder, re.escape(f"{MATRIX}: expected shape [32, 160], found [160, 32] in model-"))


def test_unsupported_dtype(folder):
    rewrite(folder, lambda tensors: tensors.update({MATRIX: np.ones((32, 160), np.int32)}), MATRIX)
    refused(folder, re.escape(f"{MATRIX}: expected dtype F32, F16, BF16, F8_E4M3, found I32"))


def test_all_problems_are_listed_together(folder):
    rewrite(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if "model.layers.1." in name], NORM)
    with pytest.raises(CheckpointError) as error:
        import_folder(folder)
    assert str(error.value).count("found no such tensor") > 3


def test_network_of_another_size(folder):
    hf = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(hf | {"kv_lora_rank": 25}))
    refused(folder, r"kv_a_layernorm\.weight: expected shape \[25\], found \[24\]")


def test_truncated_shard(folder):
    file = shard_of(folder, MATRIX)
    os.truncate(file, file.stat().st_size - 1)
    refused(folder, rf"{file.name}: damaged or cut off after [\d,]+ bytes")


def test_missing_shard(folder):
    file = shard_of(folder, MATRIX)
    file.unlink()
    refused(folder, rf"the index puts \d+ tensors, '.*' among them, into {file.name}, which is not in")


def test_index_that_points_to_the_wrong_shard(folder):
    index_file = folder / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    other = next(shard for shard in index["weight_map"].values() if shard != index["weight_map"][NORM])
    index["weight_map"][NORM] = other
    index_file.write_text(json.dumps(index))
    refused(folder, f"the index puts tensor '{NORM}' into {other}, but it is not there")


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "is damaged"), ("[]", r"is damaged \(it holds list, not an object\)"),
        ('{"weight_map": 3}', "no readable weight_map"), ('{"weight_map": {"a": 3}}', "no readable weight_map"),
        ('{"weight_map": {"a": "../x"}}', "no readable weight_map"),
        ("[" * 100_000, "is damaged"),
    ],
)  # fmt: skip
def test_damaged_index(folder, content, message):
    (folder / "model.safetensors.index.json").write_text(content)
    refused(folder, rf"index\.json:? {message}")


def test_damaged_config(folder):
    (folder / "config.json").write_text("{]")
    refused(folder, r"config\.json is damaged")
    (folder / "config.json").unlink()
    refused(folder, r"has no config\.json")


def test_pickles_are_never_opened(folder):
    for file in [*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"]:
        file.unlink()
    refused(folder, "holds neither model.safetensors nor")
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    refused(folder, "pytorch_model.bin but no safetensors. Such files are pickles")


def test_mtp_copies_may_be_absent(folder):
    for name in ("model.layers.3.embed_tokens.weight", "model.layers.3.shared_head.head.weight"):
        rewrite(folder, lambda tensors, name=name: tensors.pop(name), name)
    assert import_folder(folder)[0].mtp_depth == 1


@pytest.mark.parametrize("scale_shape, found", [(None, "found no such tensor"), ((2, 1), r"found F32 \[2, 1\]")])
def test_fp8_scale_missing_or_misshapen(tmp_path, variables, scale_shape, found):
    export_folder(TINY, variables, tmp_path / "hf", dtype="fp8")
    file = tmp_path / "hf" / "model.safetensors"
    kinds = {name: (tensor.dtype, tensor.shape) for name, tensor in read_header(file).items()}
    del kinds[MATRIX + "_scale_inv"]
    if scale_shape:
        kinds[MATRIX + "_scale_inv"] = ("F32", scale_shape)
    with ShardWriter(file, kinds) as writer:
        for name, (dtype, shape) in kinds.items():
            writer.write(name, np.ones(shape, DTYPES[dtype]))
    refused(tmp_path / "hf", rf"{MATRIX}_scale_inv: expected F32 \[1, 2\] .*, {found}")


def test_unknown_dtype_names_the_nearest(folder):
    with pytest.raises(CheckpointError, match="did you mean 'float32'"):
        import_folder(folder, dtype="float23")


def test_export_of_variables_of_another_model(tmp_path, variables):
    other = random_variables(TINY.replace(vocab_size=51))
    with pytest.raises(
        CheckpointError, match=r"params/embed/embedding: expected shape \[50, 160\] .*, found \[51, 160\]"
    ):
        export_folder(TINY, other, tmp_path / "hf")
    with pytest.raises(CheckpointError, match="params/mtp_0/.*: expected no such variable"):
        export_folder(TINY.replace(mtp_depth=0), variables, tmp_path / "hf")
    with pytest.raises(CheckpointError, match="router_bias/moe_layers/ffn/router/bias: .* found no such variable"):
        export_folder(TINY, {"params": variables["params"]}, tmp_path / "hf")
    assert list(tmp_path.iterdir()) == []


def test_existing_folder_is_not_overwritten(folder, variables):
    before = sorted(file.name for file in folder.iterdir())
    with pytest.raises(CheckpointError, match="already exists"):
        export_folder(TINY, variables, folder)
    assert sorted(file.name for file in folder.iterdir()) == before


def test_failed_export_leaves_nothing(tmp_path, variables):
    def interrupt(done, total):
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_folder(TINY, variables, tmp_path / "hf", progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_reported_before_and_during_writing(tmp_path):
    too_much = atomic_folder(tmp_path / "out", needed_bytes=10**18)
    with pytest.raises(CheckpointError, match=r"needs 1,000,000,000,000,000,000 bytes, its disk has"), too_much:
        pass
    with pytest.raises(CheckpointError, match="No space left on device"), atomic_folder(tmp_path / "out"):
        raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []

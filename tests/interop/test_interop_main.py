"""python -m deepseek_jax.interop: import, export and inspect end to end."""

import json
import re
import shutil

import jax
import numpy as np
import pytest
from tiny_checkpoints import TINY, assert_same

from deepseek_jax.errors import CheckpointError, ConfigError, DataError
from deepseek_jax.interop import export_folder, import_folder
from deepseek_jax.interop.__main__ import main
from deepseek_jax.interop.tensors import tensor_table
from deepseek_jax.training.checkpoints import load_variables

# Words as tokens, with ids that the tiny vocabulary has.
TOKENIZER = {
    "tokenizer.json": {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None,
        "decoder": None,
        "added_tokens": [
            {"id": i, "content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
             "special": True}
            for i, text in ((0, "<s>"), (7, "</s>"))
        ],
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": {"<s>": 0, "a": 1, "b": 2, "</s>": 7}, "unk_token": "a"},
    },
    "tokenizer_config.json": {"bos_token": "<s>", "eos_token": "</s>",
                              "chat_template": "{{ bos_token }}{{ messages[0].content }}"},
    "generation_config.json": {"bos_token_id": 0, "eos_token_id": [7, 1], "temperature": 0.6},
}  # fmt: skip


@pytest.fixture(scope="module")
def stored(tmp_path_factory, variables):
    """A Hugging Face folder with a tokenizer, and the checkpoint `import` makes of it."""
    root = tmp_path_factory.mktemp("cli")
    export_folder(
        TINY, variables, root / "hf", dtype="float32", carried={"eos_token_id": 7, "max_position_embeddings": 123}
    )
    for name, content in TOKENIZER.items():
        (root / "hf" / name).write_text(json.dumps(content))
    assert main(["import", str(root / "hf"), str(root / "checkpoint")]) == 0
    return root


def test_imported_checkpoint_loads_like_a_trained_one(stored, variables):
    config, loaded = load_variables(stored / "checkpoint")
    assert config == TINY
    assert_same(jax.tree.map(np.asarray, loaded), variables)
    assert (stored / "checkpoint" / "tokenizer.json").read_bytes() == (stored / "hf" / "tokenizer.json").read_bytes()


def test_export_of_the_checkpoint_gives_the_folder_back(stored, variables, tmp_path):
    assert (
        main(["export", str(stored / "checkpoint"), str(tmp_path / "hf"), "--dtype=float32", "--max_shard_gb=0.0005"])
        == 0
    )
    assert {file.name for file in (stored / "hf").iterdir()} - {"model.safetensors"} <= {
        file.name for file in (tmp_path / "hf").iterdir()
    }
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 1
    before, after = (json.loads((root / "hf" / "config.json").read_text()) for root in (stored, tmp_path))
    # of the tokenizer, whose padding is its end of text
    assert after == before | {"bos_token_id": 0, "pad_token_id": 7}
    for name in TOKENIZER:
        assert (tmp_path / "hf" / name).read_bytes() == (stored / "hf" / name).read_bytes(), name
    assert_same(import_folder(tmp_path / "hf")[1], variables)


def test_existing_outputs_are_refused_before_any_work(stored):
    with pytest.raises(CheckpointError, match="already exists"):
        main(["import", str(stored / "hf"), str(stored / "checkpoint")])
    with pytest.raises(CheckpointError, match="already exists"):
        main(["export", str(stored / "checkpoint"), str(stored / "hf")])


def test_refused_import_leaves_nothing(folder, tmp_path):
    (folder / "model.safetensors.index.json").write_text("{")
    with pytest.raises(CheckpointError):
        main(["import", str(folder), str(tmp_path / "out" / "checkpoint")])
    assert not (tmp_path / "out").exists()


def test_inspect_shows_config_tensors_and_problems(folder, capsys):
    assert main(["inspect", str(folder)]) == 0
    shown = capsys.readouterr().out
    for text in (
        "attention.kv_lora_rank",
        "routed_scaling_factor",
        "model.layers.*.mlp.gate.weight",
        "complete: every tensor",
    ):
        assert text in shown
    count = sum(leaf.size for leaf in jax.tree.leaves(import_folder(folder)[1]))
    assert f"{count:,} parameters" in shown
    next(folder.glob("model-00002-*")).unlink()
    assert main(["inspect", str(folder)]) == 1
    shown = capsys.readouterr().out
    assert "can't be imported" in shown and "model-00002-of" in shown and "found no such tensor" in shown


@pytest.fixture(scope="module")
def run(tmp_path_factory, stored):
    """A run's folder with one stage, which has the tokenizer of bytes: TINY's vocabulary is too small for it."""
    folder = tmp_path_factory.mktemp("run") / "run"
    shutil.copytree(stored / "checkpoint" / "checkpoints", folder / "sft" / "checkpoints")
    (folder / "config.json").write_text(json.dumps({"stages": ["pretrain", "sft"], "tokenizer": "byte", "model": {}}))
    return folder


def test_a_runs_folder_is_exported_by_its_last_stage(run, stored, variables, tmp_path):
    assert main(["export", str(run), str(tmp_path / "hf"), "--dtype=float32", f"--tokenizer={stored / 'hf'}"]) == 0
    fields = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert [fields[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [0, 7, 7]
    assert json.loads((tmp_path / "hf" / "generation_config.json").read_text())["eos_token_id"] == [7, 1]
    assert_same(import_folder(tmp_path / "hf")[1], variables)


def test_a_runs_config_is_not_taken_for_a_networks(run, stored):
    with pytest.raises(
        CheckpointError, match="is the folder of a run here, not a Hugging Face folder: export one of its stages .*sft"
    ):
        main(["inspect", str(run)])
    with pytest.raises(CheckpointError, match="is a checkpoint of ours, not a Hugging Face folder"):
        main(["inspect", str(run / "sft")])


def test_a_tokenizer_with_more_ids_than_the_network_is_refused(run, tmp_path):
    with pytest.raises(ConfigError, match="the tokenizer has 272 ids but the model's vocab_size is 50"):
        main(["export", str(run), str(tmp_path / "hf")])
    assert list(tmp_path.iterdir()) == []


def test_an_export_without_a_tokenizer_says_so_and_names_no_token(stored, tmp_path, capsys, variables):
    shutil.copytree(stored / "checkpoint" / "checkpoints", tmp_path / "bare" / "checkpoints")
    assert main(["export", str(tmp_path / "bare"), str(tmp_path / "hf")]) == 0
    assert "note: exported without a tokenizer and its token ids" in capsys.readouterr().out
    fields = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert [fields[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [None] * 3
    with pytest.raises(DataError, match="no tokenizer at"):
        main(["export", str(tmp_path / "bare"), str(tmp_path / "hf2"), "--tokenizer=nowhere"])


@pytest.mark.parametrize("size", ["0", "-1", "nan", "inf"])
def test_sizes_of_files_that_are_none_are_refused(stored, tmp_path, size):
    with pytest.raises(ConfigError, match="--max_shard_gb: .*must be a number, above 0"):
        main(["export", str(stored / "checkpoint"), str(tmp_path / "hf"), f"--max_shard_gb={size}"])


def test_inspect_cuts_no_name(folder, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["inspect", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "…" not in shown
    for spec in tensor_table(TINY):
        assert re.sub(r"\.\d+\.", ".*.", spec.name) in shown

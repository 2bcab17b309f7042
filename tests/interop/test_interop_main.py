"""python -m deepseek_jax.interop: import, export and inspect end to end."""

import json

import jax
import numpy as np
import pytest
from tiny_checkpoints import TINY, assert_same

from deepseek_jax.errors import CheckpointError
from deepseek_jax.interop import export_folder, import_folder
from deepseek_jax.interop.__main__ import main
from deepseek_jax.training.checkpoints import load_variables


@pytest.fixture(scope="module")
def stored(tmp_path_factory, variables):
    """A Hugging Face folder with a tokenizer, and the checkpoint `import` makes of it."""
    root = tmp_path_factory.mktemp("cli")
    export_folder(TINY, variables, root / "hf", dtype="float32", carried={"eos_token_id": 7, "max_position_embeddings": 123})
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (root / "hf" / name).write_text(json.dumps({"file": name}))
    assert main(["import", str(root / "hf"), str(root / "checkpoint")]) == 0
    return root


def test_imported_checkpoint_loads_like_a_trained_one(stored, variables):
    config, loaded = load_variables(stored / "checkpoint")
    assert config == TINY
    assert_same(jax.tree.map(np.asarray, loaded), variables)
    assert json.loads((stored / "checkpoint" / "tokenizer.json").read_text()) == {"file": "tokenizer.json"}


def test_export_of_the_checkpoint_gives_the_folder_back(stored, variables, tmp_path):
    assert main(["export", str(stored / "checkpoint"), str(tmp_path / "hf"), "--dtype=float32", "--max_shard_gb=0.0005"]) == 0
    assert {file.name for file in (stored / "hf").iterdir()} - {"model.safetensors"} <= {file.name for file in (tmp_path / "hf").iterdir()}
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 1
    assert json.loads((tmp_path / "hf" / "config.json").read_text()) == json.loads((stored / "hf" / "config.json").read_text())
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
    for text in ("attention.kv_lora_rank", "routed_scaling_factor", "model.layers.*.mlp.gate.weight", "complete: every tensor"):
        assert text in shown
    count = sum(leaf.size for leaf in jax.tree.leaves(import_folder(folder)[1]))
    assert f"{count:,} parameters" in shown
    next(folder.glob("model-00002-*")).unlink()
    assert main(["inspect", str(folder)]) == 1
    shown = capsys.readouterr().out
    assert "can't be imported" in shown and "model-00002-of" in shown and "found no such tensor" in shown

"""`python -m deepseek_jax.accounting`: the table, JSON, experiment files, and what it says about mistakes."""

import json
import subprocess
import sys

import pytest

from deepseek_jax.__main__ import print_plan
from deepseek_jax.accounting import training_flops_per_token
from deepseek_jax.accounting.__main__ import main
from deepseek_jax.errors import ConfigError
from deepseek_jax.experiment import read_flags
from deepseek_jax.interop import config_to_hf
from deepseek_jax.model.presets import preset


def test_table_of_v3_holds_the_published_figures(capsys):
    main(["v3_671b"])
    printed = capsys.readouterr().out
    for figure in ("671,026,419,200", "37,552,297,472", "36,625,618,432", "35,698,939,392", "11,610,068,224"):
        assert figure in printed
    assert "attention (mla)" in printed
    for figure in ("250.46", "35,136", "70,272", "327,680", "516,096", "1.368888", "0.1352338", "10-23"):
        assert figure in printed


def test_a_whole_table_of_a_trillion_parameters():
    result = subprocess.run(
        [sys.executable, "-m", "deepseek_jax.accounting", "kimi_k2_1t"], capture_output=True, text=True
    )
    assert result.returncode == 0 and "1,026,408,232,448" in result.stdout


def test_json(capsys):
    main(["v2_236b", "--json", "--tokens=8.1e12", "--dollars_per_hour=3"])
    figures = json.loads(capsys.readouterr().out)
    assert figures["parameters"]["total"] == 235_741_434_880
    assert (figures["attention"]["kind"], figures["attention"]["kv_lora_rank"]) == ("mla", 512)
    assert round(figures["flops_per_token"]["training"] / 1e9, 2) == 155.31
    assert figures["yarn"]["softmax_scale"] == pytest.approx(0.1147214, abs=5e-8)
    assert figures["cost"]["dollars"] == pytest.approx(3 * figures["cost"]["gpu_hours"])
    assert sum(figures["parameters"]["main"].values()) == figures["parameters"]["total"]


def test_list_of_presets(capsys):
    main([])
    printed = capsys.readouterr().out
    assert "v3_671b" in printed and "1,026,408,232,448" in printed
    main(["--json"])
    assert json.loads(capsys.readouterr().out)["v2_lite_16b"] == {
        "total": 15_706_484_224,
        "activated_with_head": 2_451_435_008,
    }


def test_experiment_file(tmp_path, capsys):
    path = tmp_path / "experiment.py"
    path.write_text(
        "import ml_collections\nfrom deepseek_jax.model.presets import preset\ndef get_config():\n"
        "    return ml_collections.ConfigDict({'model': preset('v2_lite_16b').replace(num_layers=2).to_dict()})\n"
    )
    main([f"--config={path}", "--json"])
    figures = json.loads(capsys.readouterr().out)
    assert figures["memory_bytes"]["cache_elements_per_token"] == 2 * 576
    main([f"--config={path}", "--config.model.num_layers=5", "--json"])
    assert json.loads(capsys.readouterr().out)["memory_bytes"]["cache_elements_per_token"] == 5 * 576
    with pytest.raises(ConfigError, match="num_layers"):
        main([f"--config={path}", "--config.model.num_layer=5"])


@pytest.mark.parametrize("columns", ["40", "80"])
def test_no_number_is_cut_on_a_narrow_terminal(columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    main(["v3_671b"])
    printed = capsys.readouterr().out
    assert "671,026,419,200" in printed and "11,413,547,008" in printed and "…" not in printed
    assert max(map(len, printed.splitlines())) <= 80


STAGES = """
from ml_collections import ConfigDict
from deepseek_jax.model.presets import preset

def get_config():
    model = preset("v2_lite_16b").replace(num_layers=3, mtp_depth=1)
    config = ConfigDict({"model": model.to_dict(), "stages": ("pretrain", "sft"), "tokenizer": "byte"})
    config.pretrain = {"kind": "pretrain", "seq_len": 512, "batch_size": 8}
    config.pretrain.train = {"steps": 30, "objective": {"mtp_weight": 0.3}}
    config.sft = {"kind": "sft", "seq_len": 256, "batch_size": 4}
    config.sft.train = {"steps": 20, "objective": {"mtp_weight": 0.0}}
    return config
"""


def test_the_bill_is_that_of_the_experiments_own_stages(tmp_path, capsys):
    """By hand; one stage trains the MTP module, the other one does not. Without an experiment the bill is for 1T
    tokens."""
    path = tmp_path / "mine.py"
    path.write_text(STAGES)
    main([f"--config={path}", "--json"])
    figures = json.loads(capsys.readouterr().out)
    config = preset("v2_lite_16b").replace(num_layers=3, mtp_depth=1)
    pretrain = 30 * 8 * 512 * training_flops_per_token(config, 512, mtp=True)
    sft = 20 * 4 * 256 * training_flops_per_token(config, 256)
    bill = figures["cost"]
    assert bill["stages"]["pretrain"] == {"tokens": 30 * 8 * 512, "flops": pretrain, "seq_len": 512}
    assert bill["stages"]["sft"] == {"tokens": 20 * 4 * 256, "flops": sft, "seq_len": 256}
    assert (bill["tokens"], bill["flops"]) == (30 * 8 * 512 + 20 * 4 * 256, pretrain + sft)
    assert bill["gpu_hours"] == pytest.approx((pretrain + sft) / 385e12 / 3600) and bill["dollars"] == pytest.approx(
        2 * bill["gpu_hours"]
    )
    assert figures["flops_per_token"]["training"] == training_flops_per_token(config, 512)
    print_plan(*read_flags([f"--config={path}"])[:3])
    printed = capsys.readouterr().out
    assert f"{pretrain:.3g}" in printed and f"{sft:.3g}" in printed and "123k tokens" in printed and "1T" not in printed
    main([f"--config={path}", "--tokens=2e12"])
    assert "Training on 2T tokens" in capsys.readouterr().out
    main(["v2_lite_16b"])
    assert "Training on 1T tokens" in capsys.readouterr().out


def test_a_hugging_face_folder(tmp_path, capsys):
    fields = {"model_type": "deepseek_v3", **config_to_hf(preset("v3_671b"))}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    main([str(tmp_path)])
    assert "671,026,419,200" in capsys.readouterr().out


def test_mistakes_are_named(tmp_path, monkeypatch):
    # ml_collections would fall back on the last file it loaded
    monkeypatch.delitem(sys.modules, "config_config", raising=False)
    with pytest.raises(ConfigError, match="did you mean 'v3_671b'"):
        main(["v3_671"])
    with pytest.raises(ConfigError, match="no such file"):
        main([f"--config={tmp_path / 'missing.py'}"])
    empty = tmp_path / "empty.py"
    empty.write_text("")
    with pytest.raises(ConfigError, match="get_config"):
        main([f"--config={empty}"])
    empty.write_text("def get_config():\n    import ml_collections; return ml_collections.ConfigDict({'seed': 0})\n")
    with pytest.raises(ConfigError, match="no field 'model'"):
        main([f"--config={empty}"])
    with pytest.raises(ConfigError, match="name one of them"):
        main(["v3_671b", f"--config={empty}"])
    with pytest.raises(ConfigError, match="argument --tokens: '-1': must be a number, above 0"):
        main(["v3_671b", "--tokens=-1"])

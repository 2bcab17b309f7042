"""`python -m deepseek_jax.accounting`: the table, JSON, experiment files, and what it says about mistakes."""

import json
import subprocess
import sys
import time

import pytest

from deepseek_jax.accounting.__main__ import main
from deepseek_jax.errors import ConfigError


def test_table_of_v3_holds_the_published_figures(capsys):
    main(["v3_671b"])
    printed = capsys.readouterr().out
    for figure in ("671,026,419,200", "37,552,297,472", "36,625,618,432", "35,698,939,392", "11,610,068,224"):
        assert figure in printed
    for figure in ("250.46", "35,136", "70,272", "327,680", "516,096", "1.368888", "0.1352338", "10-23"):
        assert figure in printed


def test_a_whole_table_takes_under_ten_seconds():
    start = time.perf_counter()
    result = subprocess.run([sys.executable, "-m", "deepseek_jax.accounting", "kimi_k2_1t"], capture_output=True, text=True)
    assert result.returncode == 0 and "1,026,408,232,448" in result.stdout
    assert time.perf_counter() - start < 10


def test_json(capsys):
    main(["v2_236b", "--json", "--tokens=8.1e12", "--dollars_per_hour=3"])
    figures = json.loads(capsys.readouterr().out)
    assert figures["parameters"]["total"] == 235_741_434_880
    assert round(figures["flops_per_token"]["training"] / 1e9, 2) == 155.31
    assert figures["yarn"]["softmax_scale"] == pytest.approx(0.1147214, abs=5e-8)
    assert figures["cost"]["dollars"] == pytest.approx(3 * figures["cost"]["gpu_hours"])
    assert sum(figures["parameters"]["main"].values()) == figures["parameters"]["total"]


def test_list_of_presets(capsys):
    main([])
    printed = capsys.readouterr().out
    assert "v3_671b" in printed and "1,026,408,232,448" in printed
    main(["--json"])
    assert json.loads(capsys.readouterr().out)["v2_lite_16b"] == {"total": 15_706_484_224, "activated_with_head": 2_451_435_008}


def test_experiment_file(tmp_path, capsys):
    path = tmp_path / "experiment.py"
    path.write_text(
        "import ml_collections\n"
        "from deepseek_jax.model.config import preset\n"
        "def get_config():\n"
        "    return ml_collections.ConfigDict({'model': preset('v2_lite_16b').replace(num_layers=2).to_dict()})\n"
    )
    main([f"--config={path}", "--json"])
    figures = json.loads(capsys.readouterr().out)
    assert figures["memory_bytes"]["cache_elements_per_token"] == 2 * 576
    main([f"--config={path}", "--config.model.num_layers=5", "--json"])
    assert json.loads(capsys.readouterr().out)["memory_bytes"]["cache_elements_per_token"] == 5 * 576
    with pytest.raises(ConfigError, match="num_layers"):
        main([f"--config={path}", "--config.model.num_layer=5"])


def test_mistakes_are_named(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "config_config", raising=False)  # ml_collections would fall back on the last file it loaded
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
    with pytest.raises(ConfigError, match="--tokens=-1.0: must be above 0"):
        main(["v3_671b", "--tokens=-1"])

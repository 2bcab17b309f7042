"""Files that a person wrote: what is wrong in them is one sentence with file and line."""

import sys

import pytest

from deepseek_jax.__main__ import main
from deepseek_jax.errors import ConfigError
from deepseek_jax.experiment import read_config, read_flags
from deepseek_jax.launch.sweep import load_sweep
from deepseek_jax.overrides import plain

CONFIG = "from ml_collections import ConfigDict\n\n\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\ndef get_config(:\n", r"mine.py:2: SyntaxError: invalid syntax"),
        ("\x00", "mine.py.*null bytes"),
        ("import nothing_of_that_name\n", "mine.py:1: ModuleNotFoundError: No module named 'nothing_of_that_name'"),
        ("def get_config():\n    return 1 / 0\n", "mine.py:2: ZeroDivisionError: division by zero"),
        ("def get_config():\n    raise SystemExit(3)\n", "mine.py:2: SystemExit: 3"),
        (
            "def get_config(seed):\n    return {}\n",
            "mine.py.*TypeError: .*missing 1 required positional argument: 'seed'",
        ),
        (
            "from deepseek_jax.model.presets import preset\n\n\ndef get_config():\n    return {'m': preset('v4')}\n",
            "mine.py:5: preset='v4': .*allowed",
        ),
        ("from helper import broken\n\n\ndef get_config():\n    return broken()\n", r"helper.py:2: ValueError: oh"),
        ("x = 1\n", r"mine.py has no function get_config\(\)"),
        ("get_config = 3\n", r"mine.py has no function get_config\(\)"),
        (
            "\n\ndef get_config():\n    return None\n",
            r"mine.py:3: get_config\(\) returns NoneType, not a ConfigDict of model",
        ),
        ("def get_config():\n    return [1]\n", r"mine.py:1: get_config\(\) returns list"),
    ],
)
def test_a_mistake_in_an_experiment_file(text, message, tmp_path):
    (tmp_path / "helper.py").write_text("def broken():\n    raise ValueError('oh')\n")
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_config(str(tmp_path / "mine.py"))


def test_a_mapping_may_stand_for_a_configdict_and_its_names_may_hold_dots(tmp_path):
    for text in (
        "def get_config():\n    return {'a': {'b.c:d': 1.0}}\n",
        CONFIG + "def get_config():\n    return ConfigDict({'a': {'b.c:d': 1.0}})\n",
    ):
        (tmp_path / "mine.py").write_text(text)
        assert plain(read_config(str(tmp_path / "mine.py"))) == {"a": {"b.c:d": 1.0}}
        assert plain(read_config(str(tmp_path / "mine.py"), [("a", "{'e.f:g': 2}")])) == {"a": {"e.f:g": 2}}


def test_an_override_leaves_what_a_neighbor_holds_alone(tmp_path):
    (tmp_path / "shared_part.py").write_text(CONFIG + "SOURCES = [{'name': 'a'}]\nMODEL = ConfigDict({'width': 1})\n")
    (tmp_path / "mine.py").write_text(
        CONFIG
        + "import shared_part\n\ndef get_config():\n"
        + "    return ConfigDict({'m': shared_part.MODEL, 's': shared_part.SOURCES})\n"
    )
    path = str(tmp_path / "mine.py")
    assert plain(read_config(path, [("m.width", "2"), ("s[0].name", "b")])) == {"m": {"width": 2}, "s": [{"name": "b"}]}
    assert plain(read_config(path)) == {"m": {"width": 1}, "s": [{"name": "a"}]}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--config=experiments/r1_tin.py"],
            "no such file: experiments/r1_tin.py; did you mean experiments/r1_tiny.py",
        ),
        (["--config=experiments"], "experiments is a folder; there are .*experiments/r1_tiny.py"),
        (["--config=README.md"], "README.md is not a Python file"),
        (["--config="], "no experiment given"),
        (["--dry"], "no experiment given: pass --config=FILE. Here: .*r1_tiny.py"),
        (["--config"], "argument --config: expected one argument"),
        (["--config=experiments/r1_tiny.py", "left"], "'left' belongs to no flag"),
        (["--config=experiments/r1_tiny.py", "--wrokdir=x"], "unknown flag --wrokdir: did you mean '--workdir'"),
        (["--config=experiments/r1_tiny.py", "--config=experiments/r1_zero_tiny.py"], "--config is given twice"),
        (["--config=experiments/r1_tiny.py", "--config.seed", "3"], "write --config.seed=VALUE"),
    ],
)
def test_flags_that_say_nothing(argv, message, monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)
    with pytest.raises(ConfigError, match=message):
        main(argv)


def test_a_space_for_an_equals_sign(monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)
    config, name, workdir, dry = read_flags(["--config", "experiments/r1_tiny.py", "--workdir", "here", "--dry"])
    assert (config.task.name, name, str(workdir), dry) == ("parity", "r1_tiny", "here", True)


def test_a_mistake_in_a_sweep_file(tmp_path):
    (tmp_path / "mine.py").write_text("\ndef get_sweep():\n    return 3\n")
    with pytest.raises(ConfigError, match=r"mine.py:2: get_sweep\(\) returns int, not a deepseek_jax.launch.Sweep"):
        load_sweep(str(tmp_path / "mine.py"))


def test_a_file_imports_from_its_folder_first_and_from_the_one_above_last(tmp_path, monkeypatch):
    """In a process of its own path: what is imported once is not looked for again."""
    monkeypatch.setattr("sys.path", list(sys.path))
    (tmp_path / "inner").mkdir()
    (tmp_path / "above_of_this_test.py").write_text("VALUE = 'above'\n")
    (tmp_path / "twice_of_this_test.py").write_text("VALUE = 'above'\n")
    (tmp_path / "inner" / "twice_of_this_test.py").write_text("VALUE = 'inner'\n")
    (tmp_path / "tomllib.py").write_text("VALUE = 'hides the standard library'\n")
    (tmp_path / "inner" / "mine.py").write_text(
        "import tomllib, above_of_this_test, twice_of_this_test\n\ndef get_config():\n"
        "    return {'a': above_of_this_test.VALUE, 'b': twice_of_this_test.VALUE, 'c': hasattr(tomllib, 'loads')}\n"
    )
    monkeypatch.delitem(sys.modules, "tomllib", raising=False)
    found = plain(read_config(str(tmp_path / "inner" / "mine.py")))
    assert found == {"a": "above", "b": "inner", "c": True}

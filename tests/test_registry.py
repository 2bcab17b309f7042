"""Names of a config: registered ones, imported ones, and messages for those that are neither."""

import math

import pytest

from deepseek_jax.errors import ConfigError
from deepseek_jax.registry import resolve

REGISTRY = {"sigmoid": 1, "softmax": 2}


def test_registered_names_come_first():
    assert resolve(REGISTRY, "softmax", "moe.scoring") == 2
    assert resolve({"math:sqrt": 3}, "math:sqrt", "field") == 3


def test_names_of_ones_own():
    assert resolve(REGISTRY, "math:sqrt", "moe.scoring") is math.sqrt
    assert resolve(REGISTRY, "os:path.join", "moe.scoring")("a", "b") == "a/b"


@pytest.mark.parametrize(
    "name, message",
    [
        ("sigmoit", r"moe.scoring='sigmoit': did you mean 'sigmoid'\? allowed: sigmoid, softmax, or your own as"),
        (3, "moe.scoring=3: allowed: sigmoid, softmax"),
        (None, "moe.scoring=None: allowed"),
        ("nowhere.at_all:score", "importing 'nowhere.at_all' failed .ModuleNotFoundError: No module named 'nowhere'"),
        ("math:sqroot", r"math has no 'sqroot': did you mean 'sqrt'\?"),
        ("math:", "math has no ''"),
        (":sqrt", "importing '' failed .ValueError"),
        ("..math:sqrt", "importing '..math' failed .TypeError"),
    ],
)
def test_other_names_are_refused(name, message):
    with pytest.raises(ConfigError, match=message):
        resolve(REGISTRY, name, "moe.scoring")


def test_a_module_that_raises(tmp_path, monkeypatch):
    (tmp_path / "broken_idea.py").write_text("score = 1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="importing 'broken_idea' failed .ZeroDivisionError"):
        resolve(REGISTRY, "broken_idea:score", "moe.scoring")

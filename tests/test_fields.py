"""Values against annotations: what each kind takes, what it makes of it, and what a refusal says."""

import dataclasses
import enum
import math
from typing import Any

import pytest

from deepseek_jax.errors import ConfigError
from deepseek_jax.fields import Unbounded, build, change, convert, flatten


class Color(enum.Enum):
    RED = 1


@dataclasses.dataclass(frozen=True)
class Inner:
    size: int = 1
    scale: float = 1.0


@dataclasses.dataclass(frozen=True)
class Other:
    width: int
    size: int = 1


@dataclasses.dataclass(frozen=True)
class Outer:
    name: str
    inner: Inner = Inner(size=7)
    either: Inner | Other | None = None
    given: object = None

    def __post_init__(self):
        if self.name == "bad":
            raise ValueError("name='bad': another one")


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [
        (True, bool, True),
        (3, int, 3),
        (1e3, int, 1000),
        (-2.0, int, -2),
        (3, float, 3.0),
        (0.5, float, 0.5),
        ("x", str, "x"),
        (None, int | None, None),
        (4, int | None, 4),
        (math.inf, Unbounded, math.inf),
        ("inf", Unbounded, math.inf),
        (2, Unbounded, 2.0),
        ([1, 2.0], tuple[int, ...], (1, 2)),
        ((), tuple[int, ...], ()),
        ([0.2, 1], tuple[float, float], (0.2, 1.0)),
        ({"a.b:c": 1}, tuple[tuple[str, float], ...], (("a.b:c", 1.0),)),
        ([["a", 1]], tuple[tuple[str, float], ...], (("a", 1.0),)),
        ("fsdp", str | tuple[str, ...] | None, "fsdp"),
        (["fsdp", "expert"], str | tuple[str, ...] | None, ("fsdp", "expert")),
        ({"a": 1}, dict[str, Any], {"a": 1}),
        ("RED", Color, Color.RED),
        ({"size": 2}, Inner, Inner(2)),
        ({"size": 2}, Inner | Other, Inner(2)),
        ({"size": 2, "width": 3}, Inner | Other, Other(3, 2)),
    ],
)
def test_taken(value, kind, expected):
    made = convert(value, kind, "x")
    assert made == expected and type(made) is type(expected)


@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        ("false", bool, "x='false': must be True or False"),
        (1, bool, "x=1: must be True or False"),
        (True, int, "x=True: must be a whole number"),
        (2.5, int, "x=2.5: must be a whole number"),
        ("3", int, "must be a whole number"),
        (10**19, int, "too large"),
        pytest.param(10**5000, int, "x=a number of thousands of digits: too large", id="huge"),
        (True, float, "x=True: must be a number"),
        ("nan", float, "x='nan': must be a number"),
        (math.nan, float, "must be a number"),
        (math.nan, Unbounded, "must be a number, or inf"),
        (math.inf, float, "must be finite"),
        (-math.inf, Unbounded, "must be finite"),
        (math.inf, int, "must be finite"),
        ("inf", float, "must be a number"),
        (10**400, float, "too large"),
        (None, float, "x=None: must be a number"),
        (2024, str, "x=2024: must be text"),
        ("abc", tuple[str, ...], "x='abc': must be a list, each of it text"),
        ({"a": 1}, tuple[str, ...], "must be a list"),
        ([1, "b"], tuple[int, ...], r"x\[1\]='b': must be a whole number"),
        ([0.2], tuple[float, float], "must be a list of 2: a number, a number"),
        ({"a": "b"}, tuple[tuple[str, float], ...], r"x\[0\]\[1\]='b': must be a number"),
        ("no", int | None, "x='no': must be a whole number or None"),
        (3, dict[str, Any], "must be a mapping"),
        ("BLUE", Color, "x='BLUE': allowed: RED"),
        (3, Inner, "x=3: must be a mapping of the fields of Inner"),
        ({"sice": 2}, Inner | None, "unknown field x.sice: did you mean 'size'"),
        ({"width": 3, "scale": 1}, Inner | Other, "unknown field x"),
    ],
)
def test_refused(value, kind, message):
    with pytest.raises(ConfigError, match=message):
        convert(value, kind, "x")


def test_a_mapping_becomes_a_dataclass_and_changes_the_default_of_a_nested_one():
    made = build(Outer, {"name": "a", "inner": {"scale": 2}}, "x")
    assert made == Outer("a", Inner(size=7, scale=2.0))  # not Inner's own default, 1
    assert change(made, {"inner": {"size": 3}}, "x") == Outer("a", Inner(size=3, scale=2.0))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "missing field x.name: text"),
        ({"name": "a", "inner": {"size": "b"}}, "x.inner.size='b': must be a whole number"),
        ({"name": "a", "nam.e": 1}, r"unknown field x\['nam.e'\]: did you mean 'name'"),
        ({"name": "bad"}, "x: name='bad': another one"),
        ({"name": "a", "given": 1}, "unknown field x.given"),
        ([], r"x=\[\]: must be a mapping of the fields of Outer"),
    ],
)
def test_what_no_dataclass_can_be(fields, message):
    with pytest.raises(ConfigError, match=message):
        build(Outer, fields, "x", given={"given": None})


def test_nested_fields_by_their_paths():
    fields = {"moe": {"top_k": 8, "empty": {}}, "rewards": {"a.b:c": 1.0}, "sizes": [{"x": 1}]}
    flat = {"model.moe.top_k": 8, "model.rewards['a.b:c']": 1.0, "model.sizes": [{"x": 1}]}
    assert flatten(fields, "model") == flat and flatten({"a": {"b": None}}) == {"a.b": None}

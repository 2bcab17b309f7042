"""Text into values and values into text, and where an override lands."""

import pytest
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder, required_placeholder

from deepseek_jax.config_file import any_names_and_values
from deepseek_jax.errors import ConfigError
from deepseek_jax.overrides import override, parse, plain, split, written


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("1e-3", 1e-3),
        ("true", True),
        ("False", False),
        ("none", None),
        ("null", None),
        ("'5'", "5"),
        ("abc", "abc"),
        ("", ""),
        ("inf", "inf"),
        ("0110", "0110"),
        ("[1, 'a']", [1, "a"]),
        ('{"a": true, "b": null}', {"a": True, "b": None}),
        ("{'kind': 'cosine', 'peak': 1e-3}", {"kind": "cosine", "peak": 1e-3}),
        ("{'a': ", "{'a': "),
        ("(" * 500, "(" * 500),
    ],
)
def test_text_and_value(text, value):
    assert parse(text) == value and type(parse(text)) is type(value)
    assert parse(written(value)) == value and type(parse(written(value))) is type(value)


def test_overrides_are_told_from_other_arguments():
    assert split(["--config=a.py", "--config.a.b=c=d", "--dry"]) == ([("a.b", "c=d")], ["--config=a.py", "--dry"])
    with pytest.raises(ConfigError, match="--config.seed has no value: write --config.seed=VALUE, without a space"):
        split(["--config.seed", "3"])


def config():
    made = ConfigDict(
        {
            "a": 1,
            "text": "byte",
            "none": None,
            "schedule": {"kind": "cosine", "peak": 1.0},
            "pairs": ({"n": 1}, {"n": 2}),
            "empty": placeholder(int),
        }
    )
    made.twice = made.get_ref("a") * 2
    return made


@pytest.mark.parametrize(
    ("path", "text", "expected"),
    [
        ("a", "2.5", {"a": 2.5, "twice": 5.0}),  # of another type; what refers to it follows
        ("a", "None", {"a": None, "twice": None}),
        ("text", "2024", {"text": "2024"}),  # a folder, not a number
        ("text", "None", {"text": None}),
        ("text", "{'name': 'x'}", {"text": {"name": "x"}}),
        ("none", "3", {"none": 3}),
        ("none.deep.er", "3", {"none": {"deep": {"er": 3}}}),
        ("schedule", "1e-3", {"schedule": 1e-3}),
        ("schedule.peak", "2", {"schedule": {"kind": "cosine", "peak": 2}}),
        ("new.field", "[1]", {"new": {"field": [1]}}),
        ("pairs[1].n", "7", {"pairs": [{"n": 1}, {"n": 7}]}),
        ("pairs[0]", "{}", {"pairs": [{}, {"n": 2}]}),
        ("pairs", "[]", {"pairs": []}),
        ("schedule['a.b:c']", "1.0", {"schedule": {"kind": "cosine", "peak": 1.0, "a.b:c": 1.0}}),
        ("schedule", "{'a.b:c': 1.0}", {"schedule": {"a.b:c": 1.0}}),
        ("empty", "4", {"empty": 4}),
    ],
)
def test_where_an_override_lands(path, text, expected):
    with any_names_and_values():
        made = config()
        before = plain(made)
        override(made, path, text)
    after = plain(made)
    assert {key: after[key] for key in after if after[key] != before.get(key, "nothing")} == expected


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("a.b", "config.a is 1, which has no fields"),
        ("text.name", "config.text is 'byte', which has no fields"),
        ("pairs[2].n", "config.pairs has 2 items"),
        ("pairs[2]", "config.pairs has 2 items"),
        ("schedule[0]", "which has no items"),
        ("none[0]", "config.none is None, which has no items"),
        ("", "not the path of a field"),
        (".a", "not the path of a field"),
        ("a..b", "not the path of a field"),
        ("[0]", "not the path of a field"),
        ("a[b]", "not the path of a field"),
    ],
)
def test_paths_that_lead_nowhere(path, message):
    with pytest.raises(ConfigError, match=message):
        override(config(), path, "1")


def test_what_an_experiment_can_hold():
    assert plain({"a": float("inf"), "b": (1, [None]), "c": ConfigDict({"d": True})}) == {
        "a": "inf",
        "b": (1, [None]),
        "c": {"d": True},
    }
    assert plain(ConfigDict({"a": required_placeholder(int)})) == {"a": None}
    for value, message in (
        ({"a": {1, 2}}, "config.a is a set"),
        ({"a": [print]}, r"config.a\[0\] is a builtin"),
        ({1: 2}, "the key 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            plain(value)

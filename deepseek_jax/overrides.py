"""Overrides: fields of an experiment set by text, `--config.model.moe.num_experts=32` on a command line, or by a
sweep's mapping.

A path is names joined by dots, with [0] for an item of a list and ['a.b:c'] for a name that holds dots. A value is
written as in Python or JSON (32, 1e-3, true, None, [1, 2], {'kind': 'cosine'}); anything else is text. A field may be
absent from the experiment's file; its name and value are checked where the experiment is built.
"""

import ast
import dataclasses
import json
import os
import re
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import FieldReference, RequiredValueError

from deepseek_jax.errors import ConfigError
from deepseek_jax.fields import is_mapping, join

PREFIX = "--config."
WORDS = {"true": True, "false": False, "none": None, "null": None}
STEP = re.compile(r"\.?([^.\[\]]+)|\[(\d+)\]|\[(?:'([^']+)'|\"([^\"]+)\")\]")


def split(argv: Sequence[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """-> (the overrides, (path, text), in order; the other arguments). Raises ConfigError for an override without
    "="."""
    found, rest = [], []
    for argument in argv:
        path, equals, text = argument.removeprefix(PREFIX).partition("=")
        if not argument.startswith(PREFIX):
            rest.append(argument)
        elif equals:
            found.append((path, text))
        else:
            raise ConfigError(f"{argument} has no value: write {argument}=VALUE, without a space")
    return found, rest


def parse(text: str) -> Any:
    """The value that a text stands for; the text itself where it is neither a Python literal nor JSON."""
    if text.strip().lower() in WORDS:
        return WORDS[text.strip().lower()]
    with warnings.catch_warnings(action="ignore"):  # the Python parser's, about text that is not Python
        for read in (ast.literal_eval, json.loads):
            try:
                return read(text)
            except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
                continue
    return text


def written(value: Any) -> str:
    """The text that `parse` reads as `value`."""
    value = plain(value, "value")
    return value if isinstance(value, str) and parse(value) == value else repr(value)


def override(config: ConfigDict, path: str, text: str) -> None:
    """Sets a field of `config` in place; fields that refer to it follow. Raises ConfigError for a path that leads
    nowhere.

    Where the present value is text, a number or a switch is text too: a folder may be called 2024.
    """
    steps = _steps(path)
    value = plain(parse(text), _show(steps))
    node: Any = config
    for depth, (step, following) in enumerate(zip(steps, steps[1:], strict=False), start=1):
        child = _child(node, step)
        if child is None and isinstance(following, str):
            child = ConfigDict()
            _put(node, step, child)
        if isinstance(child, tuple) and isinstance(following, int):
            child = list(child)
            _put(node, step, child)
        if not (isinstance(child, list) if isinstance(following, int) else is_mapping(child)):
            what = "items" if isinstance(following, int) else "fields"
            raise ConfigError(f"{PREFIX}{path}={text}: {_show(steps[:depth])} is {child!r}, which has no {what}")
        if isinstance(following, int) and following >= len(child):
            raise ConfigError(f"{PREFIX}{path}={text}: {_show(steps[:depth])} has {len(child)} items, the first is [0]")
        node = child
    now = _child(node, steps[-1])
    if isinstance(now, str) and now not in ("inf", "-inf", "nan") and isinstance(value, bool | int | float):
        value = text
    _put(node, steps[-1], value)


def _steps(path: str) -> list[str | int]:
    steps, position = [], 0
    while match := STEP.match(path, position):
        name, index, *quoted = match.groups()
        steps.append(int(index) if index else name or quoted[0] or quoted[1])
        position = match.end()
    if position != len(path) or not steps or isinstance(steps[0], int) or path.startswith("."):
        raise ConfigError(
            f"{PREFIX}{path}: not the path of a field; it is written as model.moe.num_experts or data.sources[0].name"
        )
    return steps


def _show(steps: Iterable[str | int]) -> str:
    path = "config"
    for step in steps:
        path = join(path, step)
    return path


def _child(node: Any, step: str | int) -> Any:
    if isinstance(step, int):
        return node[step]
    try:
        return node.get(step)
    except RequiredValueError:
        return None


def _put(node: Any, step: str | int, value: Any) -> None:
    if not isinstance(node, ConfigDict):
        node[step] = value
        return
    with node.unlocked(), node.ignore_type():
        if isinstance(_child(node, step), tuple):  # a ConfigDict would make a tuple of a list again, and keep that
            del node[step]
        node[step] = value


def plain(value: Any, path: str = "config") -> Any:
    """`value` with mappings as dictionaries, as JSON holds them: inf and nan are text, paths too, dataclasses are
    mappings.

    Lists and tuples stay. Raises ConfigError for a value that cannot be written down.
    """
    if isinstance(value, FieldReference):
        value = value.get()
    if hasattr(value, "item") and getattr(value, "shape", None) == ():
        value = value.item()
    if isinstance(value, float) and (value != value or abs(value) == float("inf")):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, list | tuple):
        return (
            type(value)(plain(item, f"{path}[{i}]") for i, item in enumerate(value))
            if type(value) in (list, tuple)
            else plain(list(value), path)
        )
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if is_mapping(value):
        items = value.items(preserve_field_references=True) if isinstance(value, ConfigDict) else value.items()
        return {_name(key, path): plain(_given(item), join(path, key)) for key, item in items}
    raise ConfigError(
        f"{path} is a {type(value).__name__}: an experiment holds numbers, text, True, False, None, lists and mappings "
        "of these"
    )


def _given(item: Any) -> Any:
    """A required value that is not set yet as None, which its field's check refuses."""
    return None if isinstance(item, FieldReference) and item.empty() else item


def _name(key: Any, path: str) -> str:
    if not isinstance(key, str):
        raise ConfigError(f"{path} has the key {key!r}: names of fields are text")
    return key

"""Errors a person can act on.

Each message says what was given, what is allowed and what to change. The command-line programs print such a
message without a traceback; anything else that is raised is a bug and keeps its traceback.
"""

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any


class UserError(Exception):
    """Something in the caller's input has to change; the message says what."""


class ConfigError(UserError, ValueError):
    """A configuration that cannot work."""


class DataError(UserError, ValueError):
    """A dataset, tokenizer or text that cannot be used."""


class CheckpointError(UserError, ValueError):
    """A checkpoint that is damaged, incomplete or of another model."""


class NumericsError(UserError, ArithmeticError):
    """A network whose numbers are not finite."""


class RewardError(UserError, RuntimeError):
    """A reward function that raised or returned something that is not a number."""


def nearest(name: str, allowed: Iterable[str]) -> str:
    """A sentence with the closest allowed name and the whole list: for 'unknown field' messages."""
    allowed = sorted(allowed)
    close = difflib.get_close_matches(name, allowed, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}allowed: {', '.join(allowed)}"


def build(cls: type, fields: Mapping[str, Any], path: str) -> Any:
    """The dataclass `cls` from a mapping. Raises ConfigError for an unknown field, naming the nearest, and for a missing one."""
    known = {field.name: field for field in dataclasses.fields(cls)}
    for name in fields:
        if name not in known:
            raise ConfigError(f"unknown field {path}.{name}: {nearest(str(name), known)}")
    for name, field in known.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in fields:
            raise ConfigError(f"missing field {path}.{name}")
    return cls(**fields)

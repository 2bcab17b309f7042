"""Errors that a person can act on.

Each message says what was given, what is allowed and what to change. The command-line programs print such a message
without a traceback; any other exception is a bug and keeps its traceback.
"""

import difflib
from collections.abc import Iterable


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
    """The closest allowed name and the whole list, in words, for messages about an unknown name."""
    allowed = sorted(allowed)
    close = difflib.get_close_matches(name, allowed, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}allowed: {', '.join(allowed)}"

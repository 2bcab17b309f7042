"""Ranges of the values in a config.

A dataclass checks its fields when it is made:

    def __post_init__(self):
        check(self, "train.", steps=at_least(1), log_every=at_least(1), eval_batches=or_none(at_least(1), "for all"))

which says `train.steps=0: must be at least 1`. A range is a function from a value to what is wrong with it, in words,
or None; so an experiment may write its own. Relations between fields are plain `if …: raise ConfigError(…)`.
"""

import math
import numbers
from collections.abc import Callable, Iterable
from typing import Any

from deepseek_jax.errors import ConfigError, nearest

Range = Callable[[Any], str | None]


def check(config: Any, prefix: str, /, **ranges: Range) -> None:
    """Raises ConfigError for the first of the named fields that is outside its range; `prefix` and the field's name
    begin the message ("grpo.", "--", "source 'x': ", "")."""
    for field, allowed in ranges.items():
        check_value(prefix + field, getattr(config, field), allowed)


def check_value(path: str, value: Any, allowed: Range) -> None:
    """Raises ConfigError, whose message begins with `path`, if `value` is outside the range."""
    if (wrong := allowed(value)) is not None:
        raise ConfigError(path + wrong)


def at_least(low: float, *, at_most: float = math.inf, below: float | None = None, why: str = "") -> Range:
    """From `low` to `at_most`, both included, or up to but not including `below`. `why` ends the message."""
    words = f"from {low} to {at_most:,}" if at_most < math.inf else f"at least {low}{_upper(at_most, below)}"
    return _range(lambda x: low <= x and _is_under(x, at_most, below), words, why)


def above(low: float, *, at_most: float = math.inf, below: float | None = None, why: str = "") -> Range:
    """More than `low`; the rest as in `at_least`."""
    return _range(lambda x: low < x and _is_under(x, at_most, below), f"above {low}{_upper(at_most, below)}", why)


def integer(low: int, *, multiple_of: int = 1, why: str = "") -> Range:
    """A whole number, at least `low`; for dataclasses that programs make too, whose types nothing else checks."""
    words = f"a multiple of {multiple_of}" if multiple_of > 1 else "an integer"
    return _range(
        lambda x: isinstance(x, numbers.Integral) and x >= low and x % multiple_of == 0, f"{words}, at least {low}", why
    )


def one_of(names: Iterable[str]) -> Range:
    """One of the names; the message has the nearest and the whole list."""
    names = tuple(names)
    return lambda value: None if value in names else f"={value!r}: {nearest(str(value), names)}"


def or_none(allowed: Range, meaning: str) -> Range:
    """The range, or None, whose `meaning` ends the message ("for all batches")."""

    def wrong(value: Any) -> str | None:
        said = None if value is None else allowed(value)
        return said and f"{said}, or None {meaning}"

    return wrong


def everywhere(allowed: Range) -> Range:
    """A schedule whose lowest value is in the range."""

    def wrong(schedule: Any) -> str | None:
        said = allowed(lowest := min(schedule.values))
        return said and f" goes down to {lowest:g}{said[said.index(':') :]}"

    return wrong


def _range(holds: Callable[[Any], bool], allowed: str, why: str = "") -> Range:
    reason = f"; {why}" if why else ""
    return lambda value: None if holds(value) else f"={value!r}: must be {allowed}{reason}"


def _is_under(x: float, at_most: float, below: float | None) -> bool:
    return x <= at_most and (below is None or x < below)


def _upper(at_most: float, below: float | None) -> str:
    if below is not None:
        return " and finite" if below == math.inf else f" and below {below:,}"
    return f" and at most {at_most:,}" if at_most < math.inf else ""


PROBABILITY = at_least(0, at_most=1)

"""Fields: builds a dataclass from nested mappings that a person wrote, and checks every name and value.

The annotations of the fields say what is allowed, so a new field needs no check of its own:

    bool, str, None            exactly these: "yes" is not true, 1 is not True
    int                        a whole number, also 1e3; not True
    float                      a finite number; `Unbounded` also takes inf
    tuple[...], dict[...]      a list, a mapping; tuple[tuple[str, X], ...] takes a mapping too
    a dataclass                a mapping of its fields; a class with `read(value, path, context)` reads itself
    an Enum                    the name of a member
    A | B                      a value of either
"""

import dataclasses
import enum
import functools
import math
import numbers
import types
import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any

from deepseek_jax.errors import ConfigError, UserError, nearest

Unbounded = Annotated[float, "inf is allowed"]
LARGEST = 2**63 - 1  # what an array of integers holds
NO_CONTEXT: Mapping[str, Any] = types.MappingProxyType({})


def build(
    cls: type, fields: Any, path: str, context: Mapping[str, Any] = NO_CONTEXT, given: Mapping[str, Any] = NO_CONTEXT
) -> Any:
    """The dataclass `cls` from a mapping of its fields.

    `path` is the name of the mapping in messages. `context` is passed on to every `read`: a schedule finds the length
    of its stage there. `given` are fields that the program sets and nobody writes. Raises ConfigError for an unknown
    field, naming the nearest, for a missing one, for a value of the wrong kind, and for a value that the class itself
    refuses.
    """
    return _make(cls, cls, fields, path, context, given)


def change(instance: Any, fields: Any, path: str, context: Mapping[str, Any] = NO_CONTEXT) -> Any:
    """As `build`, but fields that are not named, also in nested dataclasses, keep their values of `instance`."""
    return _make(type(instance), instance, fields, path, context, NO_CONTEXT)


def _make(cls: type, base: Any, fields: Any, path: str, context: Mapping[str, Any], given: Mapping[str, Any]) -> Any:
    if not is_mapping(fields):
        raise ConfigError(f"{path}={fields!r}: must be a mapping of the fields of {cls.__name__}")
    hints = _hints(cls)
    known = {
        field.name: field
        for field in dataclasses.fields(cls)
        if field.init and field.name not in given and _writable(hints[field.name])
    }
    values = dict(given)
    for name, value in fields.items():
        if name not in known:
            raise ConfigError(f"unknown field {join(path, name)}: {nearest(str(name), known)}")
        now = getattr(base, name, None) if base is not cls else known[name].default
        values[name] = convert(value, hints[name], join(path, name), context, now)
    if base is cls:
        for name, field in known.items():
            if (
                name not in values
                and field.default is dataclasses.MISSING
                and field.default_factory is dataclasses.MISSING
            ):
                raise ConfigError(f"missing field {join(path, name)}: {describe(hints[name])}")
    try:
        return cls(**values) if base is cls else dataclasses.replace(base, **values)
    except UserError:
        raise
    except ValueError as error:  # of a class that knows nothing of this package's errors
        raise ConfigError(f"{path}: {error}" if path else str(error)) from None


def _writable(kind: Any) -> bool:
    """True if a person can write a value of this kind; False for a dtype, for example."""
    plain_kinds = (bool, int, float, str, types.NoneType)
    return (
        not isinstance(kind, type)
        or kind in plain_kinds
        or issubclass(kind, enum.Enum)
        or dataclasses.is_dataclass(kind)
    )


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls, include_extras=True)


def convert(value: Any, kind: Any, path: str, context: Mapping[str, Any] = NO_CONTEXT, now: Any = None) -> Any:
    """Converts `value` to the annotation `kind`; see the module's docstring. A nested dataclass changes the fields of
    `now`.

    Raises ConfigError naming `path`, the value and what is allowed.
    """
    if kind is Any:
        return value
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return _one_of(value, arguments, kind, path, context, now)
    if kind is Unbounded or kind is float or kind is int:
        return _number(value, kind, path)
    if origin is tuple:
        return _tuple(value, arguments, kind, path, context)
    if origin in (dict, Mapping):
        if not is_mapping(value):
            raise _wrong(value, kind, path)
        return {key: convert(item, arguments[1], join(path, key), context) for key, item in value.items()}
    if kind is None or kind is types.NoneType:
        if value is not None:
            raise _wrong(value, kind, path)
        return None
    if isinstance(value, kind):  # a bool, a text, or something that is made already
        return value
    if hasattr(kind, "read"):
        return kind.read(value, path, context)
    if dataclasses.is_dataclass(kind) and is_mapping(value):
        return change(now, value, path, context) if isinstance(now, kind) else build(kind, value, path, context)
    if issubclass(kind, enum.Enum) and isinstance(value, str):
        if value not in kind.__members__:
            raise ConfigError(f"{path}={value!r}: {nearest(value, kind.__members__)}")
        return kind[value]
    raise _wrong(value, kind, path)


def _number(value: Any, kind: Any, path: str) -> int | float:
    if isinstance(value, str) and kind is Unbounded and value == "inf":
        return math.inf
    if not isinstance(value, numbers.Real) or isinstance(value, bool) or value != value:
        raise _wrong(value, kind, path)
    if abs(value) == math.inf:
        if kind is Unbounded and value > 0:
            return math.inf
        raise ConfigError(f"{path}={value}: must be finite")
    if kind is int and value != int(value):
        raise _wrong(value, kind, path)
    if abs(value) > (LARGEST if kind is int else 1e300):
        raise ConfigError(f"{path}={_shown(value)}: too large a number")
    return int(value) if kind is int else float(value)


def _tuple(value: Any, arguments: tuple, kind: Any, path: str, context: Mapping[str, Any]) -> tuple:
    items = value
    if is_mapping(value) and len(arguments) == 2 and arguments[1] is ... and typing.get_origin(arguments[0]) is tuple:
        items = list(value.items())  # pairs
    if not isinstance(items, list | tuple):
        raise _wrong(value, kind, path)
    if len(arguments) == 2 and arguments[1] is ...:
        return tuple(convert(item, arguments[0], f"{path}[{i}]", context) for i, item in enumerate(items))
    if len(items) != len(arguments):
        raise ConfigError(f"{path}={_shown(value)}: must be {describe(kind)}")
    return tuple(
        convert(item, each, f"{path}[{i}]", context)
        for i, (item, each) in enumerate(zip(items, arguments, strict=True))
    )


def _one_of(value: Any, kinds: tuple, union: Any, path: str, context: Mapping[str, Any], now: Any) -> Any:
    if value is None and types.NoneType in kinds:
        return None
    kinds = tuple(kind for kind in kinds if kind is not types.NoneType)
    if is_mapping(value):
        classes = [kind for kind in kinds if dataclasses.is_dataclass(kind)]
        if classes:  # the one that has most of these fields
            best = max(
                classes, key=lambda cls: len({field.name for field in dataclasses.fields(cls)} & set(value.keys()))
            )
            return convert(value, best, path, context, now)
    errors = []
    for kind in kinds:
        try:
            return convert(value, kind, path, context, now)
        except ConfigError as error:
            errors.append(error)
    structured = isinstance(value, list | tuple) or is_mapping(value)
    raise errors[0] if len(kinds) == 1 and structured else _wrong(value, union, path)


def _wrong(value: Any, kind: Any, path: str) -> ConfigError:
    return ConfigError(f"{path}={_shown(value)}: must be {describe(kind)}")


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # a whole number of thousands of digits
        return "a number of thousands of digits"
    return text if len(text) <= 120 else f"{text[:100]} …"


def describe(kind: Any) -> str:
    """The values that an annotation allows, in words."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe(argument) for argument in arguments)
    if kind is Unbounded:
        return "a number, or inf"
    if origin is tuple and len(arguments) == 2 and arguments[1] is ...:
        return f"a list, each of it {describe(arguments[0])}"
    if origin is tuple:
        return f"a list of {len(arguments)}: {', '.join(map(describe, arguments))}"
    if origin in (dict, Mapping):
        return "a mapping"
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return f"one of {', '.join(kind.__members__)}"
    words = {
        bool: "True or False",
        int: "a whole number",
        float: "a number",
        str: "text",
        types.NoneType: "None",
        None: "None",
    }
    if kind in words:
        return words[kind]
    return getattr(
        kind,
        "DESCRIPTION",
        f"a mapping of the fields of {kind.__name__}" if dataclasses.is_dataclass(kind) else f"a {kind.__name__}",
    )


@contextmanager
def inside(path: str) -> Iterator[None]:
    """Puts the path of a mapping in front of the ConfigErrors raised inside."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def join(path: str, name: Any) -> str:
    """The path of a field inside the mapping at `path`."""
    text = str(name)
    if not isinstance(name, str) or not text.replace(":", "_").isidentifier():
        return f"{path}[{name!r}]"
    return f"{path}.{text}" if path else text


def flatten(fields: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Nested fields by their dotted paths, {"model.moe.top_k": 8}."""
    flat = {}
    for name, value in fields.items():
        flat |= flatten(value, join(path, name)) if is_mapping(value) else {join(path, name): value}
    return flat


def is_mapping(value: Any) -> bool:
    """True of dictionaries and of ml_collections' ConfigDict, which does not derive from Mapping."""
    return isinstance(value, Mapping) or (hasattr(value, "keys") and not isinstance(value, type))

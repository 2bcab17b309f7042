"""JSON for the whole project: UTF-8, strict, with one rule for numbers that are not finite.

JSON has neither NaN nor infinity, and most readers refuse a file that holds one; they are written as null.
"""

import json
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from deepseek_jax.errors import DataError, UserError


def to_json(value: Any, indent: int | None = None) -> str:
    """Strict JSON: NaN and infinities become null, arrays (numpy, jax) become lists, and tuples too."""
    return json.dumps(_plain(value), indent=indent, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _plain(element) for key, element in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(element) for element in value]
    return _plain(value.tolist()) if hasattr(value, "tolist") else value


def parse_json(raw: bytes) -> Any:
    """The value of UTF-8 bytes; the words NaN and Infinity, which other programs write, are null. Raises ValueError,
    with the reason in words, for everything that is not JSON."""
    try:
        return json.loads(raw.decode("utf-8-sig"), parse_constant=lambda _: None)
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8 text") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json(path: Path, advice: str, error_type: type[UserError] = DataError) -> dict[str, Any]:
    """The object in a file. Raises `error_type` for a file that cannot be read or holds anything else; the message ends
    with `advice`."""
    try:
        value = parse_json(path.read_bytes())
    except OSError as error:
        raise error_type(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise error_type(f"{path} is damaged ({error}); {advice}") from None
    if not isinstance(value, dict):
        raise error_type(f"{path} is damaged (it holds {type(value).__name__}, not an object); {advice}")
    return value


def read_json_lines(path: Path, usable: Callable[[dict[str, Any]], bool] = lambda _: True) -> list[dict[str, Any]]:
    """The `usable` objects of a file of JSON lines; [] without a file.

    A last line that was cut short is left out, since a killed run leaves one. Other lines that are not usable objects,
    as a crash of the machine or another program leaves them, are left out too, and a warning counts them. Raises
    DataError where the file cannot be read.
    """
    if not path.exists():
        return []
    try:
        *lines, _ = path.read_bytes().split(b"\n")  # what follows the last newline was cut short
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    found, strange = [], []
    for number, line in enumerate(lines, start=1):
        try:
            value = parse_json(line)
        except ValueError:
            value = None
        if isinstance(value, dict) and usable(value):
            found.append(value)
        elif line.strip():
            strange.append(number)
    if strange:
        logging.warning(
            "%s: %d lines that this program did not write are left out, the first is line %d",
            path,
            len(strange),
            strange[0],
        )
    return found

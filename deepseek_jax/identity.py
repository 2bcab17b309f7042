"""Identity of a run: the settings that decide its results, and the free ones (how often it logs, how it is computed,
where its data is).

A configuration's field declares it: `log_every: int = free(10)`. Runs that differ in free fields alone may resume from
each other's checkpoints and have the same results; where a field says how the network is computed, up to rounding.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

CHANGES_RESULT = "changes_result"


def free(default: Any) -> Any:
    """A dataclass field that does not change the result."""
    return dataclasses.field(default=default, metadata={CHANGES_RESULT: False})


def is_free(field: dataclasses.Field) -> bool:
    return not field.metadata.get(CHANGES_RESULT, True)


def decisive(value: Any, path: str = "") -> dict[str, Any]:
    """The values that decide the result, by dotted path ("data.sources[0].name"); of dataclasses without their free
    fields.

    A callable, such as a schedule, is one value.
    """
    if dataclasses.is_dataclass(value) and not callable(value):
        items = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if not is_free(field)}
    elif isinstance(value, Mapping):
        items = value
    elif isinstance(value, list | tuple) and any(dataclasses.is_dataclass(element) for element in value):
        return {
            name: leaf for i, element in enumerate(value) for name, leaf in decisive(element, f"{path}[{i}]").items()
        }
    else:
        return {path: tuple(value) if isinstance(value, list) else value}
    return {
        name: leaf
        for key, item in items.items()
        for name, leaf in decisive(item, f"{path}.{key}" if path else str(key)).items()
    }

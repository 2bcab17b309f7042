"""Which matrix product runs in which number format, by recipe name."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.errors import ConfigError, nearest
from deepseek_jax.precision.fp8 import FP8Recipe
from deepseek_jax.precision.recipe import Recipe
from kernels_pallas import Quantizer

_FLOAT32, _BFLOAT16 = jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)
RECIPES = {
    "float32": Recipe("float32", _FLOAT32, _FLOAT32, jax.lax.Precision.HIGHEST),
    "bfloat16": Recipe("bfloat16", _FLOAT32, _BFLOAT16, jax.lax.Precision.DEFAULT),
    "fp8_deepseek": FP8Recipe("fp8_deepseek", _FLOAT32, _BFLOAT16, jax.lax.Precision.DEFAULT),
}


def recipe(spec: str | Mapping[str, Any]) -> Recipe:
    """The recipe called `spec`, or {"name": …, fields that differ from it}, nested as the recipe's own fields are.

    Raises ConfigError for an unknown name or field, with the nearest, and for a value that a field does not take.
    """
    fields = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = fields.pop("name", None)
    if name not in RECIPES:
        raise ConfigError(f"unknown precision {name!r}: {nearest(str(name), RECIPES)}")
    return _replace(RECIPES[name], fields, "config.precision")


def _replace(instance: Any, fields: Mapping[str, Any], path: str) -> Any:
    """The dataclass with some fields replaced, those of dataclasses in it too."""
    known = {field.name: getattr(instance, field.name) for field in dataclasses.fields(instance)}
    changes = {}
    for field, value in fields.items():
        if field not in known or isinstance(known[field], jnp.dtype):
            raise ConfigError(f"unknown field {path}.{field}: {nearest(field, known)}")
        if isinstance(value, Mapping):
            default = known[field] if dataclasses.is_dataclass(known[field]) else Quantizer()  # a quantiser that is None by default
            value = _replace(default, value, f"{path}.{field}")
        changes[field] = tuple(value) if isinstance(value, list) else value
    try:
        return dataclasses.replace(instance, **changes)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None

"""Precision policies by name: the number format of each matrix product."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.errors import ConfigError
from deepseek_jax.fields import change, is_mapping
from deepseek_jax.precision.fp8 import FP8Precision
from deepseek_jax.precision.policy import Precision
from deepseek_jax.registry import resolve

_FLOAT32, _BFLOAT16 = jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)
PRECISIONS = {
    "float32": Precision("float32", _FLOAT32, _FLOAT32, jax.lax.Precision.HIGHEST),
    "bfloat16": Precision("bfloat16", _FLOAT32, _BFLOAT16, jax.lax.Precision.DEFAULT),
    "fp8_deepseek": FP8Precision("fp8_deepseek", _FLOAT32, _BFLOAT16, jax.lax.Precision.DEFAULT),
}


def get_precision(spec: str | Mapping[str, Any], field: str = "config.precision") -> Precision:
    """The policy called `spec`, or {"name": …, fields that differ from it}, nested as the policy's own fields are.

    A name is one of `PRECISIONS`, or your own Precision as package.module:NAME. `field` names the setting in messages.
    Raises ConfigError for an unknown name or field, with the nearest, and for a value that a field does not take.
    """
    fields = {"name": spec} if isinstance(spec, str) else dict(spec.items()) if is_mapping(spec) else {"name": spec}
    name = fields.pop("name", None)
    found = resolve(PRECISIONS, name, field)
    if not isinstance(found, Precision):
        raise ConfigError(
            f"{field}={name!r} is a {type(found).__name__}: must be a deepseek_jax.precision.policy.Precision, such as "
            "dataclasses.replace of one of ours"
        )
    return change(found, fields, field)

"""Precision policies by name: the number format of each matrix product."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.errors import ConfigError, nearest
from deepseek_jax.fields import change, is_mapping
from deepseek_jax.precision.fp8 import FP8Precision
from deepseek_jax.precision.policy import Precision

_FLOAT32, _BFLOAT16 = jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)
PRECISIONS = {
    "float32": Precision("float32", _FLOAT32, _FLOAT32, jax.lax.Precision.HIGHEST),
    "bfloat16": Precision("bfloat16", _FLOAT32, _BFLOAT16, jax.lax.Precision.DEFAULT),
    "fp8_deepseek": FP8Precision("fp8_deepseek", _FLOAT32, _BFLOAT16, jax.lax.Precision.DEFAULT),
}


def get_precision(spec: str | Mapping[str, Any]) -> Precision:
    """The policy called `spec`, or {"name": …, fields that differ from it}, nested as the policy's own fields are.

    Raises ConfigError for an unknown name or field, with the nearest, and for a value that a field does not take.
    """
    fields = {"name": spec} if isinstance(spec, str) else dict(spec.items()) if is_mapping(spec) else {"name": spec}
    name = fields.pop("name", None)
    if not isinstance(name, str) or name not in PRECISIONS:
        raise ConfigError(f"unknown precision {name!r}: {nearest(str(name), PRECISIONS)}")
    return change(PRECISIONS[name], fields, "config.precision")

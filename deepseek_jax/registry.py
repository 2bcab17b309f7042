"""Names in a config: one of ours, or `package.module:attribute` of the user's own."""

import importlib
from collections.abc import Mapping
from typing import Any

from deepseek_jax.errors import ConfigError, nearest


def resolve(registry: Mapping[str, Any], name: str, field: str) -> Any:
    """The entry of `registry` called `name`, or what `package.module:attribute` names; `field` is the config's field
    that holds the name.

    Raises ConfigError for an unknown name, with the nearest known one, and for a module or an attribute that cannot be
    imported.
    """
    if isinstance(name, str) and name in registry:
        return registry[name]
    if isinstance(name, str) and ":" in name:
        return _imported(name, field)
    raise ConfigError(f"{field}={name!r}: {nearest(str(name), registry)}, or your own as package.module:attribute")


def _imported(name: str, field: str) -> Any:
    module_name, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the user's module raises while it is read
        raise ConfigError(
            f"{field}={name!r}: importing {module_name!r} failed ({type(error).__name__}: {error}). Write "
            "package.module:attribute; the folder that holds the module is the experiment file's own, the current one, "
            "or one on PYTHONPATH"
        ) from error
    value = module
    for part in attribute.split("."):
        if not part or not hasattr(value, part):
            known = [known for known in vars(value) if not known.startswith("_")]
            raise ConfigError(f"{field}={name!r}: {module_name} has no {attribute!r}: {nearest(part, known)}")
        value = getattr(value, part)
    return value

"""Names in a config: one of ours, or `package.module:attribute` of the user's own."""

import dataclasses
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from deepseek_jax.errors import ConfigError, nearest
from deepseek_jax.fields import build, is_mapping


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
    except Exception as error:  # anything that the user's module raises on import
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


def path_of(value: Any) -> str:
    """`package.module:attribute` of a class or a function, under which `resolve` finds it.

    An experiment file counts as the module of its name: its folder is searched while it runs. Raises ConfigError for a
    class or a function that is defined inside a function, which cannot be imported.
    """
    if "<locals>" in value.__qualname__:
        raise ConfigError(f"{value.__qualname__} is defined inside a function: move it to the top of its file")
    module = value.__module__
    if module.startswith("file "):  # as config_file.call runs an experiment
        module = Path(module.removeprefix("file ")).stem
    return f"{module}:{value.__qualname__}"


@dataclasses.dataclass(frozen=True)
class Variant:
    """Base of a section of a config that may be one of several classes; its field `kind` says which.

    `class AttentionConfig(Variant)` starts a family with an empty dictionary `variants`; `class MLAConfig(
    AttentionConfig, kind="mla")` enters it. A class of the user's own needs no name: its kind is
    `package.module:Class`.
    """

    variants: ClassVar[dict[str, type]]
    kind: str = dataclasses.field(default="", init=False, repr=False)

    def __init_subclass__(cls, kind: str | None = None, **rest: Any):
        super().__init_subclass__(**rest)
        if kind is not None:
            cls.variants[kind] = cls
        cls.kind = kind or path_of(cls)

    @classmethod
    def read(cls, value: Any, path: str, context: Mapping[str, Any]) -> "Variant":
        """The config of a mapping {"kind": …, fields of that class}, at `path` of the whole config.

        Without a kind the class of ours that has most of the fields is taken. Raises ConfigError for a kind that cannot
        be found or is not a class of this family, and for fields as `fields.build` does.
        """
        known = f"{', '.join(sorted(cls.variants))}, or your own as package.module:Class"
        if not is_mapping(value):
            raise ConfigError(f"{path}={value!r}: must be a mapping of 'kind' ({known}) and the fields of that kind")
        fields = dict(value.items())
        kind = fields.pop("kind", None)
        if kind is None:
            variant = max(cls.variants.values(), key=lambda one: len(_names(one) & fields.keys()))
        else:
            variant = resolve(cls.variants, kind, f"{path}.kind")
        if not (isinstance(variant, type) and issubclass(variant, cls)):
            raise ConfigError(f"{path}.kind={kind!r}: not a subclass of {cls.__name__}; allowed: {known}")
        missing = getattr(variant, "__abstractmethods__", ())
        if missing:
            raise ConfigError(f"{path}.kind={kind!r}: the class does not define {', '.join(sorted(missing))}")
        return build(variant, fields, path, context)


def _names(cls: type) -> set[str]:
    return {field.name for field in dataclasses.fields(cls)}

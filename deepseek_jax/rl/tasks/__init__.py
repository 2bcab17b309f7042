"""Tasks: problems to reason about, sampled, demonstrated and checked in the graph.

A config names a task of `TASKS`, or your own, a frozen dataclass derived from `Task`, as package.module:Class.
"""

from collections.abc import Mapping
from typing import Any

from deepseek_jax.errors import ConfigError
from deepseek_jax.fields import build, is_mapping
from deepseek_jax.registry import resolve
from deepseek_jax.rl.tasks.base import Task
from deepseek_jax.rl.tasks.chain import ChainTask
from deepseek_jax.rl.tasks.countdown import CountdownTask
from deepseek_jax.rl.tasks.parity import ParityTask

TASKS: dict[str, type[Task]] = {"parity": ParityTask, "chain": ChainTask, "countdown": CountdownTask}


def build_task(fields: Mapping[str, Any]) -> Task:
    """The task called fields["name"] with the other fields as its settings. Raises ConfigError for an unknown name, for
    an attribute that is not a class derived from Task, and for fields that the task does not have or take."""
    if not is_mapping(fields):
        raise ConfigError(f"task={fields!r}: must be a mapping such as {{'name': 'parity', 'bits': 20}}")
    fields = dict(fields.items())
    name = fields.pop("name", None)
    found = resolve(TASKS, name, "task.name")
    if not (isinstance(found, type) and issubclass(found, Task)):
        raise ConfigError(
            f"task.name={name!r} is a {type(found).__name__}: must be a class derived from deepseek_jax.rl.tasks.Task"
        )
    if missing := sorted(getattr(found, "__abstractmethods__", ())):
        raise ConfigError(f"task.name={name!r}: {found.__name__} lacks {', '.join(missing)} (see Task)")
    return build(found, fields, f"task.{name}")

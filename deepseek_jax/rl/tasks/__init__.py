"""Problems to reason about: sampled, demonstrated and checked in the graph. `build_task` finds them by name."""

from collections.abc import Mapping
from typing import Any

from deepseek_jax.errors import ConfigError, nearest
from deepseek_jax.fields import build, is_mapping
from deepseek_jax.rl.tasks.base import Task
from deepseek_jax.rl.tasks.chain import ChainTask
from deepseek_jax.rl.tasks.countdown import CountdownTask
from deepseek_jax.rl.tasks.parity import ParityTask

TASKS: dict[str, type[Task]] = {"parity": ParityTask, "chain": ChainTask, "countdown": CountdownTask}


def build_task(fields: Mapping[str, Any]) -> Task:
    """The task called fields["name"] with the other fields as its settings; ConfigError names what is unknown or can't
    work."""
    if not is_mapping(fields):
        raise ConfigError(f"task={fields!r}: must be a mapping such as {{'name': 'parity', 'bits': 20}}")
    fields = dict(fields.items())
    name = fields.pop("name", None)
    if not isinstance(name, str) or name not in TASKS:
        raise ConfigError(f"task.name={name!r}: {nearest(str(name), TASKS)}")
    return build(TASKS[name], fields, f"task.{name}")

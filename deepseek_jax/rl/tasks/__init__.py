"""Problems to reason about: sampled, demonstrated and checked in the graph. `build_task` finds them by name."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from deepseek_jax.errors import ConfigError, nearest
from deepseek_jax.rl.tasks.base import Task
from deepseek_jax.rl.tasks.chain import ChainTask
from deepseek_jax.rl.tasks.countdown import CountdownTask
from deepseek_jax.rl.tasks.parity import ParityTask

TASKS: dict[str, type[Task]] = {"parity": ParityTask, "chain": ChainTask, "countdown": CountdownTask}


def build_task(fields: Mapping[str, Any]) -> Task:
    """The task called fields["name"] with the other fields as its settings; ConfigError names what is unknown or can't work."""
    fields = dict(fields)
    name = fields.pop("name", None)
    if name not in TASKS:
        raise ConfigError(f"task.name={name!r}: {nearest(str(name), TASKS)}")
    known = [f.name for f in dataclasses.fields(TASKS[name])]
    for field in fields:
        if field not in known:
            raise ConfigError(f"unknown field task.{field} of task {name!r}: {nearest(field, known)}")
    return TASKS[name](**fields)

"""Task documents: demonstrations of a task as a data source, for pre-training and the cold start."""

import dataclasses

import jax
import numpy as np

from deepseek_jax.ranges import PROBABILITY, at_least, check, or_none
from deepseek_jax.rl.tasks.base import Task


@dataclasses.dataclass(frozen=True)
class TaskDocuments:
    """Demonstrations of the experiment's task as a data source called "task": `count` documents of the training split.

    `cot_probability` and `corrupt_probability` replace the task's own. The loss is on the completion alone, or with
    `whole_document` on the prompt too.
    """

    count: int = 16_384
    cot_probability: float | None = None
    corrupt_probability: float | None = None
    whole_document: bool = False

    def __post_init__(self):
        share = or_none(PROBABILITY, "for the task's own")
        check(self, "task_documents.", count=at_least(1), cot_probability=share, corrupt_probability=share)

    def write(self, task: Task, seed: int) -> list[dict[str, np.ndarray]]:
        """Records {"tokens", "loss_mask"} for the loader."""
        changes = {
            name: getattr(self, name)
            for name in ("cot_probability", "corrupt_probability")
            if getattr(self, name) is not None
        }
        task = dataclasses.replace(task, **changes)
        documents = jax.jit(lambda key: task.documents(key, self.count, completion_only=not self.whole_document))(
            jax.random.key(seed)
        )
        tokens, mask, loss_mask = (np.asarray(documents[name]) for name in ("tokens_BT", "mask_BT", "loss_mask_BT"))
        return [{"tokens": t[m > 0], "loss_mask": w[m > 0]} for t, m, w in zip(tokens, mask, loss_mask, strict=True)]

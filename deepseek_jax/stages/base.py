"""Stage: the interface of a stage, what all stages of a run share, and the helpers that several of them use.

A stage of your own is a frozen dataclass derived from `Stage`, in any module, and `"kind": "module:Class"` in its
section. Its fields after `name` and `experiment` are the section's, checked by their annotations. It needs `summary`
and `run`; one that leaves files also says which with `made` and `finished`, so that a restarted run keeps them.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np

from deepseek_jax.accounting.cost import Work
from deepseek_jax.data.tokenizer_files import FOLDER
from deepseek_jax.data.tokenizers import ByteTokenizer, Tokenizer, is_own
from deepseek_jax.errors import ConfigError
from deepseek_jax.fields import build
from deepseek_jax.model.transformer import Transformer, init_variables
from deepseek_jax.parallel.arrays import variables_sharding
from deepseek_jax.parallel.hosts import is_primary
from deepseek_jax.ranges import at_least, check_value
from deepseek_jax.report import plot_curves
from deepseek_jax.rl.tasks import Task
from deepseek_jax.training.checkpoints import steps_in
from deepseek_jax.training.metrics import read_metrics

Variables = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Experiment:
    """The objects that all stages of a run share. `sections` has the stages' own settings, in order."""

    name: str
    model: Transformer
    tokenizer: Tokenizer
    task: Task | None
    sections: dict[str, dict[str, Any]]
    seed: int
    workdir: Path
    config: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Batches:
    """Sizes that a mesh has to divide, each with the field that a message names: sequences of a batch, and tokens of a
    sequence."""

    sequences: list[tuple[str, int]] = dataclasses.field(default_factory=list)
    lengths: list[tuple[str, int]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of an experiment, built from its section: it takes the weights that the stage before left.

    `changes_weights` False is for a stage that only measures, `leaves_results` False for one that writes no files.
    `length` is the setting that says how many steps it makes, "" if it makes none.
    """

    name: str
    experiment: Experiment

    changes_weights: ClassVar[bool] = True
    leaves_results: ClassVar[bool] = True
    length: ClassVar[str] = ""

    @classmethod
    def build(cls, name: str, experiment: Experiment, fields: Mapping[str, Any]) -> "Stage":
        """The stage from its section without `kind`. Raises ConfigError for an unknown, missing or impossible field."""
        return build(cls, fields, "", given={"name": name, "experiment": experiment})

    @classmethod
    def batches(cls, name: str, fields: Mapping[str, Any]) -> Batches:
        """The batches of a section of this kind, read before there is a mesh to build the stage on."""
        del name, fields
        return Batches()

    @property
    def folder(self) -> Path:
        return self.experiment.workdir / self.name

    def summary(self) -> str:
        """One line for the plan and the log."""
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """The settings that decide the result, under the names of the experiment file."""
        fields = (field.name for field in dataclasses.fields(self))
        return {field: getattr(self, field) for field in fields if field not in ("name", "experiment")}

    def made(self) -> list[int]:
        """The steps that its folder has the results of, oldest first; [] if there are none yet."""
        return steps_in(self.folder / "checkpoints")

    def finished(self) -> bool:
        """True if the folder has everything that `run` would make."""
        return False

    def check_data(self, prepare: bool) -> None:
        """Opens the data that `run` will read, before the first stage starts; downloads nothing unless `prepare`.
        Raises DataError."""

    def work(self, shards: int | None = None) -> Work | None:
        """Tokens and FLOPs by the closed formulas, None for a stage that has no formula. `shards`: into how many shards
        the mesh divides a batch's sequences (None: as the experiment's own mesh does)."""
        del shards
        return None

    def updated_by(self) -> dict[str, dict[str, int]]:
        """{rule: {parameter: its size}} of the stage's optimizer (see `optimizer.updated_by`); {} without one."""
        return {}

    def run(self, variables: Variables | None) -> Variables:
        """The weights that the stage leaves; those it has left before if it is finished. `variables` is None at the
        start of an experiment (see `initial_weights`)."""
        raise NotImplementedError

    def keep_tokenizer(self) -> None:
        """Puts the tokenizer's files next to the checkpoints, so that the folder alone can read and write text. A
        tokenizer of a user's own is found again by the name in experiment.json."""
        if is_primary() and not is_own(self.experiment.config.get("tokenizer", "byte")):
            self.experiment.tokenizer.save(self.folder / FOLDER)

    def draw_curves(self) -> None:
        """Leaves curves.png, the figure of the logged metrics, in the folder."""
        if not is_primary():
            return
        title = f"{self.experiment.name}, {self.name}, seed {self.experiment.seed}"
        try:
            plot_curves(read_metrics(self.folder), self.folder / "curves.png", title)
        except Exception as error:  # weights are worth more than a figure of them
            print(
                f"{self.name}: curves.png could not be drawn ({type(error).__name__}: {error}); metrics.jsonl has the "
                "numbers",
                flush=True,
            )

    def seed(self, purpose: str) -> int:
        """A seed for one use of chance in this stage, such as "order" or "sampling"."""
        path = "/".join((self.name, purpose)).encode()
        return int(np.random.SeedSequence([self.experiment.seed, *path]).generate_state(1)[0])

    def initial_weights(self, variables: Variables | None) -> Variables:
        """`variables`, or random weights where no stage before has made any: reinforcement learning from scratch is a
        legitimate question."""
        if variables is not None:
            return variables
        model = self.experiment.model
        return init_variables(model, jax.random.key(self.experiment.seed), variables_sharding(model))

    def require_task(self) -> Task:
        """The experiment's task. Raises ConfigError if there is none, or if the tokenizer is not the task's."""
        experiment = self.experiment
        if experiment.task is None:
            raise ConfigError(
                f"stage {self.name!r} works on a task: add config.task, for example {{'name': 'parity', 'bits': 20}}"
            )
        if not isinstance(experiment.tokenizer, ByteTokenizer):
            raise ConfigError(
                f"stage {self.name!r} works on config.task, whose problems are written in the ids of the byte "
                f"tokenizer, and config.tokenizer={experiment.config.get('tokenizer')!r}: set it to 'byte', and "
                f"model.vocab_size to {ByteTokenizer.vocab_size} or more"
            )
        return experiment.task


def require_length(seq_len: int) -> None:
    """Raises ConfigError unless a sequence has a token and a next one to predict, and positions that an int32 holds."""
    check_value("seq_len", seq_len, at_least(2, below=2**31, why="a token and the next one; positions are int32"))

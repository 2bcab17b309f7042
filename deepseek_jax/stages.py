"""The stages an experiment is made of: each takes the weights that the one before left and leaves its own in
workdir/<stage>/.

A stage is built, and with that checked, from its section of the experiment file before anything runs. Starting a
finished stage again returns what it left.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.accounting.chips import peak_flops
from deepseek_jax.accounting.flops import training_flops_per_token
from deepseek_jax.data.checks import check_sources
from deepseek_jax.data.config import DataConfig, SourceConfig
from deepseek_jax.data.loader import Loader, build_loader
from deepseek_jax.data.sources import holds_out
from deepseek_jax.data.tokenizer_files import FOLDER
from deepseek_jax.data.tokenizers import ByteTokenizer
from deepseek_jax.errors import ConfigError, nearest
from deepseek_jax.experiment import Experiment
from deepseek_jax.fields import build, change, inside
from deepseek_jax.json_io import to_json
from deepseek_jax.model.transformer import Transformer, init_variables
from deepseek_jax.parallel.hosts import from_primary, is_primary, write_text
from deepseek_jax.parallel.placement import MeshPlacement
from deepseek_jax.parallel.shardings import host_share, variables_sharding
from deepseek_jax.precision.fp8 import FP8Precision
from deepseek_jax.report import plot_curves
from deepseek_jax.rl.config import GRPOConfig
from deepseek_jax.rl.diagnostics import DiagnosticsConfig
from deepseek_jax.rl.evaluate import EvalConfig, evaluate
from deepseek_jax.rl.grpo import GRPO, learning_rate
from deepseek_jax.rl.loop import LoopConfig, train_grpo
from deepseek_jax.rl.rewards import build_rewards
from deepseek_jax.rl.tasks import Task
from deepseek_jax.training.batches import Batch
from deepseek_jax.training.checkpoints import steps_in
from deepseek_jax.training.config import TrainConfig
from deepseek_jax.training.evaluate import make_evaluate
from deepseek_jax.training.loop import train
from deepseek_jax.training.metrics import MetricsWriter, read_metrics
from deepseek_jax.training.objective import uses_mtp
from deepseek_jax.training.optimizer import OptimizerConfig, build_optimizer
from deepseek_jax.training.outliers import add_outliers

Variables = Mapping[str, Any]


class Stage:
    """What all kinds of stage have. `variables` is None at the start of an experiment; a stage that needs weights says
    so."""

    name: str
    experiment: Experiment
    changes_weights = True
    leaves_results = True  # in its folder
    length = ""  # the setting that says how many steps it makes

    @property
    def folder(self) -> Path:
        return self.experiment.workdir / self.name

    def summary(self) -> str:
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """What decides the result, under the names of the experiment file."""
        raise NotImplementedError

    def made(self) -> list[int]:
        """The steps that its folder has the results of, oldest first; [] where there is nothing yet."""
        return steps_in(self.folder / "checkpoints")

    def finished(self) -> bool:
        raise NotImplementedError

    def check_data(self, prepare: bool) -> None:
        """Opens the data that `run` will read, without what would have to be downloaded unless `prepare`. Raises
        DataError."""

    def run(self, variables: Variables | None) -> Variables:
        """The weights that the stage leaves; those it has left if it is finished."""
        raise NotImplementedError

    def keep_tokenizer(self) -> None:
        """Puts the tokenizer's files beside the checkpoints: whoever takes the folder reads and writes the text it was
        trained on."""
        if is_primary():
            self.experiment.tokenizer.save(self.folder / FOLDER)


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
        if self.count < 1:
            raise ConfigError(f"task_documents.count={self.count}: at least 1")
        for name in ("cot_probability", "corrupt_probability"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ConfigError(
                    f"task_documents.{name}={value}: a probability, from 0 to 1, or None for the task's own"
                )

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


@dataclasses.dataclass(frozen=True)
class TrainStage(Stage):
    """Pre-training or SFT: next-token prediction on packed documents. They differ in their data alone.

    `batch_size` is the sequences of a step; where `train.batch_size` is a schedule, the largest, and None in the
    experiment.
    """

    name: str
    experiment: Experiment
    train: TrainConfig
    seq_len: int
    batch_size: int | None = None
    data: DataConfig = DataConfig()
    task_documents: TaskDocuments = TaskDocuments()

    length = "train.steps"

    def __post_init__(self):
        _require_length(self.seq_len)
        object.__setattr__(self, "batch_size", self.train.batch_sizes(self.batch_size)[-1])
        if self._uses_task():
            task = _require_task(self.name, self.experiment)
            needed = task.prompt_length + task.completion_length
            if needed > self.seq_len:
                raise ConfigError(
                    f"seq_len={self.seq_len}: a demonstration of the task has up to {needed} tokens and would be torn; "
                    f"raise seq_len to at least {needed}, or make the task smaller"
                )

    @classmethod
    def build(cls, name: str, experiment: Experiment, fields: Mapping[str, Any]) -> "TrainStage":
        return build(cls, fields, "", given={"name": name, "experiment": experiment})

    def _uses_task(self) -> bool:
        return any(source.name == "task" for source in self.data.sources)

    def summary(self) -> str:
        sources = ", ".join(f"{source.name} ({source.weight:g})" for source in self.data.sources)
        return f"{self.train.steps} steps of {self.batch_size} × {self.seq_len} tokens from {sources}"

    def settings(self) -> dict[str, Any]:
        return {
            "train": self.train,
            "data": self.data,
            "seq_len": self.seq_len,
            "batch_size": self.batch_size if self.train.batch_size is None else None,
            "task_documents": self.task_documents if self._uses_task() else None,
        }

    def finished(self) -> bool:
        return max(self.made(), default=0) >= self.train.steps

    def check_data(self, prepare: bool) -> None:
        _check_sources(self._text(), ("train", "validation"), self.experiment, self.data.data_dir, prepare)

    def _text(self) -> tuple[SourceConfig, ...]:
        """The sources that are not the experiment's task."""
        return tuple(source for source in self.data.sources if source.name != "task")

    def _held_out(self) -> tuple[SourceConfig, ...]:
        vocab_size = self.experiment.model.config.vocab_size
        return tuple(source for source in self._text() if holds_out(source, self.data.data_dir, vocab_size))

    def run(self, variables: Variables | None) -> Variables:
        experiment, model, held_out = self.experiment, self.experiment.model, None
        self.keep_tokenizer()
        if not self.finished() and (sources := self._held_out()):
            held_out = held_out_batches(
                dataclasses.replace(self.data, sources=sources), experiment, self.seq_len, self.batch_size
            )
        result = train(
            model,
            self.train,
            self._open_loader,
            self.folder,
            variables=variables,
            held_out=held_out,
            seed=experiment.seed,
            flops_per_token=self.flops_per_token,
            peak_flops=_peak_flops(model),
            name=self.name,
        )
        _draw_curves(experiment, self.name)
        return result.state.variables

    @property
    def flops_per_token(self) -> int:
        """Forward and backward, MTP modules included where they are trained."""
        model = self.experiment.model
        return training_flops_per_token(model.config, self.seq_len, mtp=uses_mtp(model, self.train.objective))

    def _open_loader(self) -> Loader:
        experiment, in_memory = self.experiment, None
        if self._uses_task():
            in_memory = {
                "task": {"train": self.task_documents.write(experiment.task, _seed(experiment, self.name, "documents"))}
            }
        held_out = self._held_out()
        for source in self._text():
            if source.holds_out and source not in held_out:
                share = f"its held-out share (validation_fraction={source.validation_fraction:g})"
                print(
                    f"{self.name}: no document of {source.name} falls into {share}: raise it, or set validation_path",
                    flush=True,
                )
        if self._text() and not held_out:
            print(f"{self.name}: nothing is held out, so no held-out loss is measured", flush=True)
        return build_loader(
            self.data,
            experiment.tokenizer,
            self.seq_len,
            self.batch_size,
            seed=_seed(experiment, self.name, "order"),
            share=host_share(experiment.model.placement),
            in_memory=in_memory,
            vocab_size=experiment.model.config.vocab_size,
        )


@dataclasses.dataclass(frozen=True)
class GRPOSection:
    """What an experiment file says of a GRPO stage: `grpo` the fields of GRPOConfig, `optimizer` those that differ from
    the recipe's."""

    grpo: dict[str, Any]
    optimizer: dict[str, Any] = dataclasses.field(default_factory=dict)
    loop: LoopConfig = LoopConfig()
    eval: EvalConfig = EvalConfig()
    diagnostics: DiagnosticsConfig = DiagnosticsConfig()
    loss_chunk: int = 4096

    def __post_init__(self):
        if self.loss_chunk < 1:
            raise ConfigError(f"loss_chunk={self.loss_chunk}: at least 1 token at a time")


@dataclasses.dataclass(frozen=True)
class GRPOStage(Stage):
    """Reinforcement learning with rule rewards on the experiment's task. Also leaves curves.png."""

    name: str
    experiment: Experiment
    grpo: GRPO
    optimizer: OptimizerConfig
    loop: LoopConfig
    evaluation: EvalConfig
    diagnostics: DiagnosticsConfig

    length = "grpo.steps"

    @classmethod
    def build(cls, name: str, experiment: Experiment, fields: Mapping[str, Any]) -> "GRPOStage":
        section = build(GRPOSection, fields, "")
        task = _require_task(name, experiment)
        config = GRPOConfig.from_dict(
            {"max_prompt_length": task.prompt_length, "max_completion_length": task.completion_length} | section.grpo
        )
        if config.max_prompt_length < task.prompt_length:
            raise ConfigError(
                f"grpo.max_prompt_length={config.max_prompt_length}: the task's prompts have {task.prompt_length} "
                "tokens"
            )
        recipe = OptimizerConfig(learning_rate(config), weight_decay=0.0)
        optimizer = change(recipe, section.optimizer, "optimizer", {"steps": config.steps})
        twice = [field for field in ("learning_rate", "warmup_steps") if field in section.grpo]
        if twice and optimizer.learning_rate != recipe.learning_rate:
            raise ConfigError(
                f"optimizer.learning_rate and {' and '.join(f'grpo.{field}' for field in twice)} are two answers to "
                "one question: leave one of them out"
            )
        program = GRPO(
            experiment.model, task, config, build_rewards(config, task), build_optimizer(optimizer), section.loss_chunk
        )
        return cls(name, experiment, program, optimizer, section.loop, section.eval, section.diagnostics)

    def summary(self) -> str:
        config = self.grpo.config
        rewards = ", ".join(f"{name} × {weight:g}" for name, weight in config.rewards)
        return f"{config.rollouts} rollouts of {config.prompts_per_rollout} × {config.group_size}, {config.steps_per_rollout} updates each; {rewards}"

    def settings(self) -> dict[str, Any]:
        """`loop`, `eval` and `loss_chunk` change no weights."""
        return {"grpo": self.grpo.config, "optimizer": self.optimizer}

    def finished(self) -> bool:
        config = self.grpo.config
        return max(self.made(), default=0) >= config.rollouts * config.steps_per_rollout

    def run(self, variables: Variables | None) -> Variables:
        experiment, folder = self.experiment, self.folder
        self.keep_tokenizer()
        variables = _weights(variables, experiment)
        seed = _seed(experiment, self.name, "sampling")
        state = train_grpo(
            self.grpo,
            self.loop,
            self.evaluation,
            variables,
            folder,
            diagnostics=self.diagnostics,
            seed=seed,
            name=self.name,
        )
        _draw_curves(experiment, self.name)
        return state.variables


@dataclasses.dataclass(frozen=True)
class EvalStage(Stage):
    """Held-out accuracy on the experiment's task, if it has one, and with `data` held-out bits per byte. Leaves
    evaluation.json, and its numbers as metrics of step 0; changes no weights."""

    name: str
    experiment: Experiment
    eval: EvalConfig | None = None
    data: DataConfig | None = None
    seq_len: int = 512
    batch_size: int = 16
    eval_batches: int | None = None

    changes_weights = False

    def __post_init__(self):
        _require_length(self.seq_len)
        for field in ("batch_size", "eval_batches"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise ConfigError(f"{field}={value}: at least 1")
        if self.eval is not None or self.data is None:
            _require_task(self.name, self.experiment)

    @classmethod
    def build(cls, name: str, experiment: Experiment, fields: Mapping[str, Any]) -> "EvalStage":
        if experiment.task is not None:
            fields = {"eval": {}} | fields
        return build(cls, fields, "", given={"name": name, "experiment": experiment})

    def summary(self) -> str:
        config, parts = self.eval, []
        if config is not None:
            parts.append(f"{config.problems} problems greedily, {config.num_sampled} × {config.samples} sampled")
        if self.data is not None:
            parts.append(f"bits per byte of {', '.join(source.name for source in self.data.sources)}")
        return "; ".join(parts)

    def settings(self) -> dict[str, Any]:
        fields = {"eval": self.eval, "data": self.data}
        return fields | (
            {}
            if self.data is None
            else {"seq_len": self.seq_len, "batch_size": self.batch_size, "eval_batches": self.eval_batches}
        )

    def made(self) -> list[int]:
        return [0] if self.path.exists() else []

    def finished(self) -> bool:
        return self.path.exists()

    def check_data(self, prepare: bool) -> None:
        if self.data is not None:
            _check_sources(self.data.sources, ("validation",), self.experiment, self.data.data_dir, prepare)

    @property
    def path(self) -> Path:
        return self.folder / "evaluation.json"

    def run(self, variables: Variables | None) -> Variables:
        experiment = self.experiment
        variables = _weights(variables, experiment)
        if from_primary(str(self.path.exists())) == "True":
            return variables
        result = {}
        if self.data is not None:
            batches = held_out_batches(self.data, experiment, self.seq_len, self.batch_size)()
            measured = make_evaluate(experiment.model, max_batches=self.eval_batches)(variables, batches)
            result["bits_per_byte"] = measured["bits_per_byte"]
        if self.eval is not None:
            result |= evaluate(experiment.model, variables, experiment.task, self.eval)
        write_text(self.path, to_json(result, indent=1) + "\n")
        with contextlib.closing(MetricsWriter(self.path.parent, last_step=-1)) as writer:
            writer.write(0, {name: value for name, value in result.items() if isinstance(value, float)})
        shown = [
            (name, result[name]) for name in ("bits_per_byte", "greedy_accuracy", "response_length") if name in result
        ]
        print(
            f"{self.name}: " + ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in shown), flush=True
        )
        return variables


@dataclasses.dataclass(frozen=True)
class OutliersStage(Stage):
    """Puts outlier channels into the weights, for studies of number formats; leaves no files."""

    name: str
    experiment: Experiment
    channels: int
    factor: float

    leaves_results = False

    def __post_init__(self):
        width = self.experiment.model.config.hidden_size
        if not 0 < self.channels <= width or self.factor <= 0:
            raise ConfigError(f"channels={self.channels} must be 1 to {width}, and factor={self.factor} above 0")

    @classmethod
    def build(cls, name: str, experiment: Experiment, fields: Mapping[str, Any]) -> "OutliersStage":
        return build(cls, fields, "", given={"name": name, "experiment": experiment})

    def summary(self) -> str:
        return f"{self.channels} channels {self.factor:g} times as large"

    def settings(self) -> dict[str, Any]:
        return {"channels": self.channels, "factor": self.factor}

    def finished(self) -> bool:
        return False

    def run(self, variables: Variables | None) -> Variables:
        variables = _weights(variables, self.experiment)
        return {**variables, "params": add_outliers(variables["params"], self.channels, self.factor)}


KINDS = {"pretrain": TrainStage, "sft": TrainStage, "grpo": GRPOStage, "eval": EvalStage, "outliers": OutliersStage}


def build_stages(experiment: Experiment) -> list[Stage]:
    """All stages, checked: a mistake in the last one is found before the first one runs."""
    return [build_stage(experiment, name) for name in experiment.sections]


def build_stage(experiment: Experiment, name: str) -> Stage:
    """The stage called `name`. Raises ConfigError for what its section of the experiment file cannot be."""
    fields = dict(experiment.sections[name])
    kind = fields.pop("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise ConfigError(f"{name}.kind={kind!r}: {nearest(str(kind), KINDS)}")
    with inside(f"config.{name}"):
        return KINDS[kind].build(name, experiment, fields)


def _draw_curves(experiment: Experiment, name: str) -> None:
    """Leaves curves.png in the stage's folder."""
    folder = experiment.workdir / name
    if not is_primary():
        return
    try:
        plot_curves(read_metrics(folder), folder / "curves.png", f"{experiment.name}, {name}, seed {experiment.seed}")
    except Exception as error:  # weights are worth more than a figure of them
        print(
            f"{name}: curves.png could not be drawn ({type(error).__name__}: {error}); metrics.jsonl has the numbers",
            flush=True,
        )


def _check_sources(
    sources: Sequence[SourceConfig], splits: Sequence[str], experiment: Experiment, data_dir: str | None, prepare: bool
) -> None:
    check_sources(sources, splits, experiment.tokenizer, data_dir, experiment.model.config.vocab_size, prepare=prepare)


def held_out_batches(
    data: DataConfig, experiment: Experiment, seq_len: int, batch_size: int
) -> Callable[[], Iterator[Batch]]:
    """-> a function that starts one ordered pass over the held-out documents, and stops the reading threads when the
    pass is dropped."""

    @functools.cache
    def opened() -> Loader:
        """The data is read and checked once, not at every evaluation."""
        model = experiment.model
        share = host_share(model.placement)
        return build_loader(
            data,
            experiment.tokenizer,
            seq_len,
            batch_size,
            split="validation",
            share=share,
            vocab_size=model.config.vocab_size,
        )

    def start() -> Iterator[Batch]:
        loader = opened()
        loader.restart()
        with contextlib.closing(loader):
            yield from loader

    return start


def _peak_flops(model: Transformer) -> float | None:
    """Of the devices that the network is on, at the rate of its products; None where either is not in the table, as for
    float32."""
    placement, precision = model.placement, model.precision
    devices = placement.mesh.devices.flat if isinstance(placement, MeshPlacement) else jax.devices()[:1]
    if precision.compute_dtype != jnp.bfloat16:
        return None
    return peak_flops(devices, "fp8" if isinstance(precision, FP8Precision) else "bf16")


def _seed(experiment: Experiment, *path: str) -> int:
    """A seed of its own for each use of chance in each stage."""
    return int(np.random.SeedSequence([experiment.seed, *"/".join(path).encode()]).generate_state(1)[0])


def _weights(variables: Variables | None, experiment: Experiment) -> Variables:
    """Random weights where no stage before has made any: reinforcement learning from scratch is a legitimate
    question."""
    model = experiment.model
    return (
        init_variables(model, jax.random.key(experiment.seed), variables_sharding(model))
        if variables is None
        else variables
    )


def _require_task(name: str, experiment: Experiment) -> Task:
    if experiment.task is None:
        raise ConfigError(
            f"stage {name!r} works on a task: add config.task, for example {{'name': 'parity', 'bits': 20}}"
        )
    if not isinstance(experiment.tokenizer, ByteTokenizer):
        raise ConfigError(
            f"stage {name!r} works on config.task, whose problems are written in the ids of the byte tokenizer, and "
            f"config.tokenizer={experiment.config.get('tokenizer')!r}: set it to 'byte', and model.vocab_size to "
            f"{ByteTokenizer.vocab_size} or more"
        )
    return experiment.task


def _require_length(seq_len: int) -> None:
    if seq_len < 2:
        raise ConfigError(f"seq_len={seq_len}: at least 2, a token and the next one")

"""The stages an experiment is made of: each takes the weights that the one before left and leaves its own in workdir/<stage>/.

A stage is built, and with that checked, from its section of the experiment file before anything runs. Starting a
finished stage again returns what it left.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.accounting.chips import peak_flops
from deepseek_jax.accounting.flops import training_flops_per_token
from deepseek_jax.data.checks import check_sources
from deepseek_jax.data.config import DataConfig, SourceConfig
from deepseek_jax.data.loader import Loader, build_loader
from deepseek_jax.errors import ConfigError, build, nearest
from deepseek_jax.experiment import Experiment
from deepseek_jax.json_io import to_json
from deepseek_jax.model.transformer import Transformer, init_variables
from deepseek_jax.parallel.hosts import from_primary, is_primary, write_text
from deepseek_jax.parallel.placement import MeshPlacement
from deepseek_jax.parallel.shardings import host_share, variables_sharding
from deepseek_jax.precision.fp8 import FP8Recipe
from deepseek_jax.report import plot_curves
from deepseek_jax.rl.config import GRPOConfig
from deepseek_jax.rl.evaluate import EvalConfig, evaluate
from deepseek_jax.rl.grpo import GRPO, learning_rate
from deepseek_jax.rl.loop import LoopConfig, train_grpo
from deepseek_jax.rl.rewards import build_rewards
from deepseek_jax.rl.tasks import Task
from deepseek_jax.training.batches import Batch
from deepseek_jax.training.config import TrainConfig
from deepseek_jax.training.evaluate import make_evaluate
from deepseek_jax.training.loop import train
from deepseek_jax.training.metrics import read_metrics
from deepseek_jax.training.objective import uses_mtp
from deepseek_jax.training.optimizer import OptimizerConfig, build_optimizer
from deepseek_jax.training.outliers import add_outliers

Variables = Mapping[str, Any]


class Stage(Protocol):
    """`variables` is None at the start of an experiment; a stage that needs weights says so."""

    name: str

    def summary(self) -> str: ...

    def check_data(self, prepare: bool) -> None:
        """Opens the data that `run` will read, without what would have to be downloaded unless `prepare`. Raises DataError."""

    def run(self, variables: Variables | None) -> Variables: ...


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

    def write(self, task: Task, seed: int) -> list[dict[str, np.ndarray]]:
        """Records {"tokens", "loss_mask"} for the loader."""
        changes = {name: getattr(self, name) for name in ("cot_probability", "corrupt_probability") if getattr(self, name) is not None}
        task = dataclasses.replace(task, **changes)
        documents = jax.jit(lambda key: task.documents(key, self.count, completion_only=not self.whole_document))(jax.random.key(seed))
        tokens, mask, loss_mask = (np.asarray(documents[name]) for name in ("tokens_BT", "mask_BT", "loss_mask_BT"))
        return [{"tokens": t[m > 0], "loss_mask": w[m > 0]} for t, m, w in zip(tokens, mask, loss_mask, strict=True)]


@dataclasses.dataclass(frozen=True)
class TrainStage:
    """Pre-training or SFT: next-token prediction on packed documents. They differ in their data alone."""

    name: str
    experiment: Experiment
    config: TrainConfig
    data: DataConfig
    seq_len: int
    batch_size: int
    task_documents: TaskDocuments

    FIELDS = ("kind", "train", "data", "seq_len", "batch_size", "task_documents")

    @classmethod
    def build(cls, name: str, experiment: Experiment, fields: Mapping[str, Any]) -> "TrainStage":
        _check_fields(name, fields, cls.FIELDS, required=("train", "seq_len", "batch_size"))
        stage = cls(
            name=name,
            experiment=experiment,
            config=TrainConfig.from_dict(fields["train"]),
            data=DataConfig.from_dict(fields.get("data", {})),
            seq_len=fields["seq_len"],
            batch_size=fields["batch_size"],
            task_documents=build(TaskDocuments, fields.get("task_documents", {}), f"config.{name}.task_documents"),
        )
        if stage._uses_task():
            _require_task(name, experiment)
        return stage

    def _uses_task(self) -> bool:
        return any(source.name == "task" for source in self.data.sources)

    def summary(self) -> str:
        sources = ", ".join(f"{source.name} ({source.weight:g})" for source in self.data.sources)
        return f"{self.config.steps} steps of {self.batch_size} × {self.seq_len} tokens from {sources}"

    def check_data(self, prepare: bool) -> None:
        check_sources(self._text(), ("train", "validation"), self.experiment.tokenizer, self.data.data_dir, prepare=prepare)

    def _text(self) -> tuple[SourceConfig, ...]:
        """The sources that are not the experiment's task."""
        return tuple(source for source in self.data.sources if source.name != "task")

    def _held_out(self) -> tuple[SourceConfig, ...]:
        return tuple(source for source in self._text() if source.holds_out)

    def run(self, variables: Variables | None) -> Variables:
        experiment, model, held_out = self.experiment, self.experiment.model, None
        if self._held_out():
            held_out = held_out_batches(dataclasses.replace(self.data, sources=self._held_out()), experiment, self.seq_len, self.batch_size)
        result = train(
            model,
            self.config,
            self._open_loader,
            experiment.workdir / self.name,
            variables=variables,
            held_out=held_out,
            seed=experiment.seed,
            flops_per_token=self.flops_per_token,
            peak_flops=_peak_flops(model),
            name=self.name,
        )
        return result.state.variables

    @property
    def flops_per_token(self) -> int:
        """Forward and backward, MTP modules included where they are trained."""
        model = self.experiment.model
        return training_flops_per_token(model.config, self.seq_len, mtp=uses_mtp(model, self.config.objective))

    def _open_loader(self) -> Loader:
        experiment, in_memory = self.experiment, None
        if self._uses_task():
            in_memory = {"task": {"train": self.task_documents.write(experiment.task, _seed(experiment, self.name, "documents"))}}
        if self._text() and not self._held_out():
            print(f"{self.name}: nothing is held out (validation_fraction=0 and no validation_path), so no held-out loss is measured", flush=True)
        return build_loader(
            self.data,
            experiment.tokenizer,
            self.seq_len,
            self.batch_size,
            seed=_seed(experiment, self.name, "order"),
            share=host_share(experiment.model.placement),
            in_memory=in_memory,
        )


@dataclasses.dataclass(frozen=True)
class GRPOStage:
    """Reinforcement learning with rule rewards on the experiment's task. Also leaves curves.png."""

    name: str
    experiment: Experiment
    grpo: GRPO
    loop: LoopConfig
    evaluation: EvalConfig

    FIELDS = ("kind", "grpo", "optimizer", "loop", "eval", "loss_chunk")

    @classmethod
    def build(cls, name: str, experiment: Experiment, fields: Mapping[str, Any]) -> "GRPOStage":
        _check_fields(name, fields, cls.FIELDS, required=("grpo",))
        task = _require_task(name, experiment)
        config = GRPOConfig.from_dict({"max_prompt_length": task.prompt_length, "max_completion_length": task.completion_length} | fields["grpo"])
        if config.max_prompt_length < task.prompt_length:
            raise ConfigError(f"{name}.grpo.max_prompt_length={config.max_prompt_length}: the task's prompts have {task.prompt_length} tokens")
        optimizer = build(OptimizerConfig, {"learning_rate": learning_rate(config), "weight_decay": 0.0} | fields.get("optimizer", {}), f"config.{name}.optimizer")
        return cls(
            name=name,
            experiment=experiment,
            grpo=GRPO(
                experiment.model, task, config, build_rewards(config, task), build_optimizer(optimizer), fields.get("loss_chunk", 4096)
            ),
            loop=LoopConfig.from_dict(fields.get("loop", {})),
            evaluation=EvalConfig.from_dict(fields.get("eval", {})),
        )

    def summary(self) -> str:
        config = self.grpo.config
        rewards = ", ".join(f"{name} × {weight:g}" for name, weight in config.rewards)
        return f"{config.rollouts} rollouts of {config.prompts_per_rollout} × {config.group_size}, {config.steps_per_rollout} updates each; {rewards}"

    def check_data(self, prepare: bool) -> None:
        del prepare  # problems are drawn, not read

    def run(self, variables: Variables | None) -> Variables:
        experiment, folder = self.experiment, self.experiment.workdir / self.name
        variables = _weights(variables, experiment)
        state = train_grpo(self.grpo, self.loop, self.evaluation, variables, folder, seed=_seed(experiment, self.name, "sampling"), name=self.name)
        if is_primary():
            try:
                plot_curves(read_metrics(folder), folder / "curves.png", f"{experiment.name}, {self.name}, seed {experiment.seed}")
            except Exception as error:  # weights are worth more than a figure of them
                print(f"{self.name}: curves.png could not be drawn ({type(error).__name__}: {error}); metrics.jsonl has the numbers", flush=True)
        return state.variables


@dataclasses.dataclass(frozen=True)
class EvalStage:
    """Held-out accuracy on the task and, with `data`, held-out bits per byte. Leaves evaluation.json; changes no weights."""

    name: str
    experiment: Experiment
    evaluation: EvalConfig
    data: DataConfig | None
    seq_len: int
    batch_size: int
    eval_batches: int | None

    FIELDS = ("kind", "eval", "data", "seq_len", "batch_size", "eval_batches")

    @classmethod
    def build(cls, name: str, experiment: Experiment, fields: Mapping[str, Any]) -> "EvalStage":
        _check_fields(name, fields, cls.FIELDS, required=())
        _require_task(name, experiment)
        return cls(
            name=name,
            experiment=experiment,
            evaluation=EvalConfig.from_dict(fields.get("eval", {})),
            data=DataConfig.from_dict(fields["data"]) if "data" in fields else None,
            seq_len=fields.get("seq_len", 512),
            batch_size=fields.get("batch_size", 16),
            eval_batches=fields.get("eval_batches"),
        )

    def summary(self) -> str:
        config = self.evaluation
        return f"{config.problems} problems greedily, {config.sampled_problems} × {config.samples} sampled"

    def check_data(self, prepare: bool) -> None:
        if self.data is not None:
            check_sources(self.data.sources, ("validation",), self.experiment.tokenizer, self.data.data_dir, prepare=prepare)

    @property
    def path(self) -> Path:
        return self.experiment.workdir / self.name / "evaluation.json"

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
        result |= evaluate(experiment.model, variables, experiment.task, self.evaluation)
        write_text(self.path, to_json(result, indent=1) + "\n")
        print(f"{self.name}: greedy accuracy {result['greedy_accuracy']:.3f}, response length {result['response_length']:.1f}", flush=True)
        return variables


@dataclasses.dataclass(frozen=True)
class OutliersStage:
    """Puts outlier channels into the weights, for studies of number formats; leaves no files."""

    name: str
    experiment: Experiment
    channels: int
    factor: float

    FIELDS = ("kind", "channels", "factor")

    @classmethod
    def build(cls, name: str, experiment: Experiment, fields: Mapping[str, Any]) -> "OutliersStage":
        _check_fields(name, fields, cls.FIELDS, required=("channels", "factor"))
        channels, width = fields["channels"], experiment.model.config.hidden_size
        if not 0 < channels <= width or fields["factor"] <= 0:
            raise ConfigError(f"{name}: channels={channels} must be 1 to {width}, and factor={fields['factor']} above 0")
        return cls(name, experiment, channels, fields["factor"])

    def summary(self) -> str:
        return f"{self.channels} channels {self.factor:g} times as large"

    def check_data(self, prepare: bool) -> None:
        del prepare

    def run(self, variables: Variables | None) -> Variables:
        variables = _weights(variables, self.experiment)
        return {**variables, "params": add_outliers(variables["params"], self.channels, self.factor)}


KINDS = {"pretrain": TrainStage, "sft": TrainStage, "grpo": GRPOStage, "eval": EvalStage, "outliers": OutliersStage}


def build_stages(experiment: Experiment) -> list[Stage]:
    """All stages, checked: a mistake in the last one is found before the first one runs."""
    stages = []
    for name, fields in experiment.sections.items():
        if fields["kind"] not in KINDS:
            raise ConfigError(f"{name}.kind={fields['kind']!r}: {nearest(str(fields['kind']), KINDS)}")
        stages.append(KINDS[fields["kind"]].build(name, experiment, fields))
    return stages


def held_out_batches(data: DataConfig, experiment: Experiment, seq_len: int, batch_size: int) -> Callable[[], Iterator[Batch]]:
    """-> a function that starts one ordered pass over the held-out documents, and stops the reading threads when the pass is dropped."""

    def start() -> Iterator[Batch]:
        share = host_share(experiment.model.placement)
        with contextlib.closing(build_loader(data, experiment.tokenizer, seq_len, batch_size, split="validation", share=share)) as loader:
            yield from loader

    return start


def _peak_flops(model: Transformer) -> float | None:
    """Of the devices that the network is on, at the rate of its products; None where either is not in the table, as for float32."""
    placement, precision = model.placement, model.precision
    devices = placement.mesh.devices.flat if isinstance(placement, MeshPlacement) else jax.devices()[:1]
    if precision.compute_dtype != jnp.bfloat16:
        return None
    return peak_flops(devices, "fp8" if isinstance(precision, FP8Recipe) else "bf16")


def _seed(experiment: Experiment, *path: str) -> int:
    """A seed of its own for each use of chance in each stage."""
    return int(np.random.SeedSequence([experiment.seed, *"/".join(path).encode()]).generate_state(1)[0])


def _weights(variables: Variables | None, experiment: Experiment) -> Variables:
    """Random weights where no stage before has made any: reinforcement learning from scratch is a legitimate question."""
    model = experiment.model
    return init_variables(model, jax.random.key(experiment.seed), variables_sharding(model)) if variables is None else variables


def _require_task(name: str, experiment: Experiment) -> Task:
    if experiment.task is None:
        raise ConfigError(f"stage {name!r} works on a task: add config.task, for example {{'name': 'parity', 'bits': 20}}")
    return experiment.task


def _check_fields(name: str, fields: Mapping[str, Any], known: tuple[str, ...], required: tuple[str, ...]) -> None:
    for field in fields:
        if field not in known:
            raise ConfigError(f"unknown field config.{name}.{field}: {nearest(field, known)}")
    for field in required:
        if field not in fields:
            raise ConfigError(f"missing field config.{name}.{field}")

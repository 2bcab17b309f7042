"""Training stages: pre-training and SFT, next-token prediction on packed documents."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.accounting.chips import peak_flops
from deepseek_jax.accounting.cost import Work
from deepseek_jax.accounting.flops import training_flops_per_token
from deepseek_jax.data.config import DataConfig, SourceConfig
from deepseek_jax.data.loader import Loader, build_loader
from deepseek_jax.data.sources import holds_out
from deepseek_jax.errors import ConfigError
from deepseek_jax.fields import convert
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.parallel.arrays import host_share
from deepseek_jax.parallel.sharding import MeshOps
from deepseek_jax.rl.tasks.documents import TaskDocuments
from deepseek_jax.stages.base import Batches, Stage, Variables, require_length
from deepseek_jax.stages.held_out import check_data, held_out_batches
from deepseek_jax.training.batches import batch_size_at
from deepseek_jax.training.config import TrainConfig
from deepseek_jax.training.loop import train
from deepseek_jax.training.objective import uses_mtp
from deepseek_jax.training.optimizer import updated_by


@dataclasses.dataclass(frozen=True)
class TrainStage(Stage):
    """Pre-training or SFT, kinds "pretrain" and "sft"; they differ only in their data.

    `batch_size` is the sequences of a step; where `train.batch_size` is a schedule, the largest, and None in the
    experiment.
    """

    train: TrainConfig
    seq_len: int
    batch_size: int | None = None
    data: DataConfig = DataConfig()
    task_documents: TaskDocuments = TaskDocuments()

    length: ClassVar[str] = "train.steps"

    def __post_init__(self):
        require_length(self.seq_len)
        object.__setattr__(self, "batch_size", self.train.batch_sizes(self.batch_size)[-1])
        if self._uses_task():
            task = self.require_task()
            needed = task.prompt_length + task.completion_length
            if needed > self.seq_len:
                raise ConfigError(
                    f"seq_len={self.seq_len}: a demonstration of the task has up to {needed} tokens and would be torn; "
                    f"raise seq_len to at least {needed}, or make the task smaller"
                )

    @classmethod
    def batches(cls, name: str, fields: Mapping[str, Any]) -> Batches:
        train = TrainConfig.from_dict(fields.get("train", {}))
        sizes = train.batch_sizes(convert(fields.get("batch_size"), int | None, "batch_size"))
        field, sizes = ("train.microbatch", [train.microbatch]) if train.microbatch else ("batch_size", sizes)
        length = convert(fields.get("seq_len", 1), int, "seq_len")
        return Batches([(f"{name}.{field}", size) for size in sizes], [(f"{name}.seq_len", length)])

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
        check_data(self._text(), ("train", "validation"), self.experiment, self.data.data_dir, prepare)

    def _text(self) -> tuple[SourceConfig, ...]:
        """The sources other than the experiment's task."""
        return tuple(source for source in self.data.sources if source.name != "task")

    def _held_out(self) -> tuple[SourceConfig, ...]:
        vocab_size = self.experiment.model.config.vocab_size
        return tuple(source for source in self._text() if holds_out(source, self.data.data_dir, vocab_size))

    def total_sequences(self, shards: int | None = None) -> int:
        """Sequences in the batches of all steps together, as the training loop takes them. `shards` as in `work`."""
        config = self.train
        if config.batch_size is None:
            return config.steps * self.batch_size
        shards = self.experiment.model.ops.batch_shards if shards is None else shards
        ramp = min(config.steps, sum(segment.steps for segment in config.batch_size.segments))
        total = (config.steps - ramp) * int(batch_size_at(config, ramp, shards))
        for begin in range(0, ramp, 2**20):  # a long ramp need not fit into memory
            total += int(np.sum(batch_size_at(config, np.arange(begin, min(begin + 2**20, ramp)), shards)))
        return total

    @property
    def flops_per_token(self) -> int:
        """Forward and backward, MTP modules included where they are trained."""
        model = self.experiment.model
        return training_flops_per_token(model.config, self.seq_len, mtp=uses_mtp(model, self.train.objective))

    def work(self, shards: int | None = None) -> Work:
        tokens = self.total_sequences(shards) * self.seq_len
        return Work(tokens, float(tokens) * self.flops_per_token, self.seq_len)

    def updated_by(self) -> dict[str, dict[str, int]]:
        return updated_by(self.train.optimizer.name, self.experiment.model.config)

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
            peak_flops=matmul_peak_flops(model),
            name=self.name,
        )
        self.draw_curves()
        return result.state.variables

    def _open_loader(self) -> Loader:
        experiment, in_memory = self.experiment, None
        if self._uses_task():
            in_memory = {"task": {"train": self.task_documents.write(experiment.task, self.seed("documents"))}}
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
            seed=self.seed("order"),
            share=host_share(experiment.model.ops),
            in_memory=in_memory,
            vocab_size=experiment.model.config.vocab_size,
        )


def matmul_peak_flops(model: Transformer) -> float | None:
    """The bfloat16 FLOP/s of the devices that the network is on; None in float32, or where a device is not in the table
    of chips. Utilization is of this peak for FP8 too, as in the dry run: so a faster format shows as a higher number.
    """
    ops = model.ops
    devices = ops.mesh.devices.flat if isinstance(ops, MeshOps) else jax.devices()[:1]
    if model.ops.precision.compute_dtype != jnp.bfloat16:
        return None
    return peak_flops(devices)

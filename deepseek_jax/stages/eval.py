"""Evaluation stage: accuracy on the experiment's task and bits per byte of held-out text."""

import contextlib
import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from deepseek_jax.data.config import DataConfig
from deepseek_jax.json_io import to_json
from deepseek_jax.parallel.hosts import from_primary, write_text
from deepseek_jax.ranges import at_least, check, or_none
from deepseek_jax.rl.evaluate import EvalConfig, evaluate
from deepseek_jax.stages.base import Experiment, Stage, Variables, require_length
from deepseek_jax.stages.held_out import check_data, held_out_batches
from deepseek_jax.training.evaluate import make_evaluate
from deepseek_jax.training.metrics import MetricsWriter


@dataclasses.dataclass(frozen=True)
class EvalStage(Stage):
    """Held-out accuracy on the experiment's task, if it has one, and with `data` held-out bits per byte. Leaves
    evaluation.json, and its numbers as metrics of step 0; changes no weights."""

    eval: EvalConfig | None = None
    data: DataConfig | None = None
    seq_len: int = 512
    batch_size: int = 16
    eval_batches: int | None = None

    changes_weights: ClassVar[bool] = False

    def __post_init__(self):
        require_length(self.seq_len)
        check(self, "", batch_size=at_least(1), eval_batches=or_none(at_least(1), "for all"))
        if self.eval is not None or self.data is None:
            self.require_task()

    @classmethod
    def build(cls, name: str, experiment: Experiment, fields: Mapping[str, Any]) -> "EvalStage":
        return super().build(name, experiment, fields if experiment.task is None else {"eval": {}} | fields)

    def summary(self) -> str:
        config, measures = self.eval, []
        if config is not None:
            measures.append(f"{config.problems} problems greedily, {config.num_sampled} × {config.samples} sampled")
        if self.data is not None:
            measures.append(f"bits per byte of {', '.join(source.name for source in self.data.sources)}")
        return "; ".join(measures)

    def settings(self) -> dict[str, Any]:
        """Those of the measures that are taken."""
        settings = super().settings()
        if self.data is None:
            return {field: settings[field] for field in ("eval", "data")}
        return settings

    def made(self) -> list[int]:
        return [0] if self.path.exists() else []

    def finished(self) -> bool:
        return self.path.exists()

    def check_data(self, prepare: bool) -> None:
        if self.data is not None:
            check_data(self.data.sources, ("validation",), self.experiment, self.data.data_dir, prepare)

    @property
    def path(self) -> Path:
        return self.folder / "evaluation.json"

    def run(self, variables: Variables | None) -> Variables:
        experiment = self.experiment
        variables = self.initial_weights(variables)
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
        with contextlib.closing(MetricsWriter(self.folder, last_step=-1)) as writer:
            writer.write(0, {name: value for name, value in result.items() if isinstance(value, float)})
        shown = [
            (name, result[name]) for name in ("bits_per_byte", "greedy_accuracy", "response_length") if name in result
        ]
        print(
            f"{self.name}: " + ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in shown), flush=True
        )
        broken = [name for name, value in result.items() if isinstance(value, float) and not math.isfinite(value)]
        if broken:
            print(
                f"{self.name}: not a finite number, so null in {self.path.name}: {', '.join(broken)}; these weights "
                "give logits that are NaN or infinite, and metrics.jsonl of the stage that made them shows since when",
                flush=True,
            )
        return variables

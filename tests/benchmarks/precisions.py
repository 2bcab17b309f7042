"""An experiment's whole training step in several precisions, taking turns on the device that is here: tokens/s, memory,
ratio to the first.

    python tests/benchmarks/precisions.py [--config=experiments/v3_style_1b.py] [--config.any.field=value]
        [--precisions=bfloat16,fp8_deepseek]

Forward, backward, clipping and AdamW, compiled as training compiles them, on random tokens. Before anything is timed
the losses of the first steps have to agree within 1%. What the step can reach at most: the dry run
(deepseek_jax.dry_run.dry_run) of the same file.
"""

import json
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path

import common
import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from deepseek_jax import cli
from deepseek_jax.dry_run import programs
from deepseek_jax.experiment import build_experiment, read_flags
from deepseek_jax.stages import build_stage
from deepseek_jax.training.optimizer import build_optimizer
from deepseek_jax.training.state import create_state

CONFIG = Path(__file__).parents[2] / "experiments" / "v3_style_1b.py"


class Step:
    """One experiment's compiled step and its state; a call takes one step and returns the loss."""

    def __init__(self, overrides: Sequence[str], precision: str):
        config, name, *_ = read_flags([*overrides, f"--config.precision={precision}"])
        experiment = build_experiment(config, name, Path("runs") / name)
        self.program = programs.train(experiment, None)
        state, batch = self.program.arguments
        self.compiled = self.program.jitted.lower(state, batch).compile()
        stage = next(name for name, fields in experiment.sections.items() if fields["kind"] in ("pretrain", "sft"))
        optimizer = build_optimizer(build_stage(experiment, stage).train.optimizer, experiment.model)
        self.state = create_state(experiment.model, optimizer, jax.random.key(0))
        shape = batch["tokens"].shape
        tokens_BT = np.random.default_rng(0).integers(0, experiment.model.config.vocab_size, shape, dtype=np.int32)
        ones_BT = np.ones(shape, np.int32)
        positions_BT = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
        fields = {"tokens": tokens_BT, "segment_ids": ones_BT, "positions": positions_BT, "loss_mask": ones_BT}
        self.batch = jax.device_put(fields, {name: field.sharding for name, field in batch.items()})

    def __call__(self) -> float:
        self.state, metrics = self.compiled(self.state, self.batch)
        return float(metrics["cross_entropy"])

    @property
    def temporary_bytes(self) -> int:
        """The memory of a step besides state and batch, from the compiler."""
        return self.compiled.memory_analysis().temp_size_in_bytes


def same_losses(losses: dict[str, list[float]]) -> None:
    first, *others = losses
    for name in others:
        np.testing.assert_allclose(
            losses[name], losses[first], rtol=1e-2, err_msg=f"the losses in {name} and in {first} differ"
        )
    print("losses of the first steps:", {name: [round(loss, 4) for loss in values] for name, values in losses.items()})


def main(argv: Sequence[str]) -> None:
    parser = cli.parser("", __doc__)
    parser.prog = "python tests/benchmarks/precisions.py"
    parser.add_argument("--config", default=str(CONFIG), help="an experiment file; --config.field=value overrides")
    parser.add_argument("--precisions", default="bfloat16,fp8_deepseek", help="by comma; ratios are to the first")
    parser.add_argument("--repeats", type=int, default=10, help="timed rounds; the precisions take turns")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    overrides = [argument for argument in argv if argument.startswith("--config.")]
    flags = parser.parse_args([argument for argument in argv if argument not in overrides])
    flags.cpu_time = False
    steps: dict[str, Callable[[], float]] = {
        name: Step([f"--config={flags.config}", *overrides], name) for name in flags.precisions.split(",")
    }
    figures = measure(steps, common.interleave(steps, flags, same_losses))
    device = f"{jax.device_count()} × {jax.devices()[0].device_kind}, jax {metadata.version('jax')}"
    table = Table(title=f"training step of {Path(flags.config).stem} on {device}", title_justify="left")
    for column in next(iter(figures.values())):
        table.add_column(column, justify="left" if column == "precision" else "right", no_wrap=True)
    for row in figures.values():
        table.add_row(*(f"{value:,.2f}" if isinstance(value, float) else str(value) for value in row.values()))
    Console(width=150).print(table)
    if flags.json:
        flags.json.write_text(
            json.dumps(
                {"device": device, "config": flags.config, "overrides": overrides, "steps": list(figures.values())},
                indent=2,
            )
        )


def measure(steps: dict[str, Step], timings: dict[str, common.Timing]) -> dict[str, dict[str, str | float]]:
    """A row for each precision. The model's FLOPs are those of the closed formulas, recomputation not counted."""
    first = next(iter(timings))
    return {
        name: {
            "precision": name,
            "ms": 1e3 * timing.median_s,
            "min": 1e3 * min(timing.rounds_s),
            "max": 1e3 * max(timing.rounds_s),
            "tokens/s": steps[name].program.tokens / timing.median_s,
            "TFLOP/s": steps[name].program.model_flops / timing.median_s / 1e12,
            "temporaries GB": steps[name].temporary_bytes / 1e9,
            f"× {first}": timings[first].median_s / timing.median_s,
        }
        for name, timing in timings.items()
    }


if __name__ == "__main__":
    cli.run(main)

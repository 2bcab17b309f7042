"""Pre-training and SFT: the step, the log line and the evaluation that `run_steps` runs."""

import contextlib
import dataclasses
import math
import pathlib
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from deepseek_jax.errors import DataError
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.parallel.arrays import global_batch
from deepseek_jax.training.batches import Batch, Loader, check_batch, step_batches
from deepseek_jax.training.checkpoints import METRIC, Checkpoints
from deepseek_jax.training.config import TrainConfig
from deepseek_jax.training.evaluate import make_evaluate
from deepseek_jax.training.goodput import Goodput
from deepseek_jax.training.metrics import MetricsWriter, Progress, read_metrics
from deepseek_jax.training.optimizer import build_optimizer
from deepseek_jax.training.run_steps import due, resume, run_steps
from deepseek_jax.training.state import TrainState, abstract_state, create_state, state_from_variables
from deepseek_jax.training.step import build_train_step


@dataclasses.dataclass(frozen=True)
class TrainResult:
    state: TrainState
    metrics: dict[str, float]  # the last evaluation; {} without held-out data


def train(
    model: Transformer,
    config: TrainConfig,
    open_loader: Callable[[], Loader],
    workdir,
    *,
    variables: Mapping[str, Any] | None = None,
    held_out: Callable[[], Iterable[Batch]] | None = None,
    seed: int = 0,
    flops_per_token: float | None = None,
    peak_flops: float | None = None,
    name: str = "train",
) -> TrainResult:
    """Trains from `variables` (None: random weights from `seed`) to `config.steps`, or resumes from `workdir`'s newest
    checkpoint. Where more steps are made already, the checkpoint of `config.steps` is what it gives.

    Leaves `metrics.jsonl`, `tensorboard/`, `checkpoints/` and `goodput.json` in `workdir`. A run that was killed and is
    started again with the same arguments gives bit-identical weights and log lines. `open_loader()` is called if there
    are steps to make, and the loader closed however they end. `held_out()` starts a pass over held-out batches; the
    first one is looked at before the first step. `flops_per_token` (forward and backward) adds FLOP/s to the log,
    `peak_flops` the utilization.

    Signals and exceptions save the step that was reached (see `run_steps`). Raises DataError for data that cannot be
    trained on, CheckpointError for a checkpoint that cannot be used or written.
    """
    workdir = pathlib.Path(workdir)
    clock = Goodput(workdir)
    optimizer = build_optimizer(config.optimizer, model)
    rng = jax.random.key(seed)
    with contextlib.ExitStack() as stack:
        store = Checkpoints(
            workdir / "checkpoints", model.config, keep_last=config.keep_last, keep_best=config.keep_best
        )
        stack.enter_context(contextlib.closing(store))

        def fresh() -> TrainState:
            return (
                create_state(model, optimizer, rng)
                if variables is None
                else state_from_variables(model, variables, optimizer, rng)
            )

        state, restored, beyond = resume(store, abstract_state(model, optimizer), config.steps, fresh)
        start, evaluation = int(state.step), {} if restored is None else restored.metrics

        def evaluation_due(step: int) -> bool:
            return held_out is not None and step > 0 and (step == config.steps or due(step, config.eval_every))

        # the run was killed between a save and its evaluation
        missing = evaluation_due(start) and not evaluation and not beyond
        if start >= config.steps and not missing:
            return TrainResult(state, evaluation)
        if held_out is not None:
            look_at(held_out, model.config.vocab_size)
        loader_state = None  # after the last step that was made
        if start < config.steps:
            loader = stack.enter_context(contextlib.closing(open_loader()))
            if restored is not None:
                loader.set_state(restored.loader_state)
            batches = step_batches(loader, config, model.config.vocab_size, start, model.ops.batch_shards)
            loader_state = loader.get_state()

        train_step = build_train_step(model, config, optimizer)
        evaluate = make_evaluate(model, config.objective.loss_chunk, config.eval_batches)
        writer = stack.enter_context(contextlib.closing(MetricsWriter(workdir, last_step=start)))
        logged = read_metrics(workdir)  # by the runs before this one, up to its first step
        log = Log(writer, Progress(name, config.steps, start), flops_per_token, peak_flops)
        clock.begin(start)

        def make_step(state: TrainState) -> tuple[TrainState, dict[str, jax.Array]]:
            nonlocal loader_state
            with clock("data", hidden=log.busy):
                batch = global_batch(model.ops, next(batches))
            state, metrics = train_step(state, batch)
            loader_state = loader.get_state()
            return state, metrics

        def evaluate_now(state: TrainState, step: int, saved: bool) -> None:
            nonlocal evaluation
            with clock("evaluation"):
                evaluation = evaluate(state.variables, held_out())
            if not any(line["step"] == step and METRIC in line for line in logged):
                log.evaluation(step, evaluation)
            if saved:
                with clock("checkpoint"):
                    store.note(step, evaluation)

        state = run_steps(
            state,
            make_step,
            unit="step",
            done=start,
            total=config.steps,
            store=store,
            clock=clock,
            progress=log.progress,
            log=log.add,
            flush=log.flush,
            evaluation_due=evaluation_due,
            evaluate=evaluate_now,
            evaluate_first=missing,
            log_every=config.log_every,
            checkpoint_every=config.checkpoint_every,
            loader_state=lambda: loader_state,
        )
    return TrainResult(state, evaluation)


def look_at(held_out: Callable[[], Iterable[Batch]], vocab_size: int) -> None:
    """Raises DataError if the first held-out batch is missing or cannot be evaluated: better before the first step than
    after the last."""
    first = next(iter(held_out()), None)
    if first is None:
        raise DataError("the held-out data gives no batch: give longer documents or more of them")
    check_batch(first, vocab_size)


class Log:
    """Turns the metrics of steps into log lines without stalling the device.

    The host waits for the step before the one just started, so the device always has work and clocks mean something;
    a line is fetched and written one step late, or by `flush`.
    """

    def __init__(
        self, writer: MetricsWriter, progress: Progress, flops_per_token: float | None, peak_flops: float | None
    ):
        self.writer, self.progress = writer, progress
        self._flops_per_token, self._peak_flops = flops_per_token, peak_flops
        self._pending: tuple[int, dict[str, jax.Array], bool] | None = None
        self._clock: float | None = None  # set when the first step is done: compilation is not throughput
        self._tokens: list[jax.Array] = []

    def add(self, step: int, metrics: dict[str, jax.Array], line: bool) -> None:
        self.flush()
        self._pending = (step, metrics, line)

    def busy(self) -> bool:
        """True while the device is at the pending step."""
        return self._pending is not None and not self._pending[1]["loss"].is_ready()

    def flush(self) -> None:
        """Waits for the pending step and writes its line, if it has one."""
        if self._pending is None:
            return
        (step, metrics, line), self._pending = self._pending, None
        jax.block_until_ready(metrics)
        self.progress.advance(step)
        if self._clock is None:
            self._clock = time.monotonic()
        else:
            self._tokens.append(metrics["tokens"])
        if line:
            values = jax.device_get(metrics)
            speed = self._speed()
            self.writer.write(step, values | speed)
            self.progress.report(headline(values | speed))

    def evaluation(self, step: int, values: dict[str, float]) -> None:
        """Writes a held-out evaluation; the time it took is not counted as training."""
        self.writer.write(step, values)
        self.progress.say(f"step {step}: held-out bits per byte {values['bits_per_byte']:.4f}")
        self._clock, self._tokens = None, []

    def _speed(self) -> dict[str, float]:
        now = time.monotonic()
        tokens = math.fsum(float(count) for count in self._tokens)
        if not tokens or now == self._clock:
            return {}
        per_second = tokens / (now - self._clock)
        self._clock, self._tokens = now, []
        speed = {"tokens_per_second": per_second}
        if self._flops_per_token is not None:
            speed["flops_per_second"] = per_second * self._flops_per_token
            if self._peak_flops is not None:
                speed["mfu"] = speed["flops_per_second"] / self._peak_flops
        return speed


def headline(values: Mapping[str, Any]) -> str:
    """The few numbers of a log line that a person watches."""
    numbers = [f"loss {values['loss']:.4f}", f"grad {values['grad_norm']:.3g}", f"lr {values['learning_rate']:.3g}"]
    if "max_violation_max" in values:
        numbers.append(f"MaxVio {values['max_violation_max']:.2f}")
    if values["skipped"]:
        numbers.append(f"skipped {values['skipped']}")
    if "tokens_per_second" in values:
        numbers.append(f"{values['tokens_per_second']:,.0f} tok/s")
    if "flops_per_second" in values:
        numbers.append(f"{values['flops_per_second'] / 1e9:,.1f} GFLOP/s")
    if "mfu" in values:
        numbers.append(f"MFU {values['mfu']:.1%}")
    return "  ".join(numbers)

"""GRPO: what a rollout, a log line and an evaluation are in the loop of `run_steps`."""

import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import process_allgather

from deepseek_jax.fields import build
from deepseek_jax.parallel.hosts import from_primary
from deepseek_jax.ranges import at_least, check
from deepseek_jax.rl.diagnostics import Diagnostics, DiagnosticsConfig
from deepseek_jax.rl.evaluate import EvalConfig, evaluate, greedy
from deepseek_jax.rl.grpo import GRPO, GRPOState, Samples, abstract_grpo_state, grpo_state
from deepseek_jax.rl.tasks.base import to_texts
from deepseek_jax.training.checkpoints import Checkpoints
from deepseek_jax.training.goodput import Goodput
from deepseek_jax.training.metrics import MetricsWriter, Progress, read_metrics
from deepseek_jax.training.run_steps import due, resume, run_steps


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """Counted in rollouts: a log line every `log_every`, a greedy held-out evaluation every `eval_every`, a sampled one
    with pass@k and maj@k every `sampled_eval_every` (both before the first rollout and after the last too; 0 is never),
    a checkpoint every `checkpoint_every` (and at the end), `show` completions to samples.jsonl with every log line."""

    log_every: int = 1
    eval_every: int = 5
    sampled_eval_every: int = 0
    checkpoint_every: int = 10
    keep_last: int = 2
    show: int = 4

    def __post_init__(self):
        check(
            self,
            "loop.",
            log_every=at_least(1),
            eval_every=at_least(0),
            sampled_eval_every=at_least(0),
            checkpoint_every=at_least(0),
            keep_last=at_least(1),
            show=at_least(0),
        )

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "LoopConfig":
        return build(cls, fields, "loop")


def train_grpo(
    grpo: GRPO,
    config: LoopConfig,
    evaluation: EvalConfig,
    variables: Mapping[str, Any],
    workdir: pathlib.Path,
    *,
    diagnostics: DiagnosticsConfig = DiagnosticsConfig(),
    seed: int = 0,
    name: str = "grpo",
) -> GRPOState:
    """Trains from `variables` until `grpo.config.steps` optimizer steps are made, or resumes from `workdir`'s newest
    checkpoint.

    Leaves metrics.jsonl, samples.jsonl, tensorboard/, checkpoints/ and goodput.json (its steps are rollouts) in
    `workdir`. Weights, optimizer, reference and random state are all in the checkpoint, so that a run that was killed
    goes on bit for bit. Signals and exceptions save the rollouts that were finished (see `run_steps`). Raises
    RewardError for a reward that fails.
    """
    total, clock, optimizer = grpo.config.rollouts, Goodput(workdir), grpo.optimizer
    store = Checkpoints(workdir / "checkpoints", grpo.model.config, keep_last=config.keep_last, keep_best=0)
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.closing(store))
        state, _, beyond = resume(
            store,
            abstract_grpo_state(grpo.model, optimizer, grpo.config.has_reference),
            total * grpo.config.steps_per_rollout,
            lambda: grpo_state(grpo.model, variables, optimizer, jax.random.key(seed), grpo.config.has_reference),
        )
        start, start_step = int(state.rollouts), int(state.step)

        def evaluation_of(done: int) -> Callable[..., dict[str, Any]] | None:
            """The evaluation that is due after `done` rollouts: `evaluate`, `greedy` or None."""

            def is_due(every: int) -> bool:
                return every > 0 and (done == total or due(done, every))

            return evaluate if is_due(config.sampled_eval_every) else greedy if is_due(config.eval_every) else None

        logged = [line for line in read_metrics(workdir) if line["step"] <= start_step]
        evaluated_here = any("held_out_accuracy" in line for line in logged if line["step"] == start_step)
        missing = evaluation_of(start) is not None and from_primary(str(evaluated_here)) != "True"
        if start >= total and (beyond or not missing):
            return state
        writer = stack.enter_context(contextlib.closing(MetricsWriter(workdir, last_step=start_step, group="rl")))
        progress, watch = Progress(name, total, start), Diagnostics(diagnostics)
        for line in logged:  # what was said before a run stopped is not said again
            watch.observe(line)
        clock.begin(start)
        values: dict[str, Any] = {}  # of the rollout under way

        def make_step(state: GRPOState) -> tuple[GRPOState, dict[str, jax.Array]]:
            nonlocal values
            begin = time.monotonic()
            state, metrics, samples, rewards_B = iterate(grpo, state)
            values = measured(jax.device_get(metrics)) | {"rollout_seconds": time.monotonic() - begin}
            return state, {"step": int(state.step), "samples": samples, "rewards_B": rewards_B}

        def log(done: int, made: Mapping[str, Any], line: bool) -> None:
            progress.advance(done)
            if line:
                writer.write(made["step"], values)
                writer.write_samples(made["step"], sample_rows(grpo, made["samples"], made["rewards_B"], config.show))

        def evaluate_now(state: GRPOState, done: int, saved: bool) -> None:
            with clock("evaluation"):
                measure = evaluation_of(done)
                found = held_out_metrics(measure(grpo.model, state.variables, grpo.task, evaluation))
            writer.write(int(state.step), found)
            if done == start:  # before the first rollout
                watch.observe(found)
            values.update(found)

        def finish(done: int, line: bool) -> None:
            if line:
                progress.report(headline(values))
            for sentence in watch.observe(values):
                progress.say(f"rollout {done}: {sentence}")

        return run_steps(
            state,
            make_step,
            unit="rollout",
            done=start,
            total=total,
            store=store,
            clock=clock,
            progress=progress,
            log=log,
            evaluation_due=lambda done: evaluation_of(done) is not None,
            evaluate=evaluate_now,
            evaluate_first=missing,
            finish=finish,
            log_every=config.log_every,
            checkpoint_every=config.checkpoint_every,
        )


def iterate(grpo: GRPO, state: GRPOState) -> tuple[GRPOState, dict[str, jax.Array], Samples, jax.Array]:
    """One iteration: a single call where every reward is in-graph, else two with the Python rewards between them.

    A Python reward that raises leaves `state` usable: its buffers are only given away once the rewards are there.
    """
    if grpo.rewards.in_graph:
        return grpo.iteration(state)
    samples = grpo.sample(state)
    # every process judges all completions: a reward is a function of its text
    here = process_allgather(samples, tiled=True)
    completions = to_texts(here.trajectories.completions_BN, here.trajectories.mask_BN)
    texts = (
        grpo.task.prompt_text(here.instances),
        completions,
        grpo.task.answer_text(here.instances),
        here.trajectories.finished_B,
    )
    # a completion that was emptied (see `Trajectories`) is nobody's to judge
    whole_B = here.trajectories.mask_BN.any(axis=1)
    judged = grpo.rewards.text_components(*([column[row] for row in np.flatnonzero(whole_B)] for column in texts))
    components = {name: np.full(len(whole_B), np.nan, np.float32) for name in judged}
    for name, values in judged.items():
        components[name][whole_B] = values
    return grpo.learn(state, samples, jax.tree.map(jnp.asarray, components))


def sample_rows(grpo: GRPO, samples: Samples, rewards_B: jax.Array, count: int) -> list[dict[str, Any]]:
    """The first completions of the first `count` groups, to be read."""
    firsts = [i * grpo.config.group_size for i in range(min(count, len(rewards_B) // grpo.config.group_size))]
    if not firsts:
        return []
    first, rewards_B = process_allgather(
        (jax.tree.map(lambda x: x[jnp.asarray(firsts, jnp.int32)], samples), rewards_B), tiled=True
    )
    texts = to_texts(first.trajectories.completions_BN, first.trajectories.mask_BN)
    prompts = grpo.task.prompt_text(first.instances)
    return [
        {"prompt": prompt, "completion": text, "reward": float(rewards_B[i])}
        for prompt, text, i in zip(prompts, texts, firsts, strict=True)
    ]


def measured(metrics: dict[str, Any]) -> dict[str, Any]:
    """Without the mean length of right or of wrong answers where there were none."""
    return {
        name: value
        for name, value in metrics.items()
        if name not in ("length_right_mean", "length_wrong_mean") or np.isfinite(value)
    }


def held_out_metrics(measured: Mapping[str, Any]) -> dict[str, float]:
    """An evaluation's numbers under the names they are logged by: held_out_accuracy and held_out_length of greedy
    answers, and held_out_<name> of the sampled ones."""
    named = {"greedy_accuracy": "accuracy", "greedy_length": "length"}
    return {f"held_out_{named.get(name, name)}": value for name, value in measured.items() if isinstance(value, float)}


def headline(values: Mapping[str, Any]) -> str:
    """The few numbers a person watches. Not the loss: it starts near 0 and says nothing (see `grpo_loss`)."""
    numbers = [f"reward {values['reward_mean']:.3f}"]
    numbers += [
        f"{key.removeprefix('reward_')} {value:.3f}"
        for key, value in values.items()
        if key.startswith("reward_") and key not in ("reward_mean", "reward_std")
    ]
    numbers += [f"length {values['length_mean']:.1f}", f"entropy {values['entropy']:.3f}"]
    numbers += [f"kl {values['kl']:.4f}"] if "kl" in values else []
    numbers.append(f"grad {values['grad_norm']:.2f}")
    numbers += [f"held-out {values['held_out_accuracy']:.3f}"] if "held_out_accuracy" in values else []
    return "  ".join(numbers)

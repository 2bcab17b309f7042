"""Runs GRPO: iterations, log lines, held-out accuracy, sample tables, alarms, checkpoints, curves, and going on where
it stopped."""

import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import process_allgather

from deepseek_jax.errors import ConfigError
from deepseek_jax.fields import build
from deepseek_jax.parallel.hosts import from_primary
from deepseek_jax.rl.diagnostics import Diagnostics, DiagnosticsConfig
from deepseek_jax.rl.evaluate import EvalConfig, evaluate, greedy
from deepseek_jax.rl.grpo import GRPO, GRPOState, Samples, abstract_grpo_state, grpo_state
from deepseek_jax.rl.tasks.base import to_texts
from deepseek_jax.training.checkpoints import Checkpoints
from deepseek_jax.training.goodput import Goodput
from deepseek_jax.training.metrics import MetricsWriter, Progress, read_metrics
from deepseek_jax.training.preemption import Terminated, stop_signals


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
        for name, least in (
            ("log_every", 1),
            ("eval_every", 0),
            ("sampled_eval_every", 0),
            ("checkpoint_every", 0),
            ("keep_last", 1),
            ("show", 0),
        ):
            if getattr(self, name) < least:
                raise ConfigError(f"loop.{name}={getattr(self, name)}: at least {least}")

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
    """Trains from `variables` until `grpo.config.steps` optimizer steps are made, or goes on from `workdir`'s newest
    checkpoint.

    Leaves metrics.jsonl, samples.jsonl, tensorboard/, checkpoints/ and goodput.json (its steps are rollouts) in
    `workdir`. Weights, optimizer, reference and random state are all in the checkpoint, so that a run that was killed
    goes on bit for bit. SIGTERM or Ctrl-C saves and raises `Terminated`. Raises RewardError for a reward that fails.
    Whatever is raised, the rollouts that were finished are saved first, where their state is still there.
    """
    total, clock, optimizer = grpo.config.rollouts, Goodput(workdir), grpo.optimizer
    abstract = abstract_grpo_state(grpo.model, optimizer, grpo.config.has_reference)
    store = Checkpoints(workdir / "checkpoints", grpo.model.config, keep_last=config.keep_last, keep_best=0)
    with contextlib.closing(store):
        store.require_space(abstract)
        restored = store.restore(abstract, total * grpo.config.steps_per_rollout)
        if restored is not None:
            state = restored.state
        else:
            state = grpo_state(grpo.model, variables, optimizer, jax.random.key(seed), grpo.config.has_reference)
        done = saved = int(state.rollouts)

        def due(every: int) -> bool:
            return every > 0 and (done == total or done % every == 0)

        def evaluation_due():
            """The evaluation that is due after `done` rollouts: `evaluate`, `greedy` or None."""
            return evaluate if due(config.sampled_eval_every) else greedy if due(config.eval_every) else None

        logged = [line for line in read_metrics(workdir) if line["step"] <= int(state.step)]
        evaluated_here = any("held_out_accuracy" in line for line in logged if line["step"] == int(state.step))
        evaluated = from_primary(str(evaluated_here)) == "True"
        # the stage was longer once; all that it has left stays as it is
        beyond = max(store.steps(), default=0) > int(state.step)
        if done >= total and (beyond or evaluated or evaluation_due() is None):
            return state
        writer = MetricsWriter(workdir, last_step=int(state.step), group="rl")
        progress, watch = Progress(name, total, done), Diagnostics(diagnostics)
        for line in logged:  # what was said before a run stopped is not said again
            watch.observe(line)
        clock.begin(done)

        def held_out() -> dict[str, float]:
            """The evaluation that is due, measured and logged; {} if none is."""
            measure = evaluation_due()
            if measure is None:
                return {}
            with clock("evaluation"):
                values = held_out_metrics(measure(grpo.model, state.variables, grpo.task, evaluation))
            writer.write(int(state.step), values)
            return values

        def save() -> None:
            with clock("checkpoint"):
                store.save(state)
                if done == total or stop is not None:
                    store.wait()

        def rescue() -> str:
            """Saves the rollouts that were finished, where an error has left them. Says what there is to go on from;
            raises nothing."""
            lost = f"rollouts {saved + 1} to {done} are lost" if done > saved else "nothing is lost"
            newest = (
                f"the newest checkpoint is that of step {max(store.steps())}"
                if store.steps()
                else "nothing was saved yet"
            )
            # the update that failed had been given its buffers
            if any(leaf.is_deleted() for leaf in jax.tree.leaves(state)):
                return f"the error took the weights with it: {lost}, {newest}"
            try:
                if done > saved:
                    save()
                    store.wait()
            except Exception as error:
                return f"{lost}, {newest}: {error}"
            return f"rollout {done} of {total} is saved in {store.directory}; start again to go on" if done else newest

        with contextlib.closing(writer), progress, stop_signals() as asked_to_stop:
            if done:
                progress.say(f"going on from rollout {done} of {total}")
            stop = None
            try:
                if not evaluated:
                    watch.observe(held_out())
                while done < total and stop is None:
                    begin = time.monotonic()
                    state, metrics, samples, rewards_B = iterate(grpo, state)
                    values = measured(jax.device_get(metrics))
                    clock.started(metrics)
                    done += 1
                    step = int(state.step)
                    stop = asked_to_stop()
                    last = done == total or stop is not None
                    values["rollout_seconds"] = time.monotonic() - begin
                    progress.advance(done)
                    line = last or done % config.log_every == 0
                    if line:
                        writer.write(step, values)
                        writer.write_samples(step, sample_rows(grpo, samples, rewards_B, config.show))
                    save_now = last or (config.checkpoint_every and done % config.checkpoint_every == 0)
                    if save_now:
                        save()
                        saved = done
                    values |= held_out()
                    if line:
                        progress.report(headline(values))
                    for sentence in watch.observe(values):
                        progress.say(f"rollout {done}: {sentence}")
                    if line or save_now:
                        clock.reached(done)
            except Exception:
                progress.say(rescue())
                raise
            progress.say(clock.report())
            if stop is not None:
                progress.say(f"{stop.name}: saved rollout {done} of {total} in {store.directory}; start again to go on")
                raise Terminated(128 + stop)
    return state


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
    parts = {name: np.full(len(whole_B), np.nan, np.float32) for name in judged}
    for name, values in judged.items():
        parts[name][whole_B] = values
    return grpo.learn(state, samples, jax.tree.map(jnp.asarray, parts))


def sample_rows(grpo: GRPO, samples: Samples, rewards_B: jax.Array, count: int) -> list[dict[str, Any]]:
    """The first completions of the first `count` groups, to be read."""
    rows = [i * grpo.config.group_size for i in range(min(count, len(rewards_B) // grpo.config.group_size))]
    if not rows:
        return []
    first, rewards_B = process_allgather(
        (jax.tree.map(lambda x: x[jnp.asarray(rows, jnp.int32)], samples), rewards_B), tiled=True
    )
    texts = to_texts(first.trajectories.completions_BN, first.trajectories.mask_BN)
    prompts = grpo.task.prompt_text(first.instances)
    return [
        {"prompt": prompt, "completion": text, "reward": float(rewards_B[row])}
        for prompt, text, row in zip(prompts, texts, rows, strict=True)
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
    parts = [f"reward {values['reward_mean']:.3f}"]
    parts += [
        f"{key.removeprefix('reward_')} {value:.3f}"
        for key, value in values.items()
        if key.startswith("reward_") and key not in ("reward_mean", "reward_std")
    ]
    parts += [f"length {values['length_mean']:.1f}", f"entropy {values['entropy']:.3f}"]
    parts += [f"kl {values['kl']:.4f}"] if "kl" in values else []
    parts.append(f"grad {values['grad_norm']:.2f}")
    parts += [f"held-out {values['held_out_accuracy']:.3f}"] if "held_out_accuracy" in values else []
    return "  ".join(parts)

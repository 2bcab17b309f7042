"""The loop of every training stage: steps, log lines, evaluations, checkpoints, stopping and resuming.

`training/loop.py` runs it over optimizer steps, `rl/loop.py` over rollouts.
"""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

from deepseek_jax.data.loader_state import gather
from deepseek_jax.training.checkpoints import Checkpoints, Restored
from deepseek_jax.training.goodput import Goodput
from deepseek_jax.training.metrics import Progress
from deepseek_jax.training.preemption import Terminated, stop_signals

Metrics = Mapping[str, Any]


def resume(
    store: Checkpoints, abstract: Any, last_step: int, fresh: Callable[[], Any]
) -> tuple[Any, Restored | None, bool]:
    """The state to resume from: the newest checkpoint's, or `fresh()` where there is none.

    -> (state, what was restored or None, True if the stage was once longer than `last_step`: then the state is that of
    `last_step`, and the stage's results stay as they are). Raises CheckpointError as `Checkpoints.restore` does, and
    where the disk has no room for a checkpoint.
    """
    store.require_space(abstract)
    restored = store.restore(abstract, last_step)
    beyond = max(store.steps(), default=0) > last_step
    return (fresh() if restored is None else restored.state), restored, beyond


def due(done: int, every: int) -> bool:
    """True if an event that happens every `every` steps happens after step `done`; never for 0."""
    return every > 0 and done % every == 0


def run_steps(
    state: Any,
    make_step: Callable[[Any], tuple[Any, Metrics]],
    *,
    unit: str,
    done: int,
    total: int,
    store: Checkpoints,
    clock: Goodput,
    progress: Progress,
    log: Callable[[int, Metrics, bool], None],
    evaluation_due: Callable[[int], bool],
    evaluate: Callable[[Any, int, bool], None],
    log_every: int,
    checkpoint_every: int,
    loader_state: Callable[[], Any] = lambda: None,
    flush: Callable[[], None] = lambda: None,
    finish: Callable[[int, bool], None] = lambda done, line: None,
    evaluate_first: bool = False,
) -> Any:
    """Makes steps `done` + 1 to `total` -> the last state. A step is called `unit` in what is said.

    `make_step(state)` gives the next state and its metrics, `log(done, metrics, line)` takes them; every `log_every`
    steps `line` is true. `flush()` writes what a log holds back, before a save or an evaluation. A save comes before
    the evaluation of the same step, `evaluate(state, done, saved)`, so that one that fails loses nothing. `finish(done,
    line)` ends a step. `loader_state()` is where the data stands after the last step made, and is saved with the state.
    `evaluate_first` makes up for an evaluation before the first step.

    SIGTERM or Ctrl-C saves and raises `Terminated` after the step under way (see `stop_signals`). An exception is
    passed on after the step that was reached is saved, if it still can be (`Checkpoints.rescue`), and what is safe is
    said.
    """
    with progress, stop_signals() as asked_to_stop:
        if done:
            progress.say(f"going on from {unit} {done} of {total}")
        saved, stop = done, None
        try:
            if evaluate_first:
                evaluate(state, done, done > 0)
            while done < total and stop is None:
                state, metrics = make_step(state)
                clock.started(metrics)
                done += 1
                stop = asked_to_stop()
                last = done == total or stop is not None
                line, save_now = last or due(done, log_every), last or due(done, checkpoint_every)
                log(done, metrics, line)
                if save_now or evaluation_due(done):
                    flush()
                if save_now:
                    with clock("checkpoint"):
                        saved, data = done, loader_state()
                        store.save(state, data if data is None else gather(data))
                        if last:
                            store.wait()
                if evaluation_due(done):
                    evaluate(state, done, save_now)
                finish(done, line)
                if line or save_now:
                    clock.reached(done)
        except Exception:
            with contextlib.suppress(Exception):  # the first error is the one to be told
                flush()
            if done > saved:
                made = f"{unit} {done}" if done == saved + 1 else f"{unit}s {saved + 1} to {done}"
                progress.say(f"{made}: {store.rescue(state, loader_state())}")
                with contextlib.suppress(OSError):
                    clock.reached(done)
            elif done:
                progress.say(f"{unit} {done} is saved in {store.directory}: nothing is lost")
            raise
        progress.say(clock.report())
        if stop is not None:
            progress.say(f"{stop.name}: saved {unit} {done} of {total} in {store.directory}; start again to resume")
            raise Terminated(128 + stop)
    return state

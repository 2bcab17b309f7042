"""Preemption: SIGTERM and Ctrl-C, on one host or many."""

import contextlib
import itertools
import signal
import threading
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils

from deepseek_jax.signals import STOP, catch_signals

_asked = itertools.count(1)  # jax counts over the whole life of a process, and every process has to ask equally often


class Terminated(SystemExit):
    """A signal asked the run to stop and everything is saved; left alone it ends the process with 128 + the signal's
    number."""


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[], signal.Signals | None]]:
    """Gives a function to be called after each step: the signal for which to save and stop now, or None.

    One process listens for SIGTERM and SIGINT itself; a second signal acts as if nobody listened. Main thread only. Of
    several, all stop after the same step if one gets a signal: jax hears SIGTERM and has the processes agree, in the
    background, on a step that none of them has passed; Ctrl-C is passed on to it. A notice that comes when the last
    step of a stage is under way holds for the first of the next.
    """
    alone = jax.process_count() == 1
    received: list[signal.Signals] = []
    main = threading.current_thread() is threading.main_thread()
    listened = () if not main else STOP if alone else (signal.SIGINT,)

    def receive(number: signal.Signals) -> None:
        received.append(number)
        restore()
        if not alone:
            signal.raise_signal(signal.SIGTERM)

    def stop() -> signal.Signals | None:
        if alone or multihost_utils.reached_preemption_sync_point(next(_asked)):
            return received[0] if received else None if alone else signal.SIGTERM
        return None

    with catch_signals(receive, listened) as restore:
        yield stop

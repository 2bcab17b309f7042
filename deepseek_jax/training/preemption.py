"""Being asked to stop: by Ctrl-C, by a scheduler, or on any one of several machines."""

import contextlib
import itertools
import signal
import threading
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils

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
    listened = () if not main else (signal.SIGTERM, signal.SIGINT) if alone else (signal.SIGINT,)
    handlers = {number: signal.getsignal(number) for number in listened}

    def restore():
        for number, handler in handlers.items():
            signal.signal(number, handler)

    def receive(number, _):
        received.append(signal.Signals(number))
        restore()
        if not alone:
            signal.raise_signal(signal.SIGTERM)

    def stop() -> signal.Signals | None:
        if alone or multihost_utils.reached_preemption_sync_point(next(_asked)):
            return received[0] if received else None if alone else signal.SIGTERM
        return None

    for number in handlers:
        signal.signal(number, receive)
    try:
        yield stop
    finally:
        restore()

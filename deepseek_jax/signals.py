"""Catches SIGTERM and Ctrl-C for as long as a piece of work takes."""

import contextlib
import signal
from collections.abc import Callable, Iterator, Sequence

STOP = (signal.SIGTERM, signal.SIGINT)


@contextlib.contextmanager
def catch_signals(
    handle: Callable[[signal.Signals], object], numbers: Sequence[signal.Signals] = STOP
) -> Iterator[Callable[[], None]]:
    """Calls `handle` with each of the signals `numbers` that comes, in place of what they do otherwise.

    The former handlers come back at the end, or earlier by calling what is yielded. Child processes do not inherit the
    handlers, unlike SIG_IGN. In the main thread only: Python raises ValueError elsewhere.
    """
    former = {number: signal.getsignal(number) for number in numbers}

    def restore() -> None:
        for number, handler in former.items():
            signal.signal(number, handler)

    try:
        for number in former:
            signal.signal(number, lambda caught, _: handle(signal.Signals(caught)))
        yield restore
    finally:
        restore()

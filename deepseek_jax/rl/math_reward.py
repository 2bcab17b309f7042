"""Accuracy on natural mathematics through math-verify, in a process of its own.

math-verify parses LaTeX with sympy, which can run without end on a hostile string, and its own time limit is a signal
that only works in a main thread (elsewhere it raises, or says "wrong"). So checks run in worker processes under our
clock, and a worker that is late is killed. There are several, so that answers that take the full time do not wait for
one another.
"""

import atexit
import functools
import logging
import multiprocessing
import os
import queue
import signal
from collections.abc import Callable

from deepseek_jax.errors import RewardError
from deepseek_jax.rl.answers import fold, same_answer
from deepseek_jax.rl.text_rewards import final_answer

SECONDS = 5.0
START_SECONDS = 120.0
WORKERS = min(8, os.cpu_count() or 1)


def math_accuracy_reward(prompt: str, completion: str, answer: str) -> float:
    """1.0 where the final answer and `answer` are the same by `same_answer` or by math-verify; what that can't judge in
    time, or at all, counts as wrong. May be called from several threads, of which `WORKERS` are served at a time."""
    given = final_answer(prompt, completion)
    if given is None or not given.strip():
        return 0.0
    return float(same_answer(given, answer) or _checkers()(fold(given), fold(answer)) is True)


@functools.cache
def _checkers() -> "Workers":
    return Workers(math_equal, SECONDS, WORKERS)


def math_equal(guess: str, expected: str) -> bool:
    """True if two mathematical answers, without tags, are equal. Runs in the worker."""
    from math_verify import parse, verify

    # it warns that without its own time limit it needs another: ours
    logging.getLogger("math_verify").setLevel(logging.ERROR)

    def read(text):
        marked = text if "\\boxed" in text or "$" in text else f"${text}$"
        return parse(marked, parsing_timeout=None)

    return bool(verify(read(expected), read(guess), timeout_seconds=None))


class Workers:
    """`count` workers behind one function: a call from any thread goes to one that is free, or waits for it. A worker's
    process starts when it is first needed."""

    def __init__(self, function: Callable, seconds: float, count: int):
        # the one used last first: few calls start few processes
        self._free: queue.LifoQueue[Worker] = queue.LifoQueue()
        for _ in range(count):
            self._free.put(Worker(function, seconds))

    def __call__(self, *arguments):
        worker = self._free.get()
        try:
            return worker(*arguments)
        finally:
            self._free.put(worker)


class Worker:
    """Calls `function` in another process: the result, or None where it raised or took longer than `seconds`. One call
    at a time.

    The process lives from call to call. One that was late is killed, one that died (the system may kill it for its
    memory, even between two calls) is replaced and asked once more. `function` must be importable by name.
    """

    def __init__(self, function: Callable, seconds: float):
        self.function, self.seconds = function, seconds
        self._process = None
        atexit.register(self.stop)

    def __call__(self, *arguments):
        for _ in range(2):
            if self._process is None or not self._process.is_alive():
                self._start()
            try:
                self._pipe.send(arguments)
                if self._pipe.poll(self.seconds):
                    return self._pipe.recv()
            except (EOFError, OSError):  # it is dead
                self.stop()
                continue
            self.stop()
            return None
        return None

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self.function), daemon=True)
        self._process.start()
        theirs.close()
        try:
            ready = self._pipe.poll(START_SECONDS) and self._pipe.recv()
        except EOFError:
            ready = False
        if not ready:
            self.stop()
            raise RewardError(
                f"the process that should run {self.function.__name__} did not start within {START_SECONDS:.0f} s; "
                "a script that trains must be guarded by if __name__ == '__main__'"
            )


def _serve(pipe, function: Callable) -> None:
    # Ctrl-C reaches every process of a terminal; the run ends its workers itself
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    pipe.send(True)
    while True:
        try:
            arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(function(*arguments))
        except Exception:
            pipe.send(None)

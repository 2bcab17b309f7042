"""Accuracy on natural mathematics through math-verify, in a process of its own.

math-verify parses LaTeX with sympy, which can run for ever on a hostile string, and its own time limit is a signal that
only works in a main thread (elsewhere it raises, or says "wrong"). So the check runs in a worker process under our clock,
and a worker that is late is killed.
"""

import atexit
import functools
import logging
import multiprocessing
import threading
from collections.abc import Callable

from deepseek_jax.errors import RewardError
from deepseek_jax.rl.text_rewards import split_completion

SECONDS = 5.0
START_SECONDS = 120.0


def math_accuracy_reward(prompt: str, completion: str, answer: str) -> float:
    """1.0 where math-verify finds the answer block equal to `answer`; what it can't judge in time, or at all, counts as wrong."""
    parts = split_completion(completion)
    return 0.0 if parts is None else float(_checker()(parts[1], answer) is True)


@functools.cache
def _checker() -> "Worker":
    return Worker(math_equal, SECONDS)


def math_equal(guess: str, expected: str) -> bool:
    """Whether two mathematical answers, without tags, are equal. Runs in the worker."""
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that without its own time limit it needs another: ours

    def read(text):
        marked = text if "\\boxed" in text or "$" in text else f"${text}$"
        return parse(marked, parsing_timeout=None)

    return bool(verify(read(expected), read(guess), timeout_seconds=None))


class Worker:
    """Calls `function` in another process: the result, or None where it raised or took longer than `seconds`.

    The process lives from call to call and is replaced when it had to be killed. `function` must be importable by name.
    """

    def __init__(self, function: Callable, seconds: float):
        self.function, self.seconds = function, seconds
        self._process, self._lock = None, threading.Lock()
        atexit.register(self.stop)

    def __call__(self, *arguments):
        with self._lock:
            if self._process is None or not self._process.is_alive():
                self._start()
            self._pipe.send(arguments)
            try:
                if self._pipe.poll(self.seconds):
                    return self._pipe.recv()
            except EOFError:  # the process died, for instance for want of memory
                pass
            self.stop()
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

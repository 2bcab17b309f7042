"""Signals are caught inside the block and do what they did before outside it."""

import signal
import subprocess
import sys
import threading

import pytest

from deepseek_jax.signals import STOP, catch_signals


@pytest.fixture(autouse=True)
def former():
    """Handlers that note what they got, in place of those that would end the tests."""
    got = []
    handlers = {number: signal.signal(number, lambda caught, _: got.append(caught)) for number in STOP}
    yield got
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_signals_are_caught_inside_alone(former):
    caught = []
    with catch_signals(caught.append):
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
    assert caught == [signal.SIGTERM, signal.SIGINT] and former == []
    signal.raise_signal(signal.SIGTERM)
    assert caught == [signal.SIGTERM, signal.SIGINT] and former == [signal.SIGTERM]


def test_only_the_named_signals_and_until_restored(former):
    caught = []
    with catch_signals(caught.append, (signal.SIGINT,)) as restore:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        restore()
        signal.raise_signal(signal.SIGINT)
    assert caught == [signal.SIGINT] and former == [signal.SIGTERM, signal.SIGINT]


def test_an_exception_puts_the_former_handlers_back(former):
    with pytest.raises(RuntimeError), catch_signals(lambda _: None):
        raise RuntimeError
    signal.raise_signal(signal.SIGINT)
    assert former == [signal.SIGINT]


def test_a_child_process_does_not_ignore_them():
    program = "import signal; signal.raise_signal(signal.SIGTERM)"
    with catch_signals(lambda _: None):
        assert subprocess.run([sys.executable, "-c", program]).returncode == -signal.SIGTERM


def test_another_thread_is_refused():
    errors = []

    def run():
        try:
            with catch_signals(lambda _: None):
                pass
        except ValueError as error:
            errors.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert len(errors) == 1 and "main thread" in errors[0]

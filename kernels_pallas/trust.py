"""Comparison of a kernel with its reference at its first use on a kind of device.

The input is small and has the dtypes, formats and widths of the call. A file for each user remembers the kernels that
agreed, by kind of device, version of jax and source of the kernels, so that each is compared once. A kernel that is
wrong or fails is replaced by XLA, with a warning, and compared again in the next process. `DEEPSEEK_JAX_KERNEL_CHECK=0`
skips all this, and a kernel that is asked for by its own name runs without it.
"""

import concurrent.futures
import contextlib
import contextvars
import functools
import hashlib
import json
import logging
import os
import pathlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from kernels_pallas.accuracy import disagreement

log = logging.getLogger(__name__)
SKIP = "DEEPSEEK_JAX_KERNEL_CHECK"
NOT_TRUSTED = "is not to be trusted on this device"
_verdicts: dict[str, str | None] = {}  # by call: the fault, or None if the kernel is right
_said: set[str] = set()  # warnings
_skipped = contextvars.ContextVar("kernel check is skipped", default=False)
_lock = threading.Lock()


def say_once(message: str) -> None:
    """Warns once in a process; of several processes only the first prints it."""
    if message not in _said:
        _said.add(message)
        if jax.process_index() == 0:
            log.warning("%s", message)


@contextlib.contextmanager
def unchecked() -> Iterator[None]:
    """Compares nothing within the context, in which programs are traced for other hardware, as in a dry run."""
    token = _skipped.set(True)
    try:
        yield
    finally:
        _skipped.reset(token)


def complaint(
    operation: str,
    name: str,
    arguments: tuple,
    small: Callable[[], tuple],
    kernel: Callable,
    reference: Callable,
    bound: float | None,
) -> str | None:
    """Compares `kernel` with `reference` on the arrays `small()` and says what is wrong, with what to report; None if
    they agree within `bound` (see `accuracy.disagreement`).

    `arguments` are those of the call; their shapes and dtypes are read, not their numbers, so that a program may be
    traced meanwhile. In a run of several processes all of them must call it, and all get the same answer.
    """
    if os.environ.get(SKIP) == "0" or _skipped.get():
        return None
    call = f"{name} of {operation} on {_describe(arguments)}"
    with _lock:
        if call not in _verdicts:
            _verdicts[call] = _apart(
                lambda: _agreed(_judge(f"{name} of {operation}", small(), kernel, reference, bound))
            )
        wrong = _verdicts[call]
    if wrong is None:
        return None
    return (
        f"{NOT_TRUSTED} ({wrong}). Please report this with: {call}; {_device().device_kind}, jax {jax.__version__}, "
        f"kernels {_version()}. {SKIP}=0 runs the kernel without this check"
    )


def _judge(what: str, arguments: tuple, kernel: Callable, reference: Callable, bound: float | None) -> str | None:
    key = hashlib.sha256(
        repr((what, _describe(arguments), _device().device_kind, jax.__version__, _version())).encode()
    ).hexdigest()
    if key in _agreed_before():
        return None
    leaves, structure = jax.tree.flatten(arguments)
    arrays = {index: leaf for index, leaf in enumerate(leaves) if isinstance(leaf, np.ndarray)}

    def results(function):
        """Passes arrays as arguments, since they would else become constants of the program."""
        return jax.block_until_ready(
            jax.jit(
                lambda given: function(*structure.unflatten([given.get(i, leaf) for i, leaf in enumerate(leaves)]))
            )(arrays)
        )

    try:
        got = results(kernel)
    except Exception as error:
        return f"it fails with {type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}"
    with jax.default_matmul_precision("float32"):
        wrong = disagreement(got, results(reference), bound)
    if wrong is None:
        _remember(key)
    return wrong


def _agreed(wrong: str | None) -> str | None:
    """One verdict for all processes: a kernel that is wrong on one is wrong on all. In different programs they would
    wait for each other without end."""
    if jax.process_count() == 1:
        return wrong
    anywhere = bool(np.any(multihost_utils.process_allgather(np.asarray(wrong is not None))))
    return wrong or ("another process of this run found it wrong" if anywhere else None)


def _apart(function: Callable[[], Any]) -> Any:
    """Runs function() in a thread of its own, outside the caller's trace, mesh and settings, and without comparing
    kernels there."""

    def run():
        with unchecked():
            return function()

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(run).result()


def _device() -> jax.Device:
    return jax.local_devices()[0]


def _describe(arguments: tuple) -> str:
    """The shapes, dtypes and static arguments of a call, as text."""
    text = lambda leaf: (
        f"{leaf.dtype}{list(leaf.shape)}"
        if isinstance(leaf, (np.ndarray, jax.Array, jax.ShapeDtypeStruct))
        else getattr(leaf, "__name__", repr(leaf))
    )
    leaves, structure = jax.tree.flatten(arguments)
    return f"{', '.join(map(text, leaves))} in {structure}"


@functools.cache
def _version() -> str:
    """A hash of the kernels' source: this package without the benchmark and the studies."""
    root, digest = pathlib.Path(__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        if path.relative_to(root).parts[0] not in ("bench", "studies"):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _path() -> pathlib.Path:
    return (
        pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
        / "kernels_pallas"
        / "agreed.json"
    )


def _agreed_before() -> list[str]:
    """The keys of the kernels that agreed before; none if the file is missing or damaged."""
    try:
        keys = json.loads(_path().read_text())
    except (OSError, ValueError):
        return []
    return [key for key in keys if isinstance(key, str)] if isinstance(keys, list) else []


def _remember(key: str) -> None:
    """Adds a key to the file, atomically. If it cannot be written, the next process compares again."""
    path = _path()
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(sorted({*_agreed_before(), key}), indent=0) + "\n")
        partial.replace(path)
    except OSError as error:
        log.info("%s could not be written: %s", path, error)

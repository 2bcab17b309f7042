"""Which of an operation's implementations runs."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

PREFERRED = {"sm90": "mosaic_gpu_sm90", "tpu": "mosaic_tpu"}  # by kind of device


class Unsupported(ValueError):
    """An implementation was asked for what it does not do; the message says what it would do."""


def device_kind(device: jax.Device | None = None) -> str:
    """"sm90" for NVIDIA Hopper, "tpu" for any TPU, else the platform's name; of `device`, by default the first there is."""
    device = device or jax.devices()[0]
    if device.platform in ("gpu", "cuda"):
        major = str(getattr(device, "compute_capability", "0")).partition(".")[0]
        return f"sm{major}0"
    return device.platform


def choose(operation: str, implementations: Mapping[str, tuple[Callable, Callable[..., str | None]]], implementation: str | None, *args: Any) -> Callable:
    """The function to call for `args`. `implementations` maps names to (function, reason), where reason(*args) says what it cannot do, or None.

    `implementation` None takes the kernel made for the first device there is, where it supports the arguments, and else "xla". A name takes
    that one, or raises Unsupported with the reason and the names of those that would do it.
    """
    if implementation is None:
        preferred = PREFERRED.get(device_kind())
        if preferred in implementations and implementations[preferred][1](*args) is None:
            return implementations[preferred][0]
        return implementations["xla"][0]
    if implementation not in implementations:
        raise Unsupported(f"{operation}: no implementation {implementation!r}; there are {', '.join(implementations)}")
    function, reason = implementations[implementation]
    why = reason(*args)
    if why is not None:
        able = [name for name, (_, other) in implementations.items() if other(*args) is None]
        raise Unsupported(f"{operation}: {implementation} {why}; {', '.join(able) or 'no implementation'} would do it")
    return function

"""Which of an operation's implementations runs."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

PREFERRED = {"sm90": "mosaic_gpu_sm90", "tpu": "mosaic_tpu"}  # by kind of device


class Unsupported(ValueError):
    """An implementation was asked for what it does not do; the message says what it would do."""


def device_kind(device: jax.Device | None = None) -> str:
    """sm90 for NVIDIA Hopper, tpu for any TPU, else the platform's name; of `device`, by default the first there is."""
    device = device or jax.devices()[0]
    if device.platform in ("gpu", "cuda"):
        major = str(getattr(device, "compute_capability", "0")).partition(".")[0]
        return f"sm{major}0"
    return device.platform


def preferred(kind: str) -> tuple[str, ...]:
    """Implementations for a kind of device, best first."""
    return (PREFERRED[kind], "xla") if kind in PREFERRED else ("xla",)


def choose(
    operation: str,
    implementations: Mapping[str, tuple[Callable, Callable[..., str | None]]],
    implementation: str | tuple[str, ...] | None,
    *args: Any,
) -> Callable:
    """The function to call for `args`. `implementations` maps names to (function, reason), where reason(*args) says what it cannot do, or None.

    Of several names the first that supports the arguments is taken; None stands for those preferred on the first device there is. Raises
    Unsupported, with the reasons and the names of those that would do it, if none of the names does.
    """
    names = preferred(device_kind()) if implementation is None else (implementation,) if isinstance(implementation, str) else implementation
    reasons = []
    for name in names:
        if name not in implementations:
            reasons.append(f"there is no implementation {name!r}, but {', '.join(implementations)}")
            continue
        function, reason = implementations[name]
        why = reason(*args)
        if why is None:
            return function
        reasons.append(f"{name} {why}")
    able = [name for name, (_, reason) in implementations.items() if reason(*args) is None]
    raise Unsupported(f"{operation}: {'; '.join(reasons)}. These would do it: {', '.join(able) or 'none'}")

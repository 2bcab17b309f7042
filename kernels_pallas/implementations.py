"""Implementations of an operation: one table for each operation, and the choice from it."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from kernels_pallas import trust

PREFERRED = {"sm90": "mosaic_gpu_sm90", "tpu": "mosaic_tpu"}  # the kernels for each kind of device
IMPLEMENTATIONS = ("xla", *PREFERRED.values())


class Unsupported(ValueError):
    """Raised for a call that no allowed implementation supports. The message names those that would do it."""


def anything(*arguments: Any) -> None:
    """The reason of an implementation that supports all arguments: none."""


def compute(function: Callable, *arguments: Any) -> Any:
    return function(*arguments)


@dataclasses.dataclass(frozen=True)
class Operation:
    """An operation that a user can call, and the table of all its implementations.

    implementations   name -> (function, reason). "xla" is the definition. reason(*arguments) says what the function
                      does not support, or None
    small             small(*arguments) -> arguments of the same dtypes, formats and widths with few rows, on which a
                      kernel is compared with "xla"
    results           results(function, *arguments) -> the arrays that are compared, with gradients if a kernel has its
                      own
    bound             the largest difference that is accepted there (see `accuracy.disagreement`)
    instead           a sentence on what XLA does in a kernel's place and what it costs, for the warning
    """

    name: str
    implementations: Mapping[str, tuple[Callable, Callable[..., str | None]]]
    small: Callable[..., tuple]
    results: Callable[..., Any] = compute
    bound: float | None = None
    instead: str = (
        "XLA emulates it in float32 instead, which is slower; shapes and formats that the kernel takes avoid it"
    )

    def missing(self, name: str, *arguments: Any) -> str | None:
        """Why the implementation `name` cannot be used for `arguments`: it does not support them, or it is wrong on
        this device. None if it can."""
        function, reason = self.implementations[name]
        why = reason(*arguments)
        if why is None and name == PREFERRED.get(device_kind()):
            kernel, reference = (functools.partial(self.results, f) for f in (function, self.implementations["xla"][0]))
            why = trust.complaint(
                self.name, name, arguments, lambda: self.small(*arguments), kernel, reference, self.bound
            )
        return why

    def pass_over(self, reasons: Sequence[str]) -> None:
        """Warns once that a kernel is passed over, and what XLA does instead."""
        alarm = "WARNING: " if any(trust.NOT_TRUSTED in why for why in reasons) else ""
        trust.say_once(f"{alarm}{self.name}: {'; '.join(reasons)}. {self.instead}.")


def device_kind(device: jax.Device | None = None) -> str:
    """The kind of `device`, by default of the first one: "sm90" for NVIDIA Hopper, "tpu" for any TPU, else the
    platform's name."""
    device = device or jax.devices()[0]
    if device.platform in ("gpu", "cuda"):
        major = str(getattr(device, "compute_capability", "0")).partition(".")[0]
        return f"sm{major}0"
    return device.platform


def preferred(device: str) -> tuple[str, ...]:
    """The implementations for a kind of device, best first."""
    return (PREFERRED[device], "xla") if device in PREFERRED else ("xla",)


def choose(operation: Operation, implementation: str | tuple[str, ...] | None, *arguments: Any) -> Callable:
    """Chooses the function to call for `arguments`.

    Of several names it takes the first that supports the arguments and is right on this device (see `trust`); None
    stands for those preferred on the first device. It warns once of each kernel that it passes over. A single name is
    taken without comparing it. Raises Unsupported, with the reasons and the names that would do it, if none of the
    names supports the arguments.
    """
    names = (
        preferred(device_kind())
        if implementation is None
        else (implementation,)
        if isinstance(implementation, str)
        else implementation
    )
    reasons = []
    for name in names:
        if name not in operation.implementations:
            reasons.append(f"{name!r} is not one of its implementations, {', '.join(operation.implementations)}")
            continue
        function, reason = operation.implementations[name]
        why = reason(*arguments) if len(names) == 1 else operation.missing(name, *arguments)
        if why is None:
            if reasons:
                operation.pass_over(reasons)
            return function
        reasons.append(f"{name} {why}")
    able = [name for name, (_, reason) in operation.implementations.items() if reason(*arguments) is None]
    raise Unsupported(f"{operation.name}: {'; '.join(reasons)}. These would do it: {', '.join(able) or 'none'}")

"""Which of an operation's implementations runs."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from kernels_pallas import trust

PREFERRED = {"sm90": "mosaic_gpu_sm90", "tpu": "mosaic_tpu"}  # the kernels for each kind of device
IMPLEMENTATIONS = ("xla", *PREFERRED.values())


class Unsupported(ValueError):
    """An implementation was asked for what it does not do; the message says what it would do."""


def compute(function: Callable, *arguments: Any) -> Any:
    return function(*arguments)


@dataclasses.dataclass(frozen=True)
class Operation:
    """What a user can call, and every way to compute it.

    implementations   name -> (function, reason), "xla" by the definition among them; reason(*arguments) says what the function cannot do, or None
    small             small(*arguments): numbers of the same dtypes, formats and widths, on which a kernel is compared with "xla"
    results           results(function, *arguments): what is compared, gradients too where a kernel has its own
    bound             how far off a kernel may be there (see `accuracy.disagreement`)
    instead           what XLA does in a kernel's place, and what it costs: for the note that a kernel is passed over
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
        """Why the implementation called `name` is not to be had for `arguments`, None if it is: what it cannot do, or
        that it is wrong on this device."""
        function, reason = self.implementations[name]
        why = reason(*arguments)
        if why is None and name == PREFERRED.get(device_kind()):
            kernel, reference = (functools.partial(self.results, f) for f in (function, self.implementations["xla"][0]))
            why = trust.complaint(
                self.name, name, arguments, lambda: self.small(*arguments), kernel, reference, self.bound
            )
        return why

    def pass_over(self, reasons: Sequence[str]) -> None:
        """Says once that a kernel is passed over, and what comes of it."""
        alarm = "WARNING: " if any(trust.NOT_TRUSTED in why for why in reasons) else ""
        trust.say_once(f"{alarm}{self.name}: {'; '.join(reasons)}. {self.instead}.")


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


def choose(operation: Operation, implementation: str | tuple[str, ...] | None, *arguments: Any) -> Callable:
    """The function to call for `arguments`.

    Of several names the first that supports the arguments, and is right on this device (see `trust`), is taken; None
    stands for those preferred on the first device there is. A kernel that is passed over is said once, with why. A
    single name is taken as it is. Raises Unsupported, with the reasons and the names of those that would do it, if none
    of the names does.
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
            reasons.append(f"there is no implementation {name!r}, but {', '.join(operation.implementations)}")
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

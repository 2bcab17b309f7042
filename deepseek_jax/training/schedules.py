"""Schedules of values that change over a run: learning rate, bias speed γ, MTP weight λ, batch size.

A `Schedule` is optax-style: a function of the step, traceable, and here also hashable. Reports give boundaries in
tokens; a `BatchSchedule` says at which step a token count is reached while the batch still grows.
"""

import dataclasses
import functools
import inspect
import math
import typing
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import optax

from deepseek_jax.errors import ConfigError, nearest
from deepseek_jax.fields import convert, inside, is_mapping
from deepseek_jax.ranges import check, one_of
from deepseek_jax.registry import resolve

SHAPES = ("linear", "cosine", "constant")


@dataclasses.dataclass(frozen=True)
class Segment:
    """`steps` steps that end at `end`: from the value before by a line or half a cosine, or at `end` throughout."""

    shape: str
    steps: int
    end: float

    def __post_init__(self):
        check(self, "schedule segment ", shape=one_of(SHAPES))
        if self.steps < 0:
            raise ConfigError(
                f"a {self.shape} segment of {self.steps} steps: the segments are longer than the schedule; raise "
                "steps or warm up less"
            )

    def over(self, start: float) -> optax.Schedule:
        if self.shape == "constant" or self.end == start:
            return optax.constant_schedule(self.end)
        if self.shape == "linear":
            return optax.linear_schedule(start, self.end, self.steps)
        return optax.cosine_decay_schedule(start, self.steps, alpha=self.end / start)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Piecewise schedule: `start`, then the segments one after another; the last value stays. Call: step -> float32."""

    start: float
    segments: tuple[Segment, ...] = ()

    def __post_init__(self):
        for before, segment in zip(self.values, self.segments, strict=False):
            if segment.shape == "cosine" and before == 0 != segment.end:
                raise ConfigError(f"a cosine from 0 to {segment.end:g}: it has to start from another value")

    def __call__(self, step: jax.typing.ArrayLike) -> jax.Array:
        pieces, boundaries, value, begin = [], [], self.start, 0
        for segment in self.segments:
            if segment.steps:
                pieces.append(segment.over(value))
                begin += segment.steps
                boundaries.append(begin)
            value = segment.end
        pieces.append(optax.constant_schedule(value))
        return jax.numpy.asarray(optax.join_schedules(pieces, boundaries)(step), jax.numpy.float32)

    DESCRIPTION = "a number, or a mapping with 'kind' and its arguments"

    @classmethod
    def read(cls, spec: "float | Mapping[str, Any]", path: str, context: Mapping[str, Any]) -> "Schedule":
        """As `build_schedule`, over the `steps` of the context's stage."""
        return build_schedule(spec, path, context["steps"])

    @property
    def values(self) -> tuple[float, ...]:
        """The values at the start and at the end of each segment; all other values are between two of these."""
        return (self.start, *(segment.end for segment in self.segments))

    def always(self, value: float) -> bool:
        """True if the schedule has no value but `value`."""
        return all(other == value for other in self.values)


@dataclasses.dataclass(frozen=True)
class BatchSchedule:
    """Sequences per step: from `start` to `end` while the first `ramp_tokens` are read, linear in steps or as one
    jump."""

    seq_len: int
    start: int
    end: int
    ramp_tokens: float = 0.0
    jump: bool = False

    @property
    def _mean(self) -> float:
        return self.start if self.jump else (self.start + self.end) / 2

    @property
    def ramp_steps(self) -> float:
        return self.ramp_tokens / (self.seq_len * self._mean)

    def size(self, step: int) -> int:
        """Sequences in step `step` (from 0)."""
        if step >= self.ramp_steps:
            return self.end
        return self.start if self.jump else round(self.start + (self.end - self.start) * step / self.ramp_steps)

    def step_at(self, tokens: float) -> int:
        """The step after which `tokens` have been read; in the ramp, the root of its quadratic token count."""
        sequences = tokens / self.seq_len
        if tokens >= self.ramp_tokens:
            return round(self.ramp_steps + (tokens - self.ramp_tokens) / (self.seq_len * self.end))
        growth = 0.0 if self.jump else (self.end - self.start) / (2 * self.ramp_steps)
        return round(2 * sequences / (self.start + math.sqrt(self.start**2 + 4 * growth * sequences)))


@dataclasses.dataclass(frozen=True)
class OwnSchedule(Schedule):
    """A function of the step that a user wrote, found again by `kind`, which a config has as package.module:function.

    Two are equal if kind and arguments are. `steps` is the length of the stage.
    """

    kind: str = ""
    arguments: str = ""
    steps: int = dataclasses.field(default=1, compare=False)
    function: Callable[[jax.Array], jax.Array] = dataclasses.field(default=float, compare=False)

    def __call__(self, step: jax.typing.ArrayLike) -> jax.Array:
        step = jax.numpy.asarray(step)
        value = jax.vmap(self.function)(step) if step.ndim else self.function(step)
        return jax.numpy.asarray(value, jax.numpy.float32)

    @functools.cached_property
    def values(self) -> tuple[float, ...]:
        """The first, the least, the largest and the last value of the stage's steps."""
        every = np.asarray(self(np.arange(self.steps + 1)))
        return tuple(map(float, (every[0], every.min(), every.max(), every[-1])))


# Sources: V3 §4.2, V2 §3.1.2 and appendix B, Moonlight §3.2. The shape of the ramps is not published; linear in steps
# here.
V3_BATCH = BatchSchedule(4096, 3072, 15_360, 469e9)
V2_BATCH = BatchSchedule(4096, 2304, 9216, 225e9)
V2_LITE_BATCH = BatchSchedule(4096, 4608, 4608)
MOONLIGHT_BATCH = BatchSchedule(8192, 2048, 4096, 200e9, jump=True)
V3_TOKENS, V2_TOKENS, V2_LITE_TOKENS, MOONLIGHT_TOKENS = 14.8e12, 8.1e12, 5.7e12, 5.7e12


def _boundaries(tokens: tuple[float, ...], batch: BatchSchedule, steps: int | None) -> list[int]:
    """Token counts, the last being the whole run's, as steps: published ones, or in proportion in a run of `steps`."""
    return [batch.step_at(t) if steps is None else round(steps * t / tokens[-1]) for t in tokens]


def constant(value: float) -> Schedule:
    return Schedule(value)


def ramp(start: float, end: float, steps: int) -> Schedule:
    """A line from `start` to `end` over `steps`."""
    return Schedule(start, (Segment("linear", steps, end),))


def switch(first: float, second: float, at: float, steps: int) -> Schedule:
    """`first` for the fraction `at` of `steps`, then `second`."""
    return Schedule(first, (Segment("constant", round(at * steps), first), Segment("constant", 0, second)))


def cosine(peak: float, steps: int, warmup_steps: int = 0, final_fraction: float = 0.1) -> Schedule:
    """Linear warm-up to `peak`, cosine to `final_fraction · peak` at `steps`."""
    return Schedule(
        0.0 if warmup_steps else peak,
        (Segment("linear", warmup_steps, peak), Segment("cosine", steps - warmup_steps, final_fraction * peak)),
    )


def step_decay(
    peak: float, steps: int, warmup_steps: int = 0, at: tuple[float, ...] = (0.6, 0.9), factor: float = 0.316
) -> Schedule:
    """Linear warm-up to `peak`, then `factor` times less at each of the fractions `at` of `steps`."""
    return _decay_at(peak, warmup_steps, [round(fraction * steps) for fraction in at], factor)


def _decay_at(peak: float, warmup_steps: int, boundaries: list[int], factor: float) -> Schedule:
    segments, begin, value = [Segment("linear", warmup_steps, peak)], warmup_steps, peak
    for boundary in boundaries:
        segments.append(Segment("constant", boundary - begin, value))
        begin, value = boundary, value * factor
    return Schedule(0.0 if warmup_steps else peak, (*segments, Segment("constant", 0, value)))


def deepseek_v3(peak: float = 2.2e-4, steps: int | None = None, warmup_steps: int = 2000) -> Schedule:
    """V3 §4.2: warm-up, constant to 10T tokens, cosine to a tenth over 4.3T, constant for 333B, 7.3e-6/2.2e-4 for the
    last 167B.

    `steps` squeezes the same shape into a shorter run; None is the published run with its growing batch.
    """
    constant_end, cosine_end, low_end, end = _boundaries((10e12, 14.3e12, 14.633e12, V3_TOKENS), V3_BATCH, steps)
    return Schedule(
        0.0 if warmup_steps else peak,
        (
            Segment("linear", warmup_steps, peak),
            Segment("constant", constant_end - warmup_steps, peak),
            Segment("cosine", cosine_end - constant_end, 0.1 * peak),
            Segment("constant", low_end - cosine_end, 0.1 * peak),
            Segment("constant", end - low_end, 7.3e-6 / 2.2e-4 * peak),
        ),
    )


def deepseek_v3_mtp_weight(steps: int | None = None) -> Schedule:
    """V3 §4.2: λ is 0.3 for the first 10T tokens and 0.1 for the other 4.8T."""
    boundary, _ = _boundaries((10e12, V3_TOKENS), V3_BATCH, steps)
    return Schedule(0.3, (Segment("constant", boundary, 0.3), Segment("constant", 0, 0.1)))


def deepseek_v3_bias_speed(steps: int | None = None) -> Schedule:
    """V3 §4.2: γ is 0.001 for the first 14.3T tokens and 0 for the last 500B."""
    boundary, _ = _boundaries((14.3e12, V3_TOKENS), V3_BATCH, steps)
    return Schedule(0.001, (Segment("constant", boundary, 0.001), Segment("constant", 0, 0.0)))


def deepseek_v2(peak: float = 2.4e-4, steps: int | None = None, warmup_steps: int = 2000) -> Schedule:
    """V2 §3.1.2: warm-up, then times 0.316 after 60% and after 90% of the tokens."""
    *boundaries, _ = _boundaries((0.6 * V2_TOKENS, 0.9 * V2_TOKENS, V2_TOKENS), V2_BATCH, steps)
    return _decay_at(peak, warmup_steps, boundaries, 0.316)


def deepseek_v2_lite(peak: float = 4.2e-4, steps: int | None = None, warmup_steps: int = 2000) -> Schedule:
    """V2 appendix B: warm-up, then times 0.316 after 80% and after 90% of the tokens."""
    *boundaries, _ = _boundaries((0.8 * V2_LITE_TOKENS, 0.9 * V2_LITE_TOKENS, V2_LITE_TOKENS), V2_LITE_BATCH, steps)
    return _decay_at(peak, warmup_steps, boundaries, 0.316)


def moonlight(
    peak: float = 4.2e-4, steps: int | None = None, warmup_steps: int = 2000, cooldown_warmup_steps: int = 100
) -> Schedule:
    """Moonlight §3.2: warm-up, cosine to a tenth by 5.2T tokens; then up to 1e-4/4.2e-4 of the peak and linearly to 0
    at 5.7T."""
    cosine_end, end = _boundaries((5.2e12, MOONLIGHT_TOKENS), MOONLIGHT_BATCH, steps)
    return Schedule(
        0.0 if warmup_steps else peak,
        (
            Segment("linear", warmup_steps, peak),
            Segment("cosine", cosine_end - warmup_steps, 0.1 * peak),
            Segment("linear", cooldown_warmup_steps, 1e-4 / 4.2e-4 * peak),
            Segment("linear", end - cosine_end - cooldown_warmup_steps, 0.0),
        ),
    )


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    f.__name__: f
    for f in (
        *(constant, ramp, switch, cosine, step_decay, moonlight),
        *(deepseek_v3, deepseek_v3_mtp_weight, deepseek_v3_bias_speed, deepseek_v2, deepseek_v2_lite),
    )
}


def build_schedule(spec: "Schedule | float | Mapping[str, Any]", path: str, steps: int) -> Schedule:
    """A schedule from a number, or from {"kind": name, **arguments}; `steps` is the run's length where none is given.

    `"steps": None` asks for a published schedule at its published length. A kind is one of `SCHEDULES`, or your own as
    package.module:function: it takes the arguments, and `steps` if it has such a parameter, and returns a Schedule or
    a function of the step, traceable as optax's are. Raises ConfigError for an unknown kind or argument, and for a
    function that does not return that.
    """
    if isinstance(spec, Schedule):
        return spec
    if isinstance(spec, (int, float)) and not isinstance(spec, bool):
        return constant(convert(spec, float, path))
    if not is_mapping(spec) or "kind" not in spec:
        raise ConfigError(
            f"{path}={spec!r}: a number, or a mapping with 'kind' and its arguments; kinds: "
            f"{', '.join(sorted(SCHEDULES))}"
        )
    arguments = dict(spec.items())
    kind = arguments.pop("kind")
    builder = resolve(SCHEDULES, kind, f"{path}.kind")
    if not callable(builder):
        raise ConfigError(
            f"{path}.kind={kind!r} is a {type(builder).__name__}: must be a function that makes a schedule"
        )
    try:
        parameters, hints = inspect.signature(builder).parameters, typing.get_type_hints(builder)
    except (TypeError, ValueError, NameError) as error:  # of a builtin, or of annotations that can't be read
        raise ConfigError(f"{path}.kind={kind!r} has no signature that can be read ({error})") from error
    for name, value in arguments.items():
        if name not in parameters:
            raise ConfigError(f"unknown argument {path}.{name} of schedule {kind!r}: {nearest(str(name), parameters)}")
        arguments[name] = convert(value, hints.get(name, Any), f"{path}.{name}")
    if "steps" in parameters:
        arguments.setdefault("steps", steps)
    for name, parameter in parameters.items():
        if name not in arguments and parameter.default is inspect.Parameter.empty:
            raise ConfigError(f"{path}: schedule {kind!r} needs {name!r}")
    if kind in SCHEDULES:
        with inside(path):
            return builder(**arguments)
    return _own(builder, kind, arguments, path, steps)


def _own(builder: Callable, kind: str, arguments: dict[str, Any], path: str, steps: int) -> Schedule:
    """The schedule that a user's function makes."""
    try:
        made = builder(**arguments)
        if isinstance(made, Schedule):
            return made
        shape = jax.eval_shape(made, jax.ShapeDtypeStruct((), jax.numpy.int32)).shape
    except Exception as error:  # of the user's code
        raise ConfigError(
            f"{path}: {kind} makes no schedule ({type(error).__name__}: {error}); it must return a Schedule, or a "
            "function of the step that jax can trace, as optax's are"
        ) from error
    if shape != ():
        raise ConfigError(
            f"{path}: {kind} makes a function whose value has shape {shape}: must be one number for a step"
        )
    own = OwnSchedule(0.0, kind=kind, arguments=repr(sorted(arguments.items())), steps=steps, function=made)
    if not np.isfinite(own.values).all():
        raise ConfigError(f"{path}: {kind} has values that are not finite in steps 0 to {steps}")
    return own

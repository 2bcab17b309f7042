"""Fields of a config are inside their ranges, or the message says what was given and what is allowed."""

import dataclasses
import math

import pytest

from deepseek_jax.errors import ConfigError
from deepseek_jax.ranges import above, at_least, check, check_value, everywhere, integer, one_of, or_none
from deepseek_jax.training.schedules import ramp

NAN = math.nan


@pytest.mark.parametrize(
    ("allowed", "right", "wrong"),
    [
        (at_least(1), (1, 2, math.inf), (0, 0.999, -1, NAN)),
        (at_least(0, at_most=1), (0, 0.5, 1), (-1e-9, 1.001, NAN)),
        (at_least(0, below=1), (0, 0.999), (-1e-9, 1, NAN)),
        (at_least(0, below=math.inf), (0, 1e300), (math.inf, NAN)),
        (above(0), (1e-30, math.inf), (0, -1, NAN)),
        (above(0, at_most=1), (1e-30, 1), (0, 1.001, NAN)),
        (integer(1), (1, 2**40), (0, 1.0, "1", None, NAN)),
        (integer(2, multiple_of=2), (2, 64), (0, 3, -2, 2.0)),
        (one_of(("mla", "gqa")), ("mla", "gqa"), ("mha", "", None, 3)),
        (or_none(at_least(1), "for all"), (None, 1), (0, NAN)),
        (everywhere(at_least(0)), (ramp(0.0, 1.0, 5),), (ramp(1.0, -0.1, 5), ramp(-0.1, 1.0, 5))),
    ],
)
def test_a_range_accepts_what_it_says(allowed, right, wrong):
    for value in right:
        check_value("x", value, allowed)
    for value in wrong:
        with pytest.raises(ConfigError, match="^x"):
            check_value("x", value, allowed)


@pytest.mark.parametrize(
    ("allowed", "value", "message"),
    [
        (at_least(1), 0, "x=0: must be at least 1"),
        (at_least(2, why="a token and its target"), 1, "x=1: must be at least 2; a token and its target"),
        (at_least(0, at_most=1), 2.0, "x=2.0: must be from 0 to 1"),
        (at_least(0, below=1), 1.0, "x=1.0: must be at least 0 and below 1"),
        (above(0, at_most=1, why="1 is off"), 0.0, "x=0.0: must be above 0 and at most 1; 1 is off"),
        (integer(1), "16", "x='16': must be an integer, at least 1"),
        (integer(2, multiple_of=2, why="pairs"), 3, "x=3: must be a multiple of 2, at least 2; pairs"),
        (one_of(["sigmoid", "softmax"]), "sigmoyd", "x='sigmoyd': did you mean 'sigmoid'? allowed: sigmoid, softmax"),
        (or_none(at_least(1), "for all batches"), 0, "x=0: must be at least 1, or None for all batches"),
        (everywhere(at_least(0)), ramp(1.0, -0.5, 5), "x goes down to -0.5: must be at least 0"),
    ],
)
def test_the_message_says_what_is_allowed(allowed, value, message):
    with pytest.raises(ConfigError) as refused:
        check_value("x", value, allowed)
    assert str(refused.value) == message


def test_a_dataclass_checks_its_fields():
    @dataclasses.dataclass(frozen=True)
    class Config:
        steps: int = 1
        share: float = 0.5

        def __post_init__(self):
            check(self, "train.", steps=at_least(1), share=at_least(0, at_most=1))

    Config(steps=3, share=1.0)
    with pytest.raises(ConfigError, match=r"^train\.steps=0: must be at least 1$"):
        Config(steps=0, share=2.0)
    with pytest.raises(ConfigError, match=r"^train\.share=2\.0: must be from 0 to 1$"):
        Config(share=2.0)

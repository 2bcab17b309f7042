"""Damage for files of JSON, and the count of how a reader takes it."""

import copy
import json
import random

import pytest

from deepseek_jax.errors import UserError

COUNTS = [200, pytest.param(10_000, marks=pytest.mark.fuzz)]


def damaged(rng, value, values, changes=3):
    """`value` with a few entries, at any depth, dropped, added or replaced by one of `values`."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.randint(1, changes)):
        place = value
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            key = rng.choice([*keys, "extra"]) if isinstance(place, dict) else rng.choice(keys)
            if isinstance(place, dict) and rng.random() < 0.15:
                place.pop(key, None)
                break
            inner = place[key] if key in keys else None
            if not isinstance(inner, (dict, list)) or not inner or rng.random() < 0.4:
                place[key] = copy.deepcopy(rng.choice(values))
                break
            place = inner
        if not value:
            break
    return value


def damaged_text(rng, value, values):
    """Bytes of JSON: damaged in its values, in its bytes, cut off, too deep, or not JSON at all."""
    kind = rng.random()
    if kind < 0.6:
        return json.dumps(damaged(rng, value, values)).encode()
    raw = bytearray(json.dumps(value).encode())
    if kind < 0.8:
        for _ in range(rng.randint(1, 5)):
            raw[rng.randrange(len(raw))] = rng.randrange(256)
        return bytes(raw)
    if kind < 0.9:
        return bytes(raw[: rng.randrange(len(raw))])
    return rng.choice(
        [
            b"[" * 100_000,
            b'{"a":' * 5000,
            b"\xff\xfe{}",
            rng.randbytes(rng.randrange(60)),
            b"1" * 5000,
            b"\xef\xbb\xbf" + raw,
        ]
    )


def tried(count, attempt):
    """The number of `count` attempts that are accepted; the others are refused in words, and there are some of both."""
    accepted = 0
    for i in range(count):
        rng = random.Random(i)
        try:
            attempt(rng)
            accepted += 1
        except UserError as error:
            str(error).encode()  # can be printed
    assert 0 < accepted < count
    return accepted

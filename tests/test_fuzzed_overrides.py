"""Damaged overrides: each is a valid experiment or one sentence, never anything else.

The generator draws fields that exist, fields that almost do, and values of every kind, from the seed alone. Two hundred
run with the other tests, ten thousand with `-m fuzz`.
"""

import dataclasses
import random
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deepseek_jax.errors import UserError
from deepseek_jax.experiment import build_experiment, read_flags
from deepseek_jax.fields import is_mapping
from deepseek_jax.model.config import GQAConfig, ModelConfig
from deepseek_jax.overrides import plain
from deepseek_jax.parallel.mesh import MeshConfig
from deepseek_jax.rl.config import GRPOConfig
from deepseek_jax.rl.tasks import TASKS
from deepseek_jax.stages import EvalStage, GRPOSection, TrainStage, build_stages
from deepseek_jax.training.optimizer import OptimizerConfig
from deepseek_jax.training.schedules import SCHEDULES

ROOT = Path(__file__).parents[1]
R1_TINY = str(ROOT / "experiments" / "r1_tiny.py")
SCALARS = (
    *("0", "1", "-1", "2", "3", "7", "64", "2.5", "-0.5", "1e3", "1e-400", "1e400", "-1e30", "nan", "inf", "-inf",
      "0x10", "1_000", "007", "9" * 30),
    *("9" * 5000, "True", "False", "true", "no", "yes", "None", "null", "", " ", "abc", "abc def", "'5'", '"x"', "é",
      "\u0000", "../x", "a.b:c", "os:sep"),
    *("byte", "float32", "stdlib", "task", "parity", "chain", "dapo", "cosine", "text", "whole", "cut", "none", "full",
      "softmax", "--dry", "{", "[", "(" * 500),
    *("b'x'", "1j", "...", "{1, 2}", "lambda: 0", "__import__('os')", "1 if", "[1, [2, {}]]", "{1: 2}",
      "{'a': {'b': [None]}}", "()", "[]", "{}", "(1,)", "[0.2, 0.3]"),
)  # fmt: skip


def paths_of(cls: type, prefix: str, depth: int = 0) -> Iterator[tuple[str, Any]]:
    """The fields of a dataclass and of those inside it, with their defaults."""
    for field in dataclasses.fields(cls):
        path = f"{prefix}.{field.name}"
        yield path, field.default
        hint = typing.get_type_hints(cls).get(field.name)
        for inner in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(inner) and depth < 3 and field.name != "experiment":
                yield from paths_of(inner, path, depth + 1)


def paths_in(node, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The fields of an experiment with their values."""
    if is_mapping(node):
        for key, value in node.items():
            path = f"{prefix}.{key}" if prefix else key
            yield path, value
            yield from paths_in(value, path)
    if isinstance(node, list | tuple):
        for index, value in enumerate(node):
            yield f"{prefix}[{index}]", value
            yield from paths_in(value, f"{prefix}[{index}]")


def all_paths() -> list[tuple[str, Any]]:
    classes = {
        "model": [ModelConfig],
        "mesh": [MeshConfig],
        "task": list(TASKS.values()),
        "pretrain": [TrainStage],
        "sft": [TrainStage],
    }
    classes |= {"grpo": [GRPOSection, GRPOConfig], "grpo.optimizer": [OptimizerConfig], "before": [EvalStage]}
    known = {path: now for prefix, group in classes.items() for cls in group for path, now in paths_of(cls, prefix)}
    known |= {f"model.attention.{field.name}": 2 for field in dataclasses.fields(GQAConfig)} | {
        "precision.quantization.gradient.scope": "",
        "precision.name": "",
    }
    return sorted(
        (known | dict(paths_in(plain(read_flags([f"--config={R1_TINY}"])[0])))).items(), key=lambda item: item[0]
    )


def value(rng: random.Random, depth: int = 0) -> str:
    """A value's text: a scalar, or a list or mapping of them, or a schedule with arguments of its own and of others."""
    kind = rng.random()
    if kind < 0.7 or depth > 2:
        return rng.choice(SCALARS)
    if kind < 0.8:
        names = (
            "peak",
            "start",
            "end",
            "steps",
            "warmup_steps",
            "value",
            "at",
            "first",
            "second",
            "factor",
            "final_fraction",
        )
        arguments = ", ".join(f"{name!r}: {value(rng, 3) or 0}" for name in rng.sample(names, rng.randrange(4)))
        return f"{{'kind': {rng.choice(sorted(SCHEDULES))!r}, {arguments}}}"
    if kind < 0.9:
        return f"[{', '.join(value(rng, depth + 1) or '0' for _ in range(rng.randrange(3)))}]"
    names = (
        "name",
        "kind",
        "steps",
        "weight",
        "accuracy",
        "lab.rewards:short",
        "bits",
        "sources",
        "fsdp",
        "grpo",
        "train",
        "0",
    )
    return (
        "{" + ", ".join(f"{rng.choice(names)!r}: {value(rng, depth + 1) or 0}" for _ in range(rng.randrange(3))) + "}"
    )


def damaged(rng: random.Random, path: str) -> str:
    """A path as it is, or with a letter, a part or an index too many or too few."""
    change, place = rng.randrange(16), rng.randrange(len(path) + 1)
    if change == 0:
        return path[:place] + path[place + 1 :]
    if change == 1:
        return (
            path[:place] + rng.choice([".", "[", "]", "[0]", "[7]", "x", "['a.b']", "=", " ", "é", "_"]) + path[place:]
        )
    if change == 2:
        return path + rng.choice([".x", ".kind", "[0]", "[1].name", "['a.b:c']", ".", "..", ".0"])
    if change == 3:
        return path.rpartition(".")[0]
    return path


def near(rng: random.Random, now) -> str:
    """The text of a value like `now`, which is more often valid than any."""
    if isinstance(now, bool) or now is None:
        return rng.choice(["true", "False", "None", "1"])
    if isinstance(now, int):
        return str(rng.choice([now * 2, now // 2, now + 1, now - 1, float(now), now + 0.5, now * 10**12, -now, 0]))
    if isinstance(now, float):
        return str(rng.choice([now * 2, now / 2, now + 1, int(now), -now, 0.0, now * 1e300]))
    return value(rng)


def overrides(seed: int, paths: list[tuple[str, Any]]) -> list[str]:
    rng, given = random.Random(seed), []
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        path, now = rng.choice(paths)
        given.append(f"--config.{damaged(rng, path)}={near(rng, now) if rng.random() < 0.6 else value(rng)}")
    return given


def run(seeds: range, tmp_path: Path) -> tuple[int, int]:
    """-> (how many are valid, how many are refused). Anything but a UserError fails, and so does a message that says
    little."""
    paths, counts = all_paths(), [0, 0]
    for seed in seeds:
        given = overrides(seed, paths)
        try:
            config, name, *_ = read_flags([f"--config={R1_TINY}", *given])
            build_stages(build_experiment(config, name, tmp_path, elsewhere=0))
            counts[0] += 1
        except UserError as error:
            assert len(str(error)) > 15, (seed, given, error)
            counts[1] += 1
        except BaseException as error:
            raise AssertionError(f"seed {seed}: {given} ends in {type(error).__name__}: {error}") from error
    return counts[0], counts[1]


@pytest.mark.parametrize("count", [200, pytest.param(10_000, marks=pytest.mark.fuzz)])
def test_damaged_overrides_are_valid_or_one_sentence(count, tmp_path):
    valid, refused = run(range(count), tmp_path)
    assert valid > count / 20 and refused > count / 2  # the generator makes both

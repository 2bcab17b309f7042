"""Checks of the benchmarks' flags, before anything is measured."""

import argparse
import difflib
from collections.abc import Iterable, Sequence

from kernels_pallas.implementations import IMPLEMENTATIONS


def check_implementation(parser: argparse.ArgumentParser, name: str | None) -> None:
    """Exits and names the nearest unless `name` is an implementation, or None."""
    if name is not None and name not in IMPLEMENTATIONS:
        parser.error(f"--implementation={name} does not exist. {_nearest(name, IMPLEMENTATIONS)}")


def check_only(parser: argparse.ArgumentParser, text: str, names: Iterable[str]) -> None:
    """Exits and names the nearest unless one of `names` contains `text`."""
    names = list(dict.fromkeys(names))
    if not any(text in name for name in names):
        parser.error(f"--only={text} is part of no operation's name. {_nearest(text, names)}")


def _nearest(given: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(given, names, n=1, cutoff=0.4)
    return (f"Did you mean {near[0]!r}? " if near else "") + f"The names are: {'; '.join(names)}"

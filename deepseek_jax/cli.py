"""Command lines: how all programs read flags and report errors.

A program is a `main(argv)` that may raise UserError; its `__main__.py` ends with `run(main)`.
"""

import argparse
import math
import os
import sys
from collections.abc import Callable, Sequence

from rich.console import Console, RenderableType
from rich.measure import Measurement

from deepseek_jax.errors import ConfigError, UserError, nearest
from deepseek_jax.fields import convert, describe
from deepseek_jax.overrides import parse


class Parser(argparse.ArgumentParser):
    """Raises ConfigError for arguments that it does not understand, naming the nearest flag for an unknown one."""

    def parse_args(self, args=None, namespace=None):
        flags, unknown = self.parse_known_args(args, namespace)
        if unknown:
            known = [option for action in self._actions for option in action.option_strings if option.startswith("--")]
            name = unknown[0].partition("=")[0]
            self.error(
                f"unknown flag {name}: {nearest(name, known)}"
                if name.startswith("-")
                else f"{unknown[0]!r} belongs to no flag"
            )
        return flags

    def error(self, message: str):
        raise ConfigError(f"{message} ({self.prog} --help says more)")


def parser(module: str, description: str) -> Parser:
    """A parser for `python -m {module}`: flags are spelled out in full, and help shows the defaults."""
    return Parser(
        prog=f"python -m {module}",
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )


def number(
    kind: type = float, least: float = -math.inf, above: float = -math.inf, most: float = math.inf
) -> Callable[[str], float]:
    """The `type` of a flag that takes a finite number, for `kind` int a whole one (1e3 is one), from `least` (or
    `above` it) to `most`."""

    def read(text: str) -> float:
        try:
            value = convert(parse(text), kind, "")
        except ConfigError:
            value = math.nan
        if least <= value <= most and value > above:
            return value
        limits = (
            [f"at least {least:g}"] * (least > -math.inf)
            + [f"above {above:g}"] * (above > -math.inf)
            + [f"at most {most:g}"] * (most < math.inf)
        )
        raise argparse.ArgumentTypeError(
            f"{text!r}: must be {describe(kind)}{', ' if limits else ''}{' and '.join(limits)}"
        )

    return read


def add_price(flags: argparse._ActionsContainer) -> None:
    """Adds the flag for the price of a chip-hour, as `dollars_per_chip_hour`."""
    flags.add_argument(
        "--dollars_per_hour",
        "--dollars_per_chip_hour",
        dest="dollars_per_chip_hour",
        type=number(least=0),
        help="what a chip costs for an hour (default: its list price, where one is known)",
    )


def show(table: RenderableType) -> None:
    """Prints a table with every number whole: on a terminal that is narrower than the table, the terminal breaks the
    lines."""
    console = Console(highlight=False)
    width = Measurement.get(console, console.options.update(max_width=10_000), table).maximum
    Console(highlight=False, width=max(console.width, width)).print(table)


def run(main: Callable[[Sequence[str]], int | None], argv: Sequence[str] | None = None) -> None:
    """Runs `main` on the command line and exits: 0 (or what it returns), 2 for a UserError, 130 for Ctrl-C.

    A UserError is printed to stderr without its traceback; a reader that closes the pipe (`| head`) ends the program
    quietly. Anything else is a bug and keeps its traceback.
    """
    try:
        status = main(sys.argv[1:] if argv is None else argv) or 0
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    except BrokenPipeError:
        # The interpreter flushes stdout once more on its way out; that must not raise again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    sys.exit(status)

"""python -m kernels_pallas.bench [--aot] [--only=TEXT] [--implementation=NAME] [--small] [--json=FILE]

Checks the kernels on DeepSeek-V3's shapes and measures their speed, as ratios to what the device was seen to do and to
bfloat16 in the same run. Exits with status 1 if a kernel is wrong or fails. With --aot nothing runs: the kernels are
compiled for a GPU that need not be there, and their machine code is read.
"""

import argparse
import functools
import json
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from kernels_pallas.bench.flags import check_implementation, check_only
from kernels_pallas.bench.machine_code import machine_code_row, programs
from kernels_pallas.bench.measure import ceilings, product_row
from kernels_pallas.bench.operations import ATTENTION, QUANTIZERS, attention_row, quantizer_row
from kernels_pallas.bench.shapes import shapes

Jobs = list[tuple[str, Callable[[], dict[str, Any]]]]


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    flags = _flags(argv)
    console, rows = Console(width=170), []
    for title, jobs in (_compilations if flags.aot else _measurements)(flags, console):
        group = []
        for name, job in jobs:
            if flags.only in name:
                _say(name)
                group.append({"operation": name} | attempt(job))
                if flags.json:
                    flags.json.write_text(json.dumps(rows + group, indent=1) + "\n")
        if group:
            console.print(_table(title, group))
        rows += group
    if bad := [f"{row['operation']} ({row['verdict']})" for row in rows if row.get("verdict", "right") != "right"]:
        raise SystemExit("; ".join(bad))
    return rows


def _flags(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "kernels_pallas.bench",
        description="Checks the kernels on DeepSeek-V3's shapes and measures their speed.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--aot",
        action="store_true",
        help="compile for an NVIDIA GPU that need not be there, and show figures of the machine code",
    )
    parser.add_argument("--target", default="H200", choices=("H100", "H200"), help="the GPU for --aot")
    parser.add_argument("--only", default="", help="measure only the operations whose name contains this")
    parser.add_argument("--implementation", help="measure this one instead of the best for this device")
    parser.add_argument(
        "--small",
        action="store_true",
        help="shapes of a sixteenth in each direction, to try the program; always on where the device is a CPU",
    )
    parser.add_argument("--json", type=pathlib.Path, help="also write the rows to this file, as they come")
    flags = parser.parse_args(argv)
    if flags.json and (flags.json.is_dir() or not flags.json.parent.is_dir()):
        parser.error(f"--json={flags.json}: give a file to write, in a folder that exists")
    if flags.aot and flags.implementation:
        parser.error(
            "--implementation has no effect with --aot, which compiles the kernels for NVIDIA Hopper: leave it out"
        )
    check_implementation(parser, flags.implementation)
    measured = [*(shape.title for shape in shapes()), *QUANTIZERS, *ATTENTION]
    check_only(parser, flags.only, (name for name, *_ in programs()) if flags.aot else measured)
    if not flags.aot and jax.devices()[0].platform == "cpu" and not flags.small:
        _say("On a CPU XLA runs every operation, on shapes of a sixteenth of V3's in each direction (--small).")
        flags.small = True
    return flags


def _measurements(flags: argparse.Namespace, console: Console) -> list[tuple[str, Jobs]]:
    device = f"{jax.devices()[0].device_kind}, jax {jax.__version__}"
    _say(f"{device}: measuring the most that it can do")
    limits = ceilings(flags.small)
    console.print(f"{device}; {limits}")
    given = {"small": flags.small, "implementation": flags.implementation}
    chosen = [(shape.title, shape.shrunk() if flags.small else shape) for shape in shapes()]
    return [
        (
            "products",
            [(name, functools.partial(product_row, shape, limits, flags.implementation)) for name, shape in chosen],
        ),
        (
            "memory-bound operations",
            [(name, functools.partial(quantizer_row, name, limits, **given)) for name in QUANTIZERS],
        ),
        ("attention in bfloat16", [(name, functools.partial(attention_row, name, **given)) for name in ATTENTION]),
    ]


def _compilations(flags: argparse.Namespace, console: Console) -> list[tuple[str, Jobs]]:
    del console
    jobs = [
        (name, functools.partial(machine_code_row, shape, flags.target, *program))
        for name, shape, program in programs()
    ]
    return [(f"compiled for {flags.target}, jax {jax.__version__}", jobs)]


def attempt(job: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Runs one measurement. If it raises, its own row says so and the others go on."""
    try:
        return job()
    except Exception as error:
        return {"verdict": "FAILED", "error": f"{type(error).__name__}: {error}"}


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _table(title: str, rows: Sequence[dict[str, Any]]) -> Table:
    columns = dict.fromkeys(name for row in sorted(rows, key=len, reverse=True) for name in row)
    table = Table(title=title)
    for name in columns:
        table.add_column(name, justify="left" if any(isinstance(row.get(name), str) for row in rows) else "right")
    for row in rows:
        table.add_row(*(_text(row.get(name)) for name in columns))
    return table


def _text(value: Any) -> str:
    if value is None:
        return "–"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.1e}" if 0 < abs(value) < 0.01 else f"{value:.2f}" if value < 10 else f"{value:.0f}"


if __name__ == "__main__":
    main()

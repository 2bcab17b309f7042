"""python -m kernels_pallas.bench [--aot] [--only=TEXT] [--implementation=NAME] [--small] [--json=FILE]

The FP8 kernels on DeepSeek-V3's shapes: whether they are right, and their speed as ratios to what the device was seen to do and to bfloat16 in the
same run. Exits with status 1 if any is wrong. With --aot nothing runs: the kernels are compiled for a GPU that need not be there, and the machine code is read.
"""

import argparse
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from kernels_pallas.bench.measure import Ceilings, attention_rows, ceilings, memory_rows, product_row
from kernels_pallas.bench.shapes import shapes


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser("kernels_pallas.bench", description="Speed of the FP8 kernels on DeepSeek-V3's shapes.", allow_abbrev=False)
    parser.add_argument("--aot", action="store_true", help="compile for an NVIDIA GPU that need not be there and show what the machine code says")
    parser.add_argument("--target", default="H200", choices=("H100", "H200"), help="for --aot")
    parser.add_argument("--only", default="", help="products whose name contains this")
    parser.add_argument("--implementation", help="instead of the best for this device")
    parser.add_argument("--small", action="store_true", help="a sixteenth of the shapes in each direction: to try the program")
    parser.add_argument("--json", type=pathlib.Path, help="also write the rows to this file")
    flags = parser.parse_args(argv)
    console = Console(width=170)
    chosen = [shape.shrunk() if flags.small else shape for shape in shapes() if flags.only in f"{shape.operation}, {shape.name}"]
    if flags.aot:
        from kernels_pallas.bench.machine_code import bfloat16_rows, machine_code_row

        rows = [machine_code_row(shape, flags.target) for shape in chosen]
        rows += [] if flags.only else bfloat16_rows(flags.target)
        console.print(_table(f"compiled for {flags.target}, jax {jax.__version__}", rows))
    else:
        device = jax.devices()[0]
        limits = ceilings(flags.small)
        console.print(f"{device.device_kind}, jax {jax.__version__}; {_seen(limits)}")
        rows = [product_row(shape, limits, flags.implementation) for shape in chosen]
        console.print(_table("products", rows))
        memory = memory_rows(limits, flags.small, flags.implementation)
        console.print(_table("memory-bound operations", memory))
        attention = attention_rows(flags.small, flags.implementation)
        console.print(_table("attention in bfloat16", attention))
        rows += memory + attention
    if flags.json:
        flags.json.write_text(json.dumps(rows, indent=1) + "\n")
    wrong = [row.get("product", row.get("operation")) for row in rows if row.get("verdict") == "WRONG"]
    if wrong:
        raise SystemExit(f"wrong, by calc_diff: {'; '.join(wrong)}")
    return rows


def _seen(limits: Ceilings) -> str:
    through_xla = f"8192³ through XLA {limits.bf16 / 1e12:.0f} TFLOP/s in bfloat16, {limits.fp8 / 1e12:.0f} in FP8"
    return f"{through_xla}; copied {limits.bandwidth / 1e9:.0f} GB/s"


def _table(title: str, rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(title=title)
    for name in rows[0]:
        table.add_column(name, justify="left" if isinstance(rows[0][name], str) else "right")
    for row in rows:
        table.add_row(*(_text(value) for value in row.values()))
    return table


def _text(value: Any) -> str:
    if value is None:
        return "–"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.1e}" if 0 < abs(value) < 0.01 else f"{value:.2f}" if value < 10 else f"{value:.0f}"


if __name__ == "__main__":
    main()

"""The report of `inspect`: the config as we read it, the tensors of a folder, and its problems."""

import math
import re
from collections import Counter

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from deepseek_jax import cli
from deepseek_jax.fields import flatten
from deepseek_jax.interop.folder import Folder
from deepseek_jax.interop.tensors import SCALE_SUFFIX

_SHOWN_PROBLEMS = 20


def print_report(folder: Folder, console: Console) -> None:
    """Prints the report; it reads headers only, so a folder of any size takes seconds."""
    for table in (_config_table(folder), _tensor_table(folder)):
        cli.show(table)
    parameters = sum(math.prod(spec.shape) for spec in folder.table if not spec.duplicate)
    stored = sum(tensor.nbytes for tensor in folder.stored.values())
    files = len({tensor.file for tensor in folder.stored.values()})
    console.print(f"{parameters:,} parameters (correction biases and MTP modules included)")
    console.print(f"{len(folder.stored):,} tensors in {files} file(s), {stored:,} bytes")
    for note in folder.notes:
        console.print(f"note: {escape(note)}", soft_wrap=True)
    if not folder.problems:
        console.print("[green]complete: every tensor is there, in the expected shape[/green]")
        return
    console.print(f"[red]{len(folder.problems)} problem(s); this folder can't be imported:[/red]")
    for problem in folder.problems[:_SHOWN_PROBLEMS]:
        console.print(f"  {escape(problem)}", soft_wrap=True)
    if len(folder.problems) > _SHOWN_PROBLEMS:
        console.print(f"  and {len(folder.problems) - _SHOWN_PROBLEMS} more")


def _config_table(folder: Folder) -> Table:
    table = Table(
        "field",
        "value",
        title=escape(f"{folder.hf['model_type']} config.json as ModelConfig"),
        title_justify="left",
        box=None,
    )
    for name, value in flatten(folder.config.to_dict()).items():
        table.add_row(name, escape(str(value)))
    return table


def _tensor_table(folder: Folder) -> Table:
    """One row for all tensors that differ only in their layer or expert."""
    table = Table("tensor", "shape", "dtype", "count", "scales", title="tensors", title_justify="left", box=None)
    scales = {name for name in folder.stored if name.endswith(SCALE_SUFFIX)}
    kinds, scale_counts = Counter(), Counter()
    for name, tensor in folder.stored.items():
        if name in scales:
            continue
        kind = (re.sub(r"\.\d+\.", ".*.", name), tensor.shape, tensor.dtype)
        kinds[kind] += 1
        scale_counts[kind] += name + SCALE_SUFFIX in scales
    for kind in sorted(kinds, key=lambda kind: kind[0]):
        name, shape, dtype = kind
        scaled = f"{scale_counts[kind]:,}" if scale_counts[kind] else ""
        table.add_row(escape(name), " x ".join(map(str, shape)), dtype, f"{kinds[kind]:,}", scaled)
    return table

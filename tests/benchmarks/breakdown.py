"""Breakdown of a compiled program's time: jax's own profile of every operation, summed by the module of the network it
belongs to."""

import re
import statistics
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import jax
from rich.console import Console
from rich.table import Table

# First match wins; the names are the module paths that Flax leaves in an operation's metadata.
PARTS = (
    (
        "routed experts: gathers and layout",
        r"/experts/.*(gather|sort|scatter|cumsum|iota|add|sub|eq|lt|floor|convert|reduce_window)",
    ),
    ("routed experts: products, activation, combination", r"/experts/"),
    ("router", r"/router/|MoE.*routing|one_hot"),
    ("shared experts", r"/shared/"),
    ("attention", r"/attn/"),
    ("dense feed-forward", r"/ffn/(gate|up|down|jit\(silu\))"),
    ("norms and residuals", r"_norm/|(layers|Transformer)/(add|mul)"),
    ("embedding, head and loss", r"embed|unembed|head|checkpoint|logsumexp|take_along"),
    ("moving data between scanned layers", r"dynamic_(update_)?(index|slice)|broadcast_in_dim$"),
    ("sampling and bookkeeping of decoding", r"while/body/"),
)
LEFT_OVER = "optimizer and everything else"
CONTAINERS = re.compile(r"(while|call|conditional)\b")  # their time is that of the operations inside


def where_time_goes(
    jitted: Callable, arguments: tuple, run: Callable[[], object], repeats: int = 5
) -> dict[str, float]:
    """Milliseconds per run and part. `run` executes the program `jitted` once; `arguments` are what it is compiled for.

    An operation counts with its median duration times how often it runs: an interruption by another process is no part
    of it.
    """
    names = _operation_names(jitted.lower(*arguments).compile().as_text())
    run()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(repeats):
                run()
        (profile,) = Path(folder).glob("**/*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(profile))
    durations = defaultdict(list)
    for plane in data.planes:
        for line in plane.lines:
            for event in line.events:
                operation = dict(event.stats).get("hlo_op")
                if operation in names and event.name == operation and not CONTAINERS.match(operation):
                    durations[operation].append(event.duration_ns / 1e6)
    spent = Counter()
    for operation, milliseconds in durations.items():
        spent[_part(operation, names[operation])] += statistics.median(milliseconds) * len(milliseconds) / repeats
    return dict(spent.most_common())


def _operation_names(program: str) -> dict[str, str]:
    """Operation -> the path in its metadata, empty where the compiler made it up."""
    names = {}
    for line in program.splitlines():
        if match := re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = ", line):
            path = re.search(r'op_name="([^"]*)"', line)
            names[match[1]] = path[1] if path else ""
    return names


def _part(operation: str, path: str) -> str:
    if not path:
        return "copies and fills the compiler adds"
    return next((part for part, pattern in PARTS if re.search(pattern, path)), LEFT_OVER)


def print_parts(title: str, spent: dict[str, float]) -> None:
    """A table of `where_time_goes`; the shares are of the sum, whatever ran side by side."""
    table = Table("part", "ms", "share", title=title, title_justify="left")
    total = sum(spent.values())
    for part, milliseconds in spent.items():
        table.add_row(part, f"{milliseconds:.1f}", f"{milliseconds / total:.0%}")
    Console(width=100).print(table)

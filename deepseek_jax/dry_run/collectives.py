"""Collectives of a compiled program: the bytes of each, how often it runs, and its axes of the mesh."""

import dataclasses
import functools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from deepseek_jax.dry_run.branches import NOTHING_TAKEN, Taken, compiled_branches
from deepseek_jax.dry_run.hlo import Instruction, Module, Scope, entry_scope, shape_bytes, trip_count

KINDS = (
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective instruction and the `times` it runs in one call of the program.

    `buffer_bytes` is the size of its buffer on one device: the output of an all-gather, the input of any other.
    `groups` are its device groups [G, n], indices into the mesh's devices in order; for a permute they are its (source,
    target) pairs. A ragged all-to-all is counted as if its buffers were full (the smaller of input and output).
    """

    kind: str
    buffer_bytes: int
    times: int
    groups: np.ndarray
    shape: str
    op_name: str

    @property
    def group_size(self) -> int:
        return self.groups.shape[1]

    @property
    def wire_bytes(self) -> float:
        """Bytes one device sends (and receives) in one run: (n-1)/n of the buffer, twice that for an all-reduce, all of
        it for a permute."""
        if self.kind == "collective-permute":
            return float(self.buffer_bytes)
        n = self.group_size
        return self.buffer_bytes * (n - 1) / n * (2 if self.kind == "all-reduce" else 1)

    def axes(self, mesh_shape: dict[str, int]) -> tuple[str, ...]:
        """The mesh axes along which members of a group differ."""
        coordinates = np.stack(np.unravel_index(self.groups, tuple(mesh_shape.values())), axis=-1)
        differs = (coordinates != coordinates[:, :1]).any(axis=(0, 1))
        return tuple(axis for axis, along in zip(mesh_shape, differs, strict=True) if along)


@dataclasses.dataclass(frozen=True)
class Traffic:
    """All collectives of a program, the loops whose trip count had to be assumed, and the branches that were counted
    (see `branches`)."""

    collectives: tuple[Collective, ...]
    assumed_loops: tuple[str, ...]
    taken: Taken

    def by_axes(self, mesh_shape: dict[str, int]) -> dict[str, dict[str, int]]:
        """{axes joined by "+": {kind: wire bytes per device and call of the program}}, largest first."""
        table: dict[str, dict[str, float]] = {}
        for collective in self.collectives:
            row = table.setdefault("+".join(collective.axes(mesh_shape)) or "none", {})
            row[collective.kind] = row.get(collective.kind, 0.0) + collective.wire_bytes * collective.times
        rows = sorted(table.items(), key=lambda row: -sum(row[1].values()))
        return {axes: {kind: round(size) for kind, size in sorted(row.items())} for axes, row in rows}


def traffic(
    module: Module, num_devices: int, *, while_trips: int = 1, branch: str = "most", taken: Taken = NOTHING_TAKEN
) -> Traffic:
    """Collectives of the whole program. `while_trips` and `branch` as in program_flops.FlopAssumptions; branches that
    `taken` leaves open are compared by wire bytes."""
    worst = lambda scope: _wire_bytes(_collectives(scope, num_devices, while_trips, None, []))
    runs, taken = compiled_branches(module, branch, worst, while_trips, taken)
    assumed: list[str] = []
    found = tuple(_collectives(entry_scope(module), num_devices, while_trips, runs, assumed))
    return Traffic(found, tuple(dict.fromkeys(assumed)), taken)


def _wire_bytes(collectives: Iterable[Collective]) -> float:
    return sum(collective.wire_bytes * collective.times for collective in collectives)


def _collectives(
    scope: Scope, num_devices: int, while_trips: int, runs: Mapping[tuple[str, str], int] | None, assumed: list[str]
) -> Iterator[Collective]:
    """`runs` holds the branch of each conditional, by computation and name; None counts every conditional at its
    worst."""
    inside = functools.partial(
        _collectives, num_devices=num_devices, while_trips=while_trips, runs=runs, assumed=assumed
    )
    for instruction in scope.computation.instructions.values():
        kind = instruction.opcode.removesuffix("-start")
        if kind in KINDS:
            if (collective := _collective(kind, instruction, scope, num_devices)) is not None:
                yield collective
        elif instruction.opcode == "while":
            trips = trip_count(instruction, scope)
            body = scope.enter(instruction, instruction.attribute("body"))
            found = list(inside(body))
            if trips is None:
                trips = while_trips
                assumed.append(instruction.op_name or instruction.name)
            yield from _repeated(found, trips)
        elif instruction.opcode == "conditional":
            branches = [scope.enter(instruction, name) for name in instruction.branches]
            if runs is None:
                yield from max((list(inside(branch)) for branch in branches), key=_wire_bytes)
            else:
                yield from inside(branches[runs[scope.computation.name, instruction.name]])
        elif not instruction.opcode.endswith(("-done", "-update")):
            for name in instruction.called:
                yield from inside(scope.enter(instruction, name))


def _repeated(collectives: Iterable[Collective], times: int) -> Iterator[Collective]:
    return (dataclasses.replace(c, times=c.times * times) for c in collectives if times)


def _collective(kind: str, instruction: Instruction, scope: Scope, num_devices: int) -> Collective | None:
    local = scope.computation.instructions
    sizes = [shape_bytes(local[name].shape) for name in instruction.operands]
    if kind == "collective-permute":
        pairs = re.search(r"source_target_pairs=\{(.*?\})\}", instruction.text)
        groups = np.array([[int(i) for i in pair.split(",")] for pair in re.findall(r"\{([\d,]+)\}", pairs[1])])
        groups = groups[groups[:, 0] != groups[:, 1]]
        buffer_bytes = sizes[0]
    else:
        groups = replica_groups(instruction.text, num_devices)
        buffer_bytes = min(sizes[:2]) if kind == "ragged-all-to-all" else sum(sizes)
        if kind == "all-gather":
            buffer_bytes *= groups.shape[1]
    if groups.size == 0 or groups.shape[1] == 1:
        return None  # nothing leaves a device
    if kind == "all-reduce" and "all-reduce-scatter" in scope.computation.name:
        kind = "reduce-scatter"  # how TPUs spell one: a fusion of an all-reduce and the slice that is kept
    return Collective(kind, buffer_bytes, 1, groups, _operand_shapes(instruction, local), instruction.op_name)


def _operand_shapes(instruction: Instruction, local) -> str:
    return ", ".join(re.sub(r"\{[^{}]*\}", "", local[name].shape) for name in instruction.operands[:2])


def replica_groups(text: str, num_devices: int) -> np.ndarray:
    """Device groups [G, n] of a collective, from any of the forms XLA prints:

    {{0,1},{2,3}}, {} (one group of all), [2,2]<=[4] and [2,2]<=[2,2]T(1,0), mesh['x'=2,'y'=2] {'y'} with parts of axes
    as 'x':(1)2.
    """
    start = text.index("replica_groups=") + len("replica_groups=")
    rest = text[start:]
    if rest.startswith("{"):
        listed = rest[: re.match(r"\{\}|\{(?:\{[\d,]*\},?)*\}", rest).end()]
        groups = [[int(i) for i in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed)]
        return np.array(groups or [range(num_devices)])
    if rest.startswith("["):
        match = re.match(r"\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", rest)
        return _iota(match[2]).reshape(_ints(match[1]))
    match = re.match(
        r"(?:@?mesh)\[(?P<axes>[^\]]*)\](?:,? *device_ids=\((?P<ids>.*?\)?)\))? *\{(?P<along>[^}]*)\}", rest
    )
    if match is None:
        raise ValueError(f"replica groups in an unknown form: {rest[:120]}")
    return _mesh_groups(match["axes"], match["ids"], match["along"])


def _mesh_groups(axes: str, ids: str | None, along: str) -> np.ndarray:
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
    devices = np.arange(int(np.prod(list(sizes.values()))))
    if ids:
        devices = _iota(ids) if "[" in ids else np.array(_ints(ids))
    # Every axis is cut into (before, named, after); the named parts of `along` vary inside a group, in that order.
    cuts = {name: [size] for name, size in sizes.items()}
    wanted = []
    for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", along):
        part = (int(before), int(size)) if size else (1, sizes[name])
        wanted.append((name, part))
    for name in sizes:
        edges = sorted(
            {1, sizes[name], *(edge for n, (before, size) in wanted if n == name for edge in (before, before * size))}
        )
        cuts[name] = list(zip(edges, edges[1:], strict=False)) or [(1, 1)]
    labels = [(name, before, after // before) for name, parts in cuts.items() for before, after in parts]
    grid = devices.reshape([size for _, _, size in labels])
    inner = [
        i
        for name, (before, size) in wanted
        for i, (n, b, s) in enumerate(labels)
        if n == name and before <= b < before * size
    ]
    outer = [i for i in range(len(labels)) if i not in inner]
    return grid.transpose(outer + inner).reshape(-1, int(np.prod([labels[i][2] for i in inner])))


def _iota(text: str) -> np.ndarray:
    """[4,2]T(1,0): 0, 1, 2, … in that shape, transposed, flat."""
    match = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    shape = _ints(match[1])
    grid = np.arange(int(np.prod(shape))).reshape(shape)
    return (grid.transpose(_ints(match[2])) if match[2] else grid).reshape(-1)


def _ints(text: str) -> Sequence[int]:
    return [int(i) for i in text.split(",")]

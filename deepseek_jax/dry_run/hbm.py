"""Main memory traffic of a compiled program, with loops counted as often as they run.

Every instruction that is not fused away reads its operands and writes its results once. A slice reads only its own
bytes and an update in place writes only the changed ones, inside fusions too; buffers in a TPU's on-chip memories cost
nothing. XLA's own `cost_analysis` counts a loop's body once.
"""

import functools
from collections.abc import Iterator, Mapping

from deepseek_jax.dry_run.branches import NOTHING_TAKEN, Taken, compiled_branches
from deepseek_jax.dry_run.collectives import KINDS
from deepseek_jax.dry_run.hlo import (
    Computation,
    Instruction,
    Module,
    Scope,
    arrays,
    entry_scope,
    shape_bytes,
    trip_count,
)

_FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "partition-id",
    "replica-id",
    "opt-barrier",
    "add-dependency",
    "iota",
}
_MOVES = ("bitcast", "copy", "convert")


def memory_traffic(module: Module, *, while_trips: int = 1, branch: str = "most", taken: Taken = NOTHING_TAKEN) -> int:
    """Bytes read and written per device in one call. `while_trips` and `branch` as in program_flops.FlopAssumptions;
    branches that `taken` leaves open are compared by these bytes."""
    runs, _ = compiled_branches(
        module, branch, lambda scope: _scope_bytes(scope, while_trips, None), while_trips, taken
    )
    return _scope_bytes(entry_scope(module), while_trips, runs)


def _scope_bytes(scope: Scope, while_trips: int, runs: Mapping[tuple[str, str], int] | None) -> int:
    """`runs` holds the branch of each conditional, by computation and name; None counts every conditional at its
    worst."""
    inside = functools.partial(_scope_bytes, while_trips=while_trips, runs=runs)
    total = 0
    for instruction in scope.computation.instructions.values():
        if instruction.opcode in _FREE or instruction.opcode.endswith(("-done", "-update")):
            continue
        if instruction.opcode == "while":
            trips = trip_count(instruction, scope)
            total += (while_trips if trips is None else trips) * inside(
                scope.enter(instruction, instruction.attribute("body"))
            )
        elif instruction.opcode == "conditional":
            branches = [scope.enter(instruction, name) for name in instruction.branches]
            total += (
                max(map(inside, branches))
                if runs is None
                else inside(branches[runs[scope.computation.name, instruction.name]])
            )
        elif instruction.opcode in ("call", "call-start", "async-start"):
            total += sum(inside(scope.enter(instruction, name)) for name in instruction.called)
        else:
            total += _reads(instruction, scope) + _writes(instruction, scope)
    return total


def _in_memory(shape: str) -> int:
    return sum(size for size, in_memory in arrays(shape) if in_memory)


def _reads(instruction: Instruction, scope: Scope) -> int:
    local = scope.computation.instructions
    sizes = [_in_memory(local[name].shape) for name in instruction.operands]
    if instruction.opcode == "fusion":
        body = scope.module[instruction.called[0]]
        return sum(min(size, _used(body, position, scope.module)) for position, size in enumerate(sizes) if size)
    if instruction.opcode in ("dynamic-slice", "gather", "slice"):
        return min(sizes[0], _in_memory(instruction.shape))
    if instruction.opcode in ("dynamic-update-slice", "scatter"):
        return sum(sizes[1:])
    return sum(sizes)


def _writes(instruction: Instruction, scope: Scope) -> int:
    local = scope.computation.instructions
    kind = instruction.opcode.removesuffix("-start")
    if instruction.opcode == "fusion":
        body = scope.module[instruction.called[0]]
        return min(_in_memory(instruction.shape), sum(_produced(name, body, scope.module) for name in _results(body)))
    if instruction.opcode in ("dynamic-update-slice", "scatter"):
        return _in_memory(local[instruction.operands[-1 if instruction.opcode == "scatter" else 1]].shape)
    if kind == "copy" and instruction.opcode.endswith("-start"):
        size, in_memory = next(arrays(instruction.shape))
        return size if in_memory else 0
    if instruction.opcode.endswith("-start") and kind in KINDS and kind != "all-reduce":
        return max(
            _in_memory(instruction.shape) - sum(_in_memory(local[name].shape) for name in instruction.operands), 0
        )
    return _in_memory(instruction.shape)


def _results(body: Computation) -> tuple[str, ...]:
    root = _behind_moves(body.root, body)
    return root.operands if root.opcode == "tuple" else (root.name,)


def _behind_moves(instruction: Instruction, body: Computation) -> Instruction:
    while instruction.opcode in _MOVES:
        instruction = body.instructions[instruction.operands[0]]
    return instruction


def _produced(name: str, body: Computation, module: Module) -> int:
    """Bytes that a fusion writes for one of its results; for an update in place, those of the changed slice."""
    instruction = _behind_moves(body.instructions[name], body)
    if instruction.opcode == "dynamic-update-slice":
        return shape_bytes(body.instructions[instruction.operands[1]].shape)
    if instruction.opcode == "fusion":
        inner = module[instruction.called[0]]
        return sum(_produced(result, inner, module) for result in _results(inner))
    return shape_bytes(body.instructions[name].shape)


def _used(body: Computation, position: int, module: Module) -> int:
    """Bytes that a fusion reads of its operand at `position`: those of its slices, or all of them for any other use."""
    return sum(_uses(_parameter(body, position), body, module))


def _parameter(body: Computation, position: int) -> str:
    return next(name for name, index in body.parameters.items() if index == position)


def _uses(name: str, body: Computation, module: Module) -> Iterator[int]:
    for user in body.instructions.values():
        if name not in user.operands:
            continue
        inner = module[user.called[0]] if user.opcode == "fusion" else None
        if user.opcode in _MOVES or (
            inner and _behind_moves(inner.root, inner).name == _parameter(inner, user.operands.index(name))
        ):
            # No more of it is read than is used of the copy, which may have another dtype.
            whole, copied = shape_bytes(body.instructions[name].shape), shape_bytes(user.shape)
            yield from [whole] if user.is_root else (used * whole // copied for used in _uses(user.name, body, module))
        elif inner:
            yield from (
                _used(inner, position, module) for position, operand in enumerate(user.operands) if operand == name
            )
        elif user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == name:
            yield shape_bytes(user.shape)
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
            yield 0
        elif user.opcode != "tuple":
            yield shape_bytes(body.instructions[name].shape)

"""Branches: which one of each conditional runs, chosen for all conditionals of one predicate together.

Differentiation makes several conditionals of one: the forward pass, its recomputation before the backward pass, and the
backward pass itself. They take the same branch, although each may have another cheapest branch. Two conditionals belong
together if they have the same place in the source, which differentiation keeps, or test the same value.
"""

import dataclasses
import types
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping

from deepseek_jax.dry_run.hlo import Module, Place, Scope, entry_scope, origin, trip_count

Key = tuple[Hashable, int]
Taken = Mapping[Key, int]  # the index of the branch that runs
NOTHING_TAKEN: Taken = types.MappingProxyType({})


@dataclasses.dataclass(frozen=True)
class Conditional:
    """`costs` are the costs of the branches, each at its worst, in all runs of the conditional; `keys` are what it
    shares with others of its predicate."""

    keys: tuple[Key, ...]
    costs: tuple[float, ...]


def conditional_keys(num_branches: int, place: Place | None, value: Hashable) -> tuple[Key, ...]:
    """The keys of a conditional at `place`, if that is known, that tests `value`."""
    return tuple((key, num_branches) for key in (place, value) if key is not None)


def taken_branches(conditionals: Iterable[Conditional], branch: str, known: Taken = NOTHING_TAKEN) -> dict[Key, int]:
    """The branch of every key: the "most" or the "least" expensive one by the sum over all conditionals that belong
    together.

    Choices that are `known` stay, so that a second measure follows the first. Groups whose branches all cost the same
    are left out.
    """
    taken = dict(known)
    for keys, costs in _groups(conditionals):
        decided = [known[key] for key in keys if key in known]
        if decided or min(costs) < max(costs):
            choose = max if branch == "most" else min
            index = decided[0] if decided else choose(range(len(costs)), key=costs.__getitem__)
            taken |= dict.fromkeys(keys, index)
    return taken


def taken_branch(keys: Iterable[Key], taken: Taken) -> int:
    """The branch that a conditional with these keys runs; the first one if all of them cost the same."""
    return next((taken[key] for key in keys if key in taken), 0)


def _groups(conditionals: Iterable[Conditional]) -> list[tuple[set[Key], list[float]]]:
    """Conditionals joined by common keys: (their keys, the sums of their costs)."""
    groups: list[tuple[set[Key], list[float]]] = []
    for conditional in conditionals:
        keys, costs = set(conditional.keys), list(conditional.costs)
        joined = [group for group in groups if keys & group[0]]
        for group in joined:
            groups.remove(group)
            keys |= group[0]
            costs = [a + b for a, b in zip(costs, group[1], strict=True)]
        groups.append((keys, costs))
    return groups


def compiled_branches(
    module: Module, branch: str, cost: Callable[[Scope], float], while_trips: int, known: Taken
) -> tuple[dict[tuple[str, str], int], dict[Key, int]]:
    """The branch that each conditional of a compiled program runs, by the names of its computation and of itself, and
    the choices by key.

    `cost` is that of a computation at its worst.
    """
    found = list(_conditionals(entry_scope(module), 1, cost, while_trips))
    taken = taken_branches([conditional for _, conditional in found], branch, known)
    return {name: taken_branch(conditional.keys, taken) for name, conditional in found}, taken


def _conditionals(
    scope: Scope, times: int, cost: Callable[[Scope], float], while_trips: int
) -> Iterator[tuple[tuple[str, str], Conditional]]:
    for instruction in scope.computation.instructions.values():
        if instruction.opcode == "while":
            trips = trip_count(instruction, scope)
            repeated = times * (while_trips if trips is None else trips)
            yield from _conditionals(
                scope.enter(instruction, instruction.attribute("body")), repeated, cost, while_trips
            )
        elif instruction.opcode == "conditional":
            inner = [scope.enter(instruction, name) for name in instruction.branches]
            keys = conditional_keys(len(inner), scope.module.place(instruction), origin(instruction.operands[0], scope))
            yield (
                (scope.computation.name, instruction.name),
                Conditional(keys, tuple(times * cost(body) for body in inner)),
            )
            for body in inner:
                yield from _conditionals(body, times, cost, while_trips)
        elif not instruction.opcode.endswith(("-done", "-update")):
            for name in instruction.called:
                yield from _conditionals(scope.enter(instruction, name), times, cost, while_trips)

"""HLO: the text of a compiled XLA module as data: computations, instructions, and how often each loop runs.

The trip count of a loop is None unless XLA notes it or the text compares a counter with a constant.
"""

import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping

# name = shape opcode(operands), attributes — the shape is one word or a parenthesized tuple, told apart by the balance
# of brackets.
_HEAD = re.compile(r"^\s*(?P<root>ROOT )?%?(?P<name>[\w.\-]+) = ")
_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\) -> .* \{$")
_ARRAY = re.compile(r"(?P<dtype>[a-z]+[0-9a-z]*)\[(?P<dims>[0-9,<=]*)\](?:\{(?P<layout>[^{}]*)\})?")
_REFERENCE = re.compile(r"%([\w.\-]+)")
_TRANSPARENT = (
    "copy",
    "bitcast",
    "convert",
    "copy-start",
    "copy-done",
    "opt-barrier",
    "optimization-barrier",
    "reshape",
)

# Every element type that is not a whole number of bytes, or whose width its name does not say.
_BITS = {"pred": 8, "token": 0, "opaque": 0, "bf16": 16, "c64": 64, "c128": 128}


@dataclasses.dataclass(frozen=True)
class Place:
    """The place in the source where an operation was written; lines count from 1, columns from 0."""

    file: str
    line: int
    column: int


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    opcode: str
    shape: str  # as printed, layout and all
    operands: tuple[str, ...]
    text: str  # what follows the opcode: operands and attributes
    is_root: bool

    def attribute(self, key: str) -> str | None:
        """The name that `key=%name` refers to."""
        match = re.search(rf"\b{key}=%?([\w.\-]+)", self.text)
        return match[1] if match else None

    @functools.cached_property
    def called(self) -> tuple[str, ...]:
        """Computations that run whenever this instruction does, a loop's and a conditional's excepted."""
        if self.opcode in ("while", "conditional"):
            return ()
        return tuple(name for key in ("calls", "to_apply") if (name := self.attribute(key)))

    @functools.cached_property
    def branches(self) -> tuple[str, ...]:
        """Computations of a conditional, in JAX's order: that of False before that of True."""
        listed = re.search(r"branch_computations=\{([^}]*)\}", self.text)
        if listed:
            return tuple(_REFERENCE.findall(listed[1]))
        return tuple(name for key in ("false_computation", "true_computation") if (name := self.attribute(key)))

    @property
    def op_name(self) -> str:
        """The JAX operation it comes from, by XLA's metadata."""
        match = re.search(r'op_name="([^"]*)"', self.text)
        return match[1] if match else ""


@dataclasses.dataclass(frozen=True)
class Computation:
    name: str
    instructions: Mapping[str, Instruction]

    @functools.cached_property
    def root(self) -> Instruction:
        return next(i for i in self.instructions.values() if i.is_root)

    @functools.cached_property
    def parameters(self) -> Mapping[str, int]:
        return {
            i.name: int(re.match(r"\((\d+)\)", i.text)[1])
            for i in self.instructions.values()
            if i.opcode == "parameter"
        }


@dataclasses.dataclass(frozen=True)
class Module:
    entry: str
    computations: Mapping[str, Computation]
    places: Mapping[int, Place] = dataclasses.field(default_factory=dict)  # by stack_frame_id

    def __getitem__(self, name: str) -> Computation:
        return self.computations[name]

    def place(self, instruction: Instruction) -> Place | None:
        """The place in the source of the JAX operation that an instruction comes from, or None if the text does not
        say."""
        frame = re.search(r"\bstack_frame_id=(\d+)", instruction.text)
        return self.places.get(int(frame[1])) if frame else None


def parse(text: str) -> Module:
    """A module from `compiled.as_text()`."""
    computations, entry, name, instructions = {}, None, None, {}
    for line in text.splitlines():
        if name is None:
            match = _COMPUTATION.match(line)
            if match:
                name, instructions = match["name"], {}
                entry = name if match["entry"] else entry
        elif line.startswith("}"):
            computations[name] = Computation(name, instructions)
            name = None
        elif (instruction := _instruction(line)) is not None:
            instructions[instruction.name] = instruction
    if entry is None:
        raise ValueError("no ENTRY computation: this is not the text of an HLO module")
    return Module(entry, computations, _places(text))


def _places(text: str) -> dict[int, Place]:
    """The places of the tables before the computations: every frame of a stack has a location, every location a
    file."""
    tables = {
        name: dict(re.findall(r"^(\d+) (.*)$", rows, re.M))
        for name, rows in re.findall(r"^(FileNames|FileLocations|StackFrames)\n((?:\d+ .*\n)*)", text, re.M)
    }
    number = lambda row, key: re.search(rf"\b{key}=(\d+)", row)[1]
    locations = {
        name: Place(
            tables["FileNames"][number(row, "file_name_id")].strip('"'),
            int(number(row, "line")),
            int(number(row, "column")),
        )
        for name, row in tables.get("FileLocations", {}).items()
    }
    return {
        int(name): locations[number(row, "file_location_id")] for name, row in tables.get("StackFrames", {}).items()
    }


def _instruction(line: str) -> Instruction | None:
    head = _HEAD.match(line)
    if head is None:
        return None
    start = head.end()
    shape_end = _closing(line, start) + 1 if line[start] == "(" else line.index(" ", start)
    opening = line.index("(", shape_end)
    closing = _closing(line, opening)
    operands = tuple(_REFERENCE.findall(line[opening:closing]))
    return Instruction(
        head["name"],
        line[shape_end:opening].strip(),
        line[start:shape_end],
        operands,
        line[opening:],
        bool(head["root"]),
    )


def _closing(line: str, opening: int) -> int:
    """The index of the bracket that closes the one at `opening`."""
    depth = 0
    for bracket in re.finditer(r"[()]", line[opening:]):
        depth += 1 if bracket[0] == "(" else -1
        if depth == 0:
            return opening + bracket.start()
    raise ValueError(f"brackets do not close: {line[:200]}")


def arrays(shape: str) -> Iterator[tuple[int, bool]]:
    """(bytes, whether it lives in main memory) of each array in a printed shape: S(1) and up are memories on the chip,
    scalars of DMA and the like."""
    for match in _ARRAY.finditer(shape):
        dtype, dims = match["dtype"], match["dims"].replace("<=", "")
        bits = _BITS.get(dtype)
        if bits is None:
            bits = int(re.search(r"\d+", dtype)[0])
        count = 1
        for size in dims.split(",") if dims else ():
            count *= int(size)
        yield -(-count * bits // 8), "S(" not in (match["layout"] or "")


def shape_bytes(shape: str) -> int:
    """Bytes of all arrays in a printed shape, without the padding of its tiles."""
    return sum(size for size, _ in arrays(shape))


# ----------------------------------------------------------------------------------------------------------------------
# Loops


@dataclasses.dataclass(frozen=True)
class Scope:
    """A computation as called from one place, with the names in the parent's scope that its parameters are bound to."""

    module: Module
    computation: Computation
    arguments: tuple[str, ...] = ()
    parent: "Scope | None" = None
    loop: Instruction | None = None  # the `while` whose body or condition this is

    def enter(self, caller: Instruction, name: str) -> "Scope":
        """The computation `name` as `caller` runs it."""
        return Scope(
            self.module, self.module[name], caller.operands, self, caller if caller.opcode == "while" else None
        )


def entry_scope(module: Module) -> Scope:
    return Scope(module, module[module.entry])


def origin(name: str, scope: Scope) -> tuple[str, str]:
    """The computation and the instruction that made a value, through copies and conversions of it."""
    instruction = scope.computation.instructions[name]
    while instruction.opcode in _TRANSPARENT:
        instruction = scope.computation.instructions[instruction.operands[0]]
    return scope.computation.name, instruction.name


def trip_count(loop: Instruction, scope: Scope) -> int | None:
    """The number of times that the body of a `while` runs: as XLA notes it, or from its counter."""
    noted = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.text)
    if noted:
        return int(noted[1])
    condition = scope.enter(loop, loop.attribute("condition"))
    test, test_scope = _through_fusions(condition.computation.root, condition)
    direction = re.search(r"direction=(\w+)", test.text)
    if test.opcode != "compare" or direction is None:
        return None
    index, bound = _carried_index(test.operands[0], test_scope), _value(test.operands[1], test_scope)
    if index is None or bound is None:
        return None
    start, step = _element(loop.operands[0], index, scope), _step(loop, index, scope)
    if start is None or not step or direction[1] not in ("NE", *(("LT", "LE") if step > 0 else ("GT", "GE"))):
        return None
    distance = (
        abs(bound - start)
        if direction[1] == "NE"
        else (bound - start) * (1 if step > 0 else -1) + (direction[1] in ("LE", "GE"))
    )
    return max(-(-distance // abs(step)), 0)


def _step(loop: Instruction, index: int, scope: Scope) -> int | None:
    """The number that the body adds to element `index` of the carry."""
    body = scope.enter(loop, loop.attribute("body"))
    root = body.computation.root
    if root.opcode != "tuple":
        return None
    update, update_scope = _through_fusions(body.computation.instructions[root.operands[index]], body)
    if update.opcode not in ("add", "subtract"):
        return None
    sign = 1 if update.opcode == "add" else -1
    left, right = update.operands
    if _carried_index(left, update_scope) == index:
        amount = _value(right, update_scope)
    elif update.opcode == "add" and _carried_index(right, update_scope) == index:
        amount = _value(left, update_scope)
    else:
        return None
    return None if amount is None else sign * amount


def _invariant(loop: Instruction, index: int, scope: Scope) -> bool:
    """True if the body returns element `index` of the carry unchanged."""
    body = scope.enter(loop, loop.attribute("body"))
    root = body.computation.root
    return root.opcode == "tuple" and _carried_index(root.operands[index], body) == index


def _through_fusions(instruction: Instruction, scope: Scope) -> tuple[Instruction, Scope]:
    """The instruction that makes a fusion's result, or the value that was copied, and its scope."""
    while True:
        if instruction.opcode in ("fusion", "call") and instruction.called:
            scope = scope.enter(instruction, instruction.called[0])
            instruction = scope.computation.root
        elif instruction.opcode in _TRANSPARENT:
            instruction = scope.computation.instructions[instruction.operands[0]]
        else:
            return instruction, scope


def _carried_index(name: str, scope: Scope) -> int | None:
    """The index of a loop's carry that a value in its body or condition is read from."""
    instruction = scope.computation.instructions[name]
    if instruction.opcode in _TRANSPARENT:
        return _carried_index(instruction.operands[0], scope)
    if (
        instruction.opcode == "parameter"
        and scope.parent is not None
        and len(scope.arguments) == len(scope.computation.parameters) > 0
    ):
        argument = scope.arguments[scope.computation.parameters[name]]
        return _carried_index(argument, scope.parent)
    if (
        instruction.opcode == "get-tuple-element"
        and scope.computation.instructions[instruction.operands[0]].opcode == "parameter"
    ):
        return _index(instruction)
    return None


def _index(instruction: Instruction) -> int:
    return int(re.search(r"index=(\d+)", instruction.text)[1])


def _value(name: str, scope: Scope) -> int | None:
    """The integer that a scalar always is, or None."""
    instruction, scope = _through_fusions(scope.computation.instructions[name], scope)
    if instruction.opcode == "constant":
        literal = re.match(r"\((-?\d+)\)", instruction.text)
        return int(literal[1]) if literal else None
    if instruction.opcode == "parameter" and scope.parent is not None:
        return _value(scope.arguments[scope.computation.parameters[instruction.name]], scope.parent)
    if instruction.opcode == "get-tuple-element":
        return _element(instruction.operands[0], _index(instruction), scope)
    return None


def _element(name: str, index: int, scope: Scope) -> int | None:
    """The integer that element `index` of a tuple always is, or None."""
    instruction = scope.computation.instructions[name]
    if instruction.opcode == "tuple":
        return _value(instruction.operands[index], scope)
    if instruction.opcode in _TRANSPARENT or (instruction.opcode == "while" and _invariant(instruction, index, scope)):
        return _element(instruction.operands[0], index, scope)
    if instruction.opcode == "parameter" and scope.parent is not None:
        if scope.loop is not None and not _invariant(scope.loop, index, scope.parent):
            return None
        return _element(scope.arguments[scope.computation.parameters[name]], index, scope.parent)
    return None

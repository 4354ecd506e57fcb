"""Optimized XLA programs as data, read from their text (`compiled.as_text()`)."""

import functools
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

MOST_TRIPS = 1 << 16  # a longer loop counts as unknown
START = re.compile(r"\s+(ROOT )?%?[\w.-]+ = ")  # of an instruction
SPECIAL = re.compile(r'["(){}\[\],]')


@dataclass(frozen=True)
class Array:
    """An array of a program: its type and where it lies."""

    dtype: str
    dims: tuple[int, ...]
    order: tuple[int, ...]  # dimensions from minor to major
    tile: tuple[int, ...]  # of the most minor dimensions, major first; () where it is not tiled
    bits: int  # of an element
    space: int  # memory; 0 is HBM

    @property
    def size(self) -> int:
        """Bytes of the elements alone."""
        return math.ceil(math.prod(self.dims) * self.bits / 8)

    @property
    def padded(self) -> int:
        """Bytes with the dimensions rounded up to whole tiles."""
        dims = [self.dims[i] for i in reversed(self.order)]
        for back, tile in enumerate(reversed(self.tile[-len(dims) :] if dims else ()), start=1):
            dims[-back] = -(-dims[-back] // tile) * tile
        return math.ceil(math.prod(dims) * self.bits / 8)


Shape = Array | tuple["Shape", ...]


@dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    shape: Shape
    operands: tuple[str, ...]  # names; for a parameter its number, for a constant its value
    rest: str  # the attributes as text

    @functools.cached_property
    def attributes(self) -> Mapping[str, str]:
        pairs = (part.partition("=") for part in _split(self.rest))
        return {key: value for key, _, value in pairs}

    @functools.cached_property
    def config(self) -> Mapping[str, Any]:
        """`backend_config`; empty where it is not JSON."""
        try:
            config = json.loads(self.attributes.get("backend_config", "{}"))
        except ValueError:
            return {}
        return config if isinstance(config, dict) else {}

    @property
    def called(self) -> tuple[str, ...]:
        """The computations that this runs: of a loop the body, then the condition."""
        keys = ("calls", "body", "condition", "true_computation", "false_computation")
        if self.opcode == "call":
            keys = ("to_apply",)
        names = [self.attributes[key] for key in keys if key in self.attributes]
        names += _split(self.attributes.get("branch_computations", "{}")[1:-1])
        return tuple(name.removeprefix("%") for name in names)

    @property
    def target(self) -> str:
        """What a custom call calls."""
        return self.attributes.get("custom_call_target", "").strip('"')

    @property
    def is_start(self) -> bool:
        """Whether this begins something that a `-done` ends."""
        return self.opcode.endswith("-start")


@dataclass(frozen=True)
class Computation:
    """Instructions in the order of the schedule."""

    name: str
    instructions: Mapping[str, Instruction]
    root: Instruction

    @functools.cached_property
    def parameters(self) -> Mapping[int, Instruction]:
        found = (i for i in self.instructions.values() if i.opcode == "parameter")
        return {int(i.operands[0]): i for i in found}

    @functools.cached_property
    def users(self) -> Mapping[str, list[tuple[Instruction, int]]]:
        """Of each name, who reads it, and as which operand."""
        users: dict[str, list[tuple[Instruction, int]]] = {}
        for user in self.instructions.values():
            for i, name in enumerate(user.operands):
                users.setdefault(name, []).append((user, i))
        return users


@dataclass(frozen=True)
class Module:
    """A program."""

    computations: Mapping[str, Computation]
    entry: Computation
    tiled: bool  # compiled for a TPU

    @functools.cached_property
    def fused(self) -> set[str]:
        """The computations that are bodies of fusions."""
        return {
            instruction.called[0]
            for computation in self.computations.values()
            for instruction in computation.instructions.values()
            if instruction.opcode == "fusion"
        }

    def in_hbm(self, array: Array) -> bool:
        # On GPUs space 1 is for collectives, and ordinary memory.
        return array.space == 0 or (array.space == 1 and not self.tiled)


def parse(text: str) -> Module:
    """Reads the text of an optimized module.

    Raises ValueError where it is not one.
    """
    computations: dict[str, Computation] = {}
    header, entry, name = "", None, None
    lines: list[str] = []
    for line in text.splitlines():
        if name is None:
            if line.startswith("HloModule"):
                header = line
            elif line.endswith("{") and line.startswith(("%", "ENTRY ")):
                name = line.removeprefix("ENTRY ").removeprefix("%").split(" ", 1)[0]
                entry = name if line.startswith("ENTRY ") else entry
                lines = []
        elif line == "}" or line.startswith("}, execution_thread"):
            computations[name] = _computation(name, lines)
            name = None
        elif START.match(line):
            lines.append(line.strip())
        elif lines:  # attributes of kernels may hold line breaks
            lines[-1] += line
    if entry is None:
        raise ValueError("no ENTRY computation: this is not the text of a compiled HLO module")
    return Module(computations, computations[entry], ":T(" in header)


def _computation(name: str, lines: list[str]) -> Computation:
    instructions = [_instruction(line) for line in lines]
    roots = [i for i, line in zip(instructions, lines, strict=True) if line.startswith("ROOT ")]
    if not roots:
        raise ValueError(f"computation {name} has no ROOT")
    return Computation(name, {i.name: i for i in instructions}, roots[0])


def _instruction(line: str) -> Instruction:
    """`[ROOT ]%name = shape opcode(operands)[, attribute=value]*`"""
    name, _, line = line.removeprefix("ROOT ").partition(" = ")
    shape, end = _shape(line, 0)
    opcode, _, _ = line[end:].strip().partition("(")
    begin = line.index("(", end)
    close = _closing(line, begin)
    operands = line[begin + 1 : close]
    if opcode == "constant":
        names = (operands,)
    else:
        # A comment, or in some versions of XLA the shape, may stand in front of the name.
        names = tuple(part.rpartition("%")[2] for part in _split(operands))
    return Instruction(name.removeprefix("%"), opcode, shape, names, line[close + 1 :].lstrip(", "))


def _shape(text: str, at: int) -> tuple[Shape, int]:
    """The shape that stands at `at`, and where it ends.

    bf16[8,64]{1,0:T(8,128)(2,1)S(1)} -> bf16, dims 8 64, order 1 0, tile 8 128, 16 bits, space 1
    """
    if text[at] == "(":
        end = _closing(text, at)
        parts = (re.sub(r"/\*.*?\*/", "", part) for part in _split(text[at + 1 : end]))
        return tuple(_shape(part, 0)[0] for part in parts), end + 1
    begin = text.index("[", at)
    end = text.index("]", begin)
    dtype = text[at:begin]
    dims = tuple(int(d.removeprefix("<=")) for d in text[begin + 1 : end].split(",") if d)
    layout, end = "", end + 1
    if text[end : end + 1] == "{":
        close = _closing(text, end)
        layout, end = text[end + 1 : close], close + 1
    order, _, more = layout.partition(":")
    properties = dict(re.findall(r"(T|E|S)\(([\d,]+)\)", more))  # of the tiles only the first
    array = Array(
        dtype=dtype,
        dims=dims,
        order=tuple(int(d) for d in order.split(",") if d) or tuple(reversed(range(len(dims)))),
        tile=tuple(int(d) for d in properties.get("T", "").split(",") if d),
        bits=int(properties.get("E", _bits(dtype))),
        space=int(properties.get("S", 0)),
    )
    return array, end


def _bits(dtype: str) -> int:
    """s8, bf16, f8e4m3fn; pred and, unless the layout packs them, s4 take a byte; token nothing."""
    if dtype == "pred":
        return 8
    digits = re.match(r"[a-z]+?(\d+)", dtype)
    return max(8, int(digits[1])) if digits else 0


def _closing(text: str, at: int) -> int:
    """Where the bracket at `at` is closed. Brackets in strings do not count."""
    depth = 0
    while True:
        match = SPECIAL.search(text, at)
        if match is None:
            raise ValueError(f"a bracket is not closed: {text[:80]}")
        at, char = match.end(), match[0]
        if char == '"':
            at = _string_end(text, at)
        elif char != ",":
            depth += 1 if char in "({[" else -1
            if depth == 0:
                return match.start()


def _split(text: str) -> list[str]:
    """The parts between commas that stand in no bracket and no string."""
    parts, depth, begin, at = [], 0, 0, 0
    while match := SPECIAL.search(text, at):
        at, char = match.end(), match[0]
        if char == '"':
            at = _string_end(text, at)
        elif char != ",":
            depth += 1 if char in "({[" else -1
        elif depth == 0:
            parts.append(text[begin : match.start()].strip())
            begin = at
    return [*parts, text[begin:].strip()] if text.strip() else []


def _string_end(text: str, at: int) -> int:
    while text[at] != '"':
        at += 2 if text[at] == "\\" else 1
    return at + 1


def leaves(shape: Shape) -> Iterator[Array]:
    if isinstance(shape, Array):
        yield shape
    else:
        for part in shape:
            yield from leaves(part)


# How often a loop runs


def trips(module: Module, computation: Computation, loop: Instruction) -> int | None:
    """How often the body runs; None if that depends on data.

    CPU and GPU programs state it. Otherwise the counters that start from constants are followed.
    """
    if stated := loop.config.get("known_trip_count"):
        return int(stated["n"])
    body, condition = (module.computations[name] for name in loop.called)
    begin = computation.instructions[loop.operands[0]]
    if begin.opcode != "tuple" or body.root.opcode != "tuple":
        return None
    known: dict[str, Any] = {}
    state = tuple(_evaluate(module, computation, name, (), known) for name in begin.operands)
    for trips in range(MOST_TRIPS):
        more = _evaluate(module, condition, condition.root.name, (state,))
        if more is None:
            return None
        if not more:
            return trips
        # A value once unknown stays so, unless the body sets it to a constant: not followed.
        state = tuple(
            None if old is None else _evaluate(module, body, name, (state,))
            for old, name in zip(state, body.root.operands, strict=True)
        )
    return None


def _evaluate(
    module: Module,
    computation: Computation,
    name: str,
    arguments: tuple,
    known: dict[str, Any] | None = None,
) -> Any:
    """The value of a scalar integer that depends on constants alone; None for all others.

    `known` holds what was evaluated in this computation with these arguments.
    """
    known = {} if known is None else known
    if name not in known:
        known[name] = _value(module, computation, name, arguments, known)
    return known[name]


def _value(
    module: Module, computation: Computation, name: str, arguments: tuple, known: dict[str, Any]
) -> Any:
    instruction = computation.instructions[name]
    opcode, operands = instruction.opcode, instruction.operands
    if opcode == "constant":
        return int(operands[0]) if re.fullmatch(r"-?\d+", operands[0]) else None
    if opcode == "parameter":
        i = int(operands[0])
        return arguments[i] if i < len(arguments) else None
    if opcode in ("copy", "bitcast"):
        return _evaluate(module, computation, operands[0], arguments, known)
    if opcode == "get-tuple-element":
        values = _evaluate(module, computation, operands[0], arguments, known)
        return values[int(instruction.attributes["index"])] if isinstance(values, tuple) else None
    if opcode not in ("add", "subtract", "compare", "fusion"):
        return None
    values = tuple(
        _evaluate(module, computation, operand, arguments, known) for operand in operands
    )
    if opcode == "fusion":
        body = module.computations[instruction.called[0]]
        return _evaluate(module, body, body.root.name, values)
    if not all(isinstance(value, int) for value in values):
        return None
    a, b = values
    if opcode == "compare":
        order = {"LT": a < b, "LE": a <= b, "GT": a > b, "GE": a >= b, "EQ": a == b, "NE": a != b}
        return int(order[instruction.attributes["direction"]])
    return a + b if opcode == "add" else a - b

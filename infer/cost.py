"""What an optimized XLA program costs, counted from its text (`compiled.as_text()`).

`analyze` counts one execution of the program on one device: bytes to and from HBM, floating-point
operations, collectives, and, where the compiler wrote them down (TPU), estimated cycles. XLA's own
`cost_analysis` is no measure of HBM traffic: it counts traffic of on-chip memory too, and a
prefetch three times.

What counts:
  A top-level instruction reads its operands and writes its results; a fusion is one instruction,
  what happens inside it stays on the chip. Arrays in on-chip memory, S(n) in a TPU layout, are
  free: a weight that `copy-start` or `slice-start` prefetches counts once, where it leaves HBM.
  Of an operand that is only sliced or gathered from, what is read counts; of a buffer updated by
  `dynamic-update-slice` or `scatter`, the update. XLA does these in place, and puts a visible copy
  in front where it cannot.
  A loop counts as often as it runs if that can be known, otherwise once: one step. Of a
  conditional the branch with the most traffic counts.
  Sizes are logical; `padded_hbm_bytes` counts the tiles that TPUs store ([.., 64] takes 128 lanes).
  A custom call counts by its operands and results, each once, its operations by the estimate that
  its author gave. So do operands that it writes in place, of which it may touch a few tiles.
Out of scope: caches of CPUs and GPUs, and what a custom call does inside.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np

from infer.hlo import Array, Computation, Instruction, Module, Shape, leaves, parse, trips

Measure = Callable[[Array], int]

COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
# These name a value or stand for one that another instruction made.
FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "add-dependency",
    "optimization-barrier",
    "partition-id",
    "replica-id",
}
CONTROL = {"while", "conditional", "call", "async-start"}  # the work is in what they call
SLICES = {"slice", "dynamic-slice", "gather"}
PASSING = {"bitcast", "convert", "copy", "reshape", "transpose"}  # element by element, in a fusion
# No single instruction takes minutes; the compiler prints such numbers where its estimate overflowed.
MOST_CYCLES = 1 << 40


@dataclass(frozen=True)
class Work:
    """Some number of instructions of a kind, together."""

    count: int = 0
    bytes: int = 0
    flops: int = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.count + other.count, self.bytes + other.bytes, self.flops + other.flops)

    def times(self, n: int) -> "Work":
        return Work(n * self.count, n * self.bytes, n * self.flops)


@dataclass(frozen=True)
class Temporary:
    """A buffer in HBM that the program makes for itself."""

    bytes: int
    shape: str  # bf16[8,4096]
    opcode: str
    name: str
    source: str  # the operation in the model that it comes from


@dataclass(frozen=True)
class Cost:
    """What one execution costs a device. `collectives` and `unestimated` are by kind."""

    hbm_bytes: int = 0
    padded_hbm_bytes: int = 0
    open_loop_bytes: int = 0  # of hbm_bytes, in loops of unknown length, counted once
    flops: int = 0  # of matrix products
    estimated_cycles: int = 0  # by the compiler, where it has an estimate
    # Bytes of a collective: its operands or its results, whichever is larger.
    collectives: Mapping[str, Work] = field(default_factory=dict)
    unestimated: Mapping[str, Work] = field(default_factory=dict)  # work with no such estimate
    overflowed: tuple[str, ...] = ()  # instructions whose estimate is no number of cycles
    temporaries: tuple[Temporary, ...] = ()  # largest first

    @classmethod
    def sum(cls, costs: Iterable["Cost"]) -> "Cost":
        costs = list(costs)

        def total(values: list[Any]) -> Any:
            if isinstance(values[0], int):
                return sum(values)
            return _merge(values) if isinstance(values[0], dict) else tuple(chain(*values))

        columns = {name: [getattr(cost, name) for cost in (cls(), *costs)] for name in _FIELDS}
        return cls(**{name: total(values) for name, values in columns.items()})

    def times(self, n: int) -> "Cost":
        """The cost of n executions; lists name what is in each."""

        def scaled(value: Any) -> Any:
            if isinstance(value, int):
                return n * value
            if isinstance(value, dict):
                return {kind: work.times(n) for kind, work in value.items()}
            return value

        return Cost(**{name: scaled(getattr(self, name)) for name in _FIELDS})


_FIELDS = tuple(f.name for f in dataclasses.fields(Cost))


def _merge(works: Iterable[Mapping[str, Work]]) -> dict[str, Work]:
    merged: dict[str, Work] = {}
    for work in works:
        for kind, more in work.items():
            merged[kind] = merged.get(kind, Work()) + more
    return merged


def analyze(text: str) -> Cost:
    """Counts one execution of a compiled program, given `compiled.as_text()`."""
    module = parse(text)
    cost = _cost(module, module.entry)
    outputs = _outputs(module.entry)
    kept = (t for t in cost.temporaries if t.name not in outputs)
    largest = sorted(kept, key=lambda t: (-t.bytes, t.name))
    return dataclasses.replace(cost, temporaries=tuple(largest))


def _cost(module: Module, computation: Computation) -> Cost:
    instructions = computation.instructions.values()
    return Cost.sum(_cost_of(module, computation, instruction) for instruction in instructions)


def _cost_of(module: Module, computation: Computation, instruction: Instruction) -> Cost:
    opcode = instruction.opcode
    if opcode in FREE or opcode.endswith(("-done", "-update")):
        return Cost()
    if _stage(module, instruction) == "done":
        return Cost()
    if opcode in CONTROL and instruction.called:
        costs = [_cost(module, module.computations[name]) for name in instruction.called]
        if opcode == "conditional":
            return max(costs, key=lambda cost: (cost.hbm_bytes, cost.flops))
        cost = Cost.sum(costs)
        if opcode != "while":
            return cost
        turns = trips(module, computation, instruction)
        if turns is None:
            return dataclasses.replace(cost, open_loop_bytes=cost.hbm_bytes)
        return cost.times(turns)
    return _work(module, computation, instruction)


def _work(module: Module, computation: Computation, instruction: Instruction) -> Cost:
    """The cost of an instruction that computes or moves something."""
    opcode = instruction.opcode
    traffic = _traffic(module, computation, instruction, lambda array: array.size)
    padded = _traffic(module, computation, instruction, lambda array: array.padded)
    flops = _flops(module, computation, instruction)
    cycles, unestimated, overflowed = _cycles(instruction), {}, ()
    if cycles is None:
        kind = instruction.target or opcode.removesuffix("-start")
        unestimated = {kind: Work(1, traffic, flops)}
    elif not 0 <= cycles <= MOST_CYCLES:
        overflowed = (instruction.name,)
    return Cost(
        hbm_bytes=traffic,
        padded_hbm_bytes=padded,
        flops=flops,
        estimated_cycles=0 if overflowed else cycles or 0,
        collectives=_collectives(module, computation, instruction),
        unestimated=unestimated,
        overflowed=overflowed,
        temporaries=_temporaries(module, computation, instruction),
    )


def _cycles(instruction: Instruction) -> int | None:
    window = instruction.config.get("window_config") or {}
    return int(window["estimated_cycles"]) if "estimated_cycles" in window else None


# HBM traffic


def _traffic(
    module: Module, computation: Computation, instruction: Instruction, size: Measure
) -> int:
    if instruction.target == "AllocateBuffer":
        return 0
    aliased, kept = _aliased_by_attribute(instruction)
    total = in_place = 0
    for name in dict.fromkeys(instruction.operands):
        operand = computation.instructions.get(name)
        if operand is None or _is_scalar_constant(operand):
            continue
        arrays = [array for array in leaves(operand.shape) if module.in_hbm(array)]
        uses = [i for i, other in enumerate(instruction.operands) if other == name]
        read = sum(_reads(module, computation, instruction, i, size) for i in uses)
        read = min(read, sum(map(size, arrays)))
        if aliased.isdisjoint(uses):
            total += read
        else:
            in_place += read
    if in_place and (estimated := int(_author_estimate(instruction).get("bytes_accessed", 0))):
        in_place = min(estimated, 2 * in_place)  # read and written
    results = _results(instruction)
    written = _writes(module, computation, instruction, size)
    for i, (array, count) in enumerate(zip(results, written, strict=True)):
        if module.in_hbm(array) and i not in kept:
            total += min(count, size(array))
    return total + in_place


def _reads(
    module: Module, computation: Computation, instruction: Instruction, i: int, size: Measure
) -> int:
    """Bytes that an instruction reads of its operand i."""
    opcode, operands = instruction.opcode.removesuffix("-start"), instruction.operands
    if opcode == "fusion":
        body = module.computations[instruction.called[0]]
        aliased, _ = _aliased_by_attribute(instruction)
        if i in aliased and _stage(module, instruction) == "going on":
            return 0
        return _uses(module, body, body.parameters[i].name, size)
    if i == 0 and opcode in SLICES:
        return sum(map(size, _results(instruction)))
    updated = 1 if opcode == "dynamic-update-slice" else (len(operands) - 1) // 2
    if (
        opcode in ("dynamic-update-slice", "scatter")
        and i < updated
        and _is_buffer(module, computation, operands[i])
    ):
        return 0
    return sum(map(size, leaves(computation.instructions[operands[i]].shape)))


def _uses(module: Module, computation: Computation, name: str, size: Measure) -> int:
    """Bytes that the users of a value inside a fusion read of it."""
    value = computation.instructions[name].shape
    if name == computation.root.name or not isinstance(value, Array):
        return sum(map(size, leaves(value)))
    total = 0
    for user, i in computation.users.get(name, []):
        if isinstance(user.shape, Array) and _passes(module, user):
            used = _uses(module, computation, user.name, size)
            total += used * value.bits // user.shape.bits
        else:
            total += _reads(module, computation, user, i, size)
    return total


def _passes(module: Module, instruction: Instruction) -> bool:
    """Whether an instruction in a fusion only passes on the elements of its one operand.

    TPUs do a nested fusion of this kind, a copy into other tiles, for what is sliced behind it.
    """
    if instruction.opcode == "fusion":
        inner = module.computations[instruction.called[0]].instructions.values()
        return all(i.opcode == "parameter" or i.opcode in PASSING for i in inner)
    return instruction.opcode in PASSING


def _writes(
    module: Module, computation: Computation, instruction: Instruction, size: Measure
) -> list[int]:
    """Bytes that an instruction writes, for each of its results."""
    opcode, operands = instruction.opcode, instruction.operands
    if opcode == "fusion":
        body = module.computations[instruction.called[0]]
        ends = body.root.operands if body.root.opcode == "tuple" else (body.root.name,)
        return [n for end in ends for n in _written(module, body, end, size)]
    if opcode == "dynamic-update-slice" and _is_buffer(module, computation, operands[0]):
        return [sum(map(size, leaves(computation.instructions[operands[1]].shape)))]
    if opcode == "scatter":
        n = (len(operands) - 1) // 2
        pairs = zip(operands[:n], operands[n + 1 :], _results(instruction), strict=True)
        return [
            sum(map(size, leaves(computation.instructions[update].shape)))
            if _is_buffer(module, computation, buffer)
            else size(result)
            for buffer, update, result in pairs
        ]
    return [size(array) for array in _results(instruction)]


def _written(module: Module, computation: Computation, name: str, size: Measure) -> list[int]:
    """Bytes written where a fusion ends in `name`."""
    instruction = computation.instructions[name]
    while instruction.opcode == "bitcast":
        instruction = computation.instructions[instruction.operands[0]]
    if instruction.opcode == "parameter":  # a copy, or a bitcast that moves
        return [size(array) for array in leaves(computation.instructions[name].shape)]
    return _writes(module, computation, instruction, size)


def _is_buffer(module: Module, computation: Computation, name: str) -> bool:
    """Whether a value lies in memory: outside of fusions any, in one what it has from outside."""
    if computation.name not in module.fused:
        return True
    instruction = computation.instructions[name]
    while instruction.opcode == "bitcast":
        instruction = computation.instructions[instruction.operands[0]]
    if instruction.opcode == "fusion":  # a nested one that only passes a parameter on
        body = module.computations[instruction.called[0]]
        return _is_buffer(module, body, body.root.name) and _is_buffer(
            module, computation, instruction.operands[0]
        )
    return instruction.opcode == "parameter"


def _results(instruction: Instruction) -> list[Array]:
    """The arrays that an instruction makes.

    An asynchronous one has a tuple: copy-start (result, operand, context), the others (operands,
    results, contexts); all-reduce-start only its result.
    """
    shape = instruction.shape
    if (
        instruction.is_start
        and isinstance(shape, tuple)
        and instruction.opcode != "all-reduce-start"
    ):
        shape = shape[0] if instruction.opcode == "copy-start" else shape[1]
    return list(leaves(shape))


def _is_scalar_constant(instruction: Instruction) -> bool:
    shape = instruction.shape
    return instruction.opcode == "constant" and isinstance(shape, Array) and not shape.dims


def _aliased_by_attribute(instruction: Instruction) -> tuple[set[int], set[int]]:
    """Operands that are results as well, and these results: `{0}: (1, {})` -> ({1}, {0})."""
    text = instruction.attributes.get("output_to_operand_aliasing", "")
    pairs = re.findall(r"\{(\d*)\}: \((\d+)", text)
    return {int(operand) for _, operand in pairs}, {int(result or 0) for result, _ in pairs}


def _author_estimate(instruction: Instruction) -> Mapping[str, Any]:
    """What the author of a kernel says that it costs; empty where nothing is said."""
    return _find(instruction.config, "cost_estimate") or {}


def _find(config: Any, key: str) -> Any:
    """The value of a key, at any depth."""
    if not isinstance(config, dict):
        return None
    if key in config:
        return config[key]
    return next((found for v in config.values() if (found := _find(v, key)) is not None), None)


# Temporaries


def _temporaries(
    module: Module, computation: Computation, instruction: Instruction
) -> tuple[Temporary, ...]:
    results = _results(instruction)
    written = _writes(module, computation, instruction, lambda array: array.size)
    _, aliased = _aliased_by_attribute(instruction)
    for group in (instruction.config.get("aliasing_operands") or {}).get("lists", []):
        aliased |= {int(i) - len(instruction.operands) for i in group["indices"]}
    source = re.search(r'op_name="([^"]*)"', instruction.attributes.get("metadata", ""))
    return tuple(
        Temporary(
            bytes=array.size,
            shape=f"{array.dtype}[{','.join(map(str, array.dims))}]",
            opcode=instruction.opcode,
            name=instruction.name,
            source=source[1] if source else "",
        )
        for i, (array, n) in enumerate(zip(results, written, strict=True))
        if module.in_hbm(array) and array.dims and i not in aliased and n >= array.size
    )


def _outputs(entry: Computation) -> set[str]:
    """Names of the instructions that make what the program returns."""
    todo, found = [entry.root], set()
    while todo:
        instruction = todo.pop()
        if instruction.opcode in FREE or instruction.opcode.endswith("-done"):
            todo += [entry.instructions[n] for n in instruction.operands if n in entry.instructions]
        else:
            found.add(instruction.name)
    return found


# Collectives


def _collectives(
    module: Module, computation: Computation, instruction: Instruction
) -> dict[str, Work]:
    opcode = instruction.opcode.removesuffix("-start")
    if opcode == "fusion":
        if _stage(module, instruction) == "going on":
            return {}
        body = module.computations[instruction.called[0]]
        kinds = _merge(_collectives(module, body, inner) for inner in body.instructions.values())
        # TPUs do a reduce-scatter as an all-reduce of which each chip keeps a slice.
        if set(kinds) == {"all-reduce"} and _keeps_slice(body):
            kinds = {"reduce-scatter": kinds["all-reduce"]}
        return kinds
    if opcode not in COLLECTIVES:
        return {}
    operands = [
        array.size
        for name in instruction.operands
        for array in leaves(computation.instructions[name].shape)
    ]
    results = [array.size for array in _results(instruction)]
    return {opcode: Work(1, max(sum(operands), sum(results)))}


def _stage(module: Module, instruction: Instruction) -> str | None:
    """What a fusion does in a collective that TPUs do in several: "start", "going on" or "done".

    The collective stands in each of them, and beside it, where it goes on, what is computed in the
    meantime. The count is of the first.
    """
    if instruction.opcode != "fusion":
        return None
    body = module.computations[instruction.called[0]]
    stages = {"AsyncCollectiveStart": "start", "AsyncCollectiveDone": "done"}
    if body.root.target in stages:
        return stages[body.root.target]
    chained = any(
        inner.opcode in COLLECTIVES
        and "chain_id" in inner.attributes.get("frontend_attributes", "")
        for inner in body.instructions.values()
    )
    return "going on" if chained else None


def _keeps_slice(body: Computation) -> bool:
    return any(
        user.opcode == "dynamic-slice"
        for i in body.instructions.values()
        if i.opcode == "all-reduce"
        for user, _ in body.users.get(i.name, [])
    )


# Floating-point operations


def _flops(module: Module, computation: Computation, instruction: Instruction) -> int:
    """Of matrix products, in fusions too: two for each multiplication."""
    opcode = instruction.opcode
    if opcode == "fusion":
        body = module.computations[instruction.called[0]]
        return sum(_flops(module, body, inner) for inner in body.instructions.values())
    shapes = [
        computation.instructions[name].shape
        for name in instruction.operands
        if name in computation.instructions
    ]
    if opcode == "dot":
        contracted = _numbers(instruction.attributes.get("lhs_contracting_dims", "{}"))
        return _dot_flops(instruction.shape, shapes[0], contracted)
    if opcode == "convolution":
        return _convolution_flops(instruction, shapes)
    if opcode == "custom-call":
        if estimate := _author_estimate(instruction):
            return int(estimate.get("flops", 0))
        if numbers := _find(instruction.config, "dot_dimension_numbers"):  # cuBLAS
            contracted = [int(i) for i in numbers.get("lhs_contracting_dimensions", [])]
            return _dot_flops(instruction.shape, shapes[0], contracted)
    return 0


def _dot_flops(result: Shape, lhs: Shape, contracted: list[int]) -> int:
    out = next(leaves(result))  # a second result of cuBLAS is its workspace
    dims = next(leaves(lhs)).dims
    return 2 * math.prod(out.dims) * math.prod(dims[i] for i in contracted)


def _convolution_flops(instruction: Instruction, shapes: list[Shape]) -> int:
    """TPUs turn every dot into a convolution.

    Batch axes become spatial ones that are dilated and padded such that most positions of the
    kernel fall beside the input; those are not computed and not counted.
    """
    lhs, kernel, out = (next(leaves(shape)) for shape in (*shapes[:2], instruction.shape))
    labels = re.fullmatch(r"(\w+)_(\w+)->(\w+)", instruction.attributes["dim_labels"])
    if labels is None:
        raise ValueError(f"dim_labels of {instruction.name}")
    window = dict(
        pair.split("=") for pair in instruction.attributes.get("window", "{}")[1:-1].split()
    )
    multiplications = out.dims[labels[3].index("b")] * out.dims[labels[3].index("f")]
    multiplications *= kernel.dims[labels[2].index("i")]
    for axis in range(len(labels[1]) - 2):
        digit = str(axis)

        def number(key: str, default: int, axis: int = axis) -> int:
            return int(window[key].split("x")[axis]) if key in window else default

        low = int(window["pad"].split("x")[axis].split("_")[0]) if "pad" in window else 0
        multiplications *= _positions(
            lhs.dims[labels[1].index(digit)],
            kernel.dims[labels[2].index(digit)],
            out.dims[labels[3].index(digit)],
            stride=number("stride", 1),
            low=low,
            lhs_dilate=number("lhs_dilate", 1),
            rhs_dilate=number("rhs_dilate", 1),
        )
    return 2 * multiplications


@functools.lru_cache(maxsize=1024)
def _positions(
    size: int, kernel: int, out: int, *, stride: int, low: int, lhs_dilate: int, rhs_dilate: int
) -> int:
    """How many pairs of an output and a kernel position of one axis meet an input element."""
    last = (size - 1) * lhs_dilate
    offsets = np.arange(kernel) * rhs_dilate - low
    total = 0
    for o in range(out):
        at = offsets + o * stride
        total += int(np.count_nonzero((at >= 0) & (at <= last) & (at % lhs_dilate == 0)))
    return total


def _numbers(braces: str) -> list[int]:
    return [int(number) for number in braces.strip("{}").split(",") if number]

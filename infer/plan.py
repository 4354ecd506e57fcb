"""python -m infer.plan: does a model fit on some chips, and how fast can it at best be there.

The real prefill and decode programs are compiled for the chips by their own compiler, without the
chips and without weights, and counted (`infer.cost`). Byte figures are those of one device. Two
limits are told: what the memory allows for the bytes that the program moves, and the least that
any program would have to move. What a step takes beyond the first, collectives among it, is not
predicted.
"""

import argparse
import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from infer import topology
from infer.cost import Cost, analyze
from infer.generate import Shapes, lower_programs, request_shapes
from infer.topology import CHIPS, SLICES, Chip, Slice
from llama_jax import cache as kv
from llama_jax import checkpoint, sharding
from llama_jax.checkpoint import format_bytes
from llama_jax.command import FLAGS, QUANTIZATION_FLAGS, ArgumentParser, report, run
from llama_jax.config import LlamaConfig, get_preset
from llama_jax.errors import UserError
from llama_jax.quant import KINDS, Quantization

PROG = "infer.plan"
PROMPT = 512  # tokens, where nothing is said
MOST_ROWS = 1 << 20
PROGRAMS = {"start": "prefill", "extend": "prefill of a later chunk", "decode": "decode"}
FIGURES = (  # of any program, in JSON
    "hbm_bytes", "padded_hbm_bytes", "argument_bytes", "temp_bytes", "flops", "estimated_cycles",
    "unestimated", "collectives", "compile_s",
)  # fmt: skip


@dataclass(frozen=True)
class Request:
    """What is planned: everything that decides about the programs."""

    model: str
    config: LlamaConfig
    chips: Slice
    mesh: str
    quantization: Quantization | None
    dtype: str
    int8_cache: bool
    batch: int
    context: int
    prompt_tokens: int

    @property
    def shapes(self) -> Shapes:
        """The buckets in which generation puts such prompts."""
        prompts = [[0] * self.prompt_tokens] * self.batch
        new_tokens = self.context - self.prompt_tokens
        return request_shapes(self.config, prompts, new_tokens, int8_cache=self.int8_cache)


@dataclass(frozen=True)
class Arrays:
    """What lies in memory between two steps: abstract, on the devices of a mesh."""

    mesh: Mesh
    params: Any
    cache: Any

    @functools.cached_property
    def weights_bytes(self) -> int:
        return sharding.device_bytes(self.params)

    @functools.cached_property
    def cache_bytes(self) -> int:
        return sharding.device_bytes(self.cache)

    def least_bytes(self, config: LlamaConfig, rows: int, positions: int, read: bool) -> int:
        """The least that a device moves to and from memory for `positions` new ones in each row.

        Every weight is read once, of an embedding that is not the head as well only the rows of
        the tokens. New entries are written to the cache; if `read`, all of it is read first.
        """
        weights = self.weights_bytes
        if not config.tie_embeddings:
            table = sharding.device_bytes(self.params["embed"])
            weights -= table - min(table, math.ceil(table * rows * positions / config.vocab_size))
        capacity = jax.tree.leaves(self.cache)[0].shape[2]
        written = math.ceil(self.cache_bytes * positions / capacity)
        return weights + written + (self.cache_bytes if read else 0)


def make_arrays(request: Request) -> Arrays:
    """Raises `UserError` for a mesh that does not match the chips, the model or the batch."""
    config, shapes = request.config, request.shapes
    mesh = make_mesh(request.mesh, config, request.chips)
    if request.batch % mesh.shape["data"]:
        raise UserError(
            f"--batch {request.batch} cannot be split over data={mesh.shape['data']} evenly; "
            "give a multiple of it"
        )
    dtype = jnp.dtype(request.dtype)
    params = checkpoint.abstract(config, request.quantization, dtype)
    layers = jax.eval_shape(
        lambda: kv.init_cache(config, shapes.batch, shapes.room, dtype, int8=request.int8_cache)
    ).layers
    places = jax.tree.map(lambda x: sharding.named(x.shape, kv.LOGICAL_AXES, mesh), layers)
    return Arrays(
        mesh,
        params=sharding.placed(params, sharding.shardings(params, mesh)),
        cache=sharding.placed(layers, places),
    )


def make_mesh(sizes: str, config: LlamaConfig, chips: Slice) -> Mesh:
    """The mesh of all chips. Raises `UserError` where `sizes` say another number."""
    mesh = sharding.make_mesh(sizes, config, topology.devices(chips))
    if mesh.size != chips.count:
        raise UserError(
            f"--mesh {sizes} takes {mesh.size} chips, but {chips.name} has {chips.count}; the "
            "sizes multiplied must give the number of chips"
        )
    return mesh


def default_mesh(config: LlamaConfig, chips: Slice, batch: int) -> str:
    """All chips for every row, or as many as the heads allow and the rows split over the rest."""
    sizes = [n for n in sharding.tensor_sizes(config) if chips.count % n == 0]
    fitting = [n for n in sizes if batch % (chips.count // n) == 0]
    if not fitting:
        raise UserError(
            f"{chips.name} has {chips.count} chips, but this model splits over at most {max(sizes)}"
            f" of them, and a batch of {batch} not over the rest; take fewer chips or a larger "
            "--batch"
        )
    tensor = max(fitting)
    return f"data={chips.count // tensor},tensor={tensor}"


# Compiling and counting


@dataclass(frozen=True)
class Compiled:
    """One program: what it costs to run, and what it takes in memory."""

    cost: Cost
    argument_bytes: int
    temp_bytes: int
    total_bytes: int  # arguments, results that are not among them, temporaries, code
    compile_s: float

    def then(self, other: "Compiled", times: int) -> "Compiled":
        """This one, and the other so many times behind it."""
        return Compiled(
            cost=Cost.sum((self.cost, other.cost.times(times))),
            argument_bytes=max(self.argument_bytes, other.argument_bytes),
            temp_bytes=max(self.temp_bytes, other.temp_bytes),
            total_bytes=max(self.total_bytes, other.total_bytes),
            compile_s=self.compile_s + other.compile_s,
        )


def compile_all(request: Request, arrays: Arrays) -> tuple[dict[str, Compiled], str | None]:
    """`prefill` of the whole prompt and one step of `decode`; none and why if memory is too small."""
    part = request.chips
    report(f"{PROG}: tracing {request.model} for {part.name} ({part.topology})")
    with topology.quiet():
        lowered = lower_programs(request.config, arrays.params, request.shapes)
        try:
            with ThreadPoolExecutor() as pool:  # XLA compiles without the interpreter lock
                tasks = {
                    name: pool.submit(compile_program, lowered[name], PROGRAMS[name])
                    for name in lowered
                }
            programs = {name: task.result() for name, task in tasks.items()}
        except jax.errors.JaxRuntimeError as error:
            return {}, too_large(error)
    prefill = programs["start"]
    if "extend" in programs:
        chunks = math.ceil(request.prompt_tokens / request.shapes.chunk)
        prefill = prefill.then(programs["extend"], chunks - 1)
    return {"prefill": prefill, "decode": programs["decode"]}, None


def compile_program(lowered: Any, what: str, prog: str = PROG) -> Compiled:
    """Compiles what was lowered, and counts it; `what` is what to call it."""
    report(f"{prog}: compiling {what} ...")
    began = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - began
    report(f"{prog}: compiled {what} in {seconds:.1f} s")
    memory = compiled.memory_analysis()
    return Compiled(
        cost=analyze(compiled.as_text()),
        argument_bytes=memory.argument_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        total_bytes=memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes,
        compile_s=seconds,
    )


def too_large(error: Exception) -> str:
    """What a compiler says that finds too little memory; raises any other error again."""
    if "RESOURCE_EXHAUSTED" not in str(error):
        raise error
    return str(error).partition("\n")[0].removeprefix("RESOURCE_EXHAUSTED: ")


# The plan


def plan(request: Request) -> dict[str, Any]:
    """What `--json` prints. Compiles only where weights and cache leave room.

    Figures that only a compiled program has are None without one.
    """
    arrays = make_arrays(request)
    sizes, room = arrays.mesh.shape, request.chips.chip.memory
    resting = {"weights": arrays.weights_bytes, "cache": arrays.cache_bytes}
    compiled = {}
    memory, reason = account(room, resting, "weights and cache alone take")
    if reason is None:
        compiled, reason = compile_all(request, arrays)
    if compiled:
        memory, reason = account(room, resting, "the programs take", compiled.values())
    least = functools.partial(arrays.least_bytes, request.config, request.batch)
    prompts = request.batch * request.prompt_tokens
    return {
        "fits": reason is None,
        "reason": reason,
        "model": request.model,
        "chips": request.chips.name,
        "mesh": f"data={sizes['data']},tensor={sizes['tensor'] * sizes['query']}",
        **quantization_fields(request.quantization),
        "dtype": request.dtype,
        "kv_cache": "int8" if request.int8_cache else request.dtype,
        "batch": request.batch,
        "context": request.context,
        "prompt_tokens": request.prompt_tokens,
        "memory": memory,
        "prefill": _figures(
            request, compiled.get("prefill"), least(request.prompt_tokens, read=False), prompts
        ),
        "decode": _figures(
            request, compiled.get("decode"), least(1, read=True), request.batch, steps=True
        ),
    }


def quantization_fields(quantization: Quantization | None) -> dict[str, Any]:
    """As they stand in a plan."""
    return {
        "quantize": quantization.kind if quantization else "none",
        "quantize_embeddings": bool(quantization and quantization.embeddings),
        "group_size": quantization and quantization.group_size,
        "double_quantization": bool(quantization and quantization.double_quantization),
    }


def account(
    room: int, resting: Mapping[str, int], what: str, programs: Iterable[Compiled] = ()
) -> tuple[dict[str, int], str | None]:
    """(bytes of a chip by kind of memory, why they do not fit or None).

    With the program that takes most on top of what rests there; the reason begins with `what`.
    """
    rests = sum(resting.values())
    worst = max(programs, key=lambda program: program.total_bytes, default=None)
    total, temporaries = (worst.total_bytes, worst.temp_bytes) if worst else (rests, 0)
    reason = f"{what} {format_bytes(total)} a chip of {format_bytes(room)}"
    others = {"temporaries": temporaries, "other": total - rests - temporaries}
    memory = {**resting, **others, "total": total, "chip": room}
    return memory, reason if total > room else None


def _figures(
    request: Request, program: Compiled | None, least: int, tokens: int, *, steps: bool = False
) -> dict[str, Any]:
    """What is told of a program that makes or reads so many tokens, all chips together.

    `hbm_bytes` of `decode` are those of a call of one step; of them `step_hbm_bytes` recur with
    each of its `steps`, the others once a call. The rate is that of long calls.
    """
    chip = request.chips.chip
    told = program_figures(program, chip) | {"least_bytes": least}
    told |= dict.fromkeys(("step_hbm_bytes", "roofline_tokens_per_s"))
    if program is None:
        return told
    moved = program.cost.hbm_bytes
    if steps:  # those in the loop over steps, or all if there is none
        moved = told["step_hbm_bytes"] = program.cost.open_loop_bytes or moved
    kind = request.quantization and request.quantization.kind
    seconds = max(moved / chip.bandwidth, program.cost.flops / peak_flops(chip, kind))
    return told | {"roofline_tokens_per_s": tokens / seconds}


def program_figures(program: Compiled | None, chip: Chip) -> dict[str, Any]:
    """`FIGURES` of a program; None each without one, and where the compiler estimates nothing."""
    if program is None:
        return dict.fromkeys(FIGURES)
    fields = dataclasses.asdict(program)
    fields |= fields["cost"]
    told = {name: fields[name] for name in FIGURES}
    return told if chip.clock else told | {"estimated_cycles": None}


def peak_flops(chip: Chip, kind: str | None) -> float:
    """Operations a second with weights of this kind; two kinds multiply int8 by int8."""
    return chip.int8_flops if kind in ("w8a8", "llm_int8") else chip.bf16_flops


def find(
    chips: str | None, plan_for: Callable[[Slice], dict[str, Any]], prog: str
) -> dict[str, Any]:
    """The plan of the smallest slice, by memory, that fits; of the largest if none does.

    Of all chips or of those of the kind `chips`. Slices for which `plan_for` raises `UserError`,
    over which the model or the batch cannot be split, are passed over; it is raised if those are
    all.
    """
    if chips is not None and chips not in CHIPS:
        raise UserError(
            f"--find searches all chips or those of a kind, but --chips is {chips}; "
            f"expected one of {', '.join(CHIPS)}"
        )
    kinds = [CHIPS[chips]] if chips else list(CHIPS.values())
    if any(map(topology.installed, kinds)):
        kinds = [chip for chip in kinds if topology.installed(chip)]
    parts = [part for part in SLICES.values() if part.chip in kinds]
    result, problem = None, None
    for part in sorted(parts, key=lambda part: part.count * part.chip.memory):
        try:
            result = plan_for(part)
        except UserError as error:
            problem = error
            continue
        if result["fits"]:
            break
        report(f"{prog}: {part.name} is too small: {result['reason']}")
    if result is None:
        raise problem or UserError("no slice is known")
    return result


# The command


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; exits with status 2 and one line on a mistake."""
    parser = ArgumentParser(
        prog=PROG,
        description="Say whether a model fits on some chips, and how fast it can at best be there.",
    )
    add = parser.add_argument
    add_case(parser)
    add("--mesh", **dict(FLAGS["--mesh"], help="data=2,tensor=8 (tensor takes all chips)"))
    parser.add_shared("--kv-cache")
    add("--dtype", **dict(FLAGS["--dtype"], default="bfloat16", help="(bfloat16)"))
    add("--batch", type=int, default=1, metavar="N", help="rows (1)")
    add("--context", type=int, metavar="N", help="tokens of a row, prompt included (the model's)")
    add("--prompt-tokens", type=int, metavar="N", help=f"of a row (up to {PROMPT})")
    args = parser.parse_args(arguments)
    check_case(parser, args)
    parser.refuse_below(args, batch=1, prompt_tokens=1)
    return args


def add_case(parser: ArgumentParser) -> None:
    """Adds the flags of a planner that say which model and which chips."""
    add = parser.add_argument
    add("--preset", metavar="NAME", help="a released model, llama-3.1-70b")
    add("--checkpoint", metavar="DIR", help="a model directory, of which only the config is read")
    add("--chips", metavar="NAME", help="a slice, v5e-16 or h100-8; without it all are listed")
    add(
        "--find", action="store_true", help="the smallest slice that fits, of all or of --chips v5e"
    )
    add("--quantize", choices=("none", *KINDS), default="none", help="weights (none)")
    parser.add_shared(*QUANTIZATION_FLAGS)
    add("--json", action="store_true", help="one JSON object instead of text")


def check_case(parser: ArgumentParser, args: argparse.Namespace) -> None:
    """Exits where those flags do not go together."""
    if args.chips is None and not args.find:
        if args.preset or args.checkpoint:
            parser.error("no chips given; add --chips NAME, or --find for the smallest that fit")
        return
    if (args.preset is None) == (args.checkpoint is None):
        given = "both" if args.preset else "neither"
        parser.error(f"{given} of --preset and --checkpoint given, expected one of them")
    parser.refuse_below(args, group_size=2)
    for flag in QUANTIZATION_FLAGS:
        if args.quantize == "none" and getattr(args, flag.strip("-").replace("-", "_")):
            parser.error(f"{flag} is for --quantize; add a kind")


def make_request(args: argparse.Namespace, config: LlamaConfig, chips: Slice) -> Request:
    """Raises `UserError` where the model has not so much context, or the prompt takes all."""
    context = config.context if args.context is None else args.context
    if not 2 <= context <= config.context:
        raise UserError(f"--context is {context}, expected from 2 to {config.context}, the model's")
    prompt = min(PROMPT, context // 2) if args.prompt_tokens is None else args.prompt_tokens
    if prompt >= context:
        raise UserError(
            f"--prompt-tokens {prompt} leaves no room in a context of {context}; give less than that"
        )
    if args.batch > MOST_ROWS:
        raise UserError(f"--batch is {args.batch}, expected at most {MOST_ROWS}")
    return Request(
        model=args.preset or args.checkpoint,
        config=config,
        chips=chips,
        mesh=default_mesh(config, chips, args.batch) if args.mesh is None else args.mesh,
        quantization=make_quantization(args),
        dtype=args.dtype,
        int8_cache=args.kv_cache == "int8",
        batch=args.batch,
        context=context,
        prompt_tokens=prompt,
    )


def make_quantization(args: argparse.Namespace) -> Quantization | None:
    """As the flags say, or as the checkpoint is; raises `UserError` where it would be both."""
    if args.quantize == "none":
        return checkpoint.load_quantization(args.checkpoint)[0] if args.checkpoint else None
    if args.checkpoint:
        checkpoint.refuse_quantized(args.checkpoint)
    return Quantization(
        args.quantize, args.quantize_embeddings, args.group_size, args.double_quantization
    )


def describe(result: dict[str, Any]) -> str:
    """A plan for a person to read."""
    part = SLICES[result["chips"]]
    rows, prompt = result["batch"], result["prompt_tokens"]
    return "\n".join(
        [
            f"{result['model']}, {describe_weights(result)}{result['dtype']}, "
            f"cache {result['kv_cache']}, "
            f"batch {rows}, context {result['context']}, "
            f"on {part.name}: {plural(part.count, 'chip')}, {result['mesh']}",
            *describe_memory(result, ("weights", "cache", "temporaries", "other")),
            f"decode, a step of {plural(rows, 'token')}",
            *_describe(result["decode"], part.chip, result["quantize"]),
            f"prefill of {plural(rows, 'prompt')} of {plural(prompt, 'token')}",
            *_describe(result["prefill"], part.chip, result["quantize"]),
        ]
    )


def describe_weights(result: dict[str, Any]) -> str:
    """How they are quantized, with a comma behind; nothing where they are not."""
    if result["quantize"] == "none":
        return ""
    covered = "weights and embeddings" if result["quantize_embeddings"] else "weights"
    groups = f" in groups of {result['group_size']}" if result["group_size"] else ""
    twice = " with int8 scales" if result["double_quantization"] else ""
    return f"{result['quantize']} {covered}{groups}{twice}, "


def describe_memory(result: dict[str, Any], kinds: Iterable[str]) -> list[str]:
    """Whether it fits, and a line for each kind of memory."""
    memory = result["memory"]
    verdict = f"does not fit: {result['reason']}"
    if result["fits"]:
        verdict = f"fits: {format_bytes(memory['total'])} of {format_bytes(memory['chip'])} a chip"
    return [
        verdict,
        *(f"  {kind:<12}{format_bytes(memory[kind]):>10}" for kind in kinds if memory[kind]),
    ]


def _describe(program: dict[str, Any], chip: Chip, kind: str) -> list[str]:
    least, whole = program["least_bytes"], program["hbm_bytes"]
    if whole is None:
        return [f"  would move at least {format_bytes(least)} a chip to and from memory"]
    moved = program["step_hbm_bytes"] or whole
    beside = f"{moved / least:.2f} of the least ({format_bytes(least)})"
    if moved < 0.995 * least:
        beside = f"of {format_bytes(least)} that it needs: the rest stays on the chip"
    once = f"; {format_bytes(whole - moved)} once a call" if whole > 1.001 * moved else ""
    return [
        f"  {format_bytes(moved)} a chip to and from memory, {beside}{once}",
        f"  at best {program['roofline_tokens_per_s']:,.0f} tokens/s, by "
        f"{chip.bandwidth / 1e9:,.0f} GB/s and {peak_flops(chip, kind) / 1e12:,.0f} TFLOP/s",
        describe_collectives(program["collectives"]),
        *describe_estimate(program, chip),
    ]


def describe_collectives(works: Mapping[str, dict[str, int]]) -> str:
    """A line with how many there are, and the bytes they exchange."""
    exchanged = f"; {format_bytes(sum(work['bytes'] for work in works.values()))}" if works else ""
    return f"  collectives: {counts(works.items())}{exchanged}"


def describe_estimate(program: dict[str, Any], chip: Chip) -> list[str]:
    """A line with the compiler's estimate, where it makes one."""
    if not chip.clock:
        return []
    cycles = program["estimated_cycles"]
    others = sorted(program["unestimated"].items(), key=lambda work: -work[1]["bytes"])
    return [
        f"  the compiler's estimate: {cycles / chip.clock * 1e3:.2f} ms ({cycles:,} cycles), "
        f"which leaves out {counts(others[:3])}"
    ]


def counts(works: Iterable[tuple[str, dict[str, int]]]) -> str:
    """2 all-reduce, 1 all-gather"""
    return ", ".join(f"{work['count']} {kind}" for kind, work in works) or "none"


def plural(count: int, noun: str) -> str:
    """1 chip, 8 chips"""
    return f"{count} {noun}{'s' * (count != 1)}"


def list_chips(as_json: bool) -> str:
    """All chips with what they have, and the names of their slices."""
    names = {name: [s.name for s in SLICES.values() if s.chip == CHIPS[name]] for name in CHIPS}
    if as_json:
        return json.dumps(
            {"chips": {n: dataclasses.asdict(c) | {"slices": names[n]} for n, c in CHIPS.items()}}
        )
    lines = [f"{'chip':<10}{'memory':>11}{'bandwidth':>12}{'bf16':>14}{'int8':>14}  slices"]
    lines += [
        f"{chip.name:<10}{format_bytes(chip.memory):>11}{chip.bandwidth / 1e9:>7,.0f} GB/s"
        f"{chip.bf16_flops / 1e12:>6,.0f} TFLOP/s{chip.int8_flops / 1e12:>8,.0f} TOP/s"
        f"  {', '.join(names[chip.name])}"
        for chip in CHIPS.values()
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; raises `UserError` for what the user can mend."""
    args = parse(arguments)
    answer(args, lambda config, part: plan(make_request(args, config, part)), describe, PROG)


def answer(
    args: argparse.Namespace,
    plan_for: Callable[[LlamaConfig, Slice], dict[str, Any]],
    describe: Callable[[dict[str, Any]], str],
    prog: str,
) -> None:
    """Prints the plan for the flags of `add_case`, or the chips where none is given."""
    if args.chips is None and not args.find:
        print(list_chips(args.json))
        return
    jax.config.update("jax_platforms", "cpu")  # accelerators that are here are not needed
    config = get_preset(args.preset) if args.preset else checkpoint.load_config(args.checkpoint)
    if args.find:
        result = find(args.chips, functools.partial(plan_for, config), prog)
    else:
        result = plan_for(config, topology.find_slice(str(args.chips)))
    print(json.dumps(result) if args.json else describe(result))


if __name__ == "__main__":
    run(main, PROG)

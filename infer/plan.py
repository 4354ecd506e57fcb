"""python -m infer.plan: does a model fit on some chips, and how fast can it at best be there.

The real prefill and decode programs are compiled for the chips by their own compiler, without the
chips and without weights, and counted (`infer.hlo`). Byte figures are those of one device. Two
limits are told: what the memory allows for the bytes that the program moves, and the least that
any program would have to move. What a step takes beyond the first, collectives among it, is not
predicted.
"""

import argparse
import dataclasses
import functools
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from infer import hlo, topology
from infer.generate import Shapes, lower_programs, request_shapes
from infer.topology import CHIPS, SLICES, Slice
from llama_jax import cache as kv
from llama_jax import checkpoint, sharding
from llama_jax.command import ArgumentParser, run
from llama_jax.config import LlamaConfig, get_preset
from llama_jax.errors import UserError
from llama_jax.quant import KINDS, Quantization

PROG = "infer.plan"
PROMPT = 512  # tokens, where nothing is said
MOST_ROWS = 1 << 20


@dataclass(frozen=True)
class Request:
    """What is planned: everything that decides about the programs."""

    model: str
    config: LlamaConfig
    chips: Slice
    mesh: str
    quantize: str
    quantize_embeddings: bool
    dtype: str
    int8_cache: bool
    batch: int
    context: int
    prompt_tokens: int

    @property
    def shapes(self) -> Shapes:
        """The buckets in which generation puts such prompts."""
        prompts = [[0] * self.prompt_tokens] * self.batch
        shapes = request_shapes(self.config, prompts, self.context - self.prompt_tokens)
        return shapes._replace(int8_cache=self.int8_cache)

    def asked(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "chips": self.chips.name,
            "mesh": self.mesh,
            "quantize": self.quantize,
            "quantize_embeddings": self.quantize_embeddings,
            "dtype": self.dtype,
            "kv_cache": "int8" if self.int8_cache else self.dtype,
            "batch": self.batch,
            "context": self.context,
            "prompt_tokens": self.prompt_tokens,
        }


@dataclass(frozen=True)
class Arrays:
    """What lies in memory between two steps: abstract, with the shardings of the chips' devices."""

    params: Any
    cache: Any

    @functools.cached_property
    def weights_bytes(self) -> int:
        return _device_bytes(self.params)

    @functools.cached_property
    def cache_bytes(self) -> int:
        return _device_bytes(self.cache)

    def least_bytes(self, config: LlamaConfig, rows: int, positions: int, read: bool) -> int:
        """The least that a device moves to and from memory for `positions` new ones in each row.

        Every weight is read once, of an embedding that is not the head as well only the rows of
        the tokens. New entries are written to the cache; if `read`, all of it is read first.
        """
        weights = self.weights_bytes
        if not config.tie_embeddings:
            table = _device_bytes(self.params["embed"])
            weights -= table - min(table, math.ceil(table * rows * positions / config.vocab_size))
        capacity = jax.tree.leaves(self.cache)[0].shape[2]
        written = math.ceil(self.cache_bytes * positions / capacity)
        return weights + written + (self.cache_bytes if read else 0)


def make_arrays(request: Request) -> Arrays:
    """Raises `UserError` for a mesh that does not match the chips, the model or the batch."""
    config, shapes = request.config, request.shapes
    mesh = sharding.make_mesh(request.mesh, config, topology.devices(request.chips))
    if mesh.size != request.chips.count:
        raise UserError(
            f"--mesh {request.mesh} takes {mesh.size} chips, but {request.chips.name} has "
            f"{request.chips.count}; the sizes multiplied must give the number of chips"
        )
    if request.batch % mesh.shape["data"]:
        raise UserError(
            f"--batch {request.batch} cannot be split over data={mesh.shape['data']} evenly; "
            "give a multiple of it"
        )
    quantization = None
    if request.quantize != "none":
        quantization = Quantization(request.quantize, embeddings=request.quantize_embeddings)
    params = checkpoint.abstract(config, quantization, jnp.dtype(request.dtype))
    params = jax.tree.map(_placed, params, sharding.shardings(params, mesh))
    layers = jax.eval_shape(
        lambda: kv.init_cache(
            config, shapes.batch, shapes.room, jnp.dtype(request.dtype), int8=request.int8_cache
        )
    ).layers
    places = jax.tree.map(lambda x: sharding.named(x.shape, kv.LOGICAL_AXES, mesh), layers)
    return Arrays(params, jax.tree.map(_placed, layers, places))


def _placed(x: jax.ShapeDtypeStruct, place: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)


def _device_bytes(tree: Any) -> int:
    """Bytes of the part of each array that one device holds."""

    def size(x: Any) -> int:
        bits = 4 if x.dtype in (jnp.int4, jnp.uint4) else 8 * x.dtype.itemsize
        return math.ceil(math.prod(x.sharding.shard_shape(x.shape)) * bits / 8)

    return sum(map(size, jax.tree.leaves(tree)))


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

    cost: hlo.Cost
    argument_bytes: int
    temp_bytes: int
    total_bytes: int  # arguments, results that are not among them, temporaries, code
    compile_s: float

    def then(self, other: "Compiled", times: int) -> "Compiled":
        """This one, and the other so many times behind it."""
        return Compiled(
            cost=hlo.Cost.sum((self.cost, other.cost.times(times))),
            argument_bytes=max(self.argument_bytes, other.argument_bytes),
            temp_bytes=max(self.temp_bytes, other.temp_bytes),
            total_bytes=max(self.total_bytes, other.total_bytes),
            compile_s=self.compile_s + other.compile_s,
        )


def compile_all(request: Request, arrays: Arrays) -> dict[str, Compiled] | str:
    """`prefill` of the whole prompt and one step of `decode`, or why there is no room for them."""
    programs = {}
    with os.fdopen(os.dup(2), "w", buffering=1) as stderr, topology.quiet():
        lowered = lower_programs(request.config, arrays.params, request.shapes)
        with ThreadPoolExecutor() as pool:  # XLA compiles without the interpreter lock
            names = {pool.submit(_compile, program): name for name, program in lowered.items()}
            try:
                for task in as_completed(names):
                    programs[names[task]] = task.result()
                    seconds = task.result().compile_s
                    print(f"{names[task]} compiled in {seconds:.1f} s", file=stderr)
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                return str(error).partition("\n")[0].removeprefix("RESOURCE_EXHAUSTED: ")
    prefill = programs["start"]
    if "extend" in programs:
        chunks = math.ceil(request.prompt_tokens / request.shapes.chunk)
        prefill = prefill.then(programs["extend"], chunks - 1)
    return {"prefill": prefill, "decode": programs["decode"]}


def _compile(lowered: Any) -> Compiled:
    began = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - began
    memory = compiled.memory_analysis()
    return Compiled(
        cost=hlo.analyze(compiled.as_text()),
        argument_bytes=memory.argument_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        total_bytes=memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes,
        compile_s=seconds,
    )


# The plan


def plan(request: Request) -> dict[str, Any]:
    """What `--json` prints. Compiles only where weights and cache leave room.

    Figures that only a compiled program has are None without one.
    """
    arrays = make_arrays(request)
    chip = request.chips.chip
    resting = arrays.weights_bytes + arrays.cache_bytes
    programs: dict[str, Compiled] | str
    if resting > chip.memory:
        programs = f"weights and cache alone take {_size(resting)} a chip of {_size(chip.memory)}"
    else:
        _report(f"compiling for {request.chips.name}")
        programs = compile_all(request, arrays)
    compiled = programs if isinstance(programs, dict) else {}
    worst = max(compiled.values(), key=lambda program: program.total_bytes, default=None)
    total = worst.total_bytes if worst else resting
    if total > chip.memory and worst:
        programs = f"the programs take {_size(total)} a chip of {_size(chip.memory)}"
    least = functools.partial(arrays.least_bytes, request.config, request.batch)
    return {
        "fits": not isinstance(programs, str),
        "reason": programs if isinstance(programs, str) else None,
        **request.asked(),
        "memory": {
            "weights": arrays.weights_bytes,
            "cache": arrays.cache_bytes,
            "temporaries": worst.temp_bytes if worst else 0,
            "other": total - resting - worst.temp_bytes if worst else 0,
            "total": total,
            "chip": chip.memory,
        },
        "prefill": _program(
            request,
            compiled.get("prefill"),
            least(request.prompt_tokens, read=False),
            request.batch * request.prompt_tokens,
        ),
        "decode": _program(
            request, compiled.get("decode"), least(1, read=True), request.batch, steps=True
        ),
    }


def _program(
    request: Request, program: Compiled | None, least: int, tokens: int, *, steps: bool = False
) -> dict[str, Any]:
    """What is told of a program that makes or reads so many tokens, all chips together.

    `hbm_bytes` of `decode` are those of a call of one step; of them `step_hbm_bytes` recur with
    each of its `steps`, the others once a call. The rate is that of long calls.
    """
    chip = request.chips.chip
    cost = program.cost if program else None
    flops = chip.int8_flops if request.quantize == "w8a8" else chip.bf16_flops
    seconds = None
    if cost:
        moved = _recurring(cost) if steps else cost.hbm_bytes
        seconds = max(moved / chip.bandwidth, cost.flops / flops)

    def by_kind(works: Any) -> dict[str, Any] | None:
        return works and {kind: dataclasses.asdict(work) for kind, work in works.items()}

    return {
        "hbm_bytes": cost and cost.hbm_bytes,
        "step_hbm_bytes": _recurring(cost) if cost and steps else None,
        "padded_hbm_bytes": cost and cost.padded_hbm_bytes,
        "least_bytes": least,
        "argument_bytes": program and program.argument_bytes,
        "temp_bytes": program and program.temp_bytes,
        "flops": cost and cost.flops,
        "estimated_cycles": cost and cost.estimated_cycles if chip.clock else None,
        "unestimated": by_kind(cost.unestimated) if cost else None,
        "collectives": by_kind(cost.collectives) if cost else None,
        "roofline_tokens_per_s": seconds and tokens / seconds,
        "compile_s": program and program.compile_s,
    }


def _recurring(cost: hlo.Cost) -> int:
    """Bytes in the loop over steps, or all of them if there is none."""
    return cost.open_loop_bytes or cost.hbm_bytes


def find(args: argparse.Namespace, config: LlamaConfig) -> dict[str, Any]:
    """The plan of the smallest slice, by memory, that fits; of the largest if none does.

    Slices over which the model or the batch cannot be split are passed over. Raises `UserError`
    if that is all of them.
    """
    if args.chips is not None and args.chips not in CHIPS:
        raise UserError(
            f"--find searches all chips or those of a kind, but --chips is {args.chips}; "
            f"expected one of {', '.join(CHIPS)}"
        )
    kinds = [CHIPS[args.chips]] if args.chips else list(CHIPS.values())
    if any(map(topology.installed, kinds)):
        kinds = [chip for chip in kinds if topology.installed(chip)]
    parts = [part for part in SLICES.values() if part.chip in kinds]
    result, problem = None, None
    for part in sorted(parts, key=lambda part: part.count * part.chip.memory):
        try:
            result = plan(make_request(args, config, part))
        except UserError as error:
            problem = error
            continue
        if result["fits"]:
            break
        _report(f"{part.name} is too small: {result['reason']}")
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
    add("--preset", metavar="NAME", help="a released model, llama-3.1-70b")
    add("--checkpoint", metavar="DIR", help="a model directory, of which only the config is read")
    add("--chips", metavar="NAME", help="a slice, v5e-16 or h100-8; without it all are listed")
    add(
        "--find", action="store_true", help="the smallest slice that fits, of all or of --chips v5e"
    )
    add("--mesh", metavar="SIZES", help="data=2,tensor=8 (tensor takes all chips)")
    add("--quantize", choices=("none", *KINDS), default="none", help="weights (none)")
    add("--quantize-embeddings", action="store_true", help="the embedding and the head as well")
    add("--kv-cache", choices=("int8",), help="keep keys and values as int8 (as --dtype)")
    add(
        "--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="(bfloat16)"
    )
    add("--batch", type=int, default=1, metavar="N", help="rows (1)")
    add("--context", type=int, metavar="N", help="tokens of a row, prompt included (the model's)")
    add("--prompt-tokens", type=int, metavar="N", help=f"of a row (up to {PROMPT})")
    add("--json", action="store_true", help="one JSON object instead of text")
    args = parser.parse_args(arguments)
    if args.chips is None and not args.find:
        if args.preset or args.checkpoint:
            parser.error("no chips given; add --chips NAME, or --find for the smallest that fit")
        return args
    if (args.preset is None) == (args.checkpoint is None):
        given = "both" if args.preset else "neither"
        parser.error(f"{given} of --preset and --checkpoint given, expected one of them")
    if args.quantize_embeddings and args.quantize == "none":
        parser.error("--quantize-embeddings is for --quantize; add a kind")
    for name in ("batch", "prompt_tokens"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            flag = "--" + name.replace("_", "-")
            parser.error(f"{flag} is {getattr(args, name)}, expected at least 1")
    return args


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
    kind, embeddings = args.quantize, args.quantize_embeddings
    if args.checkpoint and (stored := checkpoint.load_quantization(args.checkpoint)[0]):
        if kind != "none":
            raise UserError(
                f"{args.checkpoint} is quantized to {stored.kind} already; leave --quantize out, or "
                "plan for the model that it was made of"
            )
        kind, embeddings = stored.kind, stored.embeddings
    return Request(
        model=args.preset or args.checkpoint,
        config=config,
        chips=chips,
        mesh=args.mesh or default_mesh(config, chips, args.batch),
        quantize=kind,
        quantize_embeddings=embeddings,
        dtype=args.dtype,
        int8_cache=args.kv_cache == "int8",
        batch=args.batch,
        context=context,
        prompt_tokens=prompt,
    )


def describe(result: dict[str, Any]) -> str:
    """A plan for a person to read."""
    chips = SLICES[result["chips"]]
    memory, decode, prefill = result["memory"], result["decode"], result["prefill"]
    covered = "weights and embeddings" if result["quantize_embeddings"] else "weights"
    weights = "" if result["quantize"] == "none" else f"{result['quantize']} {covered}, "
    verdict = f"fits: {_size(memory['total'])} of {_size(memory['chip'])} a chip"
    if not result["fits"]:
        verdict = f"does not fit: {result['reason']}"
    lines = [
        f"{result['model']}, {weights}{result['dtype']}, cache {result['kv_cache']}, "
        f"batch {result['batch']}, context {result['context']}, "
        f"on {chips.name}: {chips.count} chip{'s' * (chips.count > 1)}, {result['mesh']}",
        verdict,
    ]
    lines += [
        f"  {kind:<12}{_size(memory[kind]):>10}"
        for kind in ("weights", "cache", "temporaries", "other")
        if memory[kind]
    ]
    rows, prompt = result["batch"], result["prompt_tokens"]
    lines += [f"decode, a step of {rows} tokens", *_describe(decode, chips)]
    lines += [f"prefill, {rows} x {prompt} tokens", *_describe(prefill, chips)]
    return "\n".join(lines)


def _describe(program: dict[str, Any], chips: Slice) -> list[str]:
    chip, least = chips.chip, program["least_bytes"]
    if program["hbm_bytes"] is None:
        return [f"  would move at least {_size(least)} a chip to and from memory"]
    rate = f"  at best {program['roofline_tokens_per_s']:,.0f} tokens/s"
    moved = program["step_hbm_bytes"] or program["hbm_bytes"]
    once = program["hbm_bytes"] - moved
    works = program["collectives"]
    kinds = ", ".join(f"{work['count']} {kind}" for kind, work in works.items()) or "none"
    lines = [
        f"  {_size(moved)} a chip to and from memory, {moved / least:.2f} of the least "
        f"({_size(least)})" + (f", and {_size(once)} once a call" if once > moved / 1000 else ""),
        f"{rate}, by {chip.bandwidth / 1e9:,.0f} GB/s and {chip.bf16_flops / 1e12:,.0f} TFLOP/s",
        f"  collectives: {kinds}; {_size(sum(work['bytes'] for work in works.values()))}",
    ]
    if chip.clock:
        cycles = program["estimated_cycles"]
        works = sorted(program["unestimated"].items(), key=lambda work: -work[1]["bytes"])
        others = ", ".join(f"{work['count']} {kind}" for kind, work in works[:3]) or "nothing"
        lines.append(
            f"  the compiler's estimate: {cycles / chip.clock * 1e3:.2f} ms ({cycles:,} cycles), "
            f"which leaves out {others}"
        )
    return [*lines, f"  compiled in {program['compile_s']:.1f} s"]


def list_chips(as_json: bool) -> str:
    """All chips with what they have, and the names of their slices."""
    names = {name: [s.name for s in SLICES.values() if s.chip == CHIPS[name]] for name in CHIPS}
    if as_json:
        return json.dumps(
            {"chips": {n: dataclasses.asdict(c) | {"slices": names[n]} for n, c in CHIPS.items()}}
        )
    lines = [f"{'chip':<10}{'memory':>11}{'bandwidth':>12}{'bf16':>14}{'int8':>14}  slices"]
    lines += [
        f"{chip.name:<10}{_size(chip.memory):>11}{chip.bandwidth / 1e9:>7,.0f} GB/s"
        f"{chip.bf16_flops / 1e12:>6,.0f} TFLOP/s{chip.int8_flops / 1e12:>8,.0f} TOP/s"
        f"  {', '.join(names[chip.name])}"
        for chip in CHIPS.values()
    ]
    return "\n".join(lines)


def _size(count: float) -> str:
    """1.25 GB; decimal, as bandwidths are."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:,.2f} {unit}"
    return f"{count / 1e3:,.2f} kB"


def _report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; raises `UserError` for what the user can mend."""
    args = parse(arguments)
    if args.chips is None and not args.find:
        print(list_chips(args.json))
        return
    jax.config.update("jax_platforms", "cpu")  # accelerators that are here are not needed
    config = get_preset(args.preset) if args.preset else checkpoint.load_config(args.checkpoint)
    if args.find:
        result = find(args, config)
    else:
        result = plan(make_request(args, config, topology.find_slice(str(args.chips))))
    print(json.dumps(result) if args.json else describe(result))


if __name__ == "__main__":
    run(main, PROG)

"""python -m infer.bench: how fast a model reads prompts and writes text here, and in what memory.

Configurations (weights, cache, batch) are measured side by side: repeats go round over all of
them, so that a machine that drifts is fair to each. Programs are compiled before there are weights
and run once before they are timed. A Markdown table goes to standard output, with one JSON object
as the last line; progress to standard error.

  first token  from the request to the first token of every row: prefill
  ms/token     a decode step, which makes a token in every row; median and range over windows of
               some steps, of all repeats. A window is a call: what XLA computes once before its
               loop, such as weights in another form, weighs more in short ones
  GB/s         the least that a step has to read, over its time: every weight once, and the filled
               positions of the cache; all devices together
  of copy      the same relative to what these devices reach when they add 1 to a large array
  memory       what XLA lays out for the largest program, weights included; on each device
  peak         what was measured in the first run, less the other weights present: of a device
               since its start, or of the process with all that Python and XLA take; where there
               are several processes, of the first one

Without a cache every token reads the whole sequence again, by one program of a fixed shape: what
a cache saves in time and costs in memory.
"""

import argparse
import contextlib
import gc
import itertools
import json
import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import jax
import numpy as np

from infer import kinds, machine, plot
from infer.workload import (
    Case,
    Compiled,
    Driver,
    Run,
    Setup,
    abstract_weights,
    compile_case,
    make_weights,
    run_once,
    with_cache,
    without_cache,
)
from llama_jax import cache as kv
from llama_jax import checkpoint, sharding
from llama_jax.checkpoint import format_bytes
from llama_jax.command import (
    ArgumentParser,
    default_dtype,
    is_first_process,
    join_processes,
    report,
    run,
)
from llama_jax.config import get_preset
from llama_jax.errors import UserError
from llama_jax.model import Params
from llama_jax.sharding import device_bytes

PROG = "infer.bench"


@dataclass(frozen=True)
class Prepared:
    """A configuration that ran once."""

    case: Case
    driver: Driver
    costs: dict[str, Any]  # what `Row` says of time to compile and of memory
    runs: list[Run] = field(default_factory=list)


@dataclass(frozen=True)
class Row:
    """One line of the table. Times are seconds unless their name says ms; bytes are of a device."""

    quantize: str
    cache: bool
    batch: int
    compile_s: float
    ttft_s: float  # median
    ttft_s_min: float
    ttft_s_max: float
    prefill_tokens_per_s: float
    ms_per_token: float  # median
    ms_per_token_min: float
    ms_per_token_max: float
    tokens_per_s: float  # of all rows of the batch
    step_bytes: int  # that all devices have to read for a step
    gb_s: float
    copy_gb_s: float
    share_of_copy: float
    program_bytes: int
    peak_bytes: int
    peak_is_bound: bool  # a device had this peak before the first run already


def make_row(setup: Setup, prepared: Prepared, copy_gb_s: float) -> Row:
    """Medians of what was measured."""
    case, runs = prepared.case, prepared.runs
    firsts = [one.ttft_s for one in runs]
    ms = [1e3 * seconds for one in runs for seconds in one.step_s]
    ttft_s, ms_per_token = statistics.median(firsts), statistics.median(ms)
    gb_s = prepared.costs["step_bytes"] / ms_per_token / 1e6
    return Row(
        **asdict(case),
        **prepared.costs,
        ttft_s=ttft_s,
        ttft_s_min=min(firsts),
        ttft_s_max=max(firsts),
        prefill_tokens_per_s=case.batch * setup.prompt_tokens / ttft_s,
        ms_per_token=ms_per_token,
        ms_per_token_min=min(ms),
        ms_per_token_max=max(ms),
        tokens_per_s=1e3 * case.batch / ms_per_token,
        gb_s=gb_s,
        copy_gb_s=copy_gb_s,
        share_of_copy=gb_s / copy_gb_s,
    )


# Memory


def cache_bytes(setup: Setup, batch: int, dtype: Any) -> int:
    """Bytes of the cache that one device holds, of as many positions as there is room for."""
    shapes = setup.shapes(batch)
    layers = jax.eval_shape(
        lambda: kv.init_cache(setup.config, batch, shapes.room, dtype, int8=shapes.int8_cache)
    ).layers
    if (mesh := setup.mesh) is None:
        places = setup.shardings(layers)
    else:
        places = jax.tree.map(lambda x: sharding.named(x.shape, kv.LOGICAL_AXES, mesh), layers)
    return device_bytes(sharding.placed(layers, places))


def step_bytes(setup: Setup, params: Params, case: Case) -> int:
    """The least that a decode step reads on all devices together.

    Of an embedding that is not the head as well that is only the rows of the tokens; of the cache
    the positions filled, on average over the steps.
    """
    read = device_bytes(params)
    if not setup.config.tie_embeddings:
        table = device_bytes(params["embed"])
        read -= table - min(table, math.ceil(table * case.batch / setup.config.vocab_size))
    if case.cache:
        whole = cache_bytes(setup, case.batch, params["embed"]["embedding"].dtype)
        filled = setup.prompt_tokens + (setup.new_tokens - 1) / 2
        read += round(whole * filled / setup.shapes(case.batch).room)
    return read * len(setup.devices)


def refuse_small_memory(
    setup: Setup, cases: Sequence[Case], compiled: Mapping[Case, Compiled]
) -> None:
    """Raises `UserError` unless there is room for all weights and the largest need beside them.

    That is of a program, as far as they are compiled, or of the largest leaf in float32, which is
    there while it is made.
    """
    weights = {
        kind: device_bytes(abstract_weights(setup, kind))
        for kind in dict.fromkeys(case.quantize for case in cases)
    }
    plain = checkpoint.abstract(setup.config, None, np.float32)
    plain = sharding.placed(plain, setup.shardings(plain))
    leaf = max(map(device_bytes, jax.tree.leaves(plain)))
    programs = (compiled[case].bytes - weights[case.quantize] for case in cases if case in compiled)
    needed = sum(weights.values()) + max(leaf, machine.copy_bytes(setup.devices), *programs)
    checkpoint.refuse_small_memory(dict.fromkeys(setup.own_devices, needed), setup.model)


# Measuring


def bench(setup: Setup, cases: Sequence[Case], repeats: int) -> dict[str, Any]:
    """Measures all cases; what the last line of the output says.

    Side by side where all kinds of weights fit beside each other, otherwise a kind after the
    other. Raises `UserError` where a single one has no room.
    """
    by_kind = [list(group) for _, group in itertools.groupby(cases, lambda case: case.quantize)]
    for group in by_kind:
        refuse_small_memory(setup, group, {})
    compiled = {}
    for case in cases:
        with full_memory_is_user_error():
            compiled[case] = compile_case(setup, case)
        report(f"{PROG}: {case}: compiled in {compiled[case].seconds:.1f} s")
    rows, reason = [], ""
    try:
        rows = measure(setup, cases, compiled, repeats)
    except UserError as error:  # of one process alone, which others would not know
        if len(by_kind) == 1 or jax.process_count() > 1:
            raise
        reason = str(error)
    if reason:  # behind the exception, which holds on to the weights
        report(f"{PROG}: one kind of weights is measured after the other, for together {reason}")
        for group in by_kind:
            gc.collect()
            rows += measure(setup, group, compiled, repeats)
    return {
        "model": setup.model,
        "device": machine.device_name(setup.devices[0]),
        "devices": len(setup.devices),
        "mesh": None if setup.mesh is None else dict(setup.mesh.shape),
        "jax": jax.__version__,
        "dtype": setup.dtype or "as stored",
        "kv_cache": "int8" if setup.int8_cache else "as dtype",
        "prompt_tokens": setup.prompt_tokens,
        "new_tokens": setup.new_tokens,
        "repeats": repeats,
        "interleaved": not reason,
        "peak_source": machine.peak_source(setup.own_devices),
        "rows": [asdict(row) for row in rows],
    }


@contextlib.contextmanager
def full_memory_is_user_error() -> Iterator[None]:
    """What no check before could know: temporaries of other programs, or other processes."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = str(error).partition("\n")[0].removeprefix("RESOURCE_EXHAUSTED: ")
        raise UserError(
            f"no memory is left on the devices ({reason}); make it smaller with --batch, "
            "--quantize or --dtype, or split it over more devices with --mesh"
        ) from None


@full_memory_is_user_error()
def measure(
    setup: Setup, cases: Sequence[Case], compiled: Mapping[Case, Compiled], repeats: int
) -> list[Row]:
    """The rows of some kinds of weights, all of which are here at once."""
    refuse_small_memory(setup, cases, compiled)
    prepared: dict[Case, Prepared] = {}
    others = 0
    for kind, group in itertools.groupby(cases, lambda case: case.quantize):
        began = time.perf_counter()
        params = make_weights(setup, kind)
        size, seconds = device_bytes(params), time.perf_counter() - began
        report(f"{PROG}: {kind}: {format_bytes(size)} of weights a device in {seconds:.1f} s")
        # Small programs first, because a device tells only the largest peak so far.
        for case in sorted(group, key=lambda case: compiled[case].bytes):
            prepared[case] = prepare(setup, params, others, case, compiled[case])
        others += size
    copy = 0.0
    for i in range(1, repeats + 1):
        copy = max(copy, machine.copy_gb_s(setup.devices))
        for case in cases:
            prepared[case].runs.append(run_once(prepared[case].driver, setup.new_tokens))
        report(f"{PROG}: repeat {i} of {repeats}")
    return [make_row(setup, prepared[case], copy) for case in cases]


def prepare(setup: Setup, params: Params, others: int, case: Case, compiled: Compiled) -> Prepared:
    """Runs a case once. `others` is how many bytes of other weights a device holds."""
    make = with_cache if case.cache else without_cache
    driver = make(setup, compiled.programs, params, case.batch)
    devices = setup.own_devices
    of_device = machine.peak_source(devices) == "device"
    forgotten = machine.forget_peak() and not of_device
    before = machine.peak_bytes(devices)
    run_once(driver, setup.new_tokens)
    peak = machine.peak_bytes(devices)
    costs = {
        "compile_s": compiled.seconds,
        "program_bytes": compiled.bytes,
        "step_bytes": step_bytes(setup, params, case),
        "peak_bytes": peak - (others if of_device else others * len(devices)),
        "peak_is_bound": peak == before and not forgotten,
    }
    return Prepared(case, driver, costs)


# What is shown


def table(result: dict[str, Any]) -> str:
    """The rows in Markdown."""
    lines = [
        "| weights | cache | batch | first token ms | ms/token (range) | tokens/s | GB/s | of copy "
        f"| memory | peak ({result['peak_source']}) | compile s |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {row['quantize']} | {'on' if row['cache'] else 'off'} | {row['batch']} "
        f"| {1e3 * row['ttft_s']:.2f} | {row['ms_per_token']:.3f} "
        f"({row['ms_per_token_min']:.3f} to {row['ms_per_token_max']:.3f}) "
        f"| {row['tokens_per_s']:.1f} | {row['gb_s']:.2f} | {row['share_of_copy']:.1%} "
        f"| {format_bytes(row['program_bytes'])} "
        f"| {'at most ' * row['peak_is_bound']}{format_bytes(row['peak_bytes'])} "
        f"| {row['compile_s']:.1f} |"
        for row in result["rows"]
    ]
    return "\n".join(lines)


def headline(result: dict[str, Any]) -> str:
    """What was measured, on what."""
    count, device = result["devices"], result["device"]
    sizes = ",".join(f"{name}={n}" for name, n in (result["mesh"] or {}).items() if n > 1)
    where = f"{count} devices ({sizes}) of {device}" if count > 1 else device
    int8 = ", int8 cache" if result["kv_cache"] == "int8" else ""
    return (
        f"{result['model']}, {result['dtype']}{int8}, {result['prompt_tokens']} + "
        f"{result['new_tokens']} tokens, on {where}, jax {result['jax']}"
    )


# The command


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; exits with status 2 and one line on a mistake."""
    parser = ArgumentParser(prog=PROG, description="Measure prefill and decode of a model here.")
    add = parser.add_argument
    add("--checkpoint", metavar="DIR", help="model directory that a converter wrote")
    add("--preset", metavar="NAME", help="a released model, random bfloat16 weights")
    kinds.add_flags(parser, default="none", help=f"some of {','.join(kinds.NAMES)} (none)")
    add("--cache", default="on", metavar="on,off", help="with a cache, or without, or both (on)")
    add("--batch", metavar="NUMBERS", help="rows, as 1,8 (1; with --cache on,off 1,8,16)")
    add("--prompt-tokens", type=int, default=64, metavar="N", help="of each row (64)")
    add("--new-tokens", type=int, default=128, metavar="N", help="of each row (128)")
    parser.add_shared("--kv-cache", "--dtype", "--mesh")
    add("--repeats", type=int, default=3, metavar="N", help="timed runs of each (3)")
    add("--plot", metavar="FILE.png", help="tokens/s and memory as a picture")
    args = parser.parse_args(arguments)
    if (args.preset is None) == (args.checkpoint is None):
        given = "both" if args.preset else "neither"
        parser.error(f"{given} of --preset and --checkpoint given, expected one of them")
    parser.refuse_below(args, prompt_tokens=1, new_tokens=2, repeats=1)
    if args.batch is None:
        args.batch = "1,8,16" if args.cache.count(",") else "1"
    kinds.check(parser, args)
    parser.split_list(args, "cache", ("on", "off").__contains__, "on, off or on,off")
    parser.split_list(args, "batch", _is_positive, "positive numbers such as 1,8")
    args.batch = [int(one) for one in args.batch]
    if args.kv_cache and "on" not in args.cache:
        parser.error("--kv-cache is of a cache; add --cache on")
    return args


def _is_positive(text: str) -> bool:
    return text.isascii() and text.isdigit() and int(text) > 0


def make_setup(args: argparse.Namespace) -> Setup:
    """Raises `UserError` for what the model, the devices or the memory do not allow."""
    stored = args.checkpoint is not None
    config = checkpoint.load_config(args.checkpoint) if stored else get_preset(args.preset)
    if args.prompt_tokens + args.new_tokens > config.context:
        raise UserError(
            f"--prompt-tokens {args.prompt_tokens} and --new-tokens {args.new_tokens} exceed the "
            f"model's context of {config.context}; give less"
        )
    mesh = None if args.mesh is None else sharding.make_mesh(args.mesh, config)
    for batch in args.batch:
        if mesh is not None and batch % mesh.shape["data"]:
            raise UserError(
                f"--batch {batch} cannot be split over data={mesh.shape['data']} evenly; give a "
                "multiple of it"
            )
    quantizations = kinds.quantizations(args)
    if stored and (how := checkpoint.load_quantization(args.checkpoint)[0]):
        if args.quantize != ["none"]:
            raise UserError(
                f"{args.checkpoint} is quantized to {how.kind} already; leave --quantize out, or "
                "name the model that it was made of"
            )
        quantizations = {kinds.label(how): None}
    return Setup(
        model=args.checkpoint if stored else args.preset,
        config=config,
        stored=stored,
        quantizations=quantizations,
        dtype=default_dtype(args.dtype) or (None if stored else "bfloat16"),
        mesh=mesh,
        int8_cache=args.kv_cache == "int8",
        prompt_tokens=args.prompt_tokens,
        new_tokens=args.new_tokens,
    )


def make_cases(args: argparse.Namespace, setup: Setup) -> list[Case]:
    """All combinations."""
    return [
        Case(kind, cache == "on", batch)
        for kind in setup.quantizations
        for batch in args.batch
        for cache in args.cache
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; raises `UserError` for what the user can mend."""
    args = parse(arguments)
    join_processes()
    if args.plot is not None and is_first_process():
        plot.refuse(args.plot)
    setup = make_setup(args)
    result = bench(setup, make_cases(args, setup), args.repeats)
    if not is_first_process():
        return
    if args.plot:  # before what a reader such as `head` may cut off
        plot.draw(result, headline(result).replace(", on ", "\non "), args.plot)
    print(f"{headline(result)}\n\n{table(result)}\n")
    print(json.dumps(result))


if __name__ == "__main__":
    run(main, PROG)

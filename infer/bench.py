"""python -m infer.bench: how fast a model reads prompts and writes text here, and in what memory.

Configurations (weights, cache, batch) are measured side by side: repeats go round over all of
them, so that a machine that drifts is fair to each. Programs are compiled ahead and run once before
they are timed. A Markdown table goes to standard output, with one JSON object as the last line;
progress to standard error.

  first token  from the request to the first token of every row: prefill
  ms/token     a decode step, which makes a token in every row; median and range over windows of
               some steps, of all repeats. A window is a call: what XLA computes once before its
               loop, such as weights in another form, weighs more in short ones
  GB/s         the least that a step has to read, over its time: every weight once, and the filled
               positions of the cache; all devices together
  of copy      the same relative to what these devices reach when they add 1 to a large array
  memory       what XLA lays out for the largest program, weights included; on each device
  peak         what was measured in the first run, less the other weights present: of a device
               since its start, or of the process with all that Python and XLA take

Without a cache every token reads the whole sequence again, by one program of a fixed shape: what
a cache saves in time and costs in memory.
"""

import argparse
import contextlib
import functools
import gc
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from infer import machine, plot
from infer.generate import Shapes, State, chunks, compile_programs, make_request, request_shapes
from infer.random_weights import random_weights
from infer.sampling import settings
from llama_jax import cache as kv
from llama_jax import checkpoint, sharding
from llama_jax.checkpoint import format_bytes
from llama_jax.command import ArgumentParser, default_dtype, report, run
from llama_jax.config import LlamaConfig, get_preset
from llama_jax.errors import UserError
from llama_jax.model import Params, logits_and_entries
from llama_jax.quant import KINDS, Quantization
from llama_jax.sharding import device_bytes

PROG = "infer.bench"
WINDOWS = 8  # timed ones of a run, of about the same number of steps


# What is measured


@dataclass(frozen=True)
class Case:
    """One configuration."""

    quantize: str
    cache: bool
    batch: int

    def __str__(self) -> str:
        cache = "cache" if self.cache else "no cache"
        return f"{self.quantize}, {cache}, batch {self.batch}"


@dataclass(frozen=True)
class Setup:
    """What all configurations share."""

    model: str  # preset or directory
    config: LlamaConfig
    stored: bool  # whether `model` is a directory
    stored_kind: str  # how that is quantized, or "none"
    dtype: str | None  # None is as stored
    mesh: Mesh | None
    int8_cache: bool
    prompt_tokens: int
    new_tokens: int

    @property
    def devices(self) -> list[Any]:
        return jax.local_devices()[:1] if self.mesh is None else list(self.mesh.devices.flat)

    def quantization(self, kind: str) -> Quantization | None:
        """What is done to the weights as they load."""
        return None if kind in ("none", self.stored_kind) else Quantization(kind)

    def shardings(self, tree: Params) -> Any:
        """Where the arrays of a parameter tree lie."""
        if self.mesh is not None:
            return sharding.shardings(tree, self.mesh)
        place = jax.sharding.SingleDeviceSharding(self.devices[0])
        return jax.tree.map(lambda _: place, tree)

    def prompts(self, batch: int) -> list[list[int]]:
        """Random tokens; the first rows of a larger batch are those of a smaller one."""
        rng = np.random.default_rng(0)
        size = batch, self.prompt_tokens
        return rng.integers(0, self.config.vocab_size, size).tolist()

    def shapes(self, batch: int) -> Shapes:
        """The buckets in which generation puts these prompts."""
        shapes = request_shapes(self.config, self.prompts(batch), self.new_tokens)
        return shapes._replace(int8_cache=self.int8_cache)


@dataclass(frozen=True)
class Driver:
    """A configuration ready to run: what is timed, compiled."""

    programs: Sequence[Any]
    first: Callable[[], Any]  # to the first token, from the prompts on the host; gives a state
    steps: Callable[[Any, int], Any]  # so many further tokens; takes the state
    tokens: Callable[[Any], np.ndarray]  # [B, new_tokens] that were drawn


def with_cache(setup: Setup, params: Params, batch: int) -> Driver:
    """The programs that `infer.sample` runs, greedy, to the full number of tokens."""
    config, mesh, prompts = setup.config, setup.mesh, setup.prompts(batch)
    shapes = setup.shapes(batch)
    programs = compile_programs(config, params, shapes)
    sampling = settings([(0, 0)] * batch, temperature=0)
    host = make_request(config, prompts, sampling, setup.new_tokens, ())
    placed = sharding.replicate(host, mesh)

    def first() -> State:
        request = sharding.replicate(host, mesh)
        begin, *others = (sharding.replicate(c, mesh) for c in chunks(prompts, shapes.chunk))
        state = programs.start(params, request, begin)
        for chunk in others:
            state = programs.extend(params, state, request, chunk)
        np.asarray(state.token)
        return state

    def steps(state: State, n: int) -> State:
        return programs.decode(params, state, placed, sharding.replicate(np.int32(n), mesh))

    def tokens(state: State) -> np.ndarray:
        return np.asarray(state.tokens)[:, : setup.new_tokens]

    used = [program for program in programs if program is not None]
    return Driver(used, first, steps, tokens)


@functools.partial(jax.jit, static_argnames="config", donate_argnames="tokens_BS")
def recompute(
    config: LlamaConfig, params: Params, tokens_BS: jax.Array, length: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Writes the likeliest next token behind the first `length`, from which it is computed."""
    lengths_B = jnp.full(len(tokens_BS), length)
    logits_B1V, _ = logits_and_entries(config, params, tokens_BS, None, lengths_B)
    logits_BV = sharding.constrain(logits_B1V[:, 0], None, None)
    token_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    tokens_BS = tokens_BS.at[:, length].set(token_B)
    return sharding.constrain(tokens_BS, None, None), sharding.constrain(length + 1)


def without_cache(setup: Setup, params: Params, batch: int) -> Driver:
    """The same tokens with nothing kept but them."""
    host = np.zeros((batch, setup.prompt_tokens + setup.new_tokens), np.int32)
    host[:, : setup.prompt_tokens] = setup.prompts(batch)
    begin = host, np.int32(setup.prompt_tokens)
    mesh = setup.mesh
    with sharding.use(mesh):
        example = sharding.replicate(begin, mesh)
        program = recompute.lower(setup.config, params, *example).compile()

    def first() -> tuple[jax.Array, jax.Array]:
        state = program(params, *sharding.replicate(begin, mesh))
        np.asarray(state[0])
        return state

    def steps(state: tuple[jax.Array, jax.Array], n: int) -> tuple[jax.Array, jax.Array]:
        for _ in range(n):
            state = program(params, *state)
        return state

    return Driver([program], first, steps, lambda s: np.asarray(s[0])[:, setup.prompt_tokens :])


@dataclass(frozen=True)
class Run:
    """One pass of a driver."""

    ttft_s: float
    step_s: list[float]  # mean of each window
    tokens: np.ndarray


def run_once(driver: Driver, new_tokens: int) -> Run:
    """To the first token, then the others in windows of steps."""
    began = time.perf_counter()
    state = driver.first()
    ttft_s = time.perf_counter() - began
    step_s = []
    for window in np.array_split(np.arange(new_tokens - 1), min(WINDOWS, new_tokens - 1)):
        began = time.perf_counter()
        state = jax.block_until_ready(driver.steps(state, len(window)))
        step_s.append((time.perf_counter() - began) / len(window))
    return Run(ttft_s, step_s, driver.tokens(state))


@dataclass(frozen=True)
class Prepared:
    """A configuration compiled and run once."""

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


# Weights and memory


def abstract_weights(setup: Setup, kind: str) -> Params:
    """The weights of a kind as `jax.ShapeDtypeStruct`s with their shardings."""
    quantization = setup.quantization(kind)
    if setup.stored:
        tree = checkpoint.abstract_params(setup.model, dtype=setup.dtype, quantize=quantization)
    else:
        tree = checkpoint.abstract(setup.config, quantization, jnp.dtype(setup.dtype))
    return sharding.placed(tree, setup.shardings(tree))


def make_weights(setup: Setup, kind: str) -> Params:
    """The stored weights, or random ones, on their devices in the form of `kind`."""
    quantization = setup.quantization(kind)
    if setup.stored:
        return checkpoint.load_params(
            setup.model, dtype=setup.dtype, quantize=quantization, mesh=setup.mesh
        )
    places = setup.shardings(abstract_weights(setup, kind))
    return random_weights(setup.config, setup.dtype, quantization, places)


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


def program_bytes(driver: Driver) -> int:
    """What the largest program takes on each device, the weights among its arguments."""
    return max(
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
        for memory in (program.memory_analysis() for program in driver.programs)
    )


def refuse_small_memory(setup: Setup, cases: Sequence[Case]) -> None:
    """Raises `UserError` unless there is room for the weights of all kinds and the largest cache.

    And for the largest leaf once more, in float32, while it is made.
    """
    kinds = dict.fromkeys(case.quantize for case in cases)
    weights = [abstract_weights(setup, kind) for kind in kinds]
    dtype = weights[0]["embed"]["embedding"].dtype
    plain = checkpoint.abstract(setup.config, None, np.float32)
    plain = sharding.placed(plain, setup.shardings(plain))
    leaf = max(map(device_bytes, jax.tree.leaves(plain)))
    caches = (cache_bytes(setup, case.batch, dtype) for case in cases if case.cache)
    needed = sum(map(device_bytes, weights)) + max(leaf, machine.copy_bytes(setup.devices), *caches)
    checkpoint.refuse_small_memory(dict.fromkeys(setup.devices, needed), setup.model)


# Measuring


def prepare(
    setup: Setup,
    params: Params,
    others: int,
    cases: Sequence[Case],
    compile_s: dict[Case, float],
) -> list[Prepared]:
    """Compiles all cases of these weights and runs each once.

    `others` is how many bytes of other weights a device holds. Small programs run first, because
    a device tells only the largest peak so far. `compile_s` keeps the seconds of the first
    compilation of each case. Raises `UserError` where a program has no room.
    """
    prepared = []
    compiled = [_compile(setup, params, case, compile_s) for case in cases]
    of_device = machine.peak_source(setup.devices) == "device"
    absent = others if of_device else others * len(setup.devices)
    for size, case, driver in sorted(compiled, key=lambda one: one[0]):
        forgotten = machine.forget_peak() and not of_device
        before = machine.peak_bytes(setup.devices)
        run_once(driver, setup.new_tokens)
        peak = machine.peak_bytes(setup.devices)
        costs = {
            "compile_s": compile_s[case],
            "program_bytes": size,
            "step_bytes": step_bytes(setup, params, case),
            "peak_bytes": peak - absent,
            "peak_is_bound": peak == before and not forgotten,
        }
        prepared.append(Prepared(case, driver, costs))
    return prepared


def _compile(
    setup: Setup, params: Params, case: Case, compile_s: dict[Case, float]
) -> tuple[int, Case, Driver]:
    """A case with its driver, and the bytes of its largest program in front."""
    began = time.perf_counter()
    make = with_cache if case.cache else without_cache
    driver = make(setup, params, case.batch)
    seconds = compile_s.setdefault(case, time.perf_counter() - began)
    size = program_bytes(driver)
    needed = dict.fromkeys(setup.devices, size - device_bytes(params))
    checkpoint.refuse_small_memory(needed, f"{setup.model} ({case}) beside its weights")
    report(f"{PROG}: {case}: compiled in {seconds:.1f} s")
    return size, case, driver


def bench(setup: Setup, cases: Sequence[Case], repeats: int) -> dict[str, Any]:
    """Measures all cases; what the last line of the output says.

    Side by side where all kinds of weights fit beside each other, otherwise a kind after the
    other. Raises `UserError` where a single one has no room.
    """
    by_kind = [list(group) for _, group in itertools.groupby(cases, lambda case: case.quantize)]
    for group in by_kind:
        refuse_small_memory(setup, group)
    compile_s: dict[Case, float] = {}
    rows, reason = [], ""
    try:
        with full_memory_is_user_error():
            rows = _measure(setup, by_kind, repeats, compile_s)
    except UserError as error:
        if len(by_kind) == 1:
            raise
        reason = str(error)
    if reason:  # behind the exception, which holds on to the weights
        report(f"{PROG}: one kind of weights is measured after the other, for together {reason}")
        for group in by_kind:
            gc.collect()
            with full_memory_is_user_error():
                rows += _measure(setup, [group], repeats, compile_s)
    rows.sort(key=lambda row: cases.index(Case(row.quantize, row.cache, row.batch)))
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
        "peak_source": machine.peak_source(setup.devices),
        "rows": [asdict(row) for row in rows],
    }


def _measure(
    setup: Setup, groups: Sequence[Sequence[Case]], repeats: int, compile_s: dict[Case, float]
) -> list[Row]:
    """The rows of some kinds of weights, all of which are here at once.

    For `compile_s` see `prepare`.
    """
    refuse_small_memory(setup, [case for group in groups for case in group])
    prepared: list[Prepared] = []
    others = 0
    for group in groups:
        kind = group[0].quantize
        began = time.perf_counter()
        params = make_weights(setup, kind)
        size, seconds = device_bytes(params), time.perf_counter() - began
        report(f"{PROG}: {kind}: {format_bytes(size)} of weights a device in {seconds:.1f} s")
        prepared += prepare(setup, params, others, group, compile_s)
        others += size
    copy = 0.0
    for i in range(1, repeats + 1):
        copy = max(copy, machine.copy_gb_s(setup.devices))
        for one in prepared:
            one.runs.append(run_once(one.driver, setup.new_tokens))
        report(f"{PROG}: repeat {i} of {repeats}")
    return [make_row(setup, one, copy) for one in prepared]


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
    kinds = ("none", *KINDS)
    add("--checkpoint", metavar="DIR", help="model directory that a converter wrote")
    add("--preset", metavar="NAME", help="a released model, random bfloat16 weights")
    add("--quantize", default="none", metavar="KINDS", help=f"some of {','.join(kinds)} (none)")
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
    parser.split_list(args, "quantize", kinds.__contains__, f"some of {','.join(kinds)}")
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
    quantization = checkpoint.load_quantization(args.checkpoint)[0] if stored else None
    return Setup(
        model=args.checkpoint if stored else args.preset,
        config=config,
        stored=stored,
        stored_kind=quantization.kind if quantization else "none",
        dtype=default_dtype(args.dtype) or (None if stored else "bfloat16"),
        mesh=mesh,
        int8_cache=args.kv_cache == "int8",
        prompt_tokens=args.prompt_tokens,
        new_tokens=args.new_tokens,
    )


def make_cases(args: argparse.Namespace, setup: Setup) -> list[Case]:
    """All combinations; raises `UserError` where a quantized model would be quantized."""
    kinds = args.quantize
    if setup.stored_kind != "none":
        if kinds != ["none"]:
            raise UserError(
                f"{setup.model} is quantized to {setup.stored_kind} already; leave --quantize out, "
                "or name the model that it was made of"
            )
        kinds = [setup.stored_kind]
    return [
        Case(kind, cache == "on", batch)
        for kind in kinds
        for batch in args.batch
        for cache in args.cache
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; raises `UserError` for what the user can mend."""
    args = parse(arguments)
    if args.plot is not None:
        plot.refuse(args.plot)
    setup = make_setup(args)
    cases = make_cases(args, setup)
    result = bench(setup, cases, args.repeats)
    if args.plot:  # before what a reader such as `head` may cut off
        plot.draw(result, headline(result).replace(", on ", "\non "), args.plot)
    print(f"{headline(result)}\n\n{table(result)}\n")
    print(json.dumps(result))


if __name__ == "__main__":
    run(main, PROG)

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
import importlib
import itertools
import json
import math
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from infer.generate import (
    Shapes,
    State,
    chunks,
    compile_programs,
    make_request,
    request_shapes,
)
from infer.sampling import settings
from llama_jax import cache as kv
from llama_jax import checkpoint, sharding
from llama_jax.command import ArgumentParser, run
from llama_jax.config import LlamaConfig, get_preset
from llama_jax.errors import UserError
from llama_jax.model import Params, logits_and_entries
from llama_jax.quant import KINDS, Quantization, Quantized, whole_bytes

PROG = "infer.bench"
WINDOWS = 8  # timed ones of a run, of about the same number of steps
COPY_BYTES = 256 << 20  # of each device, or of all if they are CPUs: more than any cache holds
COPY_PASSES = 8  # timed as one
PLOTS = (".png", ".pdf", ".svg")


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
    dtype: str | None  # None is as stored
    mesh: Mesh | None
    int8_cache: bool
    prompt_tokens: int
    new_tokens: int

    @property
    def devices(self) -> list[Any]:
        return jax.local_devices()[:1] if self.mesh is None else list(self.mesh.devices.flat)

    @property
    def room(self) -> int:
        return self.prompt_tokens + self.new_tokens

    def prompts(self, batch: int) -> list[list[int]]:
        """Random tokens; the first rows of a larger batch are those of a smaller one."""
        rng = np.random.default_rng(0)
        size = batch, self.prompt_tokens
        return rng.integers(0, self.config.vocab_size, size).tolist()

    def shapes(self, batch: int) -> Shapes:
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
    host = np.zeros((batch, setup.room), np.int32)
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
    compile_s: float
    program_bytes: int  # see `Row`
    step_bytes: int
    peak_bytes: int
    peak_is_bound: bool
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
    gb_s = prepared.step_bytes / ms_per_token / 1e6
    return Row(
        **asdict(case),
        compile_s=prepared.compile_s,
        ttft_s=ttft_s,
        ttft_s_min=min(firsts),
        ttft_s_max=max(firsts),
        prefill_tokens_per_s=case.batch * setup.prompt_tokens / ttft_s,
        ms_per_token=ms_per_token,
        ms_per_token_min=min(ms),
        ms_per_token_max=max(ms),
        tokens_per_s=1e3 * case.batch / ms_per_token,
        step_bytes=prepared.step_bytes,
        gb_s=gb_s,
        copy_gb_s=copy_gb_s,
        share_of_copy=gb_s / copy_gb_s,
        program_bytes=prepared.program_bytes,
        peak_bytes=prepared.peak_bytes,
        peak_is_bound=prepared.peak_is_bound,
    )


# Weights


def abstract_weights(setup: Setup, kind: str) -> Params:
    """The weights of a kind as `jax.ShapeDtypeStruct`s with their devices.

    Raises `UserError` for a model that is quantized already.
    """

    def cast(leaf: Any) -> Any:
        if isinstance(leaf, Quantized):
            return leaf if setup.dtype is None else leaf.replace(dtype=jnp.dtype(setup.dtype))
        return jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(setup.dtype or leaf.dtype))

    if setup.stored:
        tree = checkpoint.abstract_params(setup.model)
        tree = jax.tree.map(cast, tree, is_leaf=lambda node: isinstance(node, Quantized))
    else:
        tree = checkpoint.abstract(setup.config, None, jnp.dtype(setup.dtype))
    if kind in KINDS and not _is_quantized(setup):
        tree = jax.eval_shape(Quantization(kind), tree)
    return jax.tree.map(_placed, tree, _shardings(tree, setup))


def _is_quantized(setup: Setup) -> bool:
    return setup.stored and checkpoint.load_quantization(setup.model)[0] is not None


def _shardings(tree: Params, setup: Setup) -> Params:
    if setup.mesh is not None:
        return sharding.shardings(tree, setup.mesh)
    place = jax.sharding.SingleDeviceSharding(setup.devices[0])
    return jax.tree.map(lambda _: place, tree)


def _placed(x: Any, place: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)


def make_weights(setup: Setup, kind: str) -> Params:
    """The stored weights, or random ones, on their devices in the form of `kind`."""
    quantization = Quantization(kind) if kind in KINDS and not _is_quantized(setup) else None
    if setup.stored:
        return checkpoint.load_params(
            setup.model, dtype=setup.dtype, quantize=quantization, mesh=setup.mesh
        )
    return random_weights(setup, quantization)


def random_weights(setup: Setup, quantization: Quantization | None) -> Params:
    """Made leaf by leaf where they stay, and quantized there: never all of them in another form."""
    plain = checkpoint.abstract(setup.config, None, jnp.dtype(setup.dtype))
    target = plain if quantization is None else jax.eval_shape(quantization, plain)
    seeds = itertools.count()

    def leaf(path: tuple, shape: jax.ShapeDtypeStruct, place: Any) -> Any:
        covered = quantization is not None and quantization.covers(path)
        is_norm = path[-1].key == "scale"
        how = quantization if covered else None
        make = _leaf_maker(shape.shape, shape.dtype, is_norm, how, place)
        return jax.block_until_ready(whole_bytes(make(jax.random.key(next(seeds)))))

    return jax.tree.map_with_path(leaf, plain, _shardings(target, setup))


@functools.cache
def _leaf_maker(
    shape: tuple[int, ...],
    dtype: np.dtype,
    is_norm: bool,
    quantization: Quantization | None,
    place: Any,
) -> Callable[[jax.Array], Any]:
    def make(key: jax.Array) -> Any:
        if is_norm:
            return jnp.ones(shape, dtype)
        # In float32, from which XLA rounds as it writes: 16-bit random numbers repeat soon.
        array = (0.02 * jax.random.normal(key, shape)).astype(dtype)
        return array if quantization is None else quantization.quantize(array)

    return jax.jit(make, out_shardings=place)


# Memory


def device_bytes(tree: Any) -> int:
    """Bytes of the part of each array that one device holds."""

    def size(x: Any) -> int:
        bits = jax.dtypes.itemsize_bits(x.dtype)
        if next(iter(x.sharding.device_set)).platform == "cpu":
            bits = max(bits, 8)
        return math.ceil(math.prod(x.sharding.shard_shape(tuple(x.shape))) * bits / 8)

    return sum(map(size, jax.tree.leaves(tree)))


def cache_bytes(setup: Setup, batch: int, dtype: Any) -> int:
    """Bytes of the cache that one device holds, of as many positions as there is room for."""
    shapes = setup.shapes(batch)
    layers = jax.eval_shape(
        lambda: kv.init_cache(setup.config, batch, shapes.room, dtype, int8=shapes.int8_cache)
    ).layers
    if setup.mesh is None:
        places = _shardings(layers, setup)
    else:
        mesh = setup.mesh
        places = jax.tree.map(lambda x: sharding.named(x.shape, kv.LOGICAL_AXES, mesh), layers)
    return device_bytes(jax.tree.map(_placed, layers, places))


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
    plain = jax.tree.map(_placed, plain, _shardings(plain, setup))
    leaf = max(map(device_bytes, jax.tree.leaves(plain)))
    caches = (cache_bytes(setup, case.batch, dtype) for case in cases if case.cache)
    needed = sum(map(device_bytes, weights)) + max(leaf, copy_bytes(setup), *caches)
    checkpoint.refuse_small_memory(dict.fromkeys(setup.devices, needed), setup.model)


def copy_bytes(setup: Setup) -> int:
    """Size of the array on each device that `copy_gb_s` goes over."""
    on_host = setup.devices[0].platform == "cpu"
    return COPY_BYTES // (len(setup.devices) if on_host else 1)


def copy_gb_s(setup: Setup) -> float:
    """What the devices together read and write when they add 1 to a large array, in place."""
    shape = len(setup.devices), copy_bytes(setup) // 4
    place: Any = jax.sharding.SingleDeviceSharding(setup.devices[0])
    if setup.mesh is not None:
        rows = jax.sharding.PartitionSpec(setup.mesh.axis_names)
        place = jax.sharding.NamedSharding(setup.mesh, rows)
    x = jax.jit(lambda: jnp.zeros(shape), out_shardings=place)()
    add = jax.jit(lambda x: x + 1, donate_argnums=0, out_shardings=place)
    x = jax.block_until_ready(add(x))
    best = math.inf
    for _ in range(3):
        began = time.perf_counter()
        for _ in range(COPY_PASSES):
            x = add(x)
        jax.block_until_ready(x)
        best = min(best, time.perf_counter() - began)
    return 2 * COPY_PASSES * x.nbytes / best / 1e9


def peak_source(setup: Setup) -> str:
    """Who tells the largest amount of memory that was in use: "device" or "process"."""
    stats = [device.memory_stats() or {} for device in setup.devices]
    return "device" if all("peak_bytes_in_use" in one for one in stats) else "process"


def peak_bytes(setup: Setup) -> int:
    """That amount, of the fullest device."""
    if peak_source(setup) == "device":
        stats = [device.memory_stats() or {} for device in setup.devices]
        return max(one["peak_bytes_in_use"] for one in stats)
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        line = next(line for line in lines if line.startswith("VmHWM:"))
        return int(line.split()[1]) << 10
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used << 10


def forget_peak() -> bool:
    """Whether the process could be made to forget its peak, as Linux can; devices cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


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
    a device tells only the largest peak so far. Raises `UserError` where a program has no room.
    """
    compiled = []
    weights = device_bytes(params)
    for case in cases:
        began = time.perf_counter()
        make = with_cache if case.cache else without_cache
        driver = make(setup, params, case.batch)
        seconds = compile_s.setdefault(case, time.perf_counter() - began)
        size = program_bytes(driver)
        needed = dict.fromkeys(setup.devices, size - weights)
        checkpoint.refuse_small_memory(needed, f"{setup.model} ({case}) beside its weights")
        report(f"{case}: compiled in {seconds:.1f} s")
        compiled.append((size, case, driver))
    prepared = []
    of_device = peak_source(setup) == "device"
    absent = others if of_device else others * len(setup.devices)
    for size, case, driver in sorted(compiled, key=lambda one: one[0]):
        forgotten = forget_peak() and not of_device
        before = peak_bytes(setup)
        run_once(driver, setup.new_tokens)
        peak = peak_bytes(setup)
        prepared.append(
            Prepared(
                case=case,
                driver=driver,
                compile_s=compile_s[case],
                program_bytes=size,
                step_bytes=step_bytes(setup, params, case),
                peak_bytes=peak - absent,
                peak_is_bound=peak == before and not forgotten,
            )
        )
    return prepared


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
        report(f"one kind of weights is measured after the other, for together {reason}")
        for group in by_kind:
            gc.collect()
            with full_memory_is_user_error():
                rows += _measure(setup, [group], repeats, compile_s)
    rows.sort(key=lambda row: cases.index(Case(row.quantize, row.cache, row.batch)))
    return {
        "model": setup.model,
        "device": device_name(setup.devices[0]),
        "devices": len(setup.devices),
        "mesh": None if setup.mesh is None else dict(setup.mesh.shape),
        "jax": jax.__version__,
        "dtype": setup.dtype or "as stored",
        "kv_cache": "int8" if setup.int8_cache else "as dtype",
        "prompt_tokens": setup.prompt_tokens,
        "new_tokens": setup.new_tokens,
        "repeats": repeats,
        "interleaved": not reason,
        "peak_source": peak_source(setup),
        "rows": [asdict(row) for row in rows],
    }


def _measure(
    setup: Setup, groups: Sequence[Sequence[Case]], repeats: int, compile_s: dict[Case, float]
) -> list[Row]:
    """The rows of some kinds of weights, all of which are here at once.

    `compile_s` keeps the time of the first compilation of each case.
    """
    refuse_small_memory(setup, [case for group in groups for case in group])
    prepared: list[Prepared] = []
    others = 0
    for group in groups:
        kind = group[0].quantize
        began = time.perf_counter()
        params = make_weights(setup, kind)
        seconds = time.perf_counter() - began
        report(f"{kind}: {_size(device_bytes(params))} of weights a device in {seconds:.1f} s")
        prepared += prepare(setup, params, others, group, compile_s)
        others += device_bytes(params)
    copy = 0.0
    for i in range(1, repeats + 1):
        copy = max(copy, copy_gb_s(setup))
        for one in prepared:
            one.runs.append(run_once(one.driver, setup.new_tokens))
        report(f"repeat {i} of {repeats}")
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
        f"| {_size(row['program_bytes'])} "
        f"| {'at most ' * row['peak_is_bound']}{_size(row['peak_bytes'])} "
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


def plot(result: dict[str, Any], file: str) -> None:
    """Tokens/s and memory as a picture: lines over the batch, or bars where there is one batch."""
    from matplotlib.figure import Figure

    rows = result["rows"]
    batches = sorted({row["batch"] for row in rows})
    series: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["batch"]):
        weights = result["dtype"] if row["quantize"] == "none" else row["quantize"]
        name = f"{weights}, {'with' if row['cache'] else 'without'} cache"
        series.setdefault(name, []).append(row)
    biggest = max(row["program_bytes"] for row in rows)
    unit, scale = ("GB", 1e9) if biggest >= 1e9 else ("MB", 1e6)
    figure = Figure(figsize=(11, 5), dpi=130, layout="constrained")
    axes = figure.subplots(1, 2)
    panels = (
        ("tokens_per_s", 1, "decode, tokens/s"),
        ("program_bytes", scale, f"memory of the program on a device, {unit}"),
    )
    for axis, (key, scale, label) in zip(axes, panels, strict=True):
        for i, (name, some) in enumerate(series.items()):
            values = [row[key] / scale for row in some]
            color, dash = f"C{i}", "-" if some[0]["cache"] else "--"
            if len(batches) > 1:
                axis.plot(
                    [row["batch"] for row in some], values, f"o{dash}", color=color, label=name
                )
            else:
                (bar,) = axis.bar([name.replace(", ", "\n")], values, color=color, width=0.6)
                axis.bar_label(axis.containers[-1], fmt="{:,.4g}", padding=2)
                bar.set_hatch("" if some[0]["cache"] else "//")
        every = [row[key] for row in rows]
        if len(batches) > 1:
            axis.set_xscale("log", base=2)
            axis.set_xticks(batches, [str(n) for n in batches])
            axis.minorticks_off()
            axis.set_xlabel("batch, rows")
        if max(every) > 20 * min(every):
            axis.set_yscale("log")
            axis.set_ylabel(f"{label} (logarithmic)")
        else:
            axis.margins(y=0.12)
            axis.set_ylim(bottom=0)
            axis.set_ylabel(label)
        axis.grid(axis="y", alpha=0.3)
    if len(batches) > 1:
        axes[0].legend()
    figure.suptitle(headline(result).replace(", on ", "\non "), fontsize=11)
    figure.savefig(file)


def refuse_plot(file: str) -> None:
    """Raises `UserError` for a picture that could not be written at the end."""
    path = Path(file)
    if path.suffix.lower() not in PLOTS:
        raise UserError(f"--plot is {file}, expected a name that ends in {', '.join(PLOTS)}")
    if not path.parent.is_dir():
        raise UserError(f"--plot is {file}, but {path.parent} is not a directory; make it first")
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(f"--plot is {file}, which cannot be written; name another file")
    try:
        importlib.import_module("matplotlib.figure")
    except ImportError:
        raise UserError(
            "--plot needs matplotlib; install it with python -m pip install 'llama-jax[plot]'"
        ) from None


def device_name(device: Any) -> str:
    """What the device is called; of a CPU also what Linux knows of it."""
    if device.platform != "cpu":
        return device.device_kind
    name = "CPU"
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line for line in lines if line.startswith("model name")).partition(": ")[2]
    return f"{name} with {os.cpu_count()} cores"


def _size(count: float) -> str:
    """1.25 GB; decimal, as bandwidths are."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


def report(line: str) -> None:
    print(f"{PROG}: {line}", file=sys.stderr, flush=True)


# The command


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; exits with status 2 and one line on a mistake."""
    parser = ArgumentParser(prog=PROG, description="Measure prefill and decode of a model here.")
    add = parser.add_argument
    kinds = ("none", *KINDS)
    add("--checkpoint", metavar="DIR", help="model directory that a converter wrote")
    add("--preset", metavar="NAME", help="a released model with random weights, llama-3.2-1b")
    add("--quantize", default="none", metavar="KINDS", help=f"some of {','.join(kinds)} (none)")
    add("--cache", default="on", metavar="on,off", help="with a cache, or without, or both (on)")
    add("--batch", metavar="NUMBERS", help="rows, as 1,8 (1; with --cache on,off 1,8,16)")
    add("--prompt-tokens", type=int, default=64, metavar="N", help="of each row (64)")
    add("--new-tokens", type=int, default=128, metavar="N", help="of each row (128)")
    add("--kv-cache", choices=("int8",), help="keep keys and values as int8 (as --dtype)")
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="(as stored, bfloat16 of a preset; float32 on CPU)",
    )
    add("--mesh", metavar="SIZES", help="devices, data=2,tensor=4 (one)")
    add("--repeats", type=int, default=3, metavar="N", help="timed runs of each (3)")
    add("--plot", metavar="FILE.png", help="tokens/s and memory as a picture")
    args = parser.parse_args(arguments)
    if (args.preset is None) == (args.checkpoint is None):
        given = "both" if args.preset else "neither"
        parser.error(f"{given} of --preset and --checkpoint given, expected one of them")
    for name, least in (("prompt_tokens", 1), ("new_tokens", 2), ("repeats", 1)):
        if getattr(args, name) < least:
            flag = "--" + name.replace("_", "-")
            parser.error(f"{flag} is {getattr(args, name)}, expected at least {least}")
    if args.batch is None:
        args.batch = "1,8,16" if args.cache.count(",") else "1"
    for name, valid, expected in (
        ("quantize", kinds.__contains__, f"some of {','.join(kinds)}"),
        ("cache", ("on", "off").__contains__, "on, off or on,off"),
        ("batch", _is_positive, "positive numbers such as 1,8"),
    ):
        given = getattr(args, name).split(",")
        for one in given:
            if not valid(one) or given.count(one) > 1:
                what = "twice " * (given.count(one) > 1)
                parser.error(f"--{name} has {what}{one!r}, expected {expected}")
        setattr(args, name, given)
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
    dtype = args.dtype
    if dtype is None and jax.default_backend() == "cpu":
        dtype = "float32"  # XLA on CPU multiplies 16-bit weights many times slower
    if dtype is None and not stored:
        dtype = "bfloat16"
    return Setup(
        model=args.checkpoint if stored else args.preset,
        config=config,
        stored=stored,
        dtype=dtype,
        mesh=mesh,
        int8_cache=args.kv_cache == "int8",
        prompt_tokens=args.prompt_tokens,
        new_tokens=args.new_tokens,
    )


def make_cases(args: argparse.Namespace, setup: Setup) -> list[Case]:
    """All combinations; raises `UserError` where a quantized model would be quantized."""
    kinds = args.quantize
    if setup.stored:
        quantization, _ = checkpoint.load_quantization(setup.model)
        if quantization is not None and kinds != ["none"]:
            raise UserError(
                f"{setup.model} is quantized to {quantization.kind} already; leave --quantize out, "
                "or name the model that it was made of"
            )
        kinds = [quantization.kind] if quantization else kinds
    return [
        Case(kind, cache == "on", batch)
        for kind in kinds
        for batch in args.batch
        for cache in args.cache
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; raises `UserError` for what the user can mend."""
    args = parse(arguments)
    if args.plot:
        refuse_plot(args.plot)
    setup = make_setup(args)
    cases = make_cases(args, setup)
    result = bench(setup, cases, args.repeats)
    if args.plot:
        plot(result, args.plot)  # before what a reader such as `head` may cut off
    print(f"{headline(result)}\n\n{table(result)}\n")
    print(json.dumps(result))


if __name__ == "__main__":
    run(main, PROG)

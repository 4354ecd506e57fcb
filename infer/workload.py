"""What `infer.bench` runs: a model on random prompts, with a cache and without, compiled ahead."""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from infer.generate import Shapes, State, chunks, compile_programs, make_request, request_shapes
from infer.random_weights import random_weights
from infer.sampling import settings
from llama_jax import checkpoint, sharding
from llama_jax.config import LlamaConfig
from llama_jax.model import Params, logits_and_entries
from llama_jax.quant import Quantization

WINDOWS = 8  # timed ones of a run, of about the same number of steps


@dataclass(frozen=True)
class Case:
    """One configuration."""

    quantize: str  # a label of `infer.kinds`
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
    quantizations: Mapping[str, Quantization | None]  # by label: what is done as weights load
    dtype: str | None  # None is as stored
    mesh: Mesh | None
    int8_cache: bool
    prompt_tokens: int
    new_tokens: int

    @property
    def devices(self) -> list[Any]:
        return jax.local_devices()[:1] if self.mesh is None else list(self.mesh.devices.flat)

    @property
    def own_devices(self) -> list[Any]:
        """Those of this process, which alone tell of their memory."""
        here = jax.process_index()
        return [device for device in self.devices if device.process_index == here]

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


def abstract_weights(setup: Setup, kind: str) -> Params:
    """The weights of a kind as `jax.ShapeDtypeStruct`s with their shardings."""
    quantization = setup.quantizations[kind]
    if setup.stored:
        tree = checkpoint.abstract_params(setup.model, dtype=setup.dtype, quantize=quantization)
    else:
        tree = checkpoint.abstract(setup.config, quantization, jnp.dtype(setup.dtype))
    return sharding.placed(tree, setup.shardings(tree))


def make_weights(setup: Setup, kind: str) -> Params:
    """The stored weights, or random ones, on their devices in the form of `kind`."""
    quantization = setup.quantizations[kind]
    if setup.stored:
        return checkpoint.load_params(
            setup.model, dtype=setup.dtype, quantize=quantization, mesh=setup.mesh
        )
    places = setup.shardings(abstract_weights(setup, kind))
    return random_weights(setup.config, setup.dtype, quantization, places)


class Compiled(NamedTuple):
    """The programs of a configuration, made before there are weights."""

    programs: Sequence[Any]
    seconds: float
    bytes: int  # that the largest takes on each device, the weights among its arguments


def compile_case(setup: Setup, case: Case) -> Compiled:
    """Compiles what `with_cache` or `without_cache` runs."""
    began = time.perf_counter()
    params = abstract_weights(setup, case.quantize)
    if case.cache:
        programs = compile_programs(setup.config, params, setup.shapes(case.batch))
    else:
        with sharding.use(setup.mesh):
            begin = sharding.replicate(_sequences(setup, case.batch), setup.mesh)
            programs = (recompute.lower(setup.config, params, *begin).compile(),)
    seconds = time.perf_counter() - began
    return Compiled(programs, seconds, max(map(_bytes, filter(None, programs))))


def _bytes(program: Any) -> int:
    memory = program.memory_analysis()
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
    )


class Driver(NamedTuple):
    """What is timed of a configuration."""

    first: Callable[[], Any]  # to the first token, from the prompts on the host; gives a state
    steps: Callable[[Any, int], Any]  # so many further tokens; takes the state
    tokens: Callable[[Any], np.ndarray]  # [B, new_tokens] that were drawn


def with_cache(setup: Setup, programs: Any, params: Params, batch: int) -> Driver:
    """The programs that `infer.sample` runs, greedy, to the full number of tokens."""
    mesh, prompts = setup.mesh, setup.prompts(batch)
    size = setup.shapes(batch).chunk
    sampling = settings([(0, 0)] * batch, temperature=0)
    host = make_request(setup.config, prompts, sampling, setup.new_tokens, ())
    placed = sharding.replicate(host, mesh)

    def first() -> State:
        request = sharding.replicate(host, mesh)
        begin, *others = (sharding.replicate(c, mesh) for c in chunks(prompts, size))
        state = programs.start(params, request, begin)
        for chunk in others:
            state = programs.extend(params, state, request, chunk)
        np.asarray(state.token)
        return state

    def steps(state: State, n: int) -> State:
        return programs.decode(params, state, placed, sharding.replicate(np.int32(n), mesh))

    return Driver(first, steps, lambda state: np.asarray(state.tokens)[:, : setup.new_tokens])


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


def _sequences(setup: Setup, batch: int) -> tuple[np.ndarray, np.int32]:
    """The prompts with room for the new tokens, and how long they are."""
    tokens_BS = np.zeros((batch, setup.prompt_tokens + setup.new_tokens), np.int32)
    tokens_BS[:, : setup.prompt_tokens] = setup.prompts(batch)
    return tokens_BS, np.int32(setup.prompt_tokens)


def without_cache(setup: Setup, programs: Any, params: Params, batch: int) -> Driver:
    """The same tokens with nothing kept but them."""
    [program] = programs
    begin = _sequences(setup, batch)

    def first() -> tuple[jax.Array, jax.Array]:
        state = program(params, *sharding.replicate(begin, setup.mesh))
        np.asarray(state[0])
        return state

    def steps(state: tuple[jax.Array, jax.Array], n: int) -> tuple[jax.Array, jax.Array]:
        for _ in range(n):
            state = program(params, *state)
        return state

    return Driver(first, steps, lambda state: np.asarray(state[0])[:, setup.prompt_tokens :])


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

"""Generation: prompts in, tokens out, by compiled programs with static shapes.

`start` reads the first chunk of the prompts, `extend` each further one of long prompts, `decode`
runs up to a given number of steps in a compiled loop. `generate` runs `decode` to the end, `stream`
a few steps at a time: the same step, the same tokens. Prompt length and room are padded to powers
of two, everything else that a request changes (temperatures, stop ids, number of steps) is an
array, so that it never recompiles. This module knows token ids only, no text.
"""

import functools
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from infer.sampling import Sampling, sample, settings
from llama_jax import cache as kv
from llama_jax import sharding
from llama_jax.cache import Entries, KVCache, append, init_cache
from llama_jax.config import LlamaConfig
from llama_jax.errors import UserError
from llama_jax.model import Params, logits_and_entries

CHUNK = 512  # most tokens of a row that `start` or `extend` reads
SMALLEST_BUCKET = 16
STOP_IDS = 8  # room for stop ids; unused places hold -1
SECONDS_A_FETCH = 0.05  # `stream` fetches about this often
STEPS_TOGETHER = 16


class State(struct.PyTreeNode):
    """All that a step reads and writes, B rows with room for S positions; donated to each call."""

    cache: KVCache
    token: jax.Array  # int32 [B], drawn and not yet read
    count: jax.Array  # int32 [B], tokens drawn
    done: jax.Array  # bool [B]
    seen: jax.Array  # bool [B, V], tokens of prompt and completion
    tokens: jax.Array  # int32 [B, S], all tokens drawn, a stop id included
    # Of the distribution before any setting; not recorded where n is 0.
    logprobs: jax.Array  # float32 [B, S], of the tokens drawn
    top_ids: jax.Array  # int32 [B, S, n], the n likeliest tokens at each place
    top_logprobs: jax.Array  # float32 [B, S, n]


class Request(struct.PyTreeNode):
    """What a step only reads: B rows, on the host or on the devices."""

    sampling: Sampling
    limit: Any  # int32 [B], most tokens to draw
    stop_ids: Any  # int32 [STOP_IDS], ids that end a row


class Shapes(NamedTuple):
    """The static sizes of a request: what decides whether it needs a compilation."""

    batch: int
    chunk: int  # T of `start` and `extend`
    room: int  # S
    n_logprobs: int
    long: bool = False  # whether a prompt takes more than one chunk
    int8_cache: bool = False


def init_state(config: LlamaConfig, params: Params, shapes: Shapes) -> State:
    """A state before the first token; what is cached has the dtype of the embedding."""
    batch, room, n_logprobs = shapes.batch, shapes.room, shapes.n_logprobs
    ints = functools.partial(jnp.zeros, dtype=jnp.int32)
    dtype = params["embed"]["embedding"].dtype
    return State(
        cache=init_cache(config, batch, room, dtype, int8=shapes.int8_cache),
        token=ints(batch),
        count=ints(batch),
        done=jnp.zeros(batch, bool),
        seen=jnp.zeros((batch, config.vocab_size), bool),
        tokens=ints((batch, room)),
        logprobs=jnp.zeros((batch, room)),
        top_ids=ints((batch, room, n_logprobs)),
        top_logprobs=jnp.zeros((batch, room, n_logprobs)),
    )


def _draw(state: State, logits_BV: jax.Array, request: Request, active_B: jax.Array) -> State:
    """Draws a token in the active rows, and marks those that it ends as done."""
    rows = jnp.arange(len(active_B))
    token = sample(logits_BV, state.seen, state.count, request.sampling)
    at = rows, jnp.where(active_B, state.count, state.tokens.shape[1])  # elsewhere: dropped
    count = state.count + active_B
    stopped = jnp.isin(token, request.stop_ids) | (count >= request.limit)
    if n_logprobs := state.top_ids.shape[2]:
        logprobs_BV = jax.nn.log_softmax(logits_BV)
        top_logprobs, top_ids = jax.lax.top_k(logprobs_BV, n_logprobs)
        state = state.replace(
            logprobs=state.logprobs.at[at].set(logprobs_BV[rows, token], mode="drop"),
            top_ids=state.top_ids.at[at].set(top_ids, mode="drop"),
            top_logprobs=state.top_logprobs.at[at].set(top_logprobs, mode="drop"),
        )
    return state.replace(
        token=jnp.where(active_B, token, state.token),
        count=count,
        done=state.done | (active_B & stopped),
        seen=state.seen.at[rows, token].max(active_B),
        tokens=state.tokens.at[at].set(token, mode="drop"),
    )


def _write(drawn: State, new: tuple[Entries, ...], lengths_B: jax.Array) -> State:
    """Appends the new entries to the cache, except in rows that are done.

    Those are never read again. That the write waits for the draw lets XLA do it in place, after
    the last read of the cache (figures in docs/LOG.md).
    """
    lengths_B = jnp.where(drawn.done, 0, lengths_B)
    return drawn.replace(cache=append(drawn.cache, new, lengths_B))


def _axes(path: tuple, x: Any) -> tuple[str | None, ...]:
    """The logical axes of the array at this path of a `State`: only large ones are split."""
    names = [key.name for key in path if isinstance(key, jax.tree_util.GetAttrKey)]
    if names[:2] == ["cache", "layers"]:
        return kv.LOGICAL_AXES
    return ("batch", "vocab") if names == ["seen"] else (None,) * x.ndim


def _split(state: State) -> State:
    """The state with every array where the next program expects it."""

    def split(path: tuple, x: jax.Array) -> jax.Array:
        return sharding.constrain(x, *_axes(path, x))

    return jax.tree.map_with_path(split, state)


class Chunk(NamedTuple):
    """The next tokens of each prompt, on the host or on the devices."""

    tokens: Any  # int32 [B, T], padded on the right
    lengths: Any  # int32 [B]
    last: Any  # bool [B], the prompt ends here


def _read(
    config: LlamaConfig,
    params: Params,
    state: State,
    cache: KVCache | None,
    request: Request,
    chunk: Chunk,
) -> State:
    """Reads a chunk behind `cache`; draws the first token where the prompt ends."""
    tokens_BT, lengths_B, last_B = chunk
    logits_B1V, new = logits_and_entries(config, params, tokens_BT, cache, lengths_B)
    valid_BT = jnp.arange(tokens_BT.shape[1])[None] < lengths_B[:, None]
    seen = state.seen.at[jnp.arange(len(tokens_BT))[:, None], tokens_BT].max(valid_BT)
    drawn = _draw(state.replace(seen=seen), logits_B1V[:, 0], request, last_B)
    return _write(drawn, new, lengths_B)


@functools.partial(jax.jit, static_argnames=("config", "shapes"))
def start(
    config: LlamaConfig, shapes: Shapes, params: Params, request: Request, chunk: Chunk
) -> State:
    """The state after the first chunk, which sees nothing but itself."""
    empty = init_state(config, params, shapes)
    return _split(_read(config, params, empty, None, request, chunk))


@functools.partial(jax.jit, static_argnames="config", donate_argnames="state")
def extend(
    config: LlamaConfig, params: Params, state: State, request: Request, chunk: Chunk
) -> State:
    """The state after a further chunk."""
    return _split(_read(config, params, state, state.cache, request, chunk))


@functools.partial(jax.jit, static_argnames="config", donate_argnames="state")
def decode(
    config: LlamaConfig, params: Params, state: State, request: Request, steps: jax.Array
) -> State:
    """Up to `steps` more tokens in every row that is not done."""

    def step(carry):
        i, state = carry
        active = ~state.done
        logits_B1V, new = logits_and_entries(config, params, state.token[:, None], state.cache)
        drawn = _draw(state, logits_B1V[:, 0], request, active)
        return i + 1, _write(drawn, new, active.astype(jnp.int32))

    def unfinished(carry):
        i, state = carry
        return (i < steps) & ~jnp.all(state.done)

    return _split(jax.lax.while_loop(unfinished, step, (jnp.int32(0), state))[1])


class Programs(NamedTuple):
    """What a request runs, compiled for its shapes."""

    start: Any  # (params, request, chunk) -> State
    decode: Any  # (params, state, request, steps) -> State
    extend: Any = None  # (params, state, request, chunk) -> State; only for long prompts


def request_shapes(
    config: LlamaConfig,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    n_logprobs: int = 0,
    int8_cache: bool = False,
) -> Shapes:
    """The buckets that these prompts fall in.

    Raises `UserError` for no prompt, an empty one, one that leaves no room in the context, or a
    token that the model does not have: JAX would read another one in its place.
    """
    if not prompts or not all(prompts):
        raise UserError("a prompt of no tokens, expected at least one; begin with BOS")
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens}, expected at least 1")
    for token in (min(map(min, prompts)), max(map(max, prompts))):
        if not 0 <= token < config.vocab_size:
            raise UserError(
                f"a prompt holds token {token}, but the model has {config.vocab_size}; take the "
                "tokenizer and the model from the same release"
            )
    longest = max(map(len, prompts))
    if longest >= config.context:
        raise UserError(
            f"a prompt has {longest} tokens, but the model's context ends at {config.context}; "
            "shorten the prompt"
        )
    room = min(longest + max_new_tokens, config.context)
    chunk = min(_bucket(longest), CHUNK)
    return Shapes(len(prompts), chunk, _bucket(room), n_logprobs, longest > chunk, int8_cache)


def compile_programs(config: LlamaConfig, params: Params, shapes: Shapes) -> Programs:
    """The programs for these shapes, compiled at the first call with them."""
    leaves, tree = jax.tree.flatten(params)
    avals = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for x in leaves)
    return _compile(config, avals, tree, shapes)


def lower_programs(config: LlamaConfig, params: Params, shapes: Shapes) -> dict[str, Any]:
    """The programs for these shapes by name, lowered; `params` may be abstract.

    They run where the parameters lie: their shardings give the devices, which need not exist.
    """
    mesh = sharding.mesh_of(params)
    rows = [[0]] * shapes.batch

    def place(x: Any, *axes: str | None) -> jax.ShapeDtypeStruct:
        target = None if mesh is None else sharding.named(x.shape, axes, mesh)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=target)

    def copied(tree: Any) -> Any:
        return jax.tree.map(lambda x: place(x, *[None] * x.ndim), tree)

    request = copied(make_request(config, rows, settings([(0, 0)] * shapes.batch), 1, ()))
    chunk = copied(next(chunks(rows, shapes.chunk)))
    steps = copied(np.int32(1))
    with sharding.use(mesh):
        state = jax.eval_shape(functools.partial(start, config, shapes), params, request, chunk)
        state = jax.tree.map_with_path(lambda path, x: place(x, *_axes(path, x)), state)
        lowered = {
            "start": start.lower(config, shapes, params, request, chunk),
            "decode": decode.lower(config, params, state, request, steps),
        }
        if shapes.long:
            lowered["extend"] = extend.lower(config, params, state, request, chunk)
    return lowered


@functools.lru_cache(maxsize=16)
def _compile(config: LlamaConfig, avals: tuple, tree: Any, shapes: Shapes) -> Programs:
    lowered = lower_programs(config, jax.tree.unflatten(tree, avals), shapes)
    with ThreadPoolExecutor() as pool:  # XLA compiles without the interpreter lock
        compiled = pool.map(lambda program: program.compile(), lowered.values())
        return Programs(**dict(zip(lowered, compiled, strict=True)))


def chunks(prompts: Sequence[Sequence[int]], size: int) -> Iterator[Chunk]:
    """The prompts in pieces of `size` positions; a row that has ended has length 0.

    prompts abc, d; size 2 -> (ab, d.; lengths 2, 1; last no, yes), (c., ..; 1, 0; yes, no)
    """
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    for begin in range(0, lengths.max(), size):
        tokens = np.zeros((len(prompts), size), np.int32)
        for row, prompt in zip(tokens, prompts, strict=True):
            piece = prompt[begin : begin + size]
            row[: len(piece)] = piece
        last = (lengths > begin) & (lengths <= begin + size)
        valid = np.clip(lengths - begin, 0, size)
        yield Chunk(tokens, valid.astype(np.int32), last)


def make_request(
    config: LlamaConfig,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    max_new_tokens: int,
    stop_ids: Iterable[int],
) -> Request:
    """Raises `UserError` for more stop ids than `STOP_IDS`."""
    stops = sorted(stop_ids)
    if len(stops) > STOP_IDS:
        raise UserError(f"{len(stops)} stop ids, expected at most {STOP_IDS}")
    limit = [min(max_new_tokens, config.context - len(prompt)) for prompt in prompts]
    return Request(
        sampling=sampling,
        limit=np.array(limit, np.int32),
        stop_ids=np.array(stops + [-1] * (STOP_IDS - len(stops)), np.int32),
    )


@dataclass(frozen=True)
class Progress:
    """What has been drawn so far; numpy arrays as in `State`."""

    tokens: np.ndarray  # int32 [B, S]
    count: np.ndarray  # int32 [B]
    done: np.ndarray  # bool [B]
    stopped: np.ndarray  # bool [B], the last token is a stop id
    logprobs: np.ndarray  # float32 [B, S], zeros unless n > 0
    top_ids: np.ndarray  # int32 [B, S, n]
    top_logprobs: np.ndarray  # float32 [B, S, n]

    def completion(self, row: int) -> list[int]:
        """The tokens of a row, without the stop id that ended it."""
        return self.tokens[row, : self.count[row] - self.stopped[row]].tolist()


def stream(
    config: LlamaConfig,
    params: Params,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    max_new_tokens: int,
    stop_ids: Iterable[int] = (),
    n_logprobs: int = 0,
    int8_cache: bool = False,
    steps_a_fetch: int | None = None,
) -> Iterator[Progress]:
    """Generates; yields after the first token and then after every few.

    Args:
      prompts: B lists of token ids, of any lengths; padded here, with no effect on the tokens.
      sampling: from `infer.sampling.settings`, B rows.
      max_new_tokens: most tokens for each row; the model's context may end a row earlier.
      stop_ids: at most `STOP_IDS` ids that end a row.
      n_logprobs: how many of the likeliest tokens to report at each place.
      int8_cache: whether keys and values are kept as int8.
      steps_a_fetch: decode steps between two yields; by default as many as take 50 ms, or, where
        several processes must agree, `STEPS_TOGETHER`.

    Raises `UserError` as `request_shapes` does, before anything is computed.
    """
    shapes = request_shapes(
        config, prompts, max_new_tokens, n_logprobs=n_logprobs, int8_cache=int8_cache
    )
    programs = compile_programs(config, params, shapes)
    mesh = sharding.mesh_of(params)
    request = make_request(config, prompts, sampling, max_new_tokens, stop_ids)
    request = sharding.replicate(request, mesh)
    first, *others = (sharding.replicate(chunk, mesh) for chunk in chunks(prompts, shapes.chunk))
    state = programs.start(params, request, first)
    for chunk in others:
        state = programs.extend(params, state, request, chunk)

    if jax.process_count() > 1:
        steps_a_fetch = steps_a_fetch or STEPS_TOGETHER
    steps = min(steps_a_fetch or 1, shapes.room)  # no row draws more than that
    while True:
        progress = _fetch(state, request.stop_ids)
        yield progress
        if progress.done.all():
            return
        began = time.perf_counter()
        state = programs.decode(params, state, request, sharding.replicate(np.int32(steps), mesh))
        jax.block_until_ready(state.done)
        if steps_a_fetch is None:
            seconds = (time.perf_counter() - began) / steps
            steps = int(min(max(SECONDS_A_FETCH / seconds, 1), 2 * steps))


def generate(
    config: LlamaConfig,
    params: Params,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    max_new_tokens: int,
    stop_ids: Iterable[int] = (),
    n_logprobs: int = 0,
    int8_cache: bool = False,
) -> Progress:
    """Generates to the end in one compiled loop. Arguments and errors as for `stream`."""
    *_, last = stream(
        config,
        params,
        prompts,
        sampling,
        max_new_tokens=max_new_tokens,
        stop_ids=stop_ids,
        n_logprobs=n_logprobs,
        int8_cache=int8_cache,
        steps_a_fetch=max_new_tokens,
    )
    return last


def _fetch(state: State, stop_ids: jax.Array) -> Progress:
    host = jax.device_get(state.replace(cache=None, seen=None, token=None))
    rows = np.arange(len(host.count))
    last = host.tokens[rows, np.maximum(host.count - 1, 0)]
    return Progress(
        tokens=host.tokens,
        count=host.count,
        done=host.done,
        stopped=host.done & np.isin(last, stop_ids),
        logprobs=host.logprobs,
        top_ids=host.top_ids,
        top_logprobs=host.top_logprobs,
    )


def _bucket(n: int) -> int:
    """The power of two at or above n, at least `SMALLEST_BUCKET`."""
    return max(SMALLEST_BUCKET, 1 << (n - 1).bit_length())

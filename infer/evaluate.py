"""python -m infer.evaluate: what quantization costs a model, measured on a text.

The model is read as it is stored and once more for each kind of quantization; both stay in memory
while they are compared. The text is cut into windows, each with BOS in front, and every token of
it is predicted once. A Markdown table goes to standard output, progress to standard error; the
model as it is stored, "none", is its first row.

  size     of the weights, in units of 10^6 bytes
  nats     mean of -log p(token), and its exponential, the perplexity
  KL       mean Kullback-Leibler divergence of the quantized model's next-token distribution from
           that of the model as it is stored, in nats
  same     how often both find the same token the likeliest

With `--kv-cache int8` each kind has a second row: the text read as decoding would write it, token
by token, each seeing the ones before it as int8 and itself as it is. That takes a step a token.
"""

import argparse
import functools
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import llama_jax
from infer import kinds
from llama_jax import sharding
from llama_jax.cache import init_cache
from llama_jax.checkpoint import refuse_quantized, stored_bytes
from llama_jax.command import (
    ArgumentParser,
    default_dtype,
    is_first_process,
    join_processes,
    keep_compilations,
    report,
    run,
)
from llama_jax.config import LlamaConfig
from llama_jax.errors import UserError
from llama_jax.model import Params, forward

PROG = "infer.evaluate"
LINE_EVERY = 10.0  # seconds between lines of progress


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    quantize: str
    int8_cache: bool
    bytes: int  # of the weights
    tokens: int  # predicted
    nats: float
    perplexity: float
    change: float  # of the perplexity, relative to the model as it is stored
    kl: float
    same: float
    seconds: float


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; exits with status 2 and one line on a mistake."""
    parser = ArgumentParser(prog=PROG, description="Measure what quantization costs a model.")
    add = parser.add_argument
    names = ",".join(kinds.NAMES)
    add("--checkpoint", required=True, metavar="DIR", help="model directory")
    add("--data", required=True, metavar="FILE", help="UTF-8 text, of the kind the model knows")
    kinds.add_flags(parser, default=names, help=f"some of {names} (all)")
    add("--tokens", type=int, default=16384, metavar="N", help="most tokens of the text (16384)")
    add("--window", type=int, metavar="N", help="tokens seen at once (2048, or the context)")
    add("--batch", type=int, default=4, metavar="N", help="windows at once (4)")
    parser.add_shared("--kv-cache", "--dtype", "--mesh")
    add("--json", action="store_true", help="a last line of JSON")
    args = parser.parse_args(arguments)
    parser.refuse_below(args, tokens=2, window=2, batch=1)
    kinds.check(parser, args)
    return args


def read_tokens(file: str, tokenizer: Any, most: int) -> list[int]:
    """The first `most` tokens of a text; raises `UserError` where it has hardly any."""
    try:
        text = Path(file).read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        raise UserError(f"--data {file} is not UTF-8 text; convert it first") from None
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"--data {file} is no file, expected a text in UTF-8") from None
    # A tokenizer may need minutes for a text of which only the beginning is wanted.
    tokens = tokenizer.encode(text[: 16 * most])[:most]
    if len(tokens) < 2:
        what = "only 1 token" if tokens else "empty"
        raise UserError(f"--data {file} is {what}, expected a text of many")
    return tokens


def windows(
    tokens: Sequence[int], bos: int, window: int, batch: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(read, expected, valid), each [B, T]: what a model reads, what follows, which of it counts.

    All batches have the same shape: they are padded with zeros.

      tokens abcde, window 3, batch 1 -> (^ab, abc, 111), (^de -> ^d., de., 110)
    """
    pieces = [tokens[begin : begin + window] for begin in range(0, len(tokens), window)]
    for first in range(0, len(pieces), batch):
        read, expected = np.zeros((2, batch, window), np.int32)
        valid = np.zeros((batch, window), bool)
        for row, piece in enumerate(pieces[first : first + batch]):
            read[row, : len(piece)] = [bos, *piece[:-1]]
            expected[row, : len(piece)] = piece
            valid[row, : len(piece)] = True
        yield read, expected, valid


@functools.partial(jax.jit, static_argnames=("config", "int8_cache"))
def compare(
    config: LlamaConfig,
    params: Params,
    reference: Params,
    read_BT: jax.Array,
    expected_BT: Any,
    int8_cache: bool = False,
) -> tuple[jax.Array, ...]:
    """-log p of what follows, KL divergence from the reference, same likeliest token; [B, T]."""
    log_p_BTV = jax.nn.log_softmax(forward(config, reference, read_BT)[0])
    if int8_cache:
        log_q_BTV = jax.nn.log_softmax(through_int8_cache(config, params, read_BT))
    else:
        log_q_BTV = jax.nn.log_softmax(forward(config, params, read_BT)[0])
    nll_BT = -jnp.take_along_axis(log_q_BTV, expected_BT[..., None], axis=-1)[..., 0]
    kl_BT = jnp.sum(jnp.exp(log_p_BTV) * (log_p_BTV - log_q_BTV), axis=-1)
    same_BT = jnp.argmax(log_p_BTV, -1) == jnp.argmax(log_q_BTV, -1)
    return tuple(sharding.constrain(x, None, None) for x in (nll_BT, kl_BT, same_BT))


def through_int8_cache(config: LlamaConfig, params: Params, read_BT: jax.Array) -> jax.Array:
    """Logits [B, T, V] of steps of decoding, with the given tokens in place of drawn ones."""
    B, T = read_BT.shape
    empty = init_cache(config, B, T, params["embed"]["embedding"].dtype, int8=True)

    def step(cache: Any, token_B: jax.Array) -> tuple[Any, jax.Array]:
        logits_B1V, cache = forward(config, params, token_B[:, None], cache)
        return cache, logits_B1V[:, 0]

    _, logits_TBV = jax.lax.scan(step, empty, read_BT.T)
    return jnp.swapaxes(logits_TBV, 0, 1)


def measure(
    config: LlamaConfig,
    params: Params,
    reference: Params,
    batches: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]],
    *,
    int8_cache: bool = False,
    name: str = "",
) -> tuple[int, float, float, float]:
    """Tokens, mean -log p, mean KL divergence and share of equal predictions; sums in float64."""
    mesh = sharding.mesh_of(reference)
    sums, count, printed = np.zeros(3), 0, time.monotonic()
    for i, (read, expected, valid) in enumerate(batches, start=1):
        with sharding.use(mesh):
            texts = sharding.replicate((read, expected), mesh)
            found = compare(config, params, reference, *texts, int8_cache)
        sums += [np.asarray(x, np.float64)[valid].sum() for x in found]
        count += int(valid.sum())
        if time.monotonic() - printed > LINE_EVERY:
            printed = time.monotonic()
            report(f"{PROG}: {name}: {count} tokens, batch {i} of {len(batches)}")
    nats, kl, same = (sums / count).tolist()
    return count, nats, kl, same


def evaluate(args: argparse.Namespace) -> list[Row]:
    """The model as it is stored, then each kind of quantization asked for.

    Raises `UserError` for a model or a text that cannot be read or has no room.
    """
    dtype = default_dtype(args.dtype)
    quantizations = {"none": None, **kinds.quantizations(args)}
    if len(quantizations) > 1:
        refuse_quantized(args.checkpoint)
    stored = llama_jax.load(args.checkpoint, dtype=dtype, mesh=args.mesh)
    tokens = read_tokens(args.data, stored.tokenizer, args.tokens)
    window = min(args.window or 2048, stored.config.context, len(tokens))
    batch = min(args.batch, -(-len(tokens) // window))
    batches = list(windows(tokens, stored.tokenizer.bos_id, window, batch))
    rows: list[Row] = []
    for kind, how in quantizations.items():
        model = stored
        if how is not None:
            model = llama_jax.load(args.checkpoint, dtype=dtype, quantize=how, mesh=args.mesh)
        for int8_cache in (False, True) if args.kv_cache else (False,):
            name = kind + ", int8 cache" * int8_cache
            began = time.monotonic()
            count, nats, kl, same = measure(
                stored.config,
                model.params,
                stored.params,
                batches,
                int8_cache=int8_cache,
                name=name,
            )
            seconds = time.monotonic() - began
            rows.append(
                Row(
                    quantize=kind,
                    int8_cache=int8_cache,
                    bytes=stored_bytes(model.params),
                    tokens=count,
                    nats=nats,
                    perplexity=math.exp(nats),
                    change=math.expm1(nats - rows[0].nats) if rows else 0.0,
                    kl=kl,
                    same=same,
                    seconds=seconds,
                )
            )
            report(f"{PROG}: {name}: {count} tokens in {seconds:.1f} s")
    return rows


def table(rows: Sequence[Row]) -> str:
    """The rows in Markdown."""
    lines = [
        "| weights | size, MB | tokens | nats/token | perplexity | change | KL, nats | same |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {row.quantize}{', int8 cache' * row.int8_cache} | {row.bytes / 1e6:.2f} | {row.tokens} "
        f"| {row.nats:.4f} | {row.perplexity:.4f} "
        f"| {row.change:+.2%} | {row.kl:.2e} | {row.same:.2%} |"
        for row in rows
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; raises `UserError` for what the user can mend."""
    args = parse(arguments)
    keep_compilations()
    join_processes()
    rows = evaluate(args)
    if not is_first_process():
        return
    print(table(rows))
    if args.json:
        print(json.dumps({"data": args.data, "rows": [asdict(row) for row in rows]}))


if __name__ == "__main__":
    run(main, PROG)

"""python -m infer.evaluate: what quantization costs a model, measured on a text.

The model is read as it is stored and once more for each kind of quantization; both stay in memory
while they are compared. The text is cut into windows, each with BOS in front, and every token of
it is predicted once. A Markdown table goes to standard output, progress to standard error.

  nats     mean of -log p(token), and its exponential, the perplexity
  KL       mean Kullback-Leibler divergence of the quantized model's next-token distribution from
           that of the model as it is stored, in nats
  same     how often both find the same token the likeliest
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
from llama_jax import sharding
from llama_jax.checkpoint import refuse_quantized, stored_bytes
from llama_jax.command import ArgumentParser, default_dtype, keep_compilations, report, run
from llama_jax.config import LlamaConfig
from llama_jax.errors import UserError
from llama_jax.model import Params, forward
from llama_jax.quant import GROUPED, KINDS, Quantization

PROG = "infer.evaluate"
LINE_EVERY = 10.0  # seconds between lines of progress


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    quantize: str
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
    kinds = ",".join(("none", *KINDS))
    add("--checkpoint", required=True, metavar="DIR", help="model directory")
    add("--data", required=True, metavar="FILE", help="UTF-8 text, of the kind the model knows")
    add("--quantize", default=kinds, metavar="KINDS", help=f"any of {kinds} (all)")
    parser.add_shared("--quantize-embeddings", "--group-size", "--double-quantization")
    add("--tokens", type=int, default=16384, metavar="N", help="most tokens of the text (16384)")
    add("--window", type=int, metavar="N", help="tokens seen at once (2048, or the context)")
    add("--batch", type=int, default=4, metavar="N", help="windows at once (4)")
    parser.add_shared("--dtype", "--mesh")
    add("--json", action="store_true", help="a last line of JSON")
    args = parser.parse_args(arguments)
    parser.refuse_below(args, tokens=1, window=2, batch=1)
    parser.split_list(args, "quantize", ("none", *KINDS).__contains__, f"some of {kinds}")
    for given, flag, takers in (
        (args.group_size is not None, "--group-size", GROUPED),
        (args.double_quantization, "--double-quantization", ("nf4",)),
        (args.quantize_embeddings, "--quantize-embeddings", tuple(KINDS)),
    ):
        if given and not set(takers) & set(args.quantize):
            parser.error(f"{flag} is for {' and '.join(takers)}; add one of them to --quantize")
    return args


def read_tokens(file: str, tokenizer: Any, most: int) -> list[int]:
    """The first `most` tokens of a text; raises `UserError` where it has none."""
    try:
        text = Path(file).read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        raise UserError(f"--data {file} is not UTF-8 text; convert it first") from None
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"--data {file} is no file, expected a text in UTF-8") from None
    # A tokenizer may need minutes for a text of which only the beginning is wanted.
    tokens = tokenizer.encode(text[: 16 * most])[:most]
    if not tokens:
        raise UserError(f"--data {file} is empty, expected a text")
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


@functools.partial(jax.jit, static_argnames="config")
def compare(
    config: LlamaConfig, params: Params, reference: Params, read_BT: jax.Array, expected_BT: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """-log p of what follows, KL divergence from the reference, same likeliest token; [B, T]."""
    log_p_BTV = jax.nn.log_softmax(forward(config, reference, read_BT)[0])
    log_q_BTV = jax.nn.log_softmax(forward(config, params, read_BT)[0])
    nll_BT = -jnp.take_along_axis(log_q_BTV, expected_BT[..., None], axis=-1)[..., 0]
    kl_BT = jnp.sum(jnp.exp(log_p_BTV) * (log_p_BTV - log_q_BTV), axis=-1)
    return nll_BT, kl_BT, jnp.argmax(log_p_BTV, -1) == jnp.argmax(log_q_BTV, -1)


def measure(
    config: LlamaConfig,
    params: Params,
    reference: Params,
    batches: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]],
    name: str = "",
) -> tuple[int, float, float, float]:
    """Tokens, mean -log p, mean KL divergence and share of equal predictions; sums in float64."""
    mesh = sharding.mesh_of(reference)
    sums, count, printed = np.zeros(3), 0, time.monotonic()
    for i, (read, expected, valid) in enumerate(batches, start=1):
        with sharding.use(mesh):
            found = compare(config, params, reference, *sharding.replicate((read, expected), mesh))
        sums += [np.asarray(x, np.float64)[valid].sum() for x in found]
        count += int(valid.sum())
        if time.monotonic() - printed > LINE_EVERY:
            printed = time.monotonic()
            report(f"{PROG}: {name}: {count} tokens, batch {i} of {len(batches)}")
    nats, kl, same = (sums / count).tolist()
    return count, nats, kl, same


def evaluate(args: argparse.Namespace) -> list[Row]:
    """One row for each kind of quantization asked for.

    Raises `UserError` for a model or a text that cannot be read or has no room.
    """
    dtype = default_dtype(args.dtype)
    if args.quantize != ["none"]:
        refuse_quantized(args.checkpoint)
    quantizations = [_quantization(kind, args) for kind in args.quantize]
    stored = llama_jax.load(args.checkpoint, dtype=dtype, mesh=args.mesh)
    tokens = read_tokens(args.data, stored.tokenizer, args.tokens)
    window = min(args.window or 2048, stored.config.context, len(tokens))
    batch = min(args.batch, -(-len(tokens) // window))
    batches = list(windows(tokens, stored.tokenizer.bos_id, window, batch))
    rows: list[Row] = []
    base = None
    for kind, quantization in zip(args.quantize, quantizations, strict=True):
        began = time.monotonic()
        model = stored
        if quantization is not None:
            model = llama_jax.load(
                args.checkpoint, dtype=dtype, quantize=quantization, mesh=args.mesh
            )
        if base is None and quantization is not None:
            base = measure(stored.config, stored.params, stored.params, batches, "none")[1]
        count, nats, kl, same = measure(stored.config, model.params, stored.params, batches, kind)
        base = nats if base is None else base
        size = stored_bytes(model.params)
        change = math.expm1(nats - base)
        seconds = time.monotonic() - began
        rows.append(Row(kind, size, count, nats, math.exp(nats), change, kl, same, seconds))
        report(f"{PROG}: {kind}: {count} tokens in {seconds:.1f} s")
    return rows


def _quantization(kind: str, args: argparse.Namespace) -> Quantization | None:
    if kind == "none":
        return None
    group_size = args.group_size if kind in GROUPED else None
    double = args.double_quantization and kind == "nf4"
    return Quantization(kind, args.quantize_embeddings, group_size, double)


def table(rows: Sequence[Row]) -> str:
    """The rows in Markdown."""
    lines = [
        "| weights | MB | nats/token | perplexity | change | KL | same |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {row.quantize} | {row.bytes / 1e6:.2f} | {row.nats:.4f} | {row.perplexity:.4f} | "
        f"{row.change:+.2%} | {row.kl:.2e} | {row.same:.2%} |"
        for row in rows
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; raises `UserError` for what the user can mend."""
    args = parse(arguments)
    keep_compilations()
    rows = evaluate(args)
    print(table(rows))
    if args.json:
        print(json.dumps({"data": args.data, "rows": [asdict(row) for row in rows]}))


if __name__ == "__main__":
    run(main, PROG)

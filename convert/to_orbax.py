"""What both converters to a model directory share: their flags, and the writing of one."""

import argparse
import contextlib
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from convert.names import EMBED
from convert.progress import progress, say, summary
from convert.source import (
    DTYPES,
    Hashes,
    check_tokenizer,
    find_tokenizer,
    provenance,
    under_its_usual_name,
    verify,
)
from llama_jax.checkpoint import LazyArray, nested, save_model
from llama_jax.command import ArgumentParser
from llama_jax.config import LlamaConfig


@dataclass(frozen=True)
class Source:
    """A checkpoint that has been checked but not read."""

    directory: Path
    files: tuple[Path, ...]  # all that the model directory is made of, to be hashed
    config: LlamaConfig
    leaves: Mapping[str, LazyArray]  # by path in our tree
    md5: Mapping[str, str] = field(default_factory=dict)  # by file name, where it is known


def make_parser(prog: str, description: str) -> ArgumentParser:
    """The flags that both converters have."""
    parser = ArgumentParser(prog=prog, description=description)
    parser.add_argument("--input", required=True, metavar="DIR", help="checkpoint to read")
    parser.add_argument("--output", required=True, metavar="DIR", help="model directory to write")
    parser.add_argument("--dtype", choices=("original", *DTYPES), default="original")
    parser.add_argument("--tokenizer", metavar="FILE", help="default: that of the checkpoint")
    parser.add_argument("--verify", action="store_true", help="read back and compare every bit")
    return parser


def convert(
    prog: str,
    args: argparse.Namespace,
    open_source: Callable[[], Source],
    tokenizers: Iterable[str],
) -> None:
    """Opens, writes and (`--verify`) compares; says what was written on standard error.

    `tokenizers` are the places of the tokenizer's file below the checkpoint, the likeliest first.
    Raises `UserError` for what `open_source` refuses, and for a tokenizer that does not fit.
    """
    started = time.monotonic()

    # What is there
    source = open_source()
    config, leaves = source.config, source.leaves
    size = sum(leaf.nbytes for leaf in leaves.values())
    dtype = str(leaves[EMBED.path].dtype)
    origin = provenance(prog, dtype)

    tokenizer = find_tokenizer(source.directory, args.tokenizer, tokenizers)
    check_tokenizer(tokenizer, config.vocab_size)

    with contextlib.ExitStack() as stack:
        # Write it, hashing the source meanwhile; provenance is complete once the last tensor is
        hashes = stack.enter_context(Hashes(source.files, source.md5))
        bar = stack.enter_context(progress("converting", size))
        save_model(
            args.output,
            config,
            nested(leaves),
            tokenizer=stack.enter_context(under_its_usual_name(tokenizer)),
            provenance=origin,
            progress=_when_done(bar, size, lambda: origin.update(source=hashes.result())),
        )
    seconds = time.monotonic() - started

    # Check it, and say what it is
    if args.verify:
        verify(args.output, config, leaves)
        say(f"{prog}: verified: every element of {args.output} equals its source bit for bit")
    say(f"{prog}: wrote {args.output}: {summary(config, dtype, size, seconds)}")


def _when_done(
    advance: Callable[[str, int], None], total: int, finish: Callable[[], None]
) -> Callable[[str, int], None]:
    """`advance`, and `finish()` with the last tensor, before a model directory is complete."""
    done = 0

    def advance_and_finish(name: str, size: int) -> None:
        nonlocal done
        done += size
        advance(name, size)
        if done == total:
            finish()

    return advance_and_finish

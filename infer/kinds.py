"""Flags of commands that go over several kinds of weights: `--quantize none,int8` and how."""

import argparse
from typing import Any

from llama_jax.command import QUANTIZATION_FLAGS, ArgumentParser
from llama_jax.quant import GROUPED, KINDS, Quantization

NAMES = ("none", *KINDS)


def add_flags(parser: ArgumentParser, **options: Any) -> None:
    """`--quantize` with these options of `argparse`, and the flags that go with it."""
    parser.add_argument("--quantize", metavar="KINDS", **options)
    parser.add_shared(*QUANTIZATION_FLAGS)


def check(parser: ArgumentParser, args: argparse.Namespace) -> None:
    """Makes a list of `--quantize`; exits where that is unknown or a flag has nothing to do."""
    parser.split_list(args, "quantize", NAMES.__contains__, f"some of {','.join(NAMES)}")
    for given, flag, takers in (
        (args.group_size is not None, "--group-size", GROUPED),
        (args.double_quantization, "--double-quantization", ("nf4",)),
        (args.quantize_embeddings, "--quantize-embeddings", tuple(KINDS)),
    ):
        if given and not set(takers) & set(args.quantize):
            parser.error(f"{flag} is for {' and '.join(takers)}; add one of them to --quantize")


def quantizations(args: argparse.Namespace) -> dict[str, Quantization | None]:
    """How each kind asked for is made, by the flags that it takes, with a label; "none" is None."""
    hows = [_quantization(kind, args) for kind in args.quantize]
    return {label(how): how for how in hows}


def _quantization(kind: str, args: argparse.Namespace) -> Quantization | None:
    if kind == "none":
        return None
    group_size = args.group_size if kind in GROUPED else None
    double = args.double_quantization and kind == "nf4"
    return Quantization(kind, args.quantize_embeddings, group_size, double)


def label(how: Quantization | None) -> str:
    """What a table calls these weights: "int4 in groups of 32, embeddings too"."""
    if how is None:
        return "none"
    groups = f" in groups of {how.group_size}" if how.group_size else ""
    double = " with double quantization" if how.double_quantization else ""
    return how.kind + groups + double + ", embeddings too" * how.embeddings

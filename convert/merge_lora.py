"""Merges an adapter into its model: a model directory that needs the adapter no more.

    python -m convert.merge_lora --checkpoint DIR --lora DIR --output DIR

One tensor at a time is read, merged and written in its own dtype, so the memory needed is a few
times the largest tensor. Sums are made in float32 and rounded once.
"""

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convert.names import EMBED
from convert.progress import progress, say, summary
from convert.quantize import origin
from convert.source import cast, model_leaves, provenance
from llama_jax import lora
from llama_jax.adapter import fingerprint, open_adapter, read
from llama_jax.checkpoint import (
    LazyArray,
    abstract,
    load_config,
    nested,
    refuse_quantized,
    save_model,
)
from llama_jax.command import ArgumentParser, run
from llama_jax.lora import Lora
from llama_jax.tokenizer import tokenizer_file

PROG = "convert.merge_lora"
_BLOCK_BYTES = 16 << 20  # of a kernel in float32 that are merged at once


def main(arguments: list[str]) -> None:
    """The command; raises `UserError` for what the user can mend."""
    parser = ArgumentParser(prog=PROG, description=(__doc__ or "").partition("\n\n")[0])
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="DIR", help="model directory")
    add("--lora", required=True, metavar="DIR", help="adapter directory")
    add("--output", required=True, metavar="DIR", help="model directory to write")
    args = parser.parse_args(arguments)
    started = time.monotonic()

    # What is there
    config = load_config(args.checkpoint)
    refuse_quantized(args.checkpoint)
    tokenizer = tokenizer_file(args.checkpoint)
    leaves = model_leaves(args.checkpoint, config)
    opened = open_adapter(args.lora, abstract(config), fingerprint(args.checkpoint))
    adapted = lora.attach(nested(leaves), read(opened))
    size = sum(leaf.nbytes for leaf in leaves.values())
    dtype = str(np.dtype(leaves[EMBED.path].dtype))
    told = {"adapter": opened.config.to_json() | {"made_of": origin(args.lora).get("made_of")}}

    # Write it
    with progress("merging", size) as advance:
        save_model(
            args.output,
            config,
            merged(adapted),
            tokenizer=tokenizer,
            provenance=provenance(PROG, dtype) | origin(args.checkpoint) | told,
            progress=advance,
        )
    seconds = time.monotonic() - started
    say(f"{PROG}: wrote {args.output}: {summary(config, dtype, size, seconds)}")


def merged(params: dict[str, Any]) -> dict[str, Any]:
    """A tree of `LazyArray`s and `Lora` leaves as one of kernels that are merged when read."""

    def node(tree: Any, path: str) -> Any:
        if not isinstance(tree, dict):
            return tree
        children = {
            name: node(child, f"{path}{name}/") for name, child in tree.items() if name != lora.NAME
        }
        if lora.NAME in tree:
            kernel = children["kernel"]
            read = functools.partial(_merge, kernel, tree[lora.NAME], f"{path}kernel")
            children["kernel"] = LazyArray(kernel.shape, kernel.dtype, read)
        return children

    return node(params, "")


def _merge(kernel: LazyArray, adapter: Lora, name: str) -> np.ndarray:
    """The sum, by blocks of rows: whole kernels in float32 would take three times as much memory."""
    stored = kernel.read()
    out = np.empty(kernel.shape, kernel.dtype)
    rows = max(1, _BLOCK_BYTES // (4 * kernel.shape[1]))
    for start in range(0, len(stored), rows):
        block = slice(start, start + rows)
        total = _sum(stored[block], adapter.replace(b=adapter.b[block]))
        out[block] = cast(np.asarray(total), np.dtype(kernel.dtype), name)
    return out


@jax.jit
def _sum(rows: jax.Array, adapter: Lora) -> jax.Array:
    return rows.astype(jnp.float32) + adapter.delta()


if __name__ == "__main__":
    run(main, PROG)

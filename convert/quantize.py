"""Quantizes a model directory: the weights become int8, int4 or nf4, everything else stays.

    python -m convert.quantize --checkpoint DIR --output DIR --quantize int8

One tensor at a time is read, quantized and written, so the memory needed is a few times the
largest tensor. The result is what `llama_jax.load(DIR, quantize=...)` makes, bit for bit.
"""

import functools
import json
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from convert.progress import progress, say, summary
from convert.source import model_leaves, provenance
from llama_jax.adapter import fingerprint
from llama_jax.checkpoint import (
    LazyArray,
    load_config,
    nested,
    refuse_quantized,
    save_model,
    stored_bytes,
)
from llama_jax.command import ArgumentParser, run
from llama_jax.quant import KINDS, Quantization
from llama_jax.tokenizer import tokenizer_file

PROG = "convert.quantize"


def main(arguments: list[str]) -> None:
    """The command; raises `UserError` for what the user can mend."""
    parser = ArgumentParser(prog=PROG, description=(__doc__ or "").partition("\n\n")[0])
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="DIR", help="model directory")
    add("--output", required=True, metavar="DIR", help="model directory to write")
    add("--quantize", required=True, choices=tuple(KINDS), help="what weights become")
    parser.add_shared("--quantize-embeddings", "--group-size", "--double-quantization")
    args = parser.parse_args(arguments)
    started = time.monotonic()

    # What is there
    quantization = Quantization(
        args.quantize, args.quantize_embeddings, args.group_size, args.double_quantization
    )
    config = load_config(args.checkpoint)
    refuse_quantized(args.checkpoint)
    tokenizer = tokenizer_file(args.checkpoint)
    leaves = model_leaves(args.checkpoint, config)
    params = lazily(leaves, quantization)
    size = stored_bytes(params)
    dtype = str(np.dtype(next(iter(leaves.values())).dtype))

    # Write it
    with progress("quantizing", size) as advance:
        save_model(
            args.output,
            config,
            params,
            tokenizer=tokenizer,
            provenance=provenance(PROG, dtype) | origin(args.checkpoint),
            progress=advance,
            quantization=quantization,
            base=fingerprint(args.checkpoint),
        )
    seconds = time.monotonic() - started
    what = f"{args.quantize} of {dtype}"
    say(f"{PROG}: wrote {args.output}: {summary(config, what, size, seconds)}")


def lazily(leaves: Mapping[str, LazyArray], quantization: Quantization) -> dict[str, Any]:
    """The tree of quantized leaves whose arrays are made when they are read.

    `leaves` are by path. A tensor is quantized once if its arrays are read one after the other,
    as `save_model` does: the last one is kept.
    """
    quantize = jax.jit(quantization.quantize)

    @functools.lru_cache(maxsize=1)
    def arrays(path: str) -> list[np.ndarray]:
        return [np.asarray(array) for array in jax.tree.leaves(quantize(leaves[path].read()))]

    def leaf(key_path: tuple, plain: Any) -> Any:
        path = jax.tree_util.keystr(key_path, simple=True, separator="/")
        if not quantization.covers(key_path):
            return leaves[path]
        parts, structure = jax.tree.flatten(jax.eval_shape(quantization.quantize, plain))
        lazy = [
            LazyArray(part.shape, part.dtype, functools.partial(_item, arrays, path, i))
            for i, part in enumerate(parts)
        ]
        return jax.tree.unflatten(structure, lazy)

    shapes = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in leaves.items()}
    plain = nested(shapes)
    jax.eval_shape(quantization, plain)  # refuses groups that do not fit
    return jax.tree.map_with_path(leaf, plain)


def _item(arrays: Any, path: str, index: int) -> np.ndarray:
    return arrays(path)[index]


def origin(directory: str) -> dict[str, Any]:
    """What the model directory says of where it came from, as a further entry of a provenance."""
    file = epath.Path(directory) / "provenance.json"
    try:
        return {"made_of": json.loads(file.read_bytes().decode("utf-8"))}
    except (OSError, ValueError):
        return {}


if __name__ == "__main__":
    run(main, PROG)

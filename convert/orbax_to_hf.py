"""Converts a model directory to a Hugging Face checkpoint that transformers loads.

    python -m convert.orbax_to_hf --checkpoint DIR --output DIR

Writes `config.json`, `generation_config.json`, the tokenizer's file and safetensors in shards.
One tensor at a time is read and appended to its shard, so no shard is ever held in memory.
"""

import json
import re
import time
from collections.abc import Mapping
from typing import IO, Any

import numpy as np
from etils import epath

from convert.hf_to_orbax import INDEX, SINGLE, STORED
from convert.names import EMBED, weights
from convert.progress import progress, say, summary
from convert.source import DTYPES, cast, model_leaves
from llama_jax.chat import stop_ids
from llama_jax.checkpoint import LazyArray, load_config, new_directory, refuse_quantized
from llama_jax.command import ArgumentParser, run
from llama_jax.config import LlamaConfig
from llama_jax.errors import UserError
from llama_jax.tokenizer import load_tokenizer, tokenizer_file

PROG = "convert.orbax_to_hf"
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_SAFETENSORS = {DTYPES[name]: stored for stored, name in STORED.items()}


def main(arguments: list[str]) -> None:
    parser = ArgumentParser(prog=PROG, description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="model directory")
    parser.add_argument("--output", required=True, metavar="DIR", help="directory to write")
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="such as 5GB")
    parser.add_argument("--dtype", choices=("original", *DTYPES), default="original")
    args = parser.parse_args(arguments)
    started = time.monotonic()

    # What is there
    shard_size = parse_size(args.max_shard_size)
    config = load_config(args.checkpoint)
    refuse_quantized(args.checkpoint)
    leaves = _leaves_by_hf_name(args.checkpoint, config, DTYPES.get(args.dtype))
    size = sum(leaf.nbytes for leaf in leaves.values())
    dtype = str(leaves[EMBED.hf].dtype)
    tokenizer_path = tokenizer_file(args.checkpoint)
    tokenizer = load_tokenizer(tokenizer_path)
    ends = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": sorted(stop_ids(tokenizer, config.version)),
    }

    # Write it
    with new_directory(args.output, size) as staging, progress("converting", size) as advance:
        _write_json(staging / "config.json", config.to_hf(dtype) | ends)
        _write_json(staging / "generation_config.json", ends)
        tokenizer_path.copy(staging / tokenizer_path.name)
        shards = split_shards(leaves, shard_size)
        for file, names in shards.items():
            with (staging / file).open("wb") as stream:
                write_safetensors(stream, {name: leaves[name] for name in names}, advance)
        if len(shards) > 1:
            weight_map = {name: file for file, names in shards.items() for name in names}
            index = {"metadata": {"total_size": size}, "weight_map": weight_map}
            _write_json(staging / INDEX, index)
    seconds = time.monotonic() - started
    say(f"{PROG}: wrote {args.output}: {summary(config, dtype, size, seconds)}")


def parse_size(text: str) -> int:
    """ "5GB" as bytes; raises `UserError` for what is no size."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B)?", text.strip().upper())
    size = int(float(match[1]) * _UNITS[match[2] or ""]) if match else 0
    if size < 1:
        raise UserError(f"--max-shard-size is {text!r}, expected a size such as 5GB or 500MB")
    return size


def split_shards(leaves: Mapping[str, LazyArray], limit: int) -> dict[str, list[str]]:
    """{file name: tensors}: each file at most `limit` bytes, or one tensor that is larger."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, leaf in leaves.items():
        if shards[-1] and filled + leaf.nbytes > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += leaf.nbytes
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {
        f"model-{i:05d}-of-{len(shards):05d}.safetensors": names
        for i, names in enumerate(shards, start=1)
    }


def write_safetensors(stream: IO[bytes], leaves: Mapping[str, LazyArray], advance: Any) -> None:
    """Writes tensors as one safetensors file, reading each when its turn comes.

    The format: 8 bytes of header length, the header in JSON, then the tensors' bytes
    (github.com/huggingface/safetensors, "Format").
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, leaf in leaves.items():
        header[name] = {
            "dtype": _SAFETENSORS[np.dtype(leaf.dtype)],
            "shape": list(leaf.shape),
            "data_offsets": [offset, offset + leaf.nbytes],
        }
        offset += leaf.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    stream.write(len(text).to_bytes(8, "little") + text)
    for name, leaf in leaves.items():
        stream.write(np.ascontiguousarray(leaf.read()).view(np.uint8).data)
        advance(name, leaf.nbytes)


def _leaves_by_hf_name(
    directory: str, config: LlamaConfig, dtype: np.dtype | None
) -> dict[str, LazyArray]:
    stored = model_leaves(directory, config)

    def lazy(path: str) -> LazyArray:
        leaf = stored[path]
        return LazyArray(
            leaf.shape, dtype or np.dtype(leaf.dtype), lambda: cast(leaf.read(), dtype, path)
        )

    return {weight.hf: lazy(weight.path) for weight in weights(config)}


def _write_json(file: epath.Path, value: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n")


if __name__ == "__main__":
    run(main, PROG)

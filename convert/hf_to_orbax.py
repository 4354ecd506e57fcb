"""Converts a Hugging Face checkpoint (`*.safetensors`, `config.json`) to a model directory.

    python -m convert.hf_to_orbax --input DIR --output DIR

One file or shards with an index. Names change, values do not: Hugging Face rotates halves (RoPE)
as this project does. The files are memory-mapped and one tensor at a time is cast and written.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from convert.names import EMBED, HEAD, Weight, is_derived, weights
from convert.source import (
    DTYPES,
    cast,
    input_directory,
    is_model_directory,
    read_json,
    same_bits,
    unreadable_is_user_error,
)
from convert.to_orbax import Source, convert, make_parser
from llama_jax.checkpoint import LazyArray
from llama_jax.command import run
from llama_jax.config import LlamaConfig
from llama_jax.errors import UserError

PROG = "convert.hf_to_orbax"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
STORED = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # safetensors' names
_TOKENIZERS = ("tokenizer.model", "original/tokenizer.model", "tokenizer.json")


def main(arguments: list[str]) -> None:
    args = make_parser(PROG, (__doc__ or "").partition("\n\n")[0]).parse_args(arguments)
    convert(PROG, args, lambda: open_hf(args.input, dtype=args.dtype), _TOKENIZERS)


@dataclass(frozen=True)
class _Stored:
    """One tensor of a safetensors file, unread."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    handle: Any

    def read(self, name: str) -> np.ndarray:
        with unreadable_is_user_error(self.file, "safetensors"):
            return self.handle.get_tensor(name)


def open_hf(path: str, *, dtype: str = "original") -> Source:
    """Opens and checks Hugging Face's checkpoint in `path`, without reading its weights.

    Raises `UserError` for everything that is not a whole checkpoint of one Llama.
    """
    directory = input_directory(path)
    files = _weight_files(directory)
    config = LlamaConfig.from_hf(read_json(directory / "config.json"))
    tensors = _open_files(files)
    _check_index(directory, tensors)
    _check_tensors(tensors, config, directory)
    target = DTYPES.get(dtype)

    def lazy(weight: Weight) -> LazyArray:
        stored = tensors[weight.hf]
        return LazyArray(
            shape=stored.shape,
            dtype=target or DTYPES[STORED[stored.dtype]],
            read=lambda: cast(stored.read(weight.hf), target, weight.hf),
        )

    return Source(
        directory=directory,
        files=(*files, directory / "config.json"),
        config=config,
        leaves={weight.path: lazy(weight) for weight in weights(config)},
    )


# --- opening files ---


def _weight_files(directory: Path) -> list[Path]:
    """The safetensors files that the index names, or the single one."""
    if (directory / INDEX).exists():
        weight_map = _weight_map(directory)
        files = [directory / name for name in sorted(set(weight_map.values()))]
        for file in files:
            if not file.is_file():
                raise UserError(f"{file} is missing, but {INDEX} names it; download all shards")
        return files
    if (directory / SINGLE).is_file():
        return [directory / SINGLE]
    if any(directory.glob("consolidated.*.pth")):
        hint = "it is a Meta checkpoint, run python -m convert.meta_to_orbax"
    elif any(directory.glob("model-*.safetensors")):
        hint = f"there are shards, copy their {INDEX} too"
    elif any(directory.glob("pytorch_model*.bin")):
        hint = "it holds pickled weights, download the safetensors ones"
    elif is_model_directory(directory):
        hint = "it is already a model directory"
    else:
        hint = "name the directory that holds Hugging Face's weights"
    raise UserError(f"neither {SINGLE} nor {INDEX} in {directory}; {hint}")


def _weight_map(directory: Path) -> dict[str, str]:
    """{tensor: file name} of the index."""
    file = directory / INDEX
    weight_map = read_json(file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{file} holds no weight_map; download it again")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or Path(name).name != name:
            raise UserError(f"{file}: {tensor} is in {name!r}, expected a file beside the index")
    return weight_map


def _open_files(files: list[Path]) -> dict[str, _Stored]:
    """Every tensor of the files by Hugging Face's name."""
    try:
        from safetensors import safe_open
    except ImportError:
        raise UserError(
            "safetensors is not installed, needed for Hugging Face's files; pip install safetensors"
        ) from None
    tensors: dict[str, _Stored] = {}
    for file in files:
        with unreadable_is_user_error(file, "safetensors, it is truncated or no such file"):
            handle = safe_open(file, framework="np")
            for name in handle.keys():  # noqa: SIM118  it is no mapping
                view = handle.get_slice(name)
                if name in tensors:
                    raise UserError(
                        f"{name} is in both {tensors[name].file} and {file.name}; the shards are "
                        "of different models; download all of one"
                    )
                if not is_derived(name):
                    shape, dtype = tuple(view.get_shape()), view.get_dtype()
                    tensors[name] = _Stored(file, shape, dtype, handle)
    return tensors


# --- checking what is in them ---


def _check_index(directory: Path, tensors: Mapping[str, _Stored]) -> None:
    if not (directory / INDEX).exists():
        return
    for name, file in _weight_map(directory).items():
        if name not in tensors and not is_derived(name):
            raise UserError(
                f"{directory / file} does not hold {name}, but {INDEX} says so; download both again"
            )


def _check_tensors(tensors: Mapping[str, _Stored], config: LlamaConfig, directory: Path) -> None:
    """Exactly the tensors that the config asks for, in its shapes; a tied head may be repeated."""
    for weight in weights(config):  # before any list of them: the layers may be too many for one
        if weight.hf not in tensors:
            raise UserError(
                f"tensor {weight.hf} is missing from {directory}; config.json and the weights are "
                "of different models, or a shard is missing"
            )
    expected = {weight.hf: weight for weight in weights(config)}
    for name, weight in expected.items():
        stored, shape = tensors[name], weight.shape(config)
        if stored.dtype not in STORED:
            raise UserError(
                f"{stored.file}: {name} is {stored.dtype}, expected one of {', '.join(STORED)}"
            )
        if stored.shape != shape:
            raise UserError(
                f"{stored.file}: {name} has shape {stored.shape}, config.json says {shape}"
            )
    for name in tensors:
        if name not in expected and not (config.tie_embeddings and name == HEAD.hf):
            raise UserError(
                f"{tensors[name].file}: unknown tensor {name}; expected only the weights of a "
                f"Llama with {config.n_layers} layers"
            )
    if config.tie_embeddings and HEAD.hf in tensors:
        embed, head = tensors[EMBED.hf], tensors[HEAD.hf]
        if not same_bits(embed.read(EMBED.hf), head.read(HEAD.hf)):
            raise UserError(
                f"{head.file}: {HEAD.hf} differs from {EMBED.hf}, but config.json says "
                "tie_word_embeddings; set it to false if the head was trained apart"
            )


if __name__ == "__main__":
    run(main, PROG)

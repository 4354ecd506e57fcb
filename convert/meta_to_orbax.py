"""Converts a Meta checkpoint (`consolidated.NN.pth`, `params.json`) to a model directory.

    python -m convert.meta_to_orbax --input DIR --output DIR

Everything is detected from the files: the number of ranks, along which axis the embedding is
split, the version, a tied head, KV heads that several ranks hold. The files are memory-mapped and
one tensor at a time is joined, permuted, cast and written, so the memory needed is a few times
the largest tensor, whatever the size of the model.
"""

import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from convert.names import (
    BY_VERSION,
    EMBED,
    HEAD,
    LAYER,
    Weight,
    halves_from_pairs,
    is_derived,
    weights,
)
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
from llama_jax.config import LlamaConfig, flatten_meta_params
from llama_jax.errors import UserError

if TYPE_CHECKING:
    import torch

PROG = "convert.meta_to_orbax"
SAFE_TORCH = (2, 10)  # older ones can be made to run code by a .pth file (CVE-2026-24747)
_TOKENIZERS = ("tokenizer.model", "../tokenizer.model", "tokenizer.json")

Shard = Mapping[str, "torch.Tensor"]  # one rank's tensors by Meta's names


def main(arguments: list[str]) -> None:
    parser = make_parser(PROG, (__doc__ or "").partition("\n\n")[0])
    parser.add_argument(
        "--rope-scale", type=float, metavar="FACTOR", help="default: 32 for Llama 3.2, 8 for 3.1"
    )
    args = parser.parse_args(arguments)
    convert(
        PROG,
        args,
        lambda: open_meta(args.input, dtype=args.dtype, rope_scale=args.rope_scale),
        _TOKENIZERS,
    )


def open_meta(path: str, *, dtype: str = "original", rope_scale: float | None = None) -> Source:
    """Opens and checks Meta's checkpoint in `path`, without reading its weights.

    Only the norms are read (each rank must hold the same) and, where the head may be tied, the
    embedding and the head. Raises `UserError` for everything that is not a whole checkpoint of
    one Llama.
    """
    require_safe_torch()
    directory = input_directory(path)
    files = _rank_files(directory)
    params = flatten_meta_params(read_json(directory / "params.json"))
    if not isinstance(dim := params.get("dim"), int):
        raise UserError(f"{directory / 'params.json'}: dim is {dim!r}, expected a whole number")
    shards = [_open_shard(file) for file in files]
    _check_same_model(files, shards)
    _check_rank_count(files, shards, dim)
    tied = _is_tied(shards, dim)
    config = LlamaConfig.from_meta(
        params,
        vocab_size=_whole_shape(shards, EMBED, dim)[0],
        mlp_dim=_whole_shape(shards, _layer_0("mlp/gate/kernel"), dim)[0],
        dtype=_dtype(_tensor(shards[0], EMBED.meta)).name,
        tied=tied,
        rope_scale=rope_scale,
    )
    copies = _kv_copies(shards, config)
    _check_shapes(files, shards, config, copies)
    _check_norms(files, shards, config)
    target = DTYPES.get(dtype)

    def lazy(weight: Weight) -> LazyArray:
        stored = _dtype(shards[0][weight.meta])
        return LazyArray(
            shape=weight.shape(config),
            dtype=target or stored,
            read=lambda: cast(_read(shards, weight, config, copies), target, weight.meta),
        )

    return Source(
        directory=directory,
        files=(*files, directory / "params.json"),
        md5=_read_checklist(directory),
        config=config,
        leaves={weight.path: lazy(weight) for weight in weights(config)},
    )


def _read(shards: list[Shard], weight: Weight, config: LlamaConfig, copies: int) -> np.ndarray:
    """One weight as our tree has it: at most the joined array and one permuted copy at a time."""
    axis = weight.meta_axis
    if axis == BY_VERSION:
        axis = _embedding_axis(shards, config.dim)
    if axis is None or len(shards) == 1:
        array = _numpy(shards[0][weight.meta])
    else:
        array = np.concatenate([_numpy(shard[weight.meta]) for shard in shards], axis)
    if copies > 1 and weight.axes[0] == "K":
        array = _drop_copies(array, weight, config, copies)
    return halves_from_pairs(array, weight.rope_heads(config)) if weight.rope else array


def _drop_copies(array: np.ndarray, weight: Weight, config: LlamaConfig, copies: int) -> np.ndarray:
    """One of every `copies` neighbouring KV heads, which must be the same."""
    heads = array.reshape(config.n_kv_heads, copies, config.head_dim, config.dim)
    first = heads[:, 0]
    for i in range(1, copies):
        if not same_bits(first, heads[:, i]):
            raise UserError(
                f"{weight.meta} holds {config.n_kv_heads * copies} KV heads, params.json says "
                f"{config.n_kv_heads}, and they are no {copies} copies of each; the shards or "
                "params.json are of different models"
            )
    return np.ascontiguousarray(first).reshape(-1, config.dim)


# --- opening files ---


def require_safe_torch() -> None:
    """Raises `UserError` unless a torch is installed that .pth files cannot make run code."""
    try:
        import torch
    except ImportError:
        raise UserError(
            "PyTorch is not installed, needed for .pth files; pip install 'torch>=2.10'"
        ) from None
    if tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2]) < SAFE_TORCH:
        raise UserError(
            f"torch {torch.__version__} can be made to run code by a .pth file (CVE-2026-24747); "
            "pip install 'torch>=2.10'"
        )


def _rank_files(directory: Path) -> list[Path]:
    found = {}
    for file in directory.glob("consolidated.*.pth"):
        if match := re.fullmatch(r"consolidated\.(\d+)\.pth", file.name):
            if not file.is_file():
                raise UserError(f"{file} is no file, expected weights; download it again")
            found[int(match[1])] = file
    if not found:
        if any(directory.glob("*.safetensors")):
            hint = "it is a Hugging Face checkpoint, run python -m convert.hf_to_orbax"
        elif is_model_directory(directory):
            hint = "it is already a model directory"
        else:
            hint = "name the directory that holds Meta's weights"
        raise UserError(f"no consolidated.NN.pth in {directory}; {hint}")
    for rank in range(max(found) + 1):
        if rank not in found:
            raise UserError(
                f"{directory / f'consolidated.{rank:02d}.pth'} is missing, but "
                f"{found[max(found)].name} is there; copy all ranks"
            )
    return [found[rank] for rank in sorted(found)]


def _open_shard(file: Path) -> Shard:
    """One rank's tensors, memory-mapped. No code in the file is run."""
    import torch

    _check_is_torch_file(file)
    with unreadable_is_user_error(file, "a PyTorch checkpoint"):
        try:
            shard = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        except pickle.UnpicklingError:
            raise UserError(
                f"{file} asks to run code or holds other things than tensors, and was not loaded; "
                "expected Meta's weights; download them again from a source that you trust"
            ) from None
    if not isinstance(shard, dict):
        raise UserError(f"{file} holds a {type(shard).__name__}, expected a dict of tensors")
    for name, value in shard.items():
        if not isinstance(name, str):
            raise UserError(f"{file}: key {name!r} is no string, expected the names of tensors")
        if not isinstance(value, torch.Tensor):
            raise UserError(f"{file}: {name} is a {type(value).__name__}, expected a tensor")
        if value.layout != torch.strided or value.is_nested or value.device.type != "cpu":
            raise UserError(f"{file}: {name} is {value.layout}, expected a dense tensor with data")
        _dtype(value, f"{file}: {name}")
        if value.ndim not in (1, 2) or not value.numel():
            raise UserError(
                f"{file}: {name} has shape {tuple(value.shape)}, expected a vector or a matrix "
                "that is not empty; download it again"
            )
    return {name: value for name, value in shard.items() if not is_derived(name)}


def _check_is_torch_file(file: Path) -> None:
    """Tells the usual accidents apart before torch sees the file."""
    with open(file, "rb") as stream:
        start = stream.read(512).lstrip()
    if start[:1] == b"<":
        raise UserError(f"{file} is a web page, expected weights; the download failed, repeat it")
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"{file} is a Git LFS pointer, expected weights; run git lfs pull")
    if zipfile.is_zipfile(file):
        return
    if start[:2] == b"PK" or not start:
        raise UserError(f"{file} is truncated at {file.stat().st_size:,} bytes; download it again")
    raise UserError(
        f"{file} is not a PyTorch checkpoint (no zip archive); download it again, or if an old "
        "torch wrote it, save it anew with torch.save"
    )


def _read_checklist(directory: Path) -> dict[str, str]:
    """{file name: md5} of Meta's `checklist.chk`, {} where there is none."""
    file = directory / "checklist.chk"
    if not file.exists():
        return {}
    md5 = {}
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        match = re.fullmatch(r"([0-9a-fA-F]{32})[ \t]+\*?(?:\./)?(\S+)\s*", line)
        if not match and line.strip():
            raise UserError(f"{file}: {line!r} is no 'md5  file' line; download it again")
        if match:
            md5[match[2]] = match[1].lower()
    return md5


# --- checking what is in them ---


def _tensor(shard: Shard, name: str) -> "torch.Tensor":
    if name not in shard:
        raise UserError(
            f"tensor {name} is missing from the checkpoint; the weights and params.json are of "
            "different models, or the files are not Meta's"
        )
    return shard[name]


def _dtype(tensor: "torch.Tensor", name: str = "") -> np.dtype:
    stored = str(tensor.dtype).removeprefix("torch.")
    if stored not in DTYPES:
        raise UserError(f"{name} is {stored}, expected one of {', '.join(DTYPES)}")
    return DTYPES[stored]


def _numpy(tensor: "torch.Tensor") -> np.ndarray:
    """The tensor's memory as a NumPy array; no copy unless it is strided."""
    import torch

    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:  # unknown to NumPy itself
        return tensor.view(torch.int16).numpy().view(DTYPES["bfloat16"])
    return tensor.numpy()


def _layer_0(path: str) -> Weight:
    weight = next(weight for weight in LAYER if weight.path == path)
    return replace(weight, meta=weight.meta.format(i=0))


def _check_same_model(files: list[Path], shards: list[Shard]) -> None:
    """Every rank must hold the same names with the same shapes and types."""
    different = "the shards are of different models; copy all ranks of one model"
    for file, shard in zip(files[1:], shards[1:], strict=True):
        if extra := sorted(set(shard) ^ set(shards[0])):
            raise UserError(f"only one of {files[0]} and {file.name} holds {extra[0]}; {different}")
        for name, tensor in shard.items():
            first = shards[0][name]
            if (tensor.shape, tensor.dtype) != (first.shape, first.dtype):
                raise UserError(
                    f"{name} is {first.dtype} {tuple(first.shape)} in {files[0]}, but "
                    f"{tensor.dtype} {tuple(tensor.shape)} in {file.name}; {different}"
                )


def _check_rank_count(files: list[Path], shards: list[Shard], dim: int) -> None:
    """`wo` is [dim, dim / ranks]: its shape tells how many ranks there were."""
    weight = _layer_0("attention/o/kernel")
    shape = tuple(_tensor(shards[0], weight.meta).shape)
    if len(shape) != 2 or shape[0] != dim or dim % shape[1]:
        raise UserError(
            f"{files[0]}: {weight.meta} has shape {shape}, but params.json says dim {dim}; "
            "the weights and params.json are of different models"
        )
    implied = dim // shape[1]
    if implied != len(files):
        last = files[0].with_name(f"consolidated.{implied - 1:02d}.pth")
        what = f"copy the others up to {last.name}" if implied > len(files) else "remove the others"
        raise UserError(
            f"{files[0]} is one of {implied} ranks by the shape {shape} of {weight.meta}, but "
            f"{files[0].parent} holds {len(files)}; {what}"
        )


def _embedding_axis(shards: list[Shard], dim: int) -> int:
    """Along which axis the ranks of the embedding are joined: the one that makes `dim` columns."""
    shape = tuple(_tensor(shards[0], EMBED.meta).shape)
    if len(shape) == 2 and shape[1] == dim:
        return 0
    if len(shape) == 2 and shape[1] * len(shards) == dim:
        return 1
    raise UserError(
        f"{EMBED.meta} has shape {shape} in each of {len(shards)} ranks, but params.json says dim "
        f"{dim}; the weights and params.json are of different models"
    )


def _whole_shape(shards: list[Shard], weight: Weight, dim: int) -> tuple[int, ...]:
    """The shape of a weight over all ranks."""
    axis = _embedding_axis(shards, dim) if weight.meta_axis == BY_VERSION else weight.meta_axis
    shape = list(_tensor(shards[0], weight.meta).shape)
    if axis is not None and axis < len(shape):
        shape[axis] *= len(shards)
    return tuple(shape)


def _is_tied(shards: list[Shard], dim: int) -> bool:
    """Whether the head equals the embedding in every element; mostly one row settles it."""
    axis = _embedding_axis(shards, dim)
    embed = [_tensor(shard, EMBED.meta) for shard in shards]
    head = [_tensor(shard, HEAD.meta) for shard in shards]
    if _whole_shape(shards, EMBED, dim) != _whole_shape(shards, HEAD, dim):
        return False
    if embed[0].dtype != head[0].dtype:
        return False
    width = embed[0].shape[1]
    if not same_bits(_numpy(embed[0][:1]), _numpy(head[0][:1, :width])):
        return False
    # Rank by rank of the head, which is split over the vocabulary: never both whole at once.
    rows = head[0].shape[0]
    for rank, part in enumerate(head):
        if axis == 0:
            same = same_bits(_numpy(embed[rank]), _numpy(part))
        else:
            of_rank = [_numpy(columns[rank * rows : (rank + 1) * rows]) for columns in embed]
            same = same_bits(np.concatenate(of_rank, 1), _numpy(part))
        if not same:
            return False
    return True


def _kv_copies(shards: list[Shard], config: LlamaConfig) -> int:
    """How many ranks hold each KV head: 2 for 405B on 16 ranks, which has 8 heads; else 1."""
    rows = _whole_shape(shards, _layer_0("attention/k/kernel"), config.dim)[0]
    return max(1, rows // (config.n_kv_heads * config.head_dim))


def _check_shapes(files: list[Path], shards: list[Shard], config: LlamaConfig, copies: int) -> None:
    """Exactly the tensors that the config asks for, in the shapes that it gives them."""
    for weight in weights(config):  # before any list of them: the layers may be too many for one
        _tensor(shards[0], weight.meta)
    expected = {weight.meta: weight for weight in weights(config)} | {HEAD.meta: HEAD}
    for name in shards[0]:
        if name not in expected:
            raise UserError(
                f"{files[0]}: unknown tensor {name}; expected only the weights of a Llama with "
                f"{config.n_layers} layers"
            )
    for name, weight in expected.items():
        shape = list(weight.shape(config))
        if weight.axes[0] == "K":
            shape[0] *= copies
        if (found := _whole_shape(shards, weight, config.dim)) != tuple(shape):
            raise UserError(
                f"{files[0]}: {name} has shape {found} over {len(files)} ranks, params.json says "
                f"{tuple(shape)}; the weights and params.json are of different models"
            )


def _check_norms(files: list[Path], shards: list[Shard], config: LlamaConfig) -> None:
    """Every rank holds the norms, and the same ones."""
    for weight in weights(config):
        if weight.meta_axis is not None:
            continue
        first = _numpy(shards[0][weight.meta])
        for file, shard in zip(files[1:], shards[1:], strict=True):
            if not same_bits(first, _numpy(shard[weight.meta])):
                raise UserError(
                    f"{weight.meta} differs between {files[0]} and {file.name}; the shards are of "
                    "different models; copy all ranks of one model"
                )


if __name__ == "__main__":
    run(main, PROG)

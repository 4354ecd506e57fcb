"""Converts a model directory to a Meta checkpoint of any number of ranks.

    python -m convert.orbax_to_meta --checkpoint DIR --output DIR --ranks 2

Each tensor is read once and cut into raw files, one a rank, which torch.save then copies from the
page cache into `consolidated.NN.pth`: the memory needed is a few times the largest tensor, and
the disk holds the model twice for a while.
"""

import errno
import json
import os
import re
import time
from pathlib import Path

import numpy as np

from convert.meta_to_orbax import require_safe_torch
from convert.names import (
    BY_VERSION,
    EMBED,
    HEAD,
    Weight,
    meta_embedding_axis,
    pairs_from_halves,
    weights,
)
from convert.progress import progress, say, summary
from convert.source import model_leaves
from llama_jax.checkpoint import LazyArray, load_config, new_directory, refuse_quantized
from llama_jax.command import ArgumentParser, run
from llama_jax.config import LlamaConfig
from llama_jax.errors import UserError
from llama_jax.tokenizer import tokenizer_file

PROG = "convert.orbax_to_meta"


def main(arguments: list[str]) -> None:
    parser = ArgumentParser(prog=PROG, description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="model directory")
    parser.add_argument("--output", required=True, metavar="DIR", help="directory to write")
    parser.add_argument("--ranks", type=int, default=1, metavar="N", help="files to split into")
    args = parser.parse_args(arguments)
    started = time.monotonic()

    # What is there
    if "://" in args.output:
        raise UserError(f"--output {args.output} is remote, expected a local directory for torch")
    require_safe_torch()
    config = load_config(args.checkpoint)
    refuse_quantized(args.checkpoint)
    params = config.to_meta()
    check_ranks(config, args.ranks)
    leaves = model_leaves(args.checkpoint, config)
    size = sum(leaf.nbytes for leaf in leaves.values())
    tokenizer = tokenizer_file(args.checkpoint)

    # Write it: cut every tensor, then save rank by rank
    needed = size + size // args.ranks  # the raw files, and one rank's own
    with (
        new_directory(args.output, needed) as staging,
        progress("converting", 2 * size) as advance,
    ):
        ranks = [_Rank(Path(staging), rank) for rank in range(args.ranks)]
        for weight in weights(config):
            parts = _cut(weight, leaves[weight.path].read(), config, args.ranks)
            for rank, part in zip(ranks, parts, strict=True):
                rank.append(weight.meta, part)
            advance(weight.meta, leaves[weight.path].nbytes)
        if config.tie_embeddings:
            _repeat_embedding_as_head(ranks, leaves[EMBED.path], config)
        for rank in ranks:
            rank.save()
            advance(rank.file.name, size // len(ranks))
        tokenizer.copy(staging / tokenizer.name)
        (staging / "params.json").write_text(json.dumps(params) + "\n")
    seconds = time.monotonic() - started

    dtype = str(np.dtype(leaves[EMBED.path].dtype))
    say(f"{PROG}: wrote {args.output}: {summary(config, dtype, size, seconds)}")


def check_ranks(config: LlamaConfig, ranks: int) -> None:
    """Raises `UserError` unless the model can be split over that many ranks.

    More ranks than KV heads are possible: each head is then held by several.
    """
    if misfit := _misfit(config, ranks):
        fit = [str(n) for n in range(1, config.n_heads + 1) if not _misfit(config, n)]
        raise UserError(f"--ranks is {ranks}, expected {misfit}; {', '.join(fit)} would work")


def _misfit(config: LlamaConfig, ranks: int) -> str | None:
    """What the number of ranks should have been and is not."""
    sizes = {
        "n_heads": config.n_heads,
        "mlp_dim": config.mlp_dim,
        "vocab_size": config.vocab_size,
        "dim": config.dim,
    }
    for name, value in sizes.items():
        if ranks < 1 or value % ranks:
            return f"a divisor of {name} {value}"
    if config.n_kv_heads % ranks and ranks % config.n_kv_heads:
        return f"a divisor or a multiple of {config.n_kv_heads} KV heads"
    return None


def _cut(weight: Weight, array: np.ndarray, config: LlamaConfig, ranks: int) -> list[np.ndarray]:
    """One weight in Meta's row order, cut as Meta's ranks hold it."""
    if weight.rope:
        array = pairs_from_halves(array, weight.rope_heads(config))
    if weight.axes[0] == "K" and ranks > config.n_kv_heads:
        heads = np.split(array, config.n_kv_heads)
        return [heads[rank * config.n_kv_heads // ranks] for rank in range(ranks)]
    axis = weight.meta_axis
    if axis is None:
        return [array] * ranks
    return np.split(
        array, ranks, meta_embedding_axis(config.version) if axis == BY_VERSION else axis
    )


class _Rank:
    """One rank's tensors, gathered in a raw file and saved by torch from there."""

    def __init__(self, directory: Path, rank: int):
        self.file = directory / f"consolidated.{rank:02d}.pth"
        self._raw = self.file.with_suffix(".raw")
        self._raw.touch()
        self._tensors: dict[str, tuple[int, tuple[int, ...], np.dtype]] = {}
        self._same: dict[str, str] = {}

    def append(self, name: str, array: np.ndarray) -> None:
        with open(self._raw, "ab") as stream:
            self._tensors[name] = (stream.tell(), array.shape, array.dtype)
            stream.write(np.ascontiguousarray(array).view(np.uint8).data)

    def alias(self, name: str, of: str) -> None:
        """`name` is the tensor `of`; torch stores both once, as Meta's 3.2 files do."""
        self._same[name] = of

    def save(self) -> None:
        import torch

        raw = np.memmap(self._raw, np.uint8, mode="r+")
        tensors = {}
        for name, (offset, shape, dtype) in self._tensors.items():
            size = int(np.prod(shape)) * dtype.itemsize
            # A storage of its own, as torch.save writes all of the storage behind a tensor.
            part = torch.from_numpy(raw[offset : offset + size])
            tensors[name] = part.view(getattr(torch, dtype.name)).view(shape)
        tensors |= {name: tensors[of] for name, of in self._same.items()}
        try:
            torch.save(tensors, self.file)
        except RuntimeError as error:  # all that torch says of a full disk
            if not re.search("unexpected pos|file write failed", str(error)):
                raise
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.file)) from None
        self._raw.unlink()


def _repeat_embedding_as_head(ranks: list[_Rank], leaf: LazyArray, config: LlamaConfig) -> None:
    """Meta's files of a tied model hold the head as well."""
    if len(ranks) == 1 or meta_embedding_axis(config.version) == HEAD.meta_axis:
        for rank in ranks:
            rank.alias(HEAD.meta, of=EMBED.meta)
    else:
        for rank, part in zip(ranks, _cut(HEAD, leaf.read(), config, len(ranks)), strict=True):
            rank.append(HEAD.meta, part)


if __name__ == "__main__":
    run(main, PROG)

"""What the converters share about the files they read: JSON, hashes, tokenizers, casts.

Also the reading of one tensor of a model directory, because a converter that goes back never
holds more than one.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import ml_dtypes
import numpy as np
from etils import epath

from convert.names import weights
from convert.progress import progress
from llama_jax.checkpoint import (
    LazyArray,
    check_shapes,
    open_tree,
    param_shapes,
    refuse_unfinished,
)
from llama_jax.config import LlamaConfig
from llama_jax.errors import UserError

DTYPES: dict[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
_BLOCK = 1 << 22


def input_directory(path: str) -> Path:
    """`path` as a directory that exists and is finished; raises `UserError` otherwise."""
    directory = Path(path)
    if not directory.is_dir():
        what = "is a file" if directory.exists() else "does not exist"
        raise UserError(f"{directory} {what}, expected the directory of a checkpoint")
    refuse_unfinished(directory)
    return directory


def is_model_directory(directory: Path) -> bool:
    return (directory / "config.json").is_file() and (directory / "params").is_dir()


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in `file`; raises `UserError` if it is missing, not UTF-8 or no object."""
    try:
        value = json.loads(file.read_bytes().decode("utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file} is missing; copy it from where the weights came from") from None
    except IsADirectoryError:
        raise UserError(f"{file} is a directory, expected a JSON file; download it again") from None
    except UnicodeDecodeError:
        raise UserError(f"{file} is not UTF-8 text, expected JSON; download it again") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{file} is not valid JSON ({error}); download it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{file} holds a JSON {type(value).__name__}, expected an object")
    return value


# --- values ---


def cast(array: np.ndarray, dtype: np.dtype | None, name: str) -> np.ndarray:
    """`array` as `dtype` (None: as it is); a finite value that overflows is a `UserError`."""
    if dtype is None or array.dtype == dtype:
        return array
    with np.errstate(over="ignore", invalid="ignore"):
        out = array.astype(dtype)
    for rows_in, rows_out in zip(_row_blocks(array), _row_blocks(out), strict=True):
        if not np.isfinite(rows_out).all() and np.isfinite(rows_in[~np.isfinite(rows_out)]).any():
            largest = float(np.nanmax(np.abs(rows_in.astype(np.float32))))
            raise UserError(
                f"{name} holds {largest:.6g}, which {dtype} cannot; use --dtype bfloat16 or float32"
            )
    return out


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether every element is the same bit for bit (NaNs and signed zeros included)."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    bits = np.dtype(f"u{a.dtype.itemsize}")
    return all(
        np.array_equal(x.view(bits), y.view(bits))
        for x, y in zip(_row_blocks(a), _row_blocks(b), strict=True)
    )


def _row_blocks(array: np.ndarray) -> Iterator[np.ndarray]:
    """Blocks of rows, so that a temporary of one block is small beside the array."""
    rows = max(1, _BLOCK * len(array) // max(1, array.size))
    for start in range(0, len(array), rows):
        yield array[start : start + rows]


# --- one tensor of a model directory ---


def model_leaves(directory: str, config: LlamaConfig) -> dict[str, LazyArray]:
    """Every tensor of the model directory by path, unread; checks names and shapes.

    Local ones are mapped: reading such a leaf takes no memory of its own.
    Raises `UserError` naming what is missing or of the wrong shape.
    """
    stored = open_tree(epath.Path(directory) / "params")
    check_shapes(directory, stored, param_shapes(config))

    def leaf(path: str) -> LazyArray:
        node = stored
        for key in path.split("/"):
            node = node[key]
        mapped = isinstance(node, np.ndarray)
        read = (lambda: node) if mapped else (lambda: _read_zarr(directory, path))
        return LazyArray(tuple(node.shape), np.dtype(node.dtype), read)

    return {weight.path: leaf(weight.path) for weight in weights(config)}


def _read_zarr(directory: str, path: str) -> np.ndarray:
    import tensorstore as ts

    array = epath.Path(directory) / "params" / path.replace("/", ".")
    url = str(array) if "://" in str(array) else f"file://{Path(array).absolute()}"
    try:
        spec = {"driver": "zarr", "kvstore": url}
        return ts.open(spec, open=True, read=True).result().read().result()
    except ValueError as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{array} is damaged ({reason}); convert the model again") from None


def verify(directory: str, config: LlamaConfig, source: Mapping[str, LazyArray]) -> None:
    """Reads every tensor of the model directory back and compares it with its source.

    Raises `RuntimeError` naming the first tensor that differs in any bit: a defect of ours.
    """
    written = model_leaves(directory, config)
    with progress("verifying", sum(leaf.nbytes for leaf in source.values())) as advance:
        for path, leaf in source.items():
            if not same_bits(written[path].read(), leaf.read()):
                raise RuntimeError(f"{directory}: {path} differs from its source after writing")
            advance(path, leaf.nbytes)


# --- tokenizers ---


def find_tokenizer(directory: Path, given: str | None, names: Iterable[str]) -> Path:
    """The tokenizer's file: `given`, or the first of `names` in `directory`.

    Raises `UserError` where there is none.
    """
    names = tuple(names)
    found = [directory / name for name in names if (directory / name).is_file()]
    if given is not None:
        found = [Path(given)]
        if not found[0].is_file():
            raise UserError(f"--tokenizer {given} is no file, expected tokenizer.model or .json")
    if not found:
        raise UserError(
            f"no {' or '.join(names)} in {directory}; give the tokenizer's file with "
            "--tokenizer FILE"
        )
    return found[0]


@contextlib.contextmanager
def under_its_usual_name(tokenizer: Path) -> Iterator[Path]:
    """The file, called as a model directory calls its format: in a copy where it is not."""
    with open(tokenizer, "rb") as stream:
        is_json = stream.read(64).lstrip().startswith(b"{")
    name = "tokenizer.json" if is_json else "tokenizer.model"
    if tokenizer.name == name:
        yield tokenizer
        return
    with tempfile.TemporaryDirectory() as temporary:
        yield Path(shutil.copy(tokenizer, Path(temporary) / name))


def check_tokenizer(file: Path, vocab_size: int) -> None:
    """Raises `UserError` unless the tokenizer's ids and the embedding's rows agree in number."""
    from llama_jax.tokenizer import load_tokenizer

    size = load_tokenizer(file).vocab_size
    if size != vocab_size:
        raise UserError(
            f"tokenizer of the wrong size: {file} has {size} ids, but the embedding has "
            f"{vocab_size} rows; give the model's own with --tokenizer FILE"
        )


# --- hashes and provenance ---


class Hashes:
    """sha256 of files, computed in threads while the same files are converted.

    hashlib releases the interpreter lock, and the pages are shared with the conversion through
    the page cache. One core is left to the conversion, which is faster than one thread's hashing.
    Where `md5` has an expected value for a file's name, it is checked as well.
    """

    def __init__(self, files: Iterable[Path], md5: Mapping[str, str] | None = None):
        self._files, self._md5 = tuple(files), dict(md5 or {})
        self._stop = threading.Event()
        self._threads = ThreadPoolExecutor(max(1, (os.cpu_count() or 1) - 1))

    def __enter__(self) -> Self:
        self._entries = [self._threads.submit(self._hash, file) for file in self._files]
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._threads.shutdown(cancel_futures=True)

    def result(self) -> list[dict[str, Any]]:
        """[{"file", "bytes", "sha256"}] once all are read; `UserError` names a wrong md5."""
        return [entry.result() for entry in self._entries]

    def _hash(self, file: Path) -> dict[str, Any]:
        sha256, expected = hashlib.sha256(), self._md5.get(file.name)
        md5 = hashlib.md5(usedforsecurity=False) if expected else None
        with open(file, "rb", buffering=0) as stream:
            while block := stream.read(_BLOCK):
                if self._stop.is_set():
                    raise CancelledError
                sha256.update(block)
                if md5:
                    md5.update(block)
        if md5 and md5.hexdigest() != expected:
            raise UserError(
                f"{file} has md5 {md5.hexdigest()}, checklist.chk says {expected}; download it again"
            )
        size = file.stat().st_size
        return {"file": file.name, "bytes": size, "sha256": sha256.hexdigest()}


def provenance(tool: str, dtype: str) -> dict[str, Any]:
    """What a model directory tells of its origin, beside the source files themselves."""
    try:
        version = importlib.metadata.version("llama-jax")
    except importlib.metadata.PackageNotFoundError:
        version = "unknown"
    return {"tool": tool, "version": version, "dtype": dtype}


@contextlib.contextmanager
def unreadable_is_user_error(file: Path, expected: str) -> Iterator[None]:
    """Any failure of a third-party reader of `file` as one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001  malformed files raise anything
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{file} cannot be read as {expected} ({reason}); download it again"
        ) from None

"""Model directories: written a tensor at a time, restored straight onto their devices.

A model directory holds `config.json`, `tokenizer.model` or `tokenizer.json`, `provenance.json`
and `params/`, an Orbax PyTree checkpoint that stock Orbax restores. Kernels keep torch's
[out, in] layout. `params/` is plain zarr, one array a tensor, uncompressed: weights do not
compress, and an uncompressed chunk goes from the source to the file without another copy.

Paths may be local or `gs://`. Conversion, quantization and the model itself are not known here.
"""

import contextlib
import errno
import json
import logging
import math
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from etils import epath

from llama_jax.config import LlamaConfig
from llama_jax.errors import UserError
from llama_jax.quant import Quantization
from llama_jax.tokenizer import Tokenizer, load_tokenizer

Params = Any  # nested dicts of arrays, LazyArrays or jax.ShapeDtypeStructs

_STAGING = re.compile(r"\..+\.partial-[0-9a-f]{8}")  # of `new_directory`
REMOTE_CHUNK_BYTES = 64 << 20  # an object store is fastest with many requests at once


@dataclass(frozen=True)
class LazyArray:
    """A leaf whose data is read only when it is written."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def param_shapes(config: LlamaConfig) -> dict[str, Any]:
    """The shape of every parameter of `config`, as the nested dicts that `params/` holds."""
    d, h = config.dim, config.head_dim
    q, kv, f = config.n_heads * h, config.n_kv_heads * h, config.mlp_dim
    layer = {
        "attention": {
            "q": {"kernel": (q, d)},
            "k": {"kernel": (kv, d)},
            "v": {"kernel": (kv, d)},
            "o": {"kernel": (d, q)},
        },
        "mlp": {"gate": {"kernel": (f, d)}, "up": {"kernel": (f, d)}, "down": {"kernel": (d, f)}},
        "attention_norm": {"scale": (d,)},
        "mlp_norm": {"scale": (d,)},
    }
    head = {} if config.tie_embeddings else {"head": {"kernel": (config.vocab_size, d)}}
    return {
        "embed": {"embedding": (config.vocab_size, d)},
        **{f"layers_{i}": layer for i in range(config.n_layers)},
        "norm": {"scale": (d,)},
        **head,
    }


def abstract(
    config: LlamaConfig, quantization: Quantization | None = None, dtype: Any = np.float32
) -> Params:
    """The parameters of `config` as `jax.ShapeDtypeStruct`s, inside of quantized leaves as well.

    `dtype` is that of plain arrays, and what quantized leaves stand for.
    """
    shapes = param_shapes(config)
    plain = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, dtype),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )
    return plain if quantization is None else jax.eval_shape(quantization, plain)


@contextlib.contextmanager
def new_directory(path: str | os.PathLike, needed: int = 0) -> Iterator[epath.Path]:
    """Yields an empty directory that becomes `path` at the end, or vanishes on any exception.

    It stands beside `path` as `.NAME.partial-XXXXXXXX`, so that a killed process leaves nothing
    under the final name, and what it leaves is known by its name (`refuse_unfinished`).
    Raises `UserError` where `path` exists, at the start and at the end, and where the disk has
    no room for `needed` bytes or fills up.
    """
    path = _absolute(path)
    _refuse_existing(path)
    _refuse_small_disk(path, needed)
    with _full_disk_is_user_error(path, needed):
        yield from _staged(path)


def _staged(path: epath.Path) -> Iterator[epath.Path]:
    staging = path.parent / f".{path.name}.partial-{secrets.token_hex(4)}"
    try:
        staging.mkdir(parents=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{path}: {path.parent} is not a directory; name another one") from None
    try:
        yield staging
        _refuse_existing(path)
        staging.rename(path)
    except BaseException:
        if staging.exists():
            staging.rmtree()
        raise


def refuse_unfinished(path: str | os.PathLike) -> None:
    """Raises `UserError` where `path` is a directory that `new_directory` has not renamed yet.

    Even one that looks complete: only the renaming says that it is.
    """
    if _STAGING.fullmatch(_absolute(path).name):
        raise UserError(
            f"{path} is unfinished: what wrote it was interrupted, or is still at work; if it was "
            "interrupted, run it again and delete this directory"
        )


@dataclass(frozen=True)
class Model:
    """What `load` reads from a model directory."""

    config: LlamaConfig
    params: Params
    tokenizer: Tokenizer


def load(path: str | os.PathLike, *, dtype: Any = None, shardings: Any = None) -> Model:
    """Config, parameters (see `load_params`) and tokenizer of the model directory `path`.

    Raises `UserError` if any of them is missing, damaged, or does not fit the others.
    """
    config = load_config(path)
    tokenizer = load_tokenizer(_absolute(path))
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} tokens, the model "
            f"{config.vocab_size}; convert the model again with its own tokenizer"
        )
    return Model(config, load_params(path, dtype=dtype, shardings=shardings), tokenizer)


def save_model(
    path: str | os.PathLike,
    config: LlamaConfig,
    params: Params,
    *,
    tokenizer: str | os.PathLike | None,
    provenance: dict[str, Any],
    progress: Callable[[str, int], None] | None = None,
) -> None:
    """Writes a model directory; leaves nothing behind if it fails.

    `params` is a tree of arrays and `LazyArray`s, read one at a time in the order of the sorted
    tree. `tokenizer` is a file, copied as `tokenizer` and its suffix. `progress(name, bytes)` is
    called once a tensor is written. Raises `UserError` if `path` exists or the disk is too small.
    """
    needed = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    with new_directory(path, needed) as staging:
        save_tree(staging / "params", params, progress)
        if tokenizer is not None:
            tokenizer = epath.Path(tokenizer)
            tokenizer.copy(staging / f"tokenizer{tokenizer.suffix}")
        (staging / "provenance.json").write_text(json.dumps(provenance, indent=2) + "\n")
        (staging / "config.json").write_text(json.dumps(config.to_dict(), indent=2) + "\n")


def load_config(path: str | os.PathLike) -> LlamaConfig:
    """The config of the model directory `path`; `UserError` says what is wrong with it."""
    path = _absolute(path)
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise UserError(f"{path} {what}, expected a model directory")
    refuse_unfinished(path)
    if not (path / "config.json").is_file() or not (path / "params").is_dir():
        raise UserError(f"{path} is not a model directory: {_what_instead(path)}")
    file = path / "config.json"
    try:
        fields = json.loads(file.read_bytes().decode("utf-8"))
    except UnicodeDecodeError:
        raise UserError(
            f"{file} is not UTF-8 text, expected JSON; convert the model again"
        ) from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{file} is not valid JSON ({error}); convert the model again") from None
    if not isinstance(fields, dict):
        raise UserError(f"{file} holds a {type(fields).__name__}, expected a JSON object")
    return LlamaConfig.from_dict(fields)


def abstract_params(path: str | os.PathLike) -> Params:
    """The tree of `path` as `jax.ShapeDtypeStruct`s; reads metadata only."""
    return _abstract(open_tree(_absolute(path) / "params"))


def load_params(
    path: str | os.PathLike, *, dtype: Any = None, shardings: Any = None
) -> dict[str, Any]:
    """The parameters of the model directory `path` on their devices.

    `shardings` is one sharding or a tree of them (default: the first device). Each leaf is cast
    to `dtype` (default: as stored) on its devices, one after the other. On one CPU device, and
    without a cast, the arrays are the mapped files themselves: nothing is read until it is used.
    Raises `UserError` naming a tensor that is missing, unknown or of the wrong shape.
    """
    path = _absolute(path)
    config = load_config(path)
    stored = open_tree(path / "params")
    check_shapes(path, stored, param_shapes(config))
    return load_tree(path / "params", stored, dtype=dtype, shardings=shardings)


def check_shapes(path: str | os.PathLike, stored: Params, expected: dict[str, Any]) -> None:
    """Raises `UserError` unless `stored` has exactly the names and shapes of `expected`."""
    stored = {name: tuple(leaf.shape) for name, leaf in _flat(stored).items()}
    expected = _flat(expected)
    for name in expected:
        if name not in stored:
            raise UserError(f"{path}: {name} is missing; convert the model again")
    for name, shape in stored.items():
        if name not in expected:
            raise UserError(f"{path}: {name} is unknown to this config; convert the model again")
        if shape != expected[name]:
            raise UserError(f"{path}: {name} has shape {shape}, config.json says {expected[name]}")


def save_tree(
    directory: epath.Path, tree: Params, progress: Callable[[str, int], None] | None = None
) -> None:
    """Writes a tree of arrays and `LazyArray`s as an Orbax checkpoint, one leaf at a time."""
    import orbax.checkpoint as ocp

    def lazy(leaf: Any) -> LazyArray:
        if isinstance(leaf, LazyArray):
            return leaf
        if isinstance(leaf, jax.Array):  # a copy, because an array keeps what asarray fetches
            return LazyArray(leaf.shape, leaf.dtype, lambda: np.asarray(leaf.copy()))
        return LazyArray(leaf.shape, leaf.dtype, lambda: leaf)

    tree = jax.tree.map(lazy, tree)
    chunks = None if _is_local(directory) else REMOTE_CHUNK_BYTES
    save_args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=chunks), tree)
    with _quiet(), ocp.Checkpointer(_handler(ocp, progress)) as checkpointer:
        checkpointer.save(directory, ocp.args.PyTreeSave(tree, save_args))


def open_tree(directory: epath.Path) -> Params:
    """The leaves of the Orbax checkpoint `directory`, none of them read yet.

    A leaf is a read-only array mapped from its file where the checkpoint is local and in the
    layout of `save_tree`, and a `jax.ShapeDtypeStruct` in any other layout that Orbax knows.
    """
    with _damage_is_user_error(directory):
        metadata = json.loads((directory / "_METADATA").read_bytes())
        entries = metadata["tree_metadata"].values()
        paths = [[key["key"] for key in entry["key_metadata"]] for entry in entries]
        leaves = {"/".join(path): _map_array(directory / ".".join(path)) for path in paths}
        if all(leaf is not None for leaf in leaves.values()):
            return nested(leaves)

        import orbax.checkpoint as ocp

        with _quiet():
            return _abstract(ocp.PyTreeCheckpointHandler().metadata(directory).tree)


def load_tree(
    directory: epath.Path, stored: Params, *, dtype: Any = None, shardings: Any = None
) -> dict[str, Any]:
    """Puts the leaves `stored = open_tree(directory)` on their devices, cast to `dtype`."""
    if shardings is None:
        shardings = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    if isinstance(shardings, jax.sharding.Sharding):
        shardings = jax.tree.map(lambda _, one=shardings: one, stored)
    if not all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(stored)):
        return _restore(directory, stored, dtype, shardings)

    def put(host: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
        array = jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])
        return array if dtype is None else jax.block_until_ready(array.astype(dtype))

    return jax.tree.map(put, stored, shardings)


def _restore(directory: epath.Path, stored: Params, dtype: Any, shardings: Any) -> Params:
    """`load_tree` by Orbax itself, for remote directories and foreign layouts."""
    import orbax.checkpoint as ocp

    def arguments(leaf: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding) -> Any:
        target = leaf.dtype if dtype is None else dtype
        return ocp.ArrayRestoreArgs(
            restore_type=jax.Array, sharding=sharding, global_shape=leaf.shape, dtype=target
        )

    restore_args = jax.tree.map(arguments, stored, shardings)
    checkpointer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
    with _quiet(), _damage_is_user_error(directory), checkpointer:
        return checkpointer.restore(directory, ocp.args.PyTreeRestore(restore_args=restore_args))


def _map_array(directory: epath.Path) -> np.ndarray | None:
    """The zarr array `directory` mapped into memory, or None unless it is one raw local file."""
    if not _is_local(directory) or not (directory / ".zarray").exists():
        return None
    zarray = json.loads((directory / ".zarray").read_bytes())
    shape = tuple(zarray["shape"])
    keys = "compressor", "filters", "order", "dimension_separator", "chunks"
    if [zarray[key] for key in keys] != [None, None, "C", ".", list(shape)] or not shape:
        return None
    file = directory / ".".join("0" * len(shape))
    dtype = np.dtype(zarray["dtype"])
    if file.stat().length != math.prod(shape) * dtype.itemsize:
        raise ValueError(
            f"{file} has {file.stat().length} bytes, expected shape {shape} of {dtype}"
        )
    return np.asarray(np.memmap(file, dtype, "r", shape=shape))


def _handler(ocp: Any, progress: Callable[[str, int], None] | None) -> Any:
    """Orbax's handler of trees, with `LazyArray` as a further type of leaf."""
    import tensorstore as ts

    context = ts.Context({"file_io_sync": False})

    class LazyHandler(ocp.type_handlers.NumpyHandler):
        async def serialize(self, values, infos, args=None):
            for value, info, arg in zip(values, infos, args or [], strict=True):
                array = value.read()
                if array.shape != tuple(value.shape) or array.dtype != value.dtype:
                    raise TypeError(f"{info.name}: read {array.dtype}{array.shape}, not {value}")
                info = info.replace(ts_context=context)
                futures = await super().serialize([array], [info], [arg])
                while futures:
                    futures.pop().result()
                del array, futures
                if progress:
                    progress(info.name, value.nbytes)
            return []

    lazy = LazyHandler(deepcopy_host_arrays=False)
    registry = ocp.type_handlers.create_type_handler_registry(
        (LazyArray, lazy), (jax.Array, ocp.type_handlers.ArrayHandler())
    )
    return ocp.PyTreeCheckpointHandler(
        use_ocdbt=False, use_compression=False, type_handler_registry=registry
    )


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """{"a/b": x} as {"a": {"b": x}}."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def _flat(tree: Params) -> dict[str, Any]:
    """{"layers_0.mlp.up.kernel": leaf, ...}, the names that Orbax gives to the arrays."""
    leaves = jax.tree.leaves_with_path(tree, is_leaf=lambda node: isinstance(node, tuple))
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _what_instead(path: epath.Path) -> str:
    if list(path.glob("consolidated.*.pth")):
        return "it is a Meta checkpoint; run python -m convert.meta_to_orbax first"
    if list(path.glob("*.safetensors")) or list(path.glob("pytorch_model*.bin")):
        return "it is a Hugging Face checkpoint; run python -m convert.hf_to_orbax first"
    missing = [name for name in ("config.json", "params") if not (path / name).exists()]
    if not missing:
        wrong = "config.json is no file" if (path / "config.json").is_dir() else "params is a file"
        return f"{wrong} in it; convert the model again"
    return f"no {' and no '.join(missing)} in it; name the directory that a converter wrote"


def _abstract(tree: Params) -> Params:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def _absolute(path: str | os.PathLike) -> epath.Path:
    path = epath.Path(path)
    return epath.Path(os.path.abspath(path)) if _is_local(path) else path


def _refuse_existing(path: epath.Path) -> None:
    if path.exists():
        raise UserError(f"{path} exists already; name a new directory or remove it")


def _is_local(path: epath.Path) -> bool:
    return "://" not in os.fspath(path)


def _free_bytes(path: epath.Path) -> int:
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def _disk_full(path: epath.Path, needed: int) -> UserError:
    free = f", {_size(_free_bytes(path))} free" if _is_local(path) else ""
    return UserError(
        f"{path}: disk full: needs {_size(needed)}{free}; make room or write elsewhere"
    )


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


def _refuse_small_disk(path: epath.Path, needed: int) -> None:
    if _is_local(path) and _free_bytes(path) < needed:
        raise _disk_full(path, needed)


@contextlib.contextmanager
def _full_disk_is_user_error(path: epath.Path, needed: int) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:  # tensorstore raises ValueError, the reason in its text
        if not any(os.strerror(code) in str(error) for code in (errno.ENOSPC, errno.EDQUOT)):
            raise
        raise _disk_full(path, needed) from None


@contextlib.contextmanager
def _damage_is_user_error(directory: epath.Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        known = (OSError, ValueError, KeyError, TypeError, AttributeError)
        if not isinstance(error, known) and type(error) is not Exception:  # Orbax raises that
            raise
        reason = " ".join(str(error.__cause__ or error).split())[:200]
        raise UserError(
            f"{directory} is damaged or incomplete ({reason}); convert the model again"
        ) from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps Orbax's notes, and its tracebacks of errors that we report, from the user's terminal."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)

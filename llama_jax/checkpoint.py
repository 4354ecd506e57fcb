"""Model directories: written a tensor at a time, restored straight onto their devices.

A model directory holds `config.json`, `tokenizer.model` or `tokenizer.json`, `provenance.json`
and `params/`, an Orbax PyTree checkpoint that stock Orbax restores. Kernels keep torch's
[out, in] layout. `params/` is plain zarr, one array a tensor, uncompressed: weights do not
compress, and an uncompressed chunk goes from the source to the file without another copy.

The arrays inside of quantized leaves are stored like any other (`layers_0.mlp.up.kernel.values`),
those of 4 bits two to a byte, the first in the low bits. `quantization.json` says how to read them,
and has the fingerprint (`llama_jax.adapter`) of the model that they were made of.

Paths may be local or `gs://`. Conversion and the model itself are not known here.
"""

import collections
import contextlib
import errno
import functools
import importlib.util
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
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh

from llama_jax import sharding
from llama_jax.config import LlamaConfig
from llama_jax.errors import UserError
from llama_jax.lora import attach
from llama_jax.quant import Int4, Int8, Quantization, Quantized, whole_bytes
from llama_jax.tokenizer import Tokenizer, load_tokenizer

Params = Any  # nested dicts of arrays, LazyArrays or jax.ShapeDtypeStructs

DEMO = epath.Path(__file__).parent / "demo"  # the model directory that is part of this project
_STAGING = re.compile(r"\..+\.partial-[0-9a-f]{8}")  # of `new_directory`
QUANTIZATION = "quantization.json"
_AGAIN = "make it again, or copy it again from where it is whole"
NIBBLES = (np.dtype(jnp.int4), np.dtype(jnp.uint4))
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
    path = absolute(path)
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
    if _STAGING.fullmatch(absolute(path).name):
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
    quantization: Quantization | None = None


def load(
    path: str | os.PathLike,
    *,
    dtype: Any = None,
    quantize: str | Quantization | None = None,
    mesh: str | Mesh | None = None,
    lora: str | os.PathLike | None = None,
) -> Model:
    """Config, parameters (see `load_params`) and tokenizer of the model directory `path`.

    Args:
      dtype: of the activations, and of all parameters that are not quantized (as stored).
      quantize: a kind such as "int8", or all of a `Quantization`, where the stored parameters are
        not quantized already.
      mesh: the devices to split the parameters over, such as "data=2,tensor=4" (the first one).
      lora: an adapter directory; its adapters stand beside their kernels, in their own dtype.

    Raises `UserError` if any part is missing, damaged, does not fit the others or the memory.
    """
    from llama_jax import adapter  # which is made of this module

    config = load_config(path)
    tokenizer = load_tokenizer(absolute(path))
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} tokens, the model "
            f"{config.vocab_size}; convert the model again with its own tokenizer"
        )
    stored, _ = load_quantization(path)
    if isinstance(quantize, str):
        quantize = Quantization(quantize)
    opened = None  # before the model is read, because a mistake should be told at once
    if lora is not None:
        opened = adapter.open_adapter(lora, abstract(config), adapter.fingerprint(path))
    params = load_params(path, dtype=dtype, quantize=quantize, mesh=mesh)
    if opened is not None:
        params = attach(params, adapter.read(opened, sharding.mesh_of(params)))
    return Model(config, params, tokenizer, quantize or stored)


def save_model(
    path: str | os.PathLike,
    config: LlamaConfig,
    params: Params,
    *,
    tokenizer: str | os.PathLike | None,
    provenance: dict[str, Any],
    progress: Callable[[str, int], None] | None = None,
    quantization: Quantization | None = None,
    base: str | None = None,
) -> None:
    """Writes a model directory; leaves nothing behind if it fails.

    Args:
      params: a tree of arrays and `LazyArray`s, read one at a time in the order of the sorted tree.
      tokenizer: a file, copied as `tokenizer` and its suffix; None writes none.
      provenance: what `provenance.json` says of where the model comes from.
      progress: called with the name and the bytes of each tensor that is written.
      quantization: how the quantized leaves of `params` were made.
      base: the fingerprint of the model that they were made of.

    Raises `UserError` if `path` exists or the disk is too small.
    """
    with new_directory(path, stored_bytes(params)) as staging:
        save_tree(staging / "params", params, progress)
        if tokenizer is not None:
            tokenizer = epath.Path(tokenizer)
            tokenizer.copy(staging / f"tokenizer{tokenizer.suffix}")
        if quantization is not None:
            how = quantization.to_dict() | {"dtype": str(_stands_for(params))}
            told = how if base is None else how | {"base": base}
            (staging / QUANTIZATION).write_text(json.dumps(told, indent=2) + "\n")
            provenance = provenance | {"quantization": how}
        (staging / "provenance.json").write_text(json.dumps(provenance, indent=2) + "\n")
        (staging / "config.json").write_text(json.dumps(config.to_dict(), indent=2) + "\n")


def load_config(path: str | os.PathLike) -> LlamaConfig:
    """The config of the model directory `path`; `UserError` says what is wrong with it."""
    path = absolute(path)
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


def load_quantization(path: str | os.PathLike) -> tuple[Quantization | None, np.dtype]:
    """How the parameters of the model directory `path` are quantized, and what they stand for.

    None and float32 where they are not. Raises `UserError` for what this version cannot read.
    """
    quantization, dtype, _ = _read_quantization(path)
    return quantization, dtype


def quantized_base(path: str | os.PathLike) -> str | None:
    """The fingerprint of the model that the model directory `path` was quantized from, if told."""
    return _read_quantization(path)[2]


def _read_quantization(
    path: str | os.PathLike,
) -> tuple[Quantization | None, np.dtype, str | None]:
    file = absolute(path) / QUANTIZATION
    if not file.exists():
        return None, np.dtype(np.float32), None
    if file.is_dir():
        raise UserError(f"{file} is a directory, expected a file; quantize the model again")
    try:
        fields = json.loads(file.read_bytes().decode("utf-8"))
        dtype, base = np.dtype(fields.pop("dtype")), fields.pop("base", None)
        if not isinstance(base, str | None):
            raise TypeError(f"base is {base!r}")
        return Quantization(**fields), dtype, base
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{file} is not what convert.quantize writes ({reason}); quantize the model again"
        ) from None


def refuse_quantized(path: str | os.PathLike) -> None:
    """Raises `UserError` where the model directory `path` is quantized."""
    quantization, _ = load_quantization(path)
    if quantization is not None:
        raise UserError(
            f"{path} is quantized to {quantization.kind}, expected the model that it was made of"
        )


def abstract_params(
    path: str | os.PathLike, *, dtype: Any = None, quantize: Quantization | None = None
) -> Params:
    """What `load_params` makes of `path`, as `jax.ShapeDtypeStruct`s; reads metadata only.

    Raises `UserError` naming a tensor that is missing, unknown or of the wrong shape.
    """
    path = absolute(path)
    stored = open_tree(path / "params")
    source = _expected(path, load_config(path), stored, *load_quantization(path))
    return _target(source, quantize, dtype)


def load_params(
    path: str | os.PathLike,
    *,
    dtype: Any = None,
    quantize: Quantization | None = None,
    mesh: str | Mesh | None = None,
    shardings: Any = None,
) -> dict[str, Any]:
    """The parameters of the model directory `path` on their devices.

    Without a `mesh` that is the first device; `shardings`, one or a tree of them, is for other
    ways to split parameters that are not quantized. Each leaf is cast to `dtype` (default: as
    stored) or quantized on its devices, one after the other: the whole model is never there in
    another form. Of quantized leaves `dtype` is what they stand for; their arrays stay as they
    are. On one CPU device, and without a cast, the arrays are the mapped files themselves: nothing
    is read until it is used. Raises `UserError` naming a tensor that is missing, unknown or of the
    wrong shape, and where the memory is too small.
    """
    path = absolute(path)
    config = load_config(path)
    quantization, stands_for = load_quantization(path)
    if quantization and quantize:
        raise UserError(
            f"{path} is quantized to {quantization.kind} already; load it as it is, or quantize "
            "the model that it was made of"
        )
    stored = open_tree(path / "params")
    source = _expected(path, config, stored, quantization, stands_for)
    target = _target(source, quantize, dtype)
    if mesh is not None:
        mesh = sharding.make_mesh(mesh, config) if isinstance(mesh, str) else mesh
        read, shardings = sharding.shardings(source, mesh), sharding.shardings(target, mesh)
        _refuse_straddling_groups(path, target, shardings)
    else:
        read, shardings = _one_for_all(shardings, source), _one_for_all(shardings, target)
    made_of = () if target is source else sharding.placed(source, read)
    _refuse_large(path, made_of, sharding.placed(target, shardings))
    if quantization is None and quantize is None:
        return load_tree(path / "params", stored, dtype=dtype, shardings=shardings)
    as_stored = jax.tree.map(_fitting, nested(_flat(read), "."), stored)
    return _load_quantized(path / "params", stored, as_stored, target, shardings, quantize)


def _load_quantized(
    directory: epath.Path,
    stored: Params,
    as_stored: Any,
    target: Params,
    shardings: Any,
    quantize: Quantization | None,
) -> dict[str, Any]:
    """`load_tree` to the leaves of `target`, quantized here or already in what is stored.

    Arrays are read to the shardings `as_stored`, and become what lies as `shardings` says.
    """
    # Of a model that is quantized here leaves are made, of a quantized one arrays inside of leaves
    leaves = _whole if quantize else _flat
    goals: Any = leaves(target)
    places: Any = leaves(shardings)

    def finish(name: str, array: jax.Array) -> Any:
        goal, place = goals[name], places[name]
        if quantize is not None and isinstance(goal, Quantized):
            made: Any = _quantizer(quantize, place.replace(dtype=array.dtype))(array)
            return whole_bytes(made.replace(dtype=goals[name].dtype))
        if goal.dtype in NIBBLES:
            return whole_bytes(_unpacker(goal.dtype, place)(array))
        return array.astype(goal.dtype)

    loaded = leaves(load_tree(directory, stored, shardings=as_stored, finish=finish))
    structure = jax.tree.structure(target, is_leaf=_is_quantized if quantize else None)
    return jax.tree.unflatten(structure, [loaded[name] for name in goals])


@functools.cache
def _quantizer(quantization: Quantization, shardings: Any) -> Callable[[jax.Array], Quantized]:
    return jax.jit(quantization.quantize, out_shardings=shardings)


@functools.cache
def _unpacker(dtype: np.dtype, place: jax.sharding.Sharding) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda packed: unpack(packed, dtype), out_shardings=place)


def pack(array: np.ndarray) -> np.ndarray:
    """4-bit integers [..., n] as uint8 [..., n / 2], the first of two in the low bits."""
    nibbles = array.astype(np.int8).view(np.uint8) & 15
    return nibbles[..., ::2] | nibbles[..., 1::2] << 4


def unpack(packed: jax.Array, dtype: Any) -> jax.Array:
    """The inverse of `pack`."""
    nibbles = jnp.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)
    if dtype == jnp.int4:
        nibbles = (nibbles ^ 8).astype(jnp.int8) - 8
    return nibbles.astype(dtype)


def _expected(
    path: epath.Path,
    config: LlamaConfig,
    stored: Params,
    quantization: Quantization | None,
    stands_for: np.dtype,
) -> Params:
    """The tree that is stored as `jax.ShapeDtypeStruct`s, in the leaf types of `quantization`.

    Raises `UserError` naming the array that differs.
    """
    if quantization is None:
        check_shapes(path, stored, param_shapes(config))
        return _abstract(stored)
    expected = abstract(config, quantization, stands_for)
    form = _stored_form(expected)
    check_shapes(path, stored, jax.tree.map(lambda leaf: leaf.shape, form), QUANTIZATION)
    found, form = _flat(stored), _flat(form)

    def leaf(path_in_tree: tuple, leaf: Any) -> Any:
        name = _name(path_in_tree)
        if not isinstance(leaf, Quantized):
            return jax.ShapeDtypeStruct(leaf.shape, found[name].dtype)
        for inner, array in form.items():
            if inner.startswith(f"{name}.") and found[inner].dtype != array.dtype:
                raise UserError(
                    f"{path}: {inner} is of {found[inner].dtype}, {QUANTIZATION} says {array.dtype}"
                )
        return leaf

    return jax.tree.map_with_path(leaf, expected, is_leaf=_is_quantized)


def _target(source: Params, quantize: Quantization | None, dtype: Any) -> Params:
    """What becomes of the abstract tree `source`; it itself if nothing does.

    Plain leaves are of `dtype`, quantized ones stand for it.
    """
    tree = source if quantize is None else jax.eval_shape(quantize, source)
    if dtype is None:
        return tree

    def cast(leaf: Any) -> Any:
        if isinstance(leaf, Quantized):
            return leaf.replace(dtype=jnp.dtype(dtype))
        return jax.ShapeDtypeStruct(leaf.shape, dtype)

    return jax.tree.map(cast, tree, is_leaf=_is_quantized)


def _one_for_all(shardings: Any, tree: Params) -> Any:
    """A tree of shardings: `shardings` as it is, or one, by default the first device, for all."""
    if shardings is None:
        shardings = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    if isinstance(shardings, jax.sharding.Sharding):
        return jax.tree.map(lambda _: shardings, tree)
    return shardings


def _fitting(place: jax.sharding.Sharding, stored: Any) -> jax.sharding.Sharding:
    """`place`, or a copy on every device where two values of a byte go to different ones."""
    try:
        place.shard_shape(tuple(stored.shape))
    except ValueError:
        assert isinstance(place, jax.sharding.NamedSharding)
        return jax.sharding.NamedSharding(place.mesh, jax.sharding.PartitionSpec())
    return place


def _refuse_straddling_groups(path: epath.Path, target: Params, shardings: Any) -> None:
    """Raises `UserError` where a group of weights would lie on two devices.

    Every product would then gather the weights from all of them.
    """
    places = _whole(shardings)
    for name, leaf in _whole(target).items():
        if not isinstance(leaf, Int4):
            continue
        split = places[name].values.shard_shape(leaf.shape)[-1]
        group = leaf.shape[-1] // leaf.scale.shape[-1]
        if split % group:
            raise UserError(
                f"{path}: the groups of {group} of {name} do not fit on devices that hold {split} "
                f"of its {leaf.shape[-1]} inputs; quantize with --group-size "
                f"{math.gcd(split, group)}, or split the model over fewer"
            )


def _refuse_large(path: epath.Path, source: Params, target: Params) -> None:
    """Raises `UserError` where `target` does not fit beside the largest leaf of `source`.

    Both are abstract and placed.
    """
    needed: dict[Any, int] = collections.Counter()
    largest: dict[Any, int] = collections.Counter()
    for leaf in jax.tree.leaves(target):
        for device in leaf.sharding.addressable_devices:
            needed[device] += sharding.device_bytes(leaf)
    for leaf in jax.tree.leaves(source):
        for device in leaf.sharding.addressable_devices:
            largest[device] = max(largest[device], sharding.device_bytes(leaf))
    needed = {device: size + largest[device] for device, size in needed.items()}
    refuse_small_memory(needed, str(path))


def refuse_small_memory(needed: Mapping[Any, int], what: str) -> None:
    """Raises `UserError` unless every device, the key, has `needed` bytes left for `what`.

    Devices that are CPUs share the memory of this machine. A device that does not tell what it
    has passes.
    """
    on_host = sum(size for device, size in needed.items() if device.platform == "cpu")
    if on_host and (free := _host_memory()) is not None and on_host > free:
        raise _too_small(what, on_host, "this machine", free)
    for device, size in needed.items():
        if device.platform != "cpu" and (stats := device.memory_stats()):
            free = stats.get("bytes_limit", math.inf) - stats.get("bytes_in_use", 0)
            if size > free:
                raise _too_small(what, size, str(device), int(free))


def _too_small(what: str, needed: int, where: str, free: int) -> UserError:
    return UserError(
        f"{what} needs {format_bytes(needed)} of memory, {where} has {format_bytes(free)} left; split it over "
        "more devices with --mesh, or make it smaller with --quantize or --dtype"
    )


def _host_memory() -> int | None:
    """Bytes of memory that can be had on this machine; None where it does not tell."""
    try:
        with open("/proc/meminfo") as file:
            lines = dict(line.split(":") for line in file)
        return int(lines["MemAvailable"].split()[0]) << 10
    except (OSError, KeyError, ValueError):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def format_bytes(count: float) -> str:
    """1.25 GB; decimal, as disks and bandwidths are."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


def check_shapes(
    path: str | os.PathLike, stored: Params, expected: dict[str, Any], told_by: str = "config.json"
) -> None:
    """Raises `UserError` unless `stored` has exactly the names and shapes of `expected`.

    `path` is what holds them, and `told_by` its file that tells them.
    """
    stored = {name: tuple(leaf.shape) for name, leaf in _flat(stored).items()}
    expected = _flat(expected)
    for name in expected:
        if name not in stored:
            raise UserError(f"{path}: {name} is missing, but {told_by} tells of it; {_AGAIN}")
    for name, shape in stored.items():
        if name not in expected:
            raise UserError(f"{path}: {name} is unknown to {told_by}; {_AGAIN}")
        if shape != expected[name]:
            raise UserError(f"{path}: {name} has shape {shape}, {told_by} says {expected[name]}")


def first_rows(directory: epath.Path) -> Iterator[tuple[str, Any, np.ndarray]]:
    """Of each leaf of the Orbax checkpoint `directory` its name, itself unread, and its first row.

    In the order of their names. A vector is one row. Where files cannot be mapped a layer is read.
    """
    stored = open_tree(directory)
    mapped = all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(stored))
    for key in sorted(stored):
        part = {key: stored[key]}
        arrays = _flat(part if mapped else _restore(directory, part, None, None))
        for name, leaf in sorted(_flat(part).items()):
            yield name, leaf, np.asarray(arrays[name][:1] if leaf.ndim > 1 else arrays[name])


def save_tree(
    directory: epath.Path, tree: Params, progress: Callable[[str, int], None] | None = None
) -> None:
    """Writes a tree of arrays and `LazyArray`s as an Orbax checkpoint, one leaf at a time.

    By this process alone, whatever others do.
    """
    import orbax.checkpoint as ocp

    tree = _stored_form(tree)
    chunks = None if _is_local(directory) else REMOTE_CHUNK_BYTES
    save_args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=chunks), tree)
    alone = _alone(ocp)
    handler = _handler(ocp, progress, alone)
    with quiet(), ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
        checkpointer.save(directory, ocp.args.PyTreeSave(tree, save_args))


def stored_bytes(tree: Params) -> int:
    """How many bytes `save_tree` writes for these parameters."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(_stored_form(tree)))


def _stored_form(tree: Params) -> dict[str, Any]:
    """Nested dicts of `LazyArray`s, as they are stored: quantized leaves are dicts themselves.

    Values of 4 bits are packed, in whatever type they are in memory (`whole_bytes`).
    """
    packed = {f"{name}.values" for name, leaf in _whole(tree).items() if isinstance(leaf, Int4)}

    def lazy(name: str, leaf: Any) -> LazyArray:
        shape, dtype = tuple(leaf.shape), leaf.dtype
        if isinstance(leaf, LazyArray):
            read = leaf.read
        elif isinstance(leaf, jax.Array):  # a copy, because an array keeps what asarray fetches
            read = lambda: np.asarray(leaf.copy())  # noqa: E731
        else:
            read = lambda: leaf  # noqa: E731
        if name not in packed:
            return LazyArray(shape, dtype, read)
        return LazyArray((*shape[:-1], shape[-1] // 2), np.dtype(np.uint8), lambda: pack(read()))

    return nested({name: lazy(name, leaf) for name, leaf in _flat(tree).items()}, ".")


def open_tree(directory: epath.Path) -> Params:
    """The leaves of the Orbax checkpoint `directory`, none of them read yet.

    A leaf is a read-only array mapped from its file where the checkpoint is local and in the
    layout of `save_tree`, and a `jax.ShapeDtypeStruct` in any other layout that Orbax knows.
    """
    with damage_is_user_error(directory):
        metadata = json.loads((directory / "_METADATA").read_bytes())
        entries = metadata["tree_metadata"].values()
        paths = [[key["key"] for key in entry["key_metadata"]] for entry in entries]
        leaves = {"/".join(path): _map_array(directory / ".".join(path)) for path in paths}
        if all(leaf is not None for leaf in leaves.values()):
            return nested(leaves)

        import orbax.checkpoint as ocp

        with quiet():
            return _abstract(ocp.PyTreeCheckpointHandler().metadata(directory).tree)


def load_tree(
    directory: epath.Path,
    stored: Params,
    *,
    dtype: Any = None,
    shardings: Any = None,
    finish: Callable[[str, jax.Array], Any] | None = None,
) -> dict[str, Any]:
    """Puts the leaves `stored = open_tree(directory)` on their devices, cast to `dtype`.

    Of each array there `finish(name, array)` makes the leaf of the result; few are there at once.
    """
    shardings = _one_for_all(shardings, stored)

    def made(path: tuple, array: jax.Array) -> Any:
        return array if finish is None else jax.block_until_ready(finish(_name(path), array))

    def put(path: tuple, host: np.ndarray, place: jax.sharding.Sharding) -> Any:
        array = jax.make_array_from_callback(host.shape, place, lambda index: host[index])
        if dtype is not None:
            array = jax.block_until_ready(array.astype(dtype))
        return made(path, array)

    if all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(stored)):
        return jax.tree.map_with_path(put, stored, shardings)
    if finish is None:
        return _restore(directory, stored, dtype, shardings)
    tree = {}
    for key in stored:  # a layer at a time
        part = _restore(directory, {key: stored[key]}, dtype, {key: shardings[key]})
        tree |= jax.tree.map_with_path(made, part)
    return tree


def _restore(directory: epath.Path, stored: Params, dtype: Any, shardings: Any) -> Params:
    """`load_tree` by Orbax itself, for remote directories and foreign layouts.

    `stored` may be a part of what the directory holds. Without shardings arrays are NumPy's.
    """
    import orbax.checkpoint as ocp

    def how(leaf: jax.ShapeDtypeStruct, place: jax.sharding.Sharding | None) -> Any:
        target = leaf.dtype if dtype is None else dtype
        if place is None:
            return ocp.RestoreArgs(restore_type=np.ndarray, dtype=target)
        return ocp.ArrayRestoreArgs(
            restore_type=jax.Array, sharding=place, global_shape=leaf.shape, dtype=target
        )

    if shardings is None:
        restore_args = jax.tree.map(lambda leaf: how(leaf, None), stored)
    else:
        restore_args = jax.tree.map(how, stored, shardings)
    arguments = ocp.args.PyTreeRestore(stored, restore_args, partial_restore=True)
    checkpointer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
    with quiet(), damage_is_user_error(directory), checkpointer:
        return checkpointer.restore(directory, arguments)


def _map_array(directory: epath.Path) -> np.ndarray | None:
    """The zarr array `directory` mapped into memory, or None unless it is one raw local file."""
    if not _is_local(directory):
        return None
    if not (directory / ".zarray").exists():
        others = directory / "zarr.json", directory.parent / "manifest.ocdbt"
        if any(file.exists() for file in others):
            return None
        # Of the arrays that are read at once, Orbax leaves the others behind when one fails.
        raise FileNotFoundError(f"{directory / '.zarray'} is missing")
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


def _alone(ocp: Any) -> Any:
    """That Orbax is not to wait for other processes."""
    process = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=process, active_processes={process}, barrier_sync_key_prefix=f"of{process}"
    )


def _handler(ocp: Any, progress: Callable[[str, int], None] | None, alone: Any) -> Any:
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
        use_ocdbt=False,
        use_compression=False,
        type_handler_registry=registry,
        multiprocessing_options=alone,
    )


def nested(leaves: Mapping[str, Any], separator: str = "/") -> dict[str, Any]:
    """{"a/b": x} as {"a": {"b": x}}."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, name = path.split(separator)
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def _flat(tree: Params) -> dict[str, Any]:
    """{"layers_0.mlp.up.kernel": array, ...}, the names that Orbax gives to the arrays."""
    return _by_name(tree, lambda node: isinstance(node, tuple))


def _whole(tree: Params) -> dict[str, Any]:
    """`_flat`, but with quantized leaves as they are."""
    return _by_name(tree, _is_quantized)


def _by_name(tree: Params, is_leaf: Callable[[Any], bool]) -> dict[str, Any]:
    return {_name(path): leaf for path, leaf in jax.tree.leaves_with_path(tree, is_leaf=is_leaf)}


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _is_quantized(node: Any) -> bool:
    return isinstance(node, Quantized)


def _stands_for(params: Params) -> np.dtype:
    leaves = _whole(params).values()
    return next(leaf.dtype for leaf in leaves if isinstance(leaf, Int8 | Int4))


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


def absolute(path: str | os.PathLike) -> epath.Path:
    """A local path as an absolute one, which Orbax insists on; a remote path as it is.

    Raises `UserError` for gs:// without the package that reads it.
    """
    if os.fspath(path).startswith("gs://") and importlib.util.find_spec("gcsfs") is None:
        raise UserError(
            f"{path} needs gcsfs, which is not installed: python -m pip install 'etils[epath-gcs]'"
        )
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
    free = f", {format_bytes(_free_bytes(path))} free" if _is_local(path) else ""
    return UserError(
        f"{path}: disk full: needs {format_bytes(needed)}{free}; make room or write elsewhere"
    )


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
def damage_is_user_error(directory: epath.Path, remedy: str = _AGAIN) -> Iterator[None]:
    """Makes one line, with what to do, of what is raised where files are not as they were written."""
    try:
        yield
    except Exception as error:
        known = (OSError, ValueError, KeyError, TypeError, AttributeError)
        if not isinstance(error, known) and type(error) is not Exception:  # Orbax raises that
            raise
        reason = " ".join(str(error.__cause__ or error).split())[:200]
        raise UserError(f"{directory} is damaged or incomplete ({reason}); {remedy}") from None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps Orbax's notes, and its tracebacks of errors that we report, from the user's terminal."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)

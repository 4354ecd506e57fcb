"""Adapter directories: what was trained beside a model, and which model that was.

An adapter directory holds `adapter.json` (`LoraConfig` and the fingerprint of the base),
`provenance.json` and `params/`, an Orbax checkpoint as in a model directory, with the arrays
`layers_0/attention/q/lora/a` [rank, in], `.../b` [out, rank], and so on for each target of each
layer, in the dtype that they were trained in.

The fingerprint of a base is that of its unquantized model directory, however it is loaded.
"""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh

from llama_jax import checkpoint, lora, sharding
from llama_jax.checkpoint import absolute
from llama_jax.errors import UserError
from llama_jax.lora import NAME, Lora, LoraConfig
from llama_jax.model import Params, unstack

FILE = "adapter.json"
FORMAT = 1
_AGAIN = "copy the adapter again, or make it again"
_NUMBER = (int, float)
_FIELDS: dict[str, tuple[tuple[type, ...], str]] = {
    "format": ((int,), "a whole number"),
    "rank": ((int,), "a whole number"),
    "alpha": (_NUMBER, "a number"),
    "targets": ((list,), "a list"),
    "dropout": (_NUMBER, "a number"),
    "rslora": ((bool,), "true or false"),
    "base": ((str,), "a fingerprint"),
}


def fingerprint(path: str | os.PathLike) -> str:
    """sha256 over the config of the model directory `path` and a row of each of its tensors.

    Names, shapes and dtypes of the tensors count as well. A quantized model has the fingerprint of
    the model that it was made of. Raises `UserError` for what is no whole model directory.
    """
    checkpoint.load_config(path)  # refuses what is none
    path = absolute(path)
    if checkpoint.load_quantization(path)[0] is not None:
        base = checkpoint.quantized_base(path)
        if base is None:
            raise UserError(
                f"{path / checkpoint.QUANTIZATION} does not tell which model was quantized, so no "
                "adapter is known to fit; quantize the model again with python -m convert.quantize"
            )
        return base
    fields = json.loads((path / "config.json").read_bytes())
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
    for name, leaf, row in checkpoint.first_rows(path / "params"):
        digest.update(f"\n{name} {tuple(leaf.shape)} {np.dtype(leaf.dtype)}\n".encode())
        digest.update(np.ascontiguousarray(row).tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class Adapter:
    """An adapter directory that has been checked against its base but not read."""

    path: epath.Path
    config: LoraConfig
    stored: Params  # nested dicts of mapped arrays, or of `jax.ShapeDtypeStruct`s


def open_adapter(path: str | os.PathLike, params: Params, base: str) -> Adapter:
    """The adapter directory `path`, for the parameters `params` of the model `base`.

    Args:
      params: a tree of layers that are not stacked; arrays may be abstract, kernels quantized.
      base: the `fingerprint` of their model directory.

    Raises `UserError` for what is no whole adapter directory, and for one of another model.
    """
    path = absolute(path)
    config, trained_on = _read_config(path)
    if trained_on != base:
        raise UserError(
            f"{path} belongs to a model with the fingerprint {trained_on[:12]}, the one given has "
            f"{base[:12]}; give the model that the adapter was trained on, or train it again"
        )
    stored = checkpoint.open_tree(path / "params")
    expected = jax.eval_shape(lambda p: lora.add(p, config, jax.random.key(0)), params)
    shapes = jax.tree.map(lambda leaf: leaf.shape, _as_dicts(lora.adapters(expected)))
    checkpoint.check_shapes(path, stored, shapes, FILE)
    for key_path, leaf in jax.tree.leaves_with_path(stored):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            name = jax.tree_util.keystr(key_path, simple=True, separator=".")
            raise UserError(f"{path}: {name} is of {leaf.dtype}, expected floats; {_AGAIN}")
    return Adapter(path, config, stored)


def read(adapter: Adapter, mesh: Mesh | None = None) -> Params:
    """The tree of `Lora` leaves alone, in the dtype that they are stored in.

    Straight on the devices of `mesh`, or on the first one.
    """
    config = adapter.config

    def leaf(node: Any) -> Lora:
        return Lora(node["a"], node["b"], config.scale, config.dropout)

    def as_leaves(tree: Params) -> Params:
        return {n: leaf(node) if n == NAME else as_leaves(node) for n, node in tree.items()}

    places = None
    if mesh is not None:
        places = _as_dicts(sharding.shardings(as_leaves(adapter.stored), mesh))
    loaded = checkpoint.load_tree(adapter.path / "params", adapter.stored, shardings=places)
    return as_leaves(loaded)


def load_adapter(
    path: str | os.PathLike, params: Params, base: str, mesh: Mesh | None = None
) -> Params:
    """`params` with the adapters of the directory `path` beside their kernels, and none other.

    See `open_adapter` for the arguments, `read` for where they lie: by default on the mesh of
    `params`. Raises `UserError` as `open_adapter` does.
    """
    opened = open_adapter(path, params, base)
    return lora.attach(lora.drop(params), read(opened, mesh or sharding.mesh_of(params)))


def save_adapter(
    path: str | os.PathLike,
    params: Params,
    config: LoraConfig,
    base: str,
    provenance: dict[str, Any],
    progress: Callable[[str, int], None] | None = None,
) -> None:
    """Writes the adapters of `params` as an adapter directory; leaves nothing behind if it fails.

    To be called in every process of a run; the first one writes, and the others do not wait for it.

    Args:
      params: a tree with `Lora` leaves, stacked or not; all others are left out. `LazyArray`s are
        read one at a time.
      config: what the adapters were made by.
      base: the `fingerprint` of the model directory that they belong to.
      provenance: what `provenance.json` says of where the adapter comes from.
      progress: called with the name and the bytes of each array that is written.

    Raises `UserError` if `path` exists or the disk is too small, `ValueError` for adapters that
    are not those of `config`.
    """
    tree = jax.tree.map(_whole, lora.adapters(params))
    if "layers" in tree:
        tree = unstack(tree)
    _check(tree, config)
    tree = _as_dicts(tree)
    if jax.process_index() > 0:
        return
    fields = {"format": FORMAT, **config.to_json(), "base": base}
    with checkpoint.new_directory(path, checkpoint.stored_bytes(tree)) as staging:
        checkpoint.save_tree(staging / "params", tree, progress)
        (staging / "provenance.json").write_text(json.dumps(provenance, indent=2) + "\n")
        (staging / FILE).write_text(json.dumps(fields, indent=2) + "\n")


def _check(tree: Params, config: LoraConfig) -> None:
    if not tree:
        raise ValueError("no adapters in the tree")
    for name, layer in tree.items():
        found = {module: node[NAME] for half in layer.values() for module, node in half.items()}
        if set(found) != set(config.targets):
            raise ValueError(f"{name} has adapters of {sorted(found)}, not of {config.targets}")
        for module, leaf in found.items():
            ranks = leaf.a.shape[0], leaf.b.shape[1]
            if ranks != (config.rank, config.rank) or leaf.scale != config.scale:
                raise ValueError(
                    f"{name}.{module} has rank {ranks} and scale {leaf.scale}, not those of {config}"
                )


def _whole(array: Any) -> Any:
    """`array`, brought together where it lies on the devices of several processes."""
    if not isinstance(array, jax.Array) or array.is_fully_addressable:
        return array
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(array, tiled=True)


def _as_dicts(tree: Params) -> Params:
    """Each `Lora` as a dict, which is how it is stored."""
    return jax.tree.map(
        lambda leaf: {"a": leaf.a, "b": leaf.b},
        tree,
        is_leaf=lambda node: isinstance(node, Lora),
    )


def _read_config(path: epath.Path) -> tuple[LoraConfig, str]:
    """What `adapter.json` says, and the fingerprint of the base."""
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise UserError(f"{path} {what}, expected an adapter directory")
    checkpoint.refuse_unfinished(path)
    file = path / FILE
    if not file.is_file() or not (path / "params").is_dir():
        raise UserError(f"{path} is not an adapter directory: {_what_instead(path)}")
    try:
        fields = json.loads(file.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not valid JSON ({error}); {_AGAIN}") from None
    if not isinstance(fields, dict):
        raise UserError(f"{file} holds a {type(fields).__name__}, expected an object; {_AGAIN}")
    if fields.get("format") != FORMAT:
        raise UserError(
            f"{file} is of format {fields.get('format')!r}, this version reads {FORMAT}; upgrade "
            "llama-jax, or make the adapter again"
        )
    for name, value in fields.items():
        if name not in _FIELDS:
            raise UserError(f"{file}: {name} is unknown; {_AGAIN}")
        types, expected = _FIELDS[name]
        if type(value) not in types:
            raise UserError(f"{file}: {name} is {value!r}, expected {expected}; {_AGAIN}")
    for name in _FIELDS:
        if name not in fields:
            raise UserError(f"{file}: {name} is missing; {_AGAIN}")
    base, targets = fields["base"], tuple(map(str, fields["targets"]))
    options = {name: fields[name] for name in ("rank", "alpha", "dropout", "rslora")}
    try:
        return LoraConfig(targets=targets, **options), base
    except UserError as error:
        raise UserError(f"{file}: {error}; {_AGAIN}") from None


def _what_instead(path: epath.Path) -> str:
    if (path / "adapter_config.json").exists():
        return "it is one of PEFT's; run python -m convert.peft_to_orbax first"
    if (path / "adapter" / FILE).exists():
        return f"name {path / 'adapter'}, which is one"
    if (path / "config.json").exists():
        return "it holds a model, not an adapter"
    missing = [name for name in (FILE, "params") if not (path / name).exists()]
    return f"no {' and no '.join(missing) or 'directory params'} in it; {_AGAIN}"

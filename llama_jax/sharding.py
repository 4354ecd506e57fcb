"""One program on many devices: the mesh, and the one table of what is split over which axis.

Weights are split as in Megatron-LM (arXiv 1909.08053): query, key, value, gate and up by their
rows, o and down by their columns, embedding and head by the vocabulary, so that a layer sums
partial results twice and nothing else crosses devices. Mesh axes:

  data    rows of the batch
  fsdp    rows of the batch as well, and the weights along the model dimension: each device holds a
          part of them and gathers a layer when it is due (ZeRO, arXiv 1910.02054)
  tensor  KV heads, and with them query heads, feed-forward and vocabulary
  query   where there are more devices than KV heads: all that `tensor` splits is split once more,
          except for the kernels of queries, keys and values. These are copied over it, and in a
          decode step each device attends for its part of the rows, whose cache it holds.

A user asks for `data=2,tensor=16` or `fsdp=8`; `make_mesh` makes `query` of what exceeds the KV
heads.
"""

import contextlib
import functools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llama_jax.config import LlamaConfig
from llama_jax.errors import UserError

AXES = ("data", "fsdp", "tensor", "query")
GATHERED = "gathered"  # name of what `gathered` makes, for policies of rematerialization

# Logical axis -> mesh axes. Where an axis does not divide the dimension, or another dimension of
# the same array has it already, it is left out.
RULES: dict[str | None, tuple[str, ...]] = {
    None: (),
    "batch": ("data", "fsdp"),
    "cache_batch": ("data", "fsdp", "query"),
    "embed": ("fsdp",),
    "kv_heads": ("tensor",),
    "heads": ("tensor", "query"),
    "mlp": ("tensor", "query"),
    "vocab": ("tensor", "query"),
}

# The logical axes of each parameter, by the two last names of its path.
PARAMS: dict[tuple[str, str], tuple[str | None, ...]] = {
    ("embed", "embedding"): ("vocab", "embed"),
    ("head", "kernel"): ("vocab", "embed"),
    ("q", "kernel"): ("kv_heads", "embed"),
    ("k", "kernel"): ("kv_heads", "embed"),
    ("v", "kernel"): ("kv_heads", "embed"),
    ("o", "kernel"): ("embed", "heads"),
    ("gate", "kernel"): ("mlp", "embed"),
    ("up", "kernel"): ("mlp", "embed"),
    ("down", "kernel"): ("embed", "mlp"),
    ("attention_norm", "scale"): (None,),
    ("mlp_norm", "scale"): (None,),
    ("norm", "scale"): (None,),
}


def make_mesh(sizes: str, config: LlamaConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of `sizes`, such as "data=2,tensor=4", for this model.

    `devices` default to all there are, of all processes; a smaller mesh takes the first ones
    where there is one process. Raises `UserError` for a size that the devices or the heads do not
    allow.
    """
    asked = _parse(sizes)
    devices = jax.devices() if devices is None else list(devices)
    count = math.prod(asked.values())
    if count > len(devices) or (count < len(devices) and jax.process_count() > 1):
        raise UserError(
            f"--mesh {sizes} needs {count} devices, but there are {len(devices)}; give sizes whose "
            "product is that, or less in a single process"
        )
    tensor, kv = asked["tensor"], config.n_kv_heads
    shared = min(tensor, kv)
    group = tensor // shared
    if kv % shared or tensor % shared or (config.n_heads // kv) % group:
        raise UserError(
            f"--mesh {sizes}: tensor={tensor} does not split {config.n_heads} query heads on {kv} "
            f"KV heads evenly; {_choices(config)} do"
        )
    for name, size in (("feed-forward", config.mlp_dim), ("vocabulary", config.vocab_size)):
        if size % tensor:
            raise UserError(
                f"--mesh {sizes}: tensor={tensor} does not divide the {name} of {size}; "
                f"{_choices(config)} do"
            )
    grid = np.array(devices[:count]).reshape(asked["data"], asked["fsdp"], shared, group)
    return Mesh(grid, AXES)


def tensor_sizes(config: LlamaConfig) -> list[int]:
    """All sizes of `tensor` that split this model evenly."""
    kv, group = config.n_kv_heads, config.n_heads // config.n_kv_heads
    heads = [n for n in range(1, kv + 1) if kv % n == 0]
    heads += [kv * n for n in range(2, group + 1) if group % n == 0]
    return [n for n in heads if config.mlp_dim % n == 0 and config.vocab_size % n == 0]


def batch_parts(mesh: Any) -> int:
    """Over how many devices the rows of a batch are split."""
    return math.prod(mesh.shape[axis] for axis in RULES["batch"])


def spec(shape: Sequence[int], axes: Sequence[str | None], mesh: Any) -> PartitionSpec:
    """`axes`, the logical axes of an array of this shape, as the mesh axes that split it."""
    used: set[str] = set()
    entries: list[tuple[str, ...]] = []
    for size, axis in zip(shape, axes, strict=True):
        taken: tuple[str, ...] = ()
        for name in RULES[axis]:
            parts = math.prod(mesh.shape[other] for other in (*taken, name))
            if name not in used and size % parts == 0:
                taken += (name,)
        used.update(taken)
        entries.append(taken)
    return PartitionSpec(*(entry or None for entry in entries))


def named(shape: Sequence[int], axes: Sequence[str | None], mesh: Mesh) -> NamedSharding:
    """`spec` on this mesh."""
    return NamedSharding(mesh, spec(shape, axes, mesh))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """`x`, split over the mesh in use (`use`) by its logical axes; as it is where there is none."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(x.shape, axes, mesh))


def part(shape: Sequence[int], *axes: str | None) -> tuple[int, ...]:
    """The shape of what a device has of an array with these logical axes, on the mesh in use."""
    mesh: Any = jax.sharding.get_abstract_mesh()
    return tuple(shape) if mesh.empty else named(shape, axes, mesh).shard_shape(tuple(shape))


def gathered(leaf: Any, *names: str) -> Any:
    """A kernel or an adapter whole along what fsdp splits, for the product that reads it.

    `names` are the two last ones of its path. It travels as it is stored, quantized or not, and its
    gradient the other way: summed, each device keeping its part. Left to itself XLA would gather
    it anew in every turn of a loop, and for TPUs take the product apart and pass the parts around.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape["fsdp"] == 1:
        return leaf
    return jax.tree.map_with_path(lambda path, x: _gather(x, _axes(names, path, x.ndim)), leaf)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gather(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    return checkpoint_name(_whole(x, axes), GATHERED)


def _gather_forward(x: jax.Array, axes: tuple[str | None, ...]) -> tuple[jax.Array, None]:
    return _gather(x, axes), None


def _gather_backward(axes: tuple[str | None, ...], _: None, gradient: jax.Array) -> tuple:
    return (constrain(_whole(gradient, axes), *axes),)


_gather.defvjp(_gather_forward, _gather_backward)


def _whole(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    """`x`, split as `constrain` would but for fsdp."""
    split = spec(x.shape, axes, jax.sharding.get_abstract_mesh())
    others = [
        [name for name in np.atleast_1d(entry) if name not in (None, "fsdp")] for entry in split
    ]
    whole = PartitionSpec(*(tuple(names) or None for names in others))
    return jax.lax.with_sharding_constraint(x, whole)


def _axes(names: Sequence[str], path: tuple, ndim: int) -> tuple[str | None, ...]:
    """The logical axes of the array at the end of `path`, in a leaf with these two last names.

    An array inside of a quantized leaf is split as the first axes of the kernel are, those of an
    adapter as the kernel is along the axis that they share.
    """
    if names[-1] != "lora":
        return PARAMS[names[-2], names[-1]][:ndim]
    out, width = PARAMS[names[-2], "kernel"]
    return (None, width) if path[-1].name == "a" else (out, None)


def shardings(params: Any, mesh: Mesh | None) -> Any:
    """Where each array of a parameter tree lies, those inside of its leaves included.

    On `mesh`, where stacked layers are not split, or on the first device.
    """
    if mesh is None:
        first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        return jax.tree.map(lambda _: first, params)

    def sharding(path: tuple, array: Any) -> NamedSharding:
        names = [str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey)]
        stacked = (None,) * ("layers" in names)
        axes = _axes(names, path, array.ndim - len(stacked))
        return named(array.shape, (*stacked, *axes), mesh)

    return jax.tree.map_with_path(sharding, params)


def placed(tree: Any, shardings: Any) -> Any:
    """`tree` as `jax.ShapeDtypeStruct`s that lie as a tree of shardings, or one for all, says."""
    if isinstance(shardings, jax.sharding.Sharding):
        shardings = jax.tree.map(lambda _: shardings, tree)
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, shardings
    )


def device_bytes(tree: Any) -> int:
    """Bytes that the part of each array takes that one device holds; arrays may be abstract.

    4-bit integers take half a byte, except on CPUs, where they take a whole one.
    """

    def size(x: Any) -> int:
        bits = jax.dtypes.itemsize_bits(x.dtype)
        if next(iter(x.sharding.device_set)).platform == "cpu":
            bits = max(bits, 8)
        return math.ceil(math.prod(x.sharding.shard_shape(tuple(x.shape))) * bits / 8)

    return sum(map(size, jax.tree.leaves(tree)))


def mesh_of(params: Any) -> Mesh | None:
    """The mesh that the parameters lie on; None on a single device."""
    sharding = jax.tree.leaves(params)[0].sharding
    if not isinstance(sharding, NamedSharding):
        return None
    assert isinstance(sharding.mesh, Mesh)
    return sharding.mesh


def on_shards(
    function: Callable[..., Any],
    arguments: Sequence[tuple[Any, Sequence[str | None]]],
    result: tuple[Any, Sequence[str | None]],
) -> Any:
    """`function` of what each device of the mesh in use holds: XLA cannot split a kernel itself.

    Each argument stands beside the logical axes of its arrays, as does a tree with the shapes of
    the result.
    """
    values = [value for value, _ in arguments]
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return function(*values)

    def specs(tree: Any, axes: Sequence[str | None]) -> Any:
        return jax.tree.map(lambda x: spec(x.shape, axes, mesh), tree)

    return jax.shard_map(
        function,
        in_specs=tuple(specs(*argument) for argument in arguments),
        out_specs=specs(*result),
        check_vma=False,  # Pallas does not say over which axes its results vary
    )(*values)


@contextlib.contextmanager
def use(mesh: Mesh | None) -> Iterator[None]:
    """Within it, `constrain` splits arrays over `mesh`."""
    if mesh is None:
        yield
    else:
        with jax.set_mesh(mesh):
            yield


def replicate(tree: Any, mesh: Mesh | None) -> Any:
    """Host arrays, the same in every process, on every device of the mesh."""
    target = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    return jax.device_put(jax.tree.map(np.asarray, tree), target)


def _parse(sizes: str) -> dict[str, int]:
    expected = (
        f'--mesh is {sizes!r}, expected sizes such as "data=2,tensor=4": data, fsdp and tensor, '
        "each at most once and at least 1"
    )
    asked = {"data": 1, "fsdp": 1, "tensor": 1}
    seen = set()
    for part in sizes.split(","):
        name, _, size = part.strip().partition("=")
        if name not in asked or name in seen or not re.fullmatch("0{0,9}[1-9][0-9]{0,9}", size):
            raise UserError(expected)
        seen.add(name)
        asked[name] = int(size)
    return asked


def _choices(config: LlamaConfig) -> str:
    return ", ".join(str(n) for n in tensor_sizes(config))

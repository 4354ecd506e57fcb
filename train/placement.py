"""Where the arrays of a training step lie on a mesh, and the step lowered for them."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llama_jax import sharding
from llama_jax.errors import UserError
from llama_jax.model import Params
from train.data import FIELDS, Rows
from train.step import State


@dataclass(frozen=True)
class Part:
    """Which rows of every batch this process has."""

    index: int
    count: int


def everywhere(mesh: Mesh | None) -> Any:
    """A copy on every device of the mesh."""
    if mesh is None:
        return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(ndim: int, mesh: Mesh | None) -> Any:
    """Of arrays [..., B, T]: rows over the mesh axes that split a batch."""
    if mesh is None:
        return everywhere(None)
    axes = sharding.RULES["batch"]
    return NamedSharding(mesh, PartitionSpec(*(None,) * (ndim - 2), axes, None))


def state_shardings(state: State, trained: Params, mesh: Mesh | None) -> State:
    """Where each array of an abstract state lies: an optimizer's where its parameter does.

    An array of an optimizer belongs to the parameter whose path its own ends with, if the shapes
    agree; the others are on every device.
    """
    if mesh is None:
        return jax.tree.map(lambda _: everywhere(None), state)
    places = jax.tree.leaves(sharding.shardings(trained, mesh))
    paths = jax.tree_util.tree_flatten_with_path(trained)[0]
    of = {path: (leaf.shape, place) for (path, leaf), place in zip(paths, places, strict=True)}

    def place(path: tuple, leaf: Any) -> NamedSharding:
        for begin in range(len(path)):
            shape, found = of.get(path[begin:], (None, None))
            if shape == leaf.shape and found is not None:
                return found
        return everywhere(mesh)

    return jax.tree.map_with_path(place, state)


def abstract_batch(rows: Rows, shape: tuple[int, ...], mesh: Mesh | None) -> Any:
    """A batch or window of `rows` in a global shape."""
    place = batch_sharding(len(shape), mesh)
    return {
        name: jax.ShapeDtypeStruct(shape, getattr(rows, name).dtype, sharding=place)
        for name in FIELDS
    }


def refuse_batch(batch: int, mesh: Mesh | None) -> None:
    """Raises `UserError` where the rows of a batch do not divide among the devices."""
    parts = 1 if mesh is None else sharding.batch_parts(mesh)
    if batch % parts:
        raise UserError(
            f"--batch is {batch}, but the mesh splits a batch into {parts} parts (data x fsdp); "
            f"take a multiple of {parts}"
        )


def own_part(batch: int, mesh: Mesh | None) -> Part:
    """Which rows of a batch the devices of this process have.

    Processes may have the same ones, where only weights are split between them.
    """
    if mesh is None:
        return Part(0, 1)
    rows: dict[int, set[int]] = {}
    places = batch_sharding(2, mesh).devices_indices_map((batch, 1))
    for device, (rows_of, _) in places.items():
        rows.setdefault(device.process_index, set()).add(rows_of.start or 0)
    parts = sorted({tuple(sorted(begins)) for begins in rows.values()})
    return Part(parts.index(tuple(sorted(rows[jax.process_index()]))), len(parts))


def global_shape(shape: tuple[int, ...], mesh: Mesh | None) -> tuple[int, ...]:
    """Of an array [..., B, T] of which a process has `shape`."""
    *front, rows, width = shape
    parts = 1 if mesh is None else _parts(mesh)
    return (*front, rows * parts, width)


@functools.cache
def _parts(mesh: Mesh) -> int:
    return own_part(sharding.batch_parts(mesh), mesh).count


def lower_step(
    step: Callable, state: State, frozen: Params, window: Any, mesh: Mesh | None
) -> jax.stages.Lowered:
    """`train.step.make_step`'s function, traced for arguments that may be abstract but lie somewhere.

    The next state lies where the one before did, whose memory it takes; metrics are everywhere.
    """
    places = jax.tree.map(lambda x: x.sharding, state)
    with sharding.use(mesh):
        program = jax.jit(step, donate_argnums=0, out_shardings=(places, everywhere(mesh)))
        return program.lower(state, frozen, window)

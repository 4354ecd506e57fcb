"""Layers stacked on an axis of their own, for a step that walks them by one compiled loop."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from llama_jax import sharding
from llama_jax.model import Params, stack


def stack_layers(params: Params, mesh: Mesh | None) -> Params:
    """`llama_jax.model.stack` of a tree on its devices, an array at a time.

    The arrays of single layers are gone afterwards: two copies of a model may not fit.
    """
    target: Any = jax.eval_shape(stack, params)
    places = sharding.shardings(target, mesh)
    names = [f"layers_{i}" for i in range(sum(name.startswith("layers_") for name in params))]
    layers = [jax.tree.leaves(params[name]) for name in names]
    stacked = []
    for arrays, where in zip(
        zip(*layers, strict=True), jax.tree.leaves(places["layers"]), strict=True
    ):
        stacked.append(jax.jit(lambda *x: jnp.stack(x), out_shardings=where)(*arrays))
        jax.block_until_ready(stacked[-1])
        for array in arrays:
            array.delete()
    rest = {name: node for name, node in params.items() if name not in names}
    return rest | {"layers": jax.tree.unflatten(jax.tree.structure(target["layers"]), stacked)}

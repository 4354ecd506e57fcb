"""Random weights of a config, for measurements: their values mean nothing."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax import checkpoint
from llama_jax.config import LlamaConfig
from llama_jax.quant import Params, Quantization, whole_bytes


def random_weights(
    config: LlamaConfig, dtype: Any, quantization: Quantization | None, shardings: Any
) -> Params:
    """Weights in the form of `quantization`, on their devices; norms are 1.

    Made leaf by leaf where they stay, and quantized there: never all of them in another form. They
    are the same for every form and for all `shardings`, a tree of that form.
    """
    seeds = itertools.count()

    def leaf(path: tuple, shape: jax.ShapeDtypeStruct, place: Any) -> Any:
        how = quantization if quantization is not None and quantization.covers(path) else None
        make = leaf_maker(shape.shape, shape.dtype, path[-1].key == "scale", how, place)
        return jax.block_until_ready(whole_bytes(make(jax.random.key(next(seeds)))))

    plain = checkpoint.abstract(config, None, jnp.dtype(dtype))
    return jax.tree.map_with_path(leaf, plain, shardings)


@functools.cache
def leaf_maker(
    shape: tuple[int, ...],
    dtype: np.dtype,
    is_norm: bool,
    quantization: Quantization | None,
    place: Any,
) -> Callable[[jax.Array], Any]:
    """What makes a leaf of a key; leaves of a kind share a compilation."""

    def make(key: jax.Array) -> Any:
        if is_norm:
            return jnp.ones(shape, dtype)
        # In float32, from which XLA rounds as it writes: 16-bit random numbers repeat soon.
        array = (0.02 * jax.random.normal(key, shape)).astype(dtype)
        return array if quantization is None else quantization.quantize(array)

    return jax.jit(make, out_shardings=place)

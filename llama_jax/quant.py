"""Quantized weights: leaves of the parameter tree that know how to multiply.

A quantized leaf stands for a kernel [out, in] or a table [V, D] and has its `shape` and `dtype`.
`dot` and `rows` take plain arrays and quantized leaves alike, so the model never asks which it
holds. Scales are applied after the product, where the kind permits: no dequantized weight is ever
as large as a weight.
"""

from dataclasses import dataclass
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import struct

Params = Any  # nested dicts of arrays and quantized leaves


class Quantized(struct.PyTreeNode):
    """What all kinds share. Their arrays have the leading axes of the array they stand for."""

    @classmethod
    def quantize(cls, array: jax.Array) -> Self:
        raise NotImplementedError

    @property
    def shape(self) -> tuple[int, ...]:
        raise NotImplementedError

    def dot(self, x: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
        """`x` [..., in] times the transposed kernel: [..., out] in `dtype`."""
        raise NotImplementedError

    def rows(self, index: jax.Array) -> jax.Array:
        """Rows of the table, dequantized: [*index.shape, D]."""
        raise NotImplementedError


class Int8(Quantized):
    """Symmetric int8, one scale for each vector along the last axis: x = values * scale.

    The scale is the largest magnitude / 127, so -128 is never used and nothing is clipped.
    """

    values: jax.Array  # int8 [..., n]
    scale: jax.Array  # float32 [...]
    dtype: Any = struct.field(pytree_node=False)  # of the array that it stands for

    @classmethod
    def quantize(cls, array: jax.Array) -> Self:
        values, scale = quantize_int8(array)
        return cls(values, scale, jnp.dtype(array.dtype))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def dot(self, x: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
        y = jnp.einsum(
            "...i,oi->...o", x, self.values.astype(x.dtype), preferred_element_type=jnp.float32
        )
        return (y * _like(self.scale, y)).astype(dtype)

    def rows(self, index: jax.Array) -> jax.Array:
        rows = self.values[index].astype(jnp.float32) * self.scale[index][..., None]
        return rows.astype(self.dtype)


class W8A8(Int8):
    """int8 weights times activations that are quantized for each token as they come."""

    def dot(self, x: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
        values, scale = quantize_int8(x)
        y = jnp.einsum("...i,oi->...o", values, self.values, preferred_element_type=jnp.int32)
        y = y.astype(jnp.float32) * scale[..., None] * _like(self.scale, y)
        return y.astype(dtype)


KINDS: dict[str, type[Quantized]] = {"int8": Int8, "w8a8": W8A8}


@dataclass(frozen=True)
class Quantization:
    """How the weights of a model are quantized."""

    kind: str  # one of KINDS
    embeddings: bool = False  # the embedding and the head as well

    def __call__(self, params: Params) -> Params:
        """`params` with the kernels (and tables) quantized; runs under `jit` and `eval_shape`."""

        def leaf(path: tuple, array: Any) -> Any:
            return KINDS[self.kind].quantize(array) if self.covers(path) else array

        return jax.tree.map_with_path(leaf, params)

    def covers(self, path: tuple) -> bool:
        """Whether the leaf at this path of the tree is quantized."""
        parent, name = (key.key for key in path[-2:])
        if parent in ("embed", "head"):
            return self.embeddings
        return name == "kernel"


def quantize_int8(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """int8 [..., n] and float32 scales [...] such that values * scale is nearest to x.

    A vector of zeros has scale 0. Rounds to the nearest, ties to even.
    """
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=-1) / 127
    values = jnp.round(x / jnp.where(scale == 0, 1, scale)[..., None])
    return values.astype(jnp.int8), scale


def dot(
    x: jax.Array, kernel: jax.Array | Quantized, dtype: jax.typing.DTypeLike | None = None
) -> jax.Array:
    """`x` [..., in] times the transposed `kernel` [out, in]: [..., out] in `dtype` (that of x)."""
    if isinstance(kernel, Quantized):
        return kernel.dot(x, dtype or x.dtype)
    return jnp.einsum("...i,oi->...o", x, kernel, preferred_element_type=dtype)


def rows(table: jax.Array | Quantized, index: jax.Array) -> jax.Array:
    """Rows [*index.shape, D] of a `table` [V, D]."""
    return table.rows(index) if isinstance(table, Quantized) else table[index]


def _like(vector: jax.Array, y: jax.Array) -> jax.Array:
    """[out] as [1, ..., out] with the rank of y."""
    return jnp.expand_dims(vector, range(y.ndim - 1))

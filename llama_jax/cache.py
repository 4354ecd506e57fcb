"""The key-value cache: static shapes, one length a row, an ordinary pytree in and out.

Layers are separate arrays laid out [B, K, S, H], so that the two products of attention read them
as they lie; with [B, S, K, H] XLA on CPU transposes the whole cache at every step (figures in
docs/LOG.md). Keys and values may be kept as int8, with a scale for each head and position.
"""

import jax
import jax.numpy as jnp
from flax import struct

from llama_jax.config import LlamaConfig
from llama_jax.quant import Int8
from llama_jax.sharding import constrain

# Keys and values of T positions of one layer, [B, K, T, H].
Entries = tuple[jax.Array | Int8, jax.Array | Int8]


class KVCache(struct.PyTreeNode):
    """Keys and values of all positions so far; slots from `length` on are never read."""

    layers: tuple[Entries, ...]  # L of them, S positions each
    length: jax.Array  # int32 [B]

    @property
    def capacity(self) -> int:
        """S, the most positions that a row can hold."""
        return self.layers[0][0].shape[2]


def init_cache(
    config: LlamaConfig,
    batch: int,
    capacity: int,
    dtype: jax.typing.DTypeLike,
    *,
    int8: bool = False,
) -> KVCache:
    """An empty cache for `batch` rows of at most `capacity` positions that are of `dtype`.

    With `int8` they are kept as int8 instead, which takes about half the memory of bfloat16.
    """
    shape = batch, config.n_kv_heads, capacity, config.head_dim

    def empty() -> jax.Array | Int8:
        zeros = jnp.zeros(shape, dtype)
        return Int8.quantize(zeros) if int8 else zeros

    layers = tuple((empty(), empty()) for _ in range(config.n_layers))
    return KVCache(layers, jnp.zeros(batch, jnp.int32))


def logical_axes(x: jax.Array) -> tuple[str | None, ...]:
    """How an array of the cache, [B, K, ...], is split (`llama_jax.sharding`)."""
    return "cache_batch", "kv_heads", *[None] * (x.ndim - 2)


def append(cache: KVCache, new: tuple[Entries, ...], lengths: jax.Array) -> KVCache:
    """Writes the first `lengths[b]` of each row's T new positions behind what is there.

    A row whose length is 0 is left as it is; positions beyond the capacity are dropped.

      length [2, 5], T 3, lengths [3, 1] -> slots 2, 3, 4 of row 0 and slot 5 of row 1
    """
    B, _, T, _ = new[0][0].shape
    steps_1T = jnp.arange(T)[None]
    valid_BT = steps_1T < lengths[:, None]
    slots_BT = jnp.where(valid_BT, cache.length[:, None] + steps_1T, cache.capacity)
    rows_B1 = jnp.arange(B)[:, None]

    def write(old_BKSH, new_BKTH):
        new_BTKH = jnp.swapaxes(new_BKTH, 1, 2).astype(old_BKSH.dtype)
        written = old_BKSH.at[rows_B1, :, slots_BT].set(new_BTKH, mode="drop")
        return constrain(written, *logical_axes(written))

    if isinstance(cache.layers[0][0], Int8):
        new = jax.tree.map(Int8.quantize, new)
    return KVCache(jax.tree.map(write, cache.layers, new), cache.length + lengths)

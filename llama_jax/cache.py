"""The key-value cache: static shapes, one length a row, an ordinary pytree in and out.

Layers are separate arrays laid out [B, K, S, H], so that the two products of attention read them
as they lie; with [B, S, K, H] XLA on CPU transposes the whole cache at every step (figures in
docs/LOG.md).
"""

import jax
import jax.numpy as jnp
from flax import struct

from llama_jax.config import LlamaConfig

Entries = tuple[jax.Array, jax.Array]  # keys and values of T positions of one layer, [B, K, T, H]


class KVCache(struct.PyTreeNode):
    """Keys and values of all positions so far; slots from `length` on are never read."""

    layers: tuple[Entries, ...]  # L of them, S positions each
    length: jax.Array  # int32 [B]

    @property
    def capacity(self) -> int:
        """S, the most positions that a row can hold."""
        return self.layers[0][0].shape[2]


def init_cache(
    config: LlamaConfig, batch: int, capacity: int, dtype: jax.typing.DTypeLike
) -> KVCache:
    """An empty cache for `batch` rows of at most `capacity` positions."""
    shape = batch, config.n_kv_heads, capacity, config.head_dim
    layers = tuple(
        (jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.n_layers)
    )
    return KVCache(layers, jnp.zeros(batch, jnp.int32))


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
        return old_BKSH.at[rows_B1, :, slots_BT].set(new_BTKH, mode="drop")

    return KVCache(jax.tree.map(write, cache.layers, new), cache.length + lengths)

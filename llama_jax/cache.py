"""The key-value cache: static shapes, one length a row, an ordinary pytree in and out.

Layers are separate arrays laid out [B, K, S, H], so that the two products of attention read them
as they lie; with [B, S, K, H] XLA on CPU transposes the whole cache at every step (figures in
docs/LOG.md). Keys and values may be kept as int8, with a scale for each head and position.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from llama_jax import decode_kernels
from llama_jax.config import LlamaConfig
from llama_jax.quant import quantize_int8
from llama_jax.sharding import constrain, on_shards


class Int8Entries(struct.PyTreeNode):
    """Keys or values of S positions as symmetric int8, one scale for each head and position.

    The scales lie as the scores that they are multiplied with: positions last.
    """

    values: jax.Array  # int8 [B, K, S, H]
    scale: jax.Array  # float32 [B, K, 1, S]

    @classmethod
    def quantize(cls, x_BKSH: jax.Array) -> "Int8Entries":
        values, scale_BKS = quantize_int8(x_BKSH)
        return cls(values, scale_BKS[:, :, None])

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape


# Keys and values of T positions of one layer, [B, K, T, H].
Entries = tuple[jax.Array | Int8Entries, jax.Array | Int8Entries]


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

    def empty() -> jax.Array | Int8Entries:
        zeros = jnp.zeros(shape, dtype)
        return Int8Entries.quantize(zeros) if int8 else zeros

    layers = tuple((empty(), empty()) for _ in range(config.n_layers))
    return KVCache(layers, jnp.zeros(batch, jnp.int32))


# How every array of the cache, [B, K, ...], is split (`llama_jax.sharding`).
LOGICAL_AXES = "cache_batch", "kv_heads", None, None


def append(cache: KVCache, new: tuple[Entries, ...], lengths: jax.Array) -> KVCache:
    """`cache` with the first `lengths[b]` of each row's T new positions behind what is there.

    A row whose length is 0 is left as it is; positions beyond the capacity are dropped.

      length [2, 5], T 3, lengths [3, 1] -> slots 2, 3, 4 of row 0 and slot 5 of row 1

    Args:
      new: plain keys and values [B, K, T, H] of each layer; quantized here if the cache is.
      lengths: int32 [B], at most T.
    """
    B, K, T, H = new[0][0].shape
    S = cache.capacity
    steps_1T = jnp.arange(T)[None]
    valid_BT = steps_1T < lengths[:, None]
    slots_BT = jnp.where(valid_BT, cache.length[:, None] + steps_1T, S)
    # Every index is given: with a slice for the heads XLA on TPU turns the whole cache around.
    rows_B11, heads_1K1 = jnp.arange(B)[:, None, None], jnp.arange(K)[None, :, None]
    slots_B1T = slots_BT[:, None]

    def write(old_BKSH: Any, new_BKTH: Any) -> jax.Array:
        at = old_BKSH.at[rows_B11, heads_1K1, slots_B1T]
        return constrain(at.set(new_BKTH.astype(old_BKSH.dtype), mode="drop"), *LOGICAL_AXES)

    def write_int8(old: Any, new_BKTH: Any) -> Int8Entries:
        new = Int8Entries.quantize(new_BKTH)
        at = old.scale.at[rows_B11, heads_1K1, 0, slots_B1T]
        scale = constrain(at.set(new.scale[:, :, 0], mode="drop"), *LOGICAL_AXES)
        return Int8Entries(write(old.values, new.values), scale)

    def write_layer(old: Entries, new: Entries) -> Entries:
        one = write_int8 if isinstance(old[0], Int8Entries) else write
        return one(old[0], new[0]), one(old[1], new[1])

    if T == 1 and isinstance(cache.layers[0][0], Int8Entries) and decode_kernels.fits(K, S, H):
        slot_B = jnp.where(slots_BT[:, 0] < S, slots_BT[:, 0], -1)

        def write_one(old: Entries, new: Entries) -> Entries:
            return jax.lax.platform_dependent(
                old,
                new,
                tpu=lambda old, new: _write_one(old, new, slot_B),
                default=write_layer,
            )

        layers = map(write_one, cache.layers, new)
    else:
        layers = map(write_layer, cache.layers, new)
    return KVCache(tuple(layers), cache.length + lengths)


def _write_one(old: Entries, new: Entries, slot_B: jax.Array) -> Entries:
    """The int8 entries `old` of a layer with one position written in place at `slot_B`, on TPU."""

    def write(old: Any, new: Any, slot_B: jax.Array) -> Entries:
        (keys, values), (k_BK1H, v_BK1H) = old, new
        arrays = keys.values, keys.scale, values.values, values.scale
        arrays = decode_kernels.append(arrays, k_BK1H[:, :, 0], v_BK1H[:, :, 0], slot_B)
        return Int8Entries(*arrays[:2]), Int8Entries(*arrays[2:])

    arguments = (old, LOGICAL_AXES), (new, LOGICAL_AXES), (slot_B, LOGICAL_AXES[:1])
    return on_shards(write, arguments, (old, LOGICAL_AXES))

"""Kernels of our own for a decode step on TPU with an int8 cache (Pallas).

The kernels that JAX maintains know no scales. XLA alone needs some twenty small operations a layer
for one position, each of which takes longer to start than to run (docs/LOG.md). Here a layer takes
two: `attend` reads the filled part of the cache, the new position and nothing else; `append` turns
the new position into int8 and writes it in place.

Both work on what one device holds. B rows, N query heads, K KV heads, S slots, H head dimension.
`interpret` runs a kernel as plain JAX, for tests.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from llama_jax.quant import quantize_int8

LANES = 128  # scales of so many slots, and
ROWS = 32  # values of so many slots, are the least that can be written
BLOCK_BYTES = 1 << 20  # of keys or values that a step of `attend` reads
WHOLE = pl.BlockSpec(memory_space=pltpu.VMEM)

Int8Arrays = tuple[
    jax.Array, jax.Array, jax.Array, jax.Array
]  # values and scales of keys and values


def fits(K: int, S: int, H: int) -> bool:
    """Whether the kernels take a cache of this shape."""
    return H % LANES == 0 and S % LANES == 0 and K * LANES * H <= BLOCK_BYTES


def _block(K: int, S: int, H: int) -> int:
    """Slots that a step of `attend` reads: a power of two times 128 that divides S."""
    size = LANES
    while S % (2 * size) == 0 and 2 * size * K * H <= BLOCK_BYTES and size < 512:
        size *= 2
    return size


def _in_hbm(cached: Int8Arrays, interpret: bool) -> Int8Arrays:
    """`cached`, to stay where it is: XLA would fetch all of it, and after the write put it back."""
    if interpret:
        return cached
    keys, key_scales, values, value_scales = (
        pltpu.with_memory_space_constraint(x, pltpu.HBM) for x in cached
    )
    return keys, key_scales, values, value_scales


@functools.partial(jax.jit, static_argnames="interpret")
def attend(
    q_BNH: jax.Array,
    k_BKH: jax.Array,
    v_BKH: jax.Array,
    cached: Int8Arrays,
    length_B: jax.Array,
    *,
    interpret: bool = False,
) -> jax.Array:
    """One query a row on the first `length_B` slots of the row and on its own position.

    Args:
      cached: int8 [B, K, S, H] and float32 [B, K, 1, S] of the keys, then of the values.

    Returns [B, N, H] in the dtype of the queries.
    """
    B, N, H = q_BNH.shape
    _, K, S, _ = cached[0].shape
    size = _block(K, S, H)

    def block(b: jax.Array, i: jax.Array, length: jax.Array) -> jax.Array:
        """The i-th block, or the last filled one again, which is not fetched another time."""
        return jnp.minimum(i, jnp.maximum(length[b] - 1, 0) // size)

    values = pl.BlockSpec((1, K, size, H), lambda b, i, length: (b, 0, block(b, i, length), 0))
    scales = pl.BlockSpec((1, K, 1, size), lambda b, i, length: (b, 0, 0, block(b, i, length)))
    return pl.pallas_call(
        functools.partial(_attend, size=size),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, S // size),
            in_specs=[WHOLE, WHOLE, WHOLE, values, scales, values, scales],
            out_specs=WHOLE,
            scratch_shapes=[
                pltpu.VMEM((N, 1), jnp.float32),
                pltpu.VMEM((N, 1), jnp.float32),
                pltpu.VMEM((N, H), jnp.float32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((B, N, H), q_BNH.dtype),
        cost_estimate=pl.CostEstimate(
            flops=4 * B * N * S * H,
            transcendentals=B * N * S,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in cached),
        ),
        interpret=interpret,
    )(length_B, q_BNH, k_BKH, v_BKH, *_in_hbm(cached, interpret))


def _attend(
    length_ref, q_ref, k_ref, v_ref, keys_ref, key_scales_ref, values_ref, value_scales_ref,
    out_ref, largest_ref, total_ref, sum_ref, *, size,
):  # fmt: skip
    """One row and one block of slots: softmax as it goes (arXiv 1805.02867), all in float32."""
    b, i = pl.program_id(0), pl.program_id(1)
    length = length_ref[b]
    _, K, H = k_ref.shape
    G = q_ref.shape[1] // K
    slots = i * size + jax.lax.broadcasted_iota(jnp.int32, (1, size), 1)
    for k in range(K):
        heads = slice(k * G, (k + 1) * G)
        q_GH = q_ref[b, heads] * H**-0.5
        dtype = q_GH.dtype

        @pl.when(i == 0)
        def _(k=k, heads=heads, q_GH=q_GH):
            own = q_GH.astype(jnp.float32) * k_ref[b, pl.ds(k, 1)].astype(jnp.float32)
            largest_ref[heads] = own.sum(-1, keepdims=True)
            total_ref[heads] = jnp.ones((G, 1), jnp.float32)
            value_1H = v_ref[b, pl.ds(k, 1)].astype(jnp.float32)
            sum_ref[heads] = jnp.broadcast_to(value_1H, (G, H))

        @pl.when(i * size < length)
        def _(k=k, heads=heads, q_GH=q_GH, dtype=dtype):
            scores_GS = jax.lax.dot_general(
                q_GH,
                keys_ref[0, k].astype(dtype),
                (((1,), (1,)), ((), ())),
                preferred_element_type=jnp.float32,
            )
            filled = slots < length
            scores_GS = jnp.where(filled, scores_GS * key_scales_ref[0, k], -jnp.inf)
            before = largest_ref[heads]
            largest = jnp.maximum(before, scores_GS.max(-1, keepdims=True))
            weights_GS = jnp.exp(scores_GS - largest)
            shrink = jnp.exp(before - largest)
            mixed_GH = jax.lax.dot_general(
                (weights_GS * jnp.where(filled, value_scales_ref[0, k], 0)).astype(dtype),
                values_ref[0, k].astype(dtype),
                (((1,), (0,)), ((), ())),
                preferred_element_type=jnp.float32,
            )
            largest_ref[heads] = largest
            total_ref[heads] = total_ref[heads] * shrink + weights_GS.sum(-1, keepdims=True)
            sum_ref[heads] = sum_ref[heads] * shrink + mixed_GH

        @pl.when(i == pl.num_programs(1) - 1)
        def _(heads=heads):
            out_ref[b, heads] = (sum_ref[heads] / total_ref[heads]).astype(out_ref.dtype)


@functools.partial(jax.jit, static_argnames="interpret")
def append(
    cached: Int8Arrays,
    k_BKH: jax.Array,
    v_BKH: jax.Array,
    slot_B: jax.Array,
    *,
    interpret: bool = False,
) -> Int8Arrays:
    """`cached` with the new position of each row at `slot_B`; nothing is written at -1."""
    B, K, _, H = cached[0].shape

    def tile(b: jax.Array, slot: jax.Array, size: int) -> jax.Array:
        return jnp.maximum(slot[b], 0) // size

    values = pl.BlockSpec((1, K, ROWS, H), lambda b, slot: (b, 0, tile(b, slot, ROWS), 0))
    scales = pl.BlockSpec((1, K, 1, LANES), lambda b, slot: (b, 0, 0, tile(b, slot, LANES)))
    return pl.pallas_call(
        _append,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B,),
            in_specs=[WHOLE, WHOLE, values, scales, values, scales],
            out_specs=[values, scales, values, scales],
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in cached],
        input_output_aliases={3: 0, 4: 1, 5: 2, 6: 3},
        cost_estimate=pl.CostEstimate(
            flops=8 * B * K * H,
            transcendentals=0,
            bytes_accessed=4 * B * K * (ROWS * H + 4 * LANES),  # read and written, keys and values
        ),
        interpret=interpret,
    )(slot_B, k_BKH, v_BKH, *_in_hbm(cached, interpret))


def _append(slot_ref, k_ref, v_ref, *cached_refs):
    """One row: the tiles around its slot, with the slot itself replaced."""
    b = pl.program_id(0)
    slot = slot_ref[b]
    row = jax.lax.broadcasted_iota(jnp.int32, (ROWS, 1), 0)
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
    is_row = row == slot - jnp.maximum(slot, 0) // ROWS * ROWS
    is_lane = lane == slot - jnp.maximum(slot, 0) // LANES * LANES
    for n, new_ref in enumerate((k_ref, v_ref)):
        old_values, old_scales = cached_refs[2 * n : 2 * n + 2]
        new_values, new_scales = cached_refs[4 + 2 * n : 6 + 2 * n]
        for k in range(new_ref.shape[1]):
            values_1H, scale_1 = quantize_int8(new_ref[b, pl.ds(k, 1)])
            old = old_values[0, k].astype(jnp.int32)
            written = jnp.where(is_row, values_1H.astype(jnp.int32), old)
            new_values[0, k] = written.astype(jnp.int8)
            new_scales[0, k] = jnp.where(is_lane, scale_1[:, None], old_scales[0, k])

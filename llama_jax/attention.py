"""Causal grouped-query attention over a cache and the positions being added to it.

`attend` is the one entry. It has a plain form for every platform, and fused kernels
(`llama_jax.kernels`) that take its place on TPU and GPU for bfloat16 and for shapes that they are
made for. The platform a program is lowered for decides; there is no setting.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax import decode_kernels, kernels
from llama_jax.cache import Entries
from llama_jax.sharding import on_shards

MASKED = -1e30  # its weight is exactly 0, as every query sees at least itself
BLOCK = 512  # cached positions that the plain form reads at once for more than one query
QUERY_BLOCKS, LEAST_QUERIES = 4, 128  # parts, and their least size, of queries without a cache
DECODE_ROOM = 1024  # least S for which a decode step on TPU or GPU takes a kernel

Arrays = tuple[jax.Array, jax.Array]  # keys and values that are not quantized
Kernel = Callable[..., jax.Array]  # (q_BTNH, new, cached, length_B, segments_BT) -> out_BTNH


def attend(
    q_BTNH: jax.Array,
    new: Arrays,
    cached: Entries | None,
    length_B: jax.Array,
    segments_BT: jax.Array | None = None,
) -> jax.Array:
    """Each query sees the cached positions of its row and the new ones up to its own.

    Query heads are in groups of G = N/K beside the KV head that they share. The cache is read
    before the new entries are written to it: XLA can then write in place, where reading after
    the write costs a copy of the whole cache on CPU (docs/LOG.md).

      length 2, S 4, T 2: query 0 sees 1 1 0 0 | 1 0
                          query 1 sees 1 1 0 0 | 1 1

    Args:
      q_BTNH: queries, turned by RoPE.
      new: keys (turned by RoPE) and values of the same T positions, [B, K, T, H].
      cached: those of earlier positions, [B, K, S, H], as arrays or as int8 with scales; None
        where there are none. Not differentiable where S and T are large.
      length_B: how many of the S slots of each row are filled.
      segments_BT: without a cache, which of the texts packed in its row a position belongs to;
        it sees no other.

    Returns [B, T, N*H] in the dtype of the queries. Softmax is float32, as in Meta's reference.
    """
    B, T, N, H = q_BTNH.shape
    operands = q_BTNH, new, cached, length_B, segments_BT
    large = T > 1 and cached is not None and _slots(cached) > BLOCK
    plain: Kernel = _blockwise if large else _whole
    fused = _fused(q_BTNH, cached, segments_BT)
    if fused:
        out_BTNH = jax.lax.platform_dependent(*operands, **fused, default=plain)
    else:
        out_BTNH = plain(*operands)
    return out_BTNH.reshape(B, T, N * H)


def _slots(cached: Entries) -> int:
    return cached[0].shape[2]


# --- plain ---


def scores(q_BTKGH: jax.Array, k_BKSH: Any) -> jax.Array:
    """float32 [B, K, G, T, S]. Scales of int8 keys are applied after the product."""
    quantized = not isinstance(k_BKSH, jax.Array)
    keys = k_BKSH.values.astype(q_BTKGH.dtype) if quantized else k_BKSH
    products = jnp.einsum("BTKGH,BKSH->BKGTS", q_BTKGH, keys, preferred_element_type=jnp.float32)
    if quantized:
        products *= k_BKSH.scale[:, :, None]
    return products * q_BTKGH.shape[-1] ** -0.5


def mix(
    weights_BKGTS: jax.Array,
    v_BKSH: Any,
    dtype: jax.typing.DTypeLike,
    result: jax.typing.DTypeLike | None = None,
) -> jax.Array:
    """[B, K, G, T, H] in `result`, which defaults to `dtype`, that of the product.

    Scales of int8 values are applied to the weights before the product.

    The result has the batch axes first, as the product computes it: any other order makes XLA
    transpose the whole cache instead of the small result.
    """
    if not isinstance(v_BKSH, jax.Array):
        weights_BKGTS = weights_BKGTS * v_BKSH.scale[:, :, None]
        v_BKSH = v_BKSH.values.astype(dtype)
    return jnp.einsum(
        "BKGTS,BKSH->BKGTH", weights_BKGTS.astype(dtype), v_BKSH, preferred_element_type=result
    )


def _grouped(q_BTNH: jax.Array, K: int) -> jax.Array:
    B, T, N, H = q_BTNH.shape
    return q_BTNH.reshape(B, T, K, N // K, H)


def _ungrouped(out_BKGTH: jax.Array) -> jax.Array:
    B, K, G, T, H = out_BKGTH.shape
    return jnp.moveaxis(out_BKGTH, 3, 1).reshape(B, T, K * G, H)


def _new_scores(q_BTKGH: jax.Array, k_BKTH: jax.Array) -> jax.Array:
    T = q_BTKGH.shape[1]
    seen_TT = jnp.tril(jnp.ones((T, T), bool))
    return jnp.where(seen_TT[None, None, None], scores(q_BTKGH, k_BKTH), MASKED)


def _whole(
    q_BTNH: jax.Array,
    new: Arrays,
    cached: Entries | None,
    length_B: jax.Array,
    segments_BT: jax.Array | None = None,
) -> jax.Array:
    """All scores of a query at once, over all the room of the cache."""
    if cached is None:
        return _causal(q_BTNH, *new, segments_BT)
    dtype = q_BTNH.dtype
    k_BKTH, v_BKTH = new
    q_BTKGH = _grouped(q_BTNH, k_BKTH.shape[1])
    scores_BKGTS = _new_scores(q_BTKGH, k_BKTH)
    k_BKSH, v_BKSH = cached
    S = k_BKSH.shape[2]
    filled_BS = jnp.arange(S)[None] < length_B[:, None]
    past_BKGTS = jnp.where(filled_BS[:, None, None, None], scores(q_BTKGH, k_BKSH), MASKED)
    weights = jax.nn.softmax(jnp.concatenate([past_BKGTS, scores_BKGTS], axis=-1))
    out_BKGTH = mix(weights[..., :S], v_BKSH, dtype) + mix(weights[..., S:], v_BKTH, dtype)
    return _ungrouped(out_BKGTH)


def _causal(
    q_BTNH: jax.Array, k_BKTH: jax.Array, v_BKTH: jax.Array, segments_BT: jax.Array | None
) -> jax.Array:
    """Without a cache: some queries at a time, with the keys up to the last of them.

    The products are divided by the sum of weights, not the weights: a pass over [T, S] less.
    """
    dtype = q_BTNH.dtype
    q_BTKGH = _grouped(q_BTNH, k_BKTH.shape[1])
    T = q_BTNH.shape[1]
    block = max(LEAST_QUERIES, -(-T // QUERY_BLOCKS))
    out = []
    for begin in range(0, T, block):
        end = min(begin + block, T)
        seen_BTS = jnp.tril(jnp.ones((end - begin, end), bool), begin)[None]
        if segments_BT is not None:
            seen_BTS &= segments_BT[:, begin:end, None] == segments_BT[:, None, :end]
        scores_BKGTS = scores(q_BTKGH[:, begin:end], k_BKTH[:, :, :end])
        scores_BKGTS += jnp.where(seen_BTS, 0.0, MASKED)[:, None, None]
        largest = jax.lax.stop_gradient(scores_BKGTS.max(-1, keepdims=True))
        weights = jnp.exp(scores_BKGTS - largest)
        mixed = mix(weights, v_BKTH[:, :, :end], dtype, jnp.float32)
        out.append((mixed / weights.sum(-1, keepdims=True)).astype(dtype))
    return _ungrouped(jnp.concatenate(out, axis=3))


def _slice(entries: Any, begin: jax.Array) -> Any:
    """The slots from `begin` to `begin + BLOCK`; scales have them last."""
    if isinstance(entries, jax.Array):
        return jax.lax.dynamic_slice_in_dim(entries, begin, BLOCK, axis=2)
    return entries.replace(
        values=jax.lax.dynamic_slice_in_dim(entries.values, begin, BLOCK, axis=2),
        scale=jax.lax.dynamic_slice_in_dim(entries.scale, begin, BLOCK, axis=3),
    )


def _blockwise(
    q_BTNH: jax.Array, new: Arrays, cached: Entries, length_B: jax.Array, _: None = None
) -> jax.Array:
    """The same, a block of the cache at a time, up to the longest row (arXiv 2205.14135).

    Scores take [T, BLOCK] for each head, and time follows what is filled.
    """
    dtype = q_BTNH.dtype
    k_BKTH, v_BKTH = new
    q_BTKGH = _grouped(q_BTNH, k_BKTH.shape[1])
    S = _slots(cached)

    def weigh(scores_BKGTS: jax.Array, largest: jax.Array) -> tuple[jax.Array, jax.Array]:
        weights = jnp.exp(scores_BKGTS - largest[..., None])
        return weights, weights.sum(-1)

    def step(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        out, total, largest = carry
        begin = jnp.minimum(i * BLOCK, S - BLOCK)  # the last block may begin within another
        k_block, v_block = (_slice(entries, begin) for entries in cached)
        slots_1S = begin + jnp.arange(BLOCK)[None]
        valid_BS = (slots_1S >= i * BLOCK) & (slots_1S < length_B[:, None])
        block_scores = jnp.where(valid_BS[:, None, None, None], scores(q_BTKGH, k_block), MASKED)
        now_largest = jnp.maximum(largest, block_scores.max(-1))
        weights, block_total = weigh(block_scores, now_largest)
        shrink = jnp.exp(largest - now_largest)
        out = out * shrink[..., None] + mix(weights, v_block, dtype, jnp.float32)
        return out, total * shrink + block_total, now_largest

    scores_BKGTT = _new_scores(q_BTKGH, k_BKTH)
    largest = scores_BKGTT.max(-1)
    weights, total = weigh(scores_BKGTT, largest)
    out = mix(weights, v_BKTH, dtype, jnp.float32)
    blocks = (jnp.max(length_B) + BLOCK - 1) // BLOCK
    out, total, _ = jax.lax.fori_loop(0, blocks, step, (out, total, largest))
    return _ungrouped((out / total[..., None]).astype(dtype))


# --- fused ---


def _fused(
    q_BTNH: jax.Array, cached: Entries | None, segments_BT: jax.Array | None
) -> dict[str, Kernel]:
    """The kernels that take these shapes, by platform; none where the plain form is as good.

    An int8 cache is for the kernel of our own: the others know no scales, and a dequantized copy
    costs more than they save.
    """
    _, T, _, H = q_BTNH.shape
    dtype = q_BTNH.dtype
    chosen: dict[str, Kernel] = {}
    if dtype not in (jnp.bfloat16, jnp.float16) or H % 64:
        return chosen
    if cached is None:
        if T >= kernels.SMALLEST:
            chosen["tpu"] = _splash_causal
            if segments_BT is not None:
                chosen["cuda"] = _triton_causal
            elif kernels.cudnn_is_there():
                chosen["cuda"] = _cudnn_causal
    elif not isinstance(cached[0], jax.Array):
        if T == 1 and decode_kernels.fits(*cached[0].shape[1:]):
            chosen["tpu"] = _int8_step
    elif T > 1 or _slots(cached) >= DECODE_ROOM:
        if kernels.splash_past_fits(q_BTNH, cached[0]):
            chosen["tpu"] = _splash
        if kernels.triton_past_fits(cached[0]):
            chosen["cuda"] = _triton
    if dtype == jnp.float16:  # which TPUs do not multiply
        chosen.pop("tpu", None)
    return {platform: functools.partial(_on_shards, kernel) for platform, kernel in chosen.items()}


def _on_shards(
    kernel: Kernel,
    q_BTNH: jax.Array,
    new: Arrays,
    cached: Entries | None,
    length_B: jax.Array,
    segments_BT: jax.Array | None = None,
) -> jax.Array:
    """`kernel` on what each device of the mesh in use holds: XLA cannot split a kernel itself.

    As in `llama_jax.sharding`, the queries of a cache are where its rows are.
    """
    rows = "batch" if cached is None else "cache_batch"
    queries = q_BTNH, (rows, None, "heads", None)
    entries = rows, "kv_heads", None, None
    arguments = queries, (new, entries), (cached, entries), (length_B, (rows,))
    arguments += ((segments_BT, (rows, None)),)
    return on_shards(kernel, arguments, queries)


def _int8_step(
    q_B1NH: jax.Array, new: Arrays, cached: Any, length_B: jax.Array, _: None
) -> jax.Array:
    keys, values = cached
    arrays = keys.values, keys.scale, values.values, values.scale
    k_BKH, v_BKH = (x_BK1H[:, :, 0] for x_BK1H in new)
    return decode_kernels.attend(q_B1NH[:, 0], k_BKH, v_BKH, arrays, length_B)[:, None]


def _splash_causal(
    q_BTNH: jax.Array, new: Arrays, _: None, __: jax.Array, segments_BT: jax.Array | None
) -> jax.Array:
    return jnp.swapaxes(kernels.splash_causal(q_BTNH, *new, segments_BT), 1, 2)


def _splash(
    q_BTNH: jax.Array, new: Arrays, cached: Arrays, length_B: jax.Array, _: None
) -> jax.Array:
    fits = q_BTNH.shape[1] >= kernels.SMALLEST
    causal = functools.partial(kernels.splash_causal, residuals=True) if fits else _causal_part
    past = kernels.splash_past(q_BTNH, *cached, length_B)
    return jnp.swapaxes(kernels.merge(past, causal(q_BTNH, *new)), 1, 2)


def _cudnn_causal(q_BTNH: jax.Array, new: Arrays, *_: Any) -> jax.Array:
    return kernels.cudnn_causal(q_BTNH, *new)


def _triton_causal(
    q_BTNH: jax.Array, new: Arrays, _: None, __: jax.Array, segments_BT: jax.Array
) -> jax.Array:
    return kernels.triton_segments(q_BTNH, *new, segments_BT)


def _triton(
    q_BTNH: jax.Array, new: Arrays, cached: Arrays, length_B: jax.Array, _: None
) -> jax.Array:
    fits = q_BTNH.shape[1] % kernels.SMALLEST == 0
    causal = kernels.triton_causal if fits else _causal_part
    past = kernels.triton_past(q_BTNH, *cached, length_B)
    return jnp.swapaxes(kernels.merge(past, causal(q_BTNH, *new)), 1, 2)


def _causal_part(q_BTNH: jax.Array, k_BKTH: jax.Array, v_BKTH: jax.Array) -> kernels.Part:
    """For few queries, where all their scores are small."""
    B, T, N, H = q_BTNH.shape
    scores_BKGTT = _new_scores(_grouped(q_BTNH, k_BKTH.shape[1]), k_BKTH)
    out_BKGTH = mix(jax.nn.softmax(scores_BKGTT), v_BKTH, q_BTNH.dtype)
    lse_BKGT = jax.nn.logsumexp(scores_BKGTT, axis=-1)
    return kernels.Part(out_BKGTH.reshape(B, N, T, H), lse_BKGT.reshape(B, N, T))

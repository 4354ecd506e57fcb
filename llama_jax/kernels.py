"""The fused attention kernels that JAX maintains for TPU and GPU, on the shapes of this project.

Each works on what one device holds, never has a matrix of scores in memory, and skips blocks that
nobody sees. Where the queries see both cached and new positions, the two parts are computed apart
and merged by the logarithms of their softmax sums. Nothing here knows a mesh or chooses a platform.

  TPU  splash attention for both parts (Pallas)
  GPU  cuDNN where there is no cache; Pallas kernels in Triton for the two parts where there is one,
       because cuDNN by way of `jax.nn` rounds the logarithms to bfloat16, and wants another layout

Axes: B batch, T new positions, S cached ones, K KV heads, G query heads that share one, N = K*G,
H head dimension. `interpret` runs a Pallas kernel as plain JAX, for tests.
"""

import functools
import importlib
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as splash,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as splash_mask,
)
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

SMALLEST = 128  # fewest queries or keys that are worth a kernel: a row of a TPU's registers
CAUSAL_BLOCK = 512  # by the compiler's schedules (docs/LOG.md)
PAST_BLOCK = 1024
MOST_BLOCKS = 1 << 16  # (head, query block, key block) triples whose table fits a TPU's SMEM


def _gpu_module(name: str) -> Any:
    """A module of JAX's kernels for GPUs, which jax 0.12 calls deprecated but still has."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return importlib.import_module(f"jax.experimental.pallas.ops.gpu.{name}")


class Part(NamedTuple):
    """Attention over some of the positions that the queries see."""

    out: jax.Array  # [B, N, T, H]; anything where there are no such positions
    lse: jax.Array  # float32 [B, N, T], log of the sum of exp(scores); -inf then


def merge(past: Part, new: Part) -> jax.Array:
    """Attention over the positions of both, [B, N, T, H]; every query sees some of the new ones."""
    share = jax.nn.sigmoid(past.lse - new.lse)[..., None]
    mixed = share * past.out.astype(jnp.float32) + (1 - share) * new.out.astype(jnp.float32)
    out = jnp.where(share > 0, mixed.astype(new.out.dtype), new.out)
    # Without it XLA on TPU computes all this once more for each tile of the transposed result.
    return jax.lax.optimization_barrier(out)


# --- TPU ---


@functools.partial(jax.jit, static_argnames=("residuals", "interpret"))
def splash_causal(
    q_BTNH: jax.Array,
    k_BKTH: jax.Array,
    v_BKTH: jax.Array,
    segments_BT: jax.Array | None = None,
    *,
    residuals: bool = False,
    interpret: bool = False,
) -> Any:
    """Each query on the keys up to its own: [B, N, T, H], or a `Part` with `residuals`.

    With segments, on those of its own segment. T is padded to whole blocks: padded keys come after
    every query. Differentiable without `residuals`. `jit` so that the layers of a model share one
    trace.
    """
    B, T, N, H = q_BTNH.shape
    block = min(CAUSAL_BLOCK, 1 << (T - 1).bit_length())
    padding = -T % block
    rows = 1 if segments_BT is None else B  # else the rows are heads of the kernel like others

    def padded(x_BKTH: jax.Array) -> jax.Array:
        x = x_BKTH.reshape(rows, -1, T, H)
        return jnp.pad(x, ((0, 0), (0, 0), (0, padding), (0, 0))) if padding else x

    mask = splash_mask.CausalMask((T + padding, T + padding))
    kernel = splash.make_splash_mha(
        splash_mask.MultiHeadMask([mask] * (B // rows * N)),
        block_sizes=splash.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        head_shards=1,
        q_seq_shards=1,
        save_residuals=residuals,
        interpret=interpret,
    )
    q, k, v = (padded(x) for x in (jnp.swapaxes(q_BTNH * H**-0.5, 1, 2), k_BKTH, v_BKTH))
    if segments_BT is None:
        result: Any = jax.tree.map(lambda x: x[None], kernel(q[0], k[0], v[0]))
    else:
        ids_BT = jnp.pad(segments_BT, ((0, 0), (0, padding)))
        result = jax.vmap(kernel)(q, k, v, splash.SegmentIds(ids_BT, ids_BT))

    def unpadded(x: jax.Array) -> jax.Array:
        return x[:, :, :T].reshape(B, N, T, *x.shape[3:])

    if not residuals:
        return unpadded(result)
    out, (lse,) = result
    return Part(unpadded(out), unpadded(lse))


def splash_past_fits(q_BTNH: jax.Array, k_BKSH: jax.Array) -> bool:
    """Whether `splash_past` takes these shapes."""
    _, T, N, _ = q_BTNH.shape
    B, K, S, _ = k_BKSH.shape
    R = N // K * T
    if S % SMALLEST or R % _row_block(R):
        return False
    return B * K * (R // _row_block(R)) * (S // _past_block(S)) <= MOST_BLOCKS


def _row_block(rows: int) -> int:
    return min(rows, CAUSAL_BLOCK)


def _past_block(S: int) -> int:
    return next(n for n in (PAST_BLOCK, 512, 256, SMALLEST) if S % n == 0)


@functools.partial(jax.jit, static_argnames="interpret")
def splash_past(
    q_BTNH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    length_B: jax.Array,
    *,
    interpret: bool = False,
) -> Part:
    """All queries on the first `length_B` keys of their row; blocks beyond are not read.

    All queries of a KV head see the same keys, so its G*T queries are the kernel's sequence and
    the KV heads of all rows its heads. The mask is a table made here: for each block of keys 0
    skip, 1 apply the mask of the row, 2 see all; and which block to fetch, the last one again
    where it is skipped.

      length 3, S 8, blocks of 2: see 2 1 0 0, fetch 0 1 1 1, mask 1 0
    """
    _, T, N, H = q_BTNH.shape
    B, K, S, _ = k_BKSH.shape
    R = N // K * T
    size_q, size = _row_block(R), _past_block(S)
    blocks = jnp.arange(S // size)[None]
    length_B1 = length_B[:, None]
    see = jnp.where((blocks + 1) * size <= length_B1, 2, blocks * size < length_B1)
    fetch = jnp.minimum(blocks, jnp.maximum(length_B1 - 1, 0) // size)
    mask = jnp.broadcast_to(jnp.arange(B)[:, None], see.shape)

    def table(x: jax.Array) -> jax.Array:
        shape = B, K, R // size_q, S // size
        small = jnp.int8 if max(B, S // size) < 128 else jnp.int32  # SMEM is scarce
        return jnp.broadcast_to(x[:, None, None], shape).reshape(B * K, *shape[2:]).astype(small)

    inside = jnp.arange(size)[None] < length_B1 % size
    info = MaskInfo(
        data_next=table(fetch),
        mask_next=table(mask),
        block_mask=table(see),
        partial_mask_blocks=jnp.broadcast_to(inside[:, None], (B, size_q, size)),
        q_sequence=None,
    )
    kernel = splash.SplashAttentionKernel(
        info,
        None,
        None,
        block_sizes=splash.BlockSizes(
            block_q=size_q,
            block_kv=size,
            block_kv_compute=min(size, CAUSAL_BLOCK if T > 1 else size),
        ),
        is_mqa=False,
        save_residuals=True,
        mask_value=splash.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=None,
        residual_checkpoint_name=None,
        mask_function=None,
        interpret=interpret,
    )
    q = jnp.swapaxes(q_BTNH * H**-0.5, 1, 2).reshape(B * K, R, H)
    result: Any = kernel(q, k_BKSH.reshape(B * K, S, H), v_BKSH.reshape(B * K, S, H))
    out, (lse,) = result
    return Part(out.reshape(B, N, T, H), lse.reshape(B, N, T))


# --- GPU ---


@functools.cache
def cudnn_is_there() -> bool:
    """Whether cuDNN's attention can be traced: jax asks for the library then, on any platform."""
    x = jax.ShapeDtypeStruct((1, SMALLEST, 1, 64), jnp.bfloat16)
    attention = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
    try:
        jax.eval_shape(attention, x, x, x)
    except RuntimeError:
        return False
    return True


def cudnn_causal(q_BTNH: jax.Array, k_BKTH: jax.Array, v_BKTH: jax.Array) -> jax.Array:
    """Each query on the keys up to its own, [B, T, N, H]; bfloat16 or float16 only."""
    return jax.nn.dot_product_attention(
        q_BTNH,
        jnp.swapaxes(k_BKTH, 1, 2),
        jnp.swapaxes(v_BKTH, 1, 2),
        is_causal=True,
        implementation="cudnn",
    )


@functools.partial(jax.jit, static_argnames="interpret")
def triton_causal(
    q_BTNH: jax.Array, k_BKTH: jax.Array, v_BKTH: jax.Array, *, interpret: bool = False
) -> Part:
    """Each query on the keys up to its own. T is a multiple of 128. Keys are copied G times."""
    result: Any = _triton(q_BTNH, k_BKTH, v_BKTH, None, interpret, return_residuals=True)
    out_BTNH, lse_BNT = result
    return Part(jnp.swapaxes(out_BTNH, 1, 2), lse_BNT * jnp.log(2.0))  # the kernel's is of base 2


@functools.partial(jax.jit, static_argnames="interpret")
def triton_segments(
    q_BTNH: jax.Array,
    k_BKTH: jax.Array,
    v_BKTH: jax.Array,
    segments_BT: jax.Array,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Each query on the keys of its segment up to its own, [B, T, N, H]; differentiable.

    T is padded to a multiple of 128 by keys that come after every query.
    """
    T = q_BTNH.shape[1]
    padding = -T % SMALLEST
    q_BTNH = jnp.pad(q_BTNH, ((0, 0), (0, padding), (0, 0), (0, 0)))
    k_BKTH, v_BKTH = (jnp.pad(x, ((0, 0), (0, 0), (0, padding), (0, 0))) for x in (k_BKTH, v_BKTH))
    segments_BT = jnp.pad(segments_BT, ((0, 0), (0, padding)))
    return _triton(q_BTNH, k_BKTH, v_BKTH, segments_BT, interpret)[:, :T]


def _triton(
    q_BTNH: jax.Array,
    k_BKTH: jax.Array,
    v_BKTH: jax.Array,
    segments_BT: jax.Array | None,
    interpret: bool,
    return_residuals: bool = False,
) -> Any:
    _, _, N, H = q_BTNH.shape
    K = k_BKTH.shape[1]

    def repeated(x_BKTH: jax.Array) -> jax.Array:
        return jnp.repeat(jnp.swapaxes(x_BKTH, 1, 2), N // K, axis=2)

    return _gpu_module("attention").mha(
        q_BTNH,
        repeated(k_BKTH),
        repeated(v_BKTH),
        segments_BT,
        sm_scale=H**-0.5,
        causal=True,
        interpret=interpret,
        return_residuals=return_residuals,
    )


TRITON_SPLITS = 16  # parts of the keys that a decode step reads at once


def triton_past_fits(k_BKSH: jax.Array) -> bool:
    """Whether `triton_past` takes these shapes."""
    return k_BKSH.shape[2] % (16 * TRITON_SPLITS) == 0


@functools.partial(jax.jit, static_argnames="interpret")
def triton_past(
    q_BTNH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    length_B: jax.Array,
    *,
    interpret: bool = False,
) -> Part:
    """All queries on the first `length_B` keys of their row; blocks beyond are not read.

    The kernel is one of decoding for a single KV head. Its query heads are the G*T queries here,
    its batch the KV heads of all rows. Few queries leave most of a GPU idle: then the keys are
    read in 16 parts.
    """
    _, T, N, H = q_BTNH.shape
    B, K, S, _ = k_BKSH.shape
    R = N // K * T
    splits = TRITON_SPLITS if R <= 64 else 1
    result: Any = _gpu_module("decode_attention").mqa(
        jnp.swapaxes(q_BTNH, 1, 2).reshape(B * K, R, H),
        k_BKSH.reshape(B * K, S, H),
        v_BKSH.reshape(B * K, S, H),
        kv_seq_len=jnp.repeat(length_B, K),
        block_h=16 if R <= 64 else 64,
        block_k=min(64, S // splits),
        k_splits=splits,
        interpret=interpret,
        return_residuals=True,
    )
    out, (sums, largest) = result
    lse = largest + jnp.log(sums)
    return Part(out.reshape(B, N, T, H), lse.reshape(B, N, T))

"""The kernels of a decode step with an int8 cache: their numbers, and what they leave alone.

They run here as plain JAX (`interpret`); the real compilers show that a program has them.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from infer import topology
from infer.cost import analyze
from llama_jax import cache as kv
from llama_jax import decode_kernels, sharding
from llama_jax.attention import attend
from llama_jax.cache import Int8Entries, KVCache
from llama_jax.config import PRESETS

H = 128
# float32 sums of up to 1024 products in another order, on results of order 1.
F32_ATOL = 5e-6
# bfloat16 rounds queries once more for their scale, weights and results: each by up to 2**-9 of
# values up to 4.
BF16_ATOL = 0.03


def normal(*shape, dtype=jnp.float32, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def filled(B, K, S):
    """Int8 entries of order 1 and their scales, of keys and values; as `decode_kernels.Int8Arrays`."""
    rng = np.random.default_rng(1)

    def one():
        values = jnp.asarray(rng.integers(-127, 128, (B, K, S, H)), jnp.int8)
        return values, jnp.asarray(rng.uniform(0.005, 0.02, (B, K, 1, S)), jnp.float32)

    return *one(), *one()


def oracle(q_BNH, k_BKH, v_BKH, cached, length_B):
    """[B, N, H] in float64, one row and head at a time."""
    q_BNH, k_BKH, v_BKH = (np.asarray(x, np.float64) for x in (q_BNH, k_BKH, v_BKH))
    values, scales = (
        [np.asarray(x, np.float64) for x in part] for part in (cached[::2], cached[1::2])
    )
    out_BNH = np.empty(q_BNH.shape)
    G = q_BNH.shape[1] // k_BKH.shape[1]
    for b, n in np.ndindex(q_BNH.shape[:2]):
        own, past = (b, n // G), (b, n // G, slice(length_B[b]))
        keys, mixed = (
            np.vstack([x[past] * scale[b, n // G, 0, : length_B[b], None], new[own]])
            for x, scale, new in zip(values, scales, (k_BKH, v_BKH), strict=True)
        )
        weights = np.exp(keys @ q_BNH[b, n] / np.sqrt(H))
        out_BNH[b, n] = weights @ mixed / weights.sum()
    return out_BNH


def close(actual, expected, atol=F32_ATOL):
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=0, atol=atol)


# --- attend ---

attend_kernel = functools.partial(decode_kernels.attend, interpret=True)


def operands(lengths, K, G, S, dtype=jnp.float32):
    B = len(lengths)
    q = normal(B, K * G, H, dtype=dtype)
    new = (normal(B, K, H, dtype=dtype, seed=n) for n in (2, 3))
    return q, *new, filled(B, K, S), jnp.asarray(lengths, jnp.int32)


@pytest.mark.parametrize("K", [1, 2, 8])
@pytest.mark.parametrize("G", [1, 4])
def test_attend_is_attention_over_what_the_cache_stands_for(K, G):
    S = 1024
    block = decode_kernels._block(K, S, H)
    assert block < S
    lengths = [0, 1, block - 1, block, block + 1, S]
    arguments = operands(lengths, K, G, S)
    close(attend_kernel(*arguments), oracle(*arguments))


def test_attend_of_bfloat16():
    arguments = operands([0, 1, 200, 512], 2, 4, 512, jnp.bfloat16)
    out = attend_kernel(*arguments)
    assert out.dtype == jnp.bfloat16
    close(out, oracle(*arguments), BF16_ATOL)


@pytest.mark.parametrize("length", [0, 1, 511, 512, 513, 600])
def test_attend_uses_nothing_beyond_the_length(length):
    """Slots of the block that is read and of all others: a NaN would spoil the result."""
    q, k, v, cached, _ = operands([length], 2, 2, 1536)
    expected = oracle(q, k, v, cached, [length])
    beyond = jnp.arange(1536) >= length
    stale = [jnp.where(beyond, jnp.nan, x) if x.dtype == jnp.float32 else x for x in cached]
    close(attend_kernel(q, k, v, tuple(stale), jnp.array([length])), expected)


def test_the_blocks_of_attend_divide_the_room_and_stay_small():
    for K, S in ((1, 128), (1, 384), (8, 1024), (2, 1280), (32, 4096), (64, 2048)):
        size = decode_kernels._block(K, S, H)
        assert S % size == 0
        assert K * size * H <= decode_kernels.BLOCK_BYTES


# --- append ---

append_kernel = functools.partial(decode_kernels.append, interpret=True)


@pytest.mark.parametrize(("K", "dtype"), [(1, jnp.float32), (8, jnp.bfloat16)])
def test_append_writes_what_the_plain_path_writes(K, dtype):
    """Bit for bit, at the edges of both kinds of tiles; in rows of slot -1 nothing."""
    S = 256
    slots = [0, 1, 31, 32, 127, 128, 200, 255, -1]
    B = len(slots)
    old = filled(B, K, S)
    k, v = (normal(B, K, H, dtype=dtype, seed=n) for n in (2, 3))
    written = append_kernel(old, k, v, jnp.asarray(slots, jnp.int32))
    # On CPU `append` takes its plain path.
    layers = ((Int8Entries(*old[:2]), Int8Entries(*old[2:])),)
    plain = jax.jit(kv.append)(
        KVCache(layers, jnp.asarray([max(slot, 0) for slot in slots], jnp.int32)),
        ((k[:, :, None], v[:, :, None]),),
        jnp.asarray([int(slot >= 0) for slot in slots], jnp.int32),
    )
    for before, ours, theirs in zip(old, written, jax.tree.leaves(plain.layers), strict=True):
        assert ours.dtype == before.dtype
        np.testing.assert_array_equal(ours, theirs)
        np.testing.assert_array_equal(ours[-1], before[-1])
        changed = np.asarray(ours != before).any(axis=1)  # [B, S, H] or [B, 1, S]
        changed = changed.any(axis=2) if changed.shape[2] == H else changed[:, 0]
        assert np.argwhere(changed).tolist() == [[b, s] for b, s in enumerate(slots) if s >= 0]


def test_append_of_zeros_has_scale_0():
    old = filled(1, 1, 128)
    zeros = jnp.zeros((1, 1, H))
    written = append_kernel(old, zeros, zeros, jnp.array([5]))
    for x in written[::2]:
        assert not x[0, 0, 5].any()
    for x in written[1::2]:
        assert x[0, 0, 0, 5] == 0


# --- where they are taken ---


def test_shapes_that_the_kernels_take():
    fits = decode_kernels.fits
    assert fits(1, 128, 128)
    assert fits(8, 2048, 128)
    assert fits(64, 4096, 128)  # a block of 128 slots is as large as one may be
    assert not fits(65, 4096, 128)
    assert not fits(8, 2048, 64)  # heads of 64 do not fill a register
    assert not fits(8, 2048, 192)
    assert not fits(8, 64, 128)  # nor do 64 scales
    assert not fits(8, 2000, 128)


@pytest.mark.parametrize("chips", ["v5e-1", "v5p-8", "v6e-1"])
def test_a_tpu_compiles_a_step_with_both(chips):
    """Attention and the write behind it, with 8 query heads on 2 KV heads."""
    part = topology.find_slice(chips)
    if not topology.installed(part.chip):
        pytest.skip(f"the compiler for {chips} is absent: pip install 'llama-jax[plan]'")
    # Pallas asks the mesh which chip it is compiled for.
    mesh = sharding.make_mesh("tensor=1", PRESETS["llama-3.1-8b"], topology.devices(part))
    place = NamedSharding(mesh, PartitionSpec())
    B, K, N, S = 2, 2, 8, 1024

    def step(q_BTNH, new, cache):
        out = attend(q_BTNH, new, cache.layers[0], cache.length)
        return out, kv.append(cache, (new,), jnp.ones(B, jnp.int32))

    def shape(*sizes, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=place)

    new = (shape(B, K, 1, H),) * 2
    entries = Int8Entries(shape(B, K, S, H, dtype=jnp.int8), shape(B, K, 1, S, dtype=jnp.float32))
    cache = KVCache(((entries, entries),), shape(B, dtype=jnp.int32))
    with sharding.use(mesh), topology.quiet():
        lowered = jax.jit(step, donate_argnums=2).lower(shape(B, 1, N, H), new, cache)
        text = lowered.compile().as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 2
    # The cache stays in HBM: `attend` reads it, `append` a few tiles, and nothing else moves it.
    cache_bytes = 2 * B * K * S * (H + 4)
    assert cache_bytes <= analyze(text).hbm_bytes < 1.1 * cache_bytes

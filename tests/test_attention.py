"""Attention in all its forms against float64, and the kernels that compilers are given.

Kernels for TPU and GPU run here as plain JAX (`interpret`), which shows their numbers; the real
compilers show that each platform gets its kernel and no matrix of scores. They need no hardware.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from jax.sharding import AxisType

from infer import topology
from llama_jax import attention, kernels, sharding
from llama_jax.attention import attend

# float32 sums of up to 1500 products in another order, on results of order 1.
F32_ATOL = 5e-6
# bfloat16 rounds queries once more for their scale, weights and results: each by up to 2**-9 of
# values up to 4.
BF16_ATOL = 0.03

HEADS = pytest.mark.parametrize("H", [64, 128])
GROUPS = pytest.mark.parametrize("G", [1, 4])


class Quantized(struct.PyTreeNode):
    """What attention knows of int8 entries."""

    values: jax.Array  # int8 [B, K, S, H]
    scale: jax.Array  # [B, K, 1, S]

    @property
    def shape(self):
        return self.values.shape


def oracle(q_BTNH, new, cached, length_B):
    """[B, T, N*H] in float64, one row, head and query at a time."""
    q_BTNH, new, cached = jax.tree.map(lambda x: np.asarray(x, np.float64), (q_BTNH, new, cached))
    B, T, N, H = q_BTNH.shape
    K = new[0].shape[1]
    out_BTNH = np.empty((B, T, N, H))
    for b in range(B):
        for n in range(N):
            k, v = (x[b, n // (N // K)] for x in new)
            past = (x[b, n // (N // K), : length_B[b]] for x in cached) if cached else (k[:0],) * 2
            k, v = (np.concatenate(pair) for pair in zip(past, (k, v), strict=True))
            for t in range(T):
                seen = slice(len(k) - T + t + 1)
                weights = np.exp(k[seen] @ q_BTNH[b, t, n] / np.sqrt(H))
                out_BTNH[b, t, n] = weights @ v[seen] / weights.sum()
    return out_BTNH.reshape(B, T, N * H)


def arrays(B, T, K, G, H, S=None, dtype=jnp.float32, seed=0):
    """Queries, new and cached keys and values; S None for no cache."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    new = normal(B, K, T, H), normal(B, K, T, H)
    cached = None if S is None else (normal(B, K, S, H), normal(B, K, S, H))
    return normal(B, T, K * G, H), new, cached


def merged(past, new):
    """Two parts as [B, T, N*H]."""
    out_BTNH = jnp.swapaxes(kernels.merge(past, new), 1, 2)
    return out_BTNH.reshape(*out_BTNH.shape[:2], -1)


def close(actual, expected, atol=F32_ATOL):
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=0, atol=atol)


# --- the plain form ---


@GROUPS
@pytest.mark.parametrize(("T", "S"), [(7, None), (1, 40), (7, 40), (5, 1300)])
def test_the_plain_form_is_attention(T, S, G):
    lengths = jnp.array([0, 1, S and S // 2, S] if S else [0] * 4, jnp.int32)
    q, new, cached = arrays(4, T, 2, G, 16, S)
    close(jax.jit(attend)(q, new, cached, lengths), oracle(q, new, cached, lengths))


def test_the_plain_form_reads_filled_blocks_alone():
    """A NaN in a block that is read spoils the result, whatever its weight."""
    q, new, cached = arrays(2, 3, 2, 2, 16, 4 * attention.BLOCK)
    lengths = jnp.array([3, attention.BLOCK + 1])
    expected = oracle(q, new, cached, lengths)
    stale = jax.tree.map(lambda x: x.at[:, :, 2 * attention.BLOCK :].set(jnp.nan), cached)
    close(jax.jit(attend)(q, new, stale, lengths), expected)


def test_the_plain_form_holds_scores_of_one_block():
    q, new, _ = arrays(1, 256, 2, 2, 16)
    filled = jnp.array([9])

    def temporary(S):
        cached = (jnp.zeros((1, 2, S, 16)),) * 2
        return jax.jit(attend).lower(q, new, cached, filled).compile().memory_analysis()

    small, large = (temporary(S).temp_size_in_bytes for S in (2048, 16384))
    assert large < 1.1 * small


@pytest.mark.parametrize("scale_dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("T", "S"), [(1, 40), (7, 40), (5, 600)])
def test_an_int8_cache_is_the_cache_that_it_stands_for(T, S, scale_dtype):
    lengths = jnp.array([0, S // 2, S], jnp.int32)
    q, new, _ = arrays(3, T, 2, 4, 16)
    rng = np.random.default_rng(2)

    def entries():
        values = rng.integers(-127, 128, (3, 2, S, 16))
        scale = jnp.asarray(rng.uniform(0.001, 0.02, (3, 2, 1, S)), scale_dtype)
        return Quantized(jnp.asarray(values, jnp.int8), scale)

    cached = entries(), entries()
    same = [
        np.asarray(x.values) * np.asarray(x.scale, np.float64)[:, :, 0, :, None] for x in cached
    ]
    close(jax.jit(attend)(q, new, cached, lengths), oracle(q, new, same, lengths))


# --- kernels ---


# A block, less than one, more than one.
@pytest.mark.parametrize(
    ("T", "G", "H"), [(128, 1, 64), (200, 4, 128), (640, 4, 64), (640, 1, 128)]
)
def test_splash_is_causal_attention(T, G, H):
    q, new, _ = arrays(1, T, 2, G, H)
    expected = oracle(q, new, None, [0])
    out = kernels.splash_causal(q, *new, interpret=True)
    close(jnp.swapaxes(out, 1, 2).reshape(expected.shape), expected)


@pytest.mark.parametrize(("T", "G", "H"), [(1, 4, 64), (1, 1, 128), (16, 4, 128), (128, 4, 64)])
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_cached_and_new_parts_merge_to_the_whole(platform, T, G, H):
    S = 2048 if T == 1 else 256  # one block, or two
    lengths = jnp.array([0, S // 2 + 1, S], jnp.int32)
    q, new, cached = arrays(len(lengths), T, 1, G, H, S)
    past = {"tpu": kernels.splash_past, "cuda": kernels.triton_past}[platform]
    causal = {"tpu": functools.partial(kernels.splash_causal, residuals=True)}
    causal = causal.get(platform, kernels.triton_causal)
    if T < kernels.SMALLEST:
        part = attention._causal_part(q, *new)
    else:
        part = causal(q, *new, interpret=True)
    out = merged(past(q, *cached, lengths, interpret=True), part)
    close(out, oracle(q, new, cached, lengths))


def test_skipped_blocks_of_the_cache_are_not_read_by_splash():
    q, new, cached = arrays(2, 1, 2, 2, 64, 2 * kernels.PAST_BLOCK)
    lengths = jnp.array([0, 5])
    expected = oracle(q, new, cached, lengths)
    stale = jax.tree.map(lambda x: x.at[:, :, kernels.PAST_BLOCK :].set(jnp.nan), cached)
    past = kernels.splash_past(q, *stale, lengths, interpret=True)
    close(merged(past, attention._causal_part(q, *new)), expected)


@pytest.mark.parametrize("T", [1, 128])
def test_kernels_of_bfloat16_are_as_close_as_the_plain_form(T):
    lengths = jnp.array([0, 700], jnp.int32)
    q, new, cached = arrays(2, T, 1, 2, 64, 1024, jnp.bfloat16)
    expected = oracle(q, new, cached, lengths)
    close(attend(q, new, cached, lengths), expected, BF16_ATOL)
    for past in (kernels.splash_past, kernels.triton_past):
        part = past(q, *cached, lengths, interpret=True)
        close(merged(part, attention._causal_part(q, *new)), expected, BF16_ATOL)


SEGMENTS = np.repeat([[1, 2, 3], [1, 2, 0]], [90, 60, 50], axis=1)  # packed texts of two rows


@pytest.mark.parametrize("form", ["plain", "splash", "triton"])
def test_packed_texts_do_not_see_each_other(form):
    q, new, _ = arrays(2, 200, 2, 2, 64)
    segments = jnp.asarray(SEGMENTS)
    out = {
        "plain": lambda: attend(q, new, None, jnp.zeros(2, jnp.int32), segments),
        "splash": lambda: jnp.swapaxes(
            kernels.splash_causal(q, *new, segments, interpret=True), 1, 2
        ),
        "triton": lambda: kernels.triton_segments(q, *new, segments, interpret=True),
    }[form]().reshape(2, 200, -1)
    for begin, end in [(0, 90), (90, 150), (150, 200)]:
        part = q[:, begin:end], tuple(x[:, :, begin:end] for x in new)
        alone = oracle(*part, None, None)
        close(out[:, begin:end], alone)


@pytest.mark.parametrize(
    ("form", "packed"), [("splash", False), ("splash", True), ("triton", True)]
)
def test_the_gradient_of_a_kernel_is_that_of_the_plain_form(form, packed):
    q, new, _ = arrays(2, 200, 2, 2, 64)
    segments = jnp.asarray(SEGMENTS) if packed else None
    target = jnp.asarray(np.random.default_rng(1).normal(size=q.shape), jnp.float32)

    def loss(causal, q, new):
        return (causal(q, new).reshape(q.shape) * target).sum()

    def kernel(q, new):
        if form == "triton":
            return kernels.triton_segments(q, *new, segments, interpret=True)
        return jnp.swapaxes(kernels.splash_causal(q, *new, segments, interpret=True), 1, 2)

    def plain(q, new):
        return attention._whole(q, new, None, None, segments)

    ours, theirs = (
        jax.jit(jax.grad(functools.partial(loss, causal), (0, 1)))(q, new)
        for causal in (kernel, plain)
    )
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        close(a, b, 10 * F32_ATOL)


@pytest.mark.parametrize("S", [None, 256])
def test_a_kernel_over_a_mesh_is_the_kernel(S, monkeypatch):
    """data 2, tensor 2, query 2: two KV heads of four query heads each."""
    for name in ("splash_causal", "splash_past"):
        monkeypatch.setattr(
            kernels, name, functools.partial(getattr(kernels, name), interpret=True)
        )
    q, new, cached = arrays(4, 128, 2, 4, 64, S)
    lengths = jnp.array([0, 3, 128, 200]) if S else jnp.zeros(4, jnp.int32)
    kernel = attention._splash_causal if cached is None else attention._splash
    mesh = jax.make_mesh((2, 1, 2, 2), sharding.AXES, axis_types=(AxisType.Auto,) * 4)
    with jax.set_mesh(mesh):
        run = jax.jit(functools.partial(attention._on_shards, kernel))
        out = run(q, new, cached, lengths)
        rows = ("data", "query") if S else "data"
        assert out.sharding.spec[0] == rows
    close(out.reshape(4, 128, -1), oracle(q, new, cached, lengths))


def test_gradients_pass_through_the_choice_of_a_platform():
    """bfloat16 and 128 positions: here the plain form runs, but every kernel is traced."""
    q, new, _ = arrays(1, 128, 2, 2, 64, dtype=jnp.bfloat16)
    gradient = jax.jit(jax.grad(lambda q: attend(q, new, None, jnp.zeros(1, jnp.int32)).sum()))(q)
    assert np.isfinite(np.asarray(gradient, np.float32)).all()
    assert np.any(np.asarray(gradient, np.float32) != 0)


# --- what compilers are given ---


def compiled(chips, B, T, S, H, dtype=jnp.bfloat16, program=attend):
    """The text of attention with 8 query heads on 2 KV heads, compiled for one of these chips."""
    part = topology.find_slice(chips)
    if not topology.installed(part.chip):
        pytest.skip(f"the compiler for {chips} is not installed")
    place = jax.sharding.SingleDeviceSharding(topology.devices(part)[0])

    def shape(*sizes, dtype=dtype):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=place)

    new = (shape(B, 2, T, H),) * 2
    cached = None if S is None else (shape(B, 2, S, H),) * 2
    lowered = jax.jit(program).lower(shape(B, T, 8, H), new, cached, shape(B, dtype=jnp.int32))
    with topology.quiet():
        return lowered.compile().as_text()


def largest_scores(text, T, S):
    """The arrays in a compiled program that have an axis of T and another of S or T."""
    shapes = {tuple(map(int, x.split(","))) for x in re.findall(r"\w+\[([\d,]+)\]", text)}
    return [s for s in shapes if s.count(T) and (s.count(S) if S != T else s.count(T) > 1)]


TPUS = pytest.mark.parametrize("chips", ["v5e-1", "v5p-8", "v6e-1"])


@TPUS
@HEADS
def test_a_tpu_compiles_prefill_with_splash(chips, H):
    text = compiled(chips, 1, 2048, None, H)
    assert "splash_mha_fwd_no_residuals" in text
    assert not largest_scores(text, 2048, 2048)


@TPUS
@HEADS
def test_a_tpu_compiles_extension_with_splash(chips, H):
    text = compiled(chips, 2, 256, 4096, H)
    assert text.count('custom_call_target="tpu_custom_call"') == 2
    assert not largest_scores(text, 256, 4096)
    assert not largest_scores(text, 256, 256)


@TPUS
def test_a_tpu_compiles_decoding_with_splash(chips):
    text = compiled(chips, 2, 1, 2048, 128)
    assert text.count('custom_call_target="tpu_custom_call"') == 1
    assert "bf16[2,2,2048,128]{3,2,1,0:T(8,128)(2,1)} copy(" not in text


@HEADS
def test_an_h100_compiles_prefill_with_cudnn(H):
    if not kernels.cudnn_is_there():
        pytest.skip("cuDNN is not installed")
    text = compiled("h100-1", 1, 2048, None, H)
    assert "__cudnn$fmhaSoftmax" in text
    assert not largest_scores(text, 2048, 2048)


@HEADS
@pytest.mark.parametrize(("T", "calls"), [(1, 1), (256, 2)])
def test_an_h100_compiles_a_cache_with_triton(T, calls, H):
    text = compiled("h100-1", 2, T, 4096, H)
    assert len(re.findall("__gpu.xla.gpu.triton", text)) == calls
    assert "mha_forward" in text
    assert T == 1 or not largest_scores(text, T, 4096) + largest_scores(text, T, T)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16])
def test_a_tpu_has_the_plain_form_for_other_dtypes(dtype):
    assert "tpu_custom_call" not in compiled("v5e-1", 1, 128, None, 64, dtype)


def test_splash_trains_on_a_tpu():
    def gradient(q, new, cached, length_B):
        loss = lambda q, new: attend(q, new, cached, length_B).astype(jnp.float32).sum()  # noqa: E731
        return jax.grad(loss, (0, 1))(q, new)

    text = compiled("v5e-1", 1, 2048, None, 128, program=gradient)
    assert "splash_mha_dq" in text
    assert "splash_mha_dkv" in text
    assert not largest_scores(text, 2048, 2048)

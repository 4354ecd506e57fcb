"""Quantized leaves: bit for bit what plain NumPy makes, and products that say what they stand for."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle
import pytest

from llama_jax import checkpoint, quant
from llama_jax.errors import UserError
from llama_jax.model import forward
from llama_jax.quant import KINDS, W8A8, Int4, Int8, LLMInt8, Quantization, Scales

F32 = np.float32
OUT, IN, GROUP = 48, 128, 32
DTYPES = [np.float32, ml_dtypes.bfloat16, np.float16]


def weights(dtype=np.float32, shape=(OUT, IN), seed=0):
    """Values in which zeros, ties, powers of two, subnormal and large numbers occur."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape).astype(F32)
    x[1] = 0
    x[2] = rng.integers(-127, 128, shape[1])  # exact, among them ties of 127
    x[2, 0] = 127
    x[3] = rng.integers(-14, 15, shape[1]) / 2  # ties half way between steps
    x[3, ::GROUP] = 7
    x[4] *= 2.0**-20
    x[5, GROUP:] = 0
    x[6] = 3.5
    x[7, ::2], x[7, 1::2] = -0.25, 0.25
    x[8] *= 1e4 / np.abs(x[8]).max()
    with np.errstate(under="ignore"):
        x[9] *= F32(1e-39)  # in float32 and bfloat16 subnormal
        x[10, 1:] *= F32(1e-39)
        x[11] *= F32(1e-31)  # scales below the smallest
    x[12] = (np.arange(shape[1]) - 64) * F32(2.0**-24)  # in float16 subnormal
    return x.astype(dtype)


def scale_of(x, most):
    """NumPy's idea of `quant._scale`."""
    scale = np.abs(x).max(-1) * F32(1 / most)
    return np.where(scale < F32(2.0**-100), F32(0), scale)


def inverse_of(scale):
    with np.errstate(divide="ignore"):
        return np.where(scale == 0, F32(0), F32(1) / scale)


def int8_of(x):
    scale = scale_of(x, 127)
    return np.round(x * inverse_of(scale)[..., None]).astype(np.int8), scale


def int4_of(x, group):
    groups = x.reshape(len(x), -1, group)
    most, least = groups.max(-1), groups.min(-1)
    scale = np.where(most >= -least, most, least) * F32(-0.125)
    scale = np.where(np.abs(scale) < F32(2.0**-100), F32(0), scale)
    stored = scale.astype(ml_dtypes.bfloat16)
    values = np.round(groups * inverse_of(stored.astype(F32))[..., None])
    return np.clip(values, -8, 7).reshape(x.shape).astype(np.int8), stored


# Appendix E of arXiv 2305.14314, and bitsandbytes' kernels, whose decision points are these means.
NF4 = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
        0.7229568362236023, 1.0,
    ],
    F32,
)  # fmt: skip
NF4_EDGES = [
    -0.8480964004993439, -0.6106329262256622, -0.4599952697753906, -0.33967943489551544,
    -0.23460740596055984, -0.13791173323988914, -0.045525018125772476, 0.03979014977812767,
    0.1202552504837513, 0.2035212516784668, 0.2920137718319893, 0.3893125355243683,
    0.5016634166240692, 0.6427869200706482, 0.8614784181118011,
]  # fmt: skip


def nf4_of(x, group):
    groups = x.reshape(len(x), -1, group)
    scale = scale_of(groups, 1)
    relative = groups * inverse_of(scale)[..., None]
    codes = np.searchsorted(np.array(NF4_EDGES, F32), relative, side="left")
    return codes.reshape(x.shape).astype(np.uint8), scale


def scales_of(scale):
    """Double quantization: blocks of rows less their mean, as int8."""
    out, n = scale.shape
    blocks = scale.reshape(-1, np.gcd(out, 256), n)
    sums = blocks
    while sums.shape[1] > 1:
        half = sums.shape[1] // 2
        sums = sums[:, :half] + sums[:, half:]
    mean = sums[:, 0] * F32(1 / blocks.shape[1])
    centred = blocks - mean[:, None]
    step = scale_of(centred.swapaxes(1, 2), 127)
    values = np.round(centred * inverse_of(step)[:, None]).astype(np.int8)
    return values.reshape(out, n), step, mean


def same(a, b):
    a = np.asarray(a)
    if a.dtype in (np.dtype(jnp.int4), np.dtype(jnp.uint4)):
        a = a.astype(b.dtype)
    assert (a.dtype, a.shape) == (b.dtype, b.shape)
    np.testing.assert_array_equal(a.view(f"u{a.itemsize}"), b.view(f"u{b.itemsize}"))


def both_ways(function):
    return [function, jax.jit(function)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [Int8, W8A8, LLMInt8])
def test_int8_is_numpys_bit_for_bit(kind, dtype):
    x = weights(dtype)
    values, scale = int8_of(x.astype(F32))
    for quantize in both_ways(kind.quantize):
        leaf = quantize(x)
        same(leaf.values, values)
        same(leaf.scale, scale)
        assert (leaf.shape, leaf.dtype) == (x.shape, np.dtype(dtype))
    assert np.abs(values).max() == 127


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_of_every_magnitude_is_numpys(dtype):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(2000, 24)) * 2.0 ** rng.uniform(-14, 10, (2000, 1))
    x = x.astype(dtype)
    expected = int8_of(x.astype(F32))
    for quantize in both_ways(quant.quantize_int8):
        for a, b in zip(quantize(x), expected, strict=True):
            same(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [32, 64, 128])
def test_int4_is_numpys_bit_for_bit(group, dtype):
    x = weights(dtype)
    values, scale = int4_of(x.astype(F32), group)
    for quantize in both_ways(functools.partial(Int4.quantize, group_size=group)):
        leaf = quantize(x)
        same(leaf.values, values)
        same(leaf.scale, scale)
        assert leaf.values.dtype == jnp.int4
        assert (leaf.shape, leaf.dtype) == (x.shape, np.dtype(dtype))
    assert values.min() == -8
    assert values.max() == 7


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("group", [32, 64])
def test_nf4_is_numpys_bit_for_bit(group, double, dtype):
    x = weights(dtype)
    codes, scale = nf4_of(x.astype(F32), group)
    function = functools.partial(quant.NF4.quantize, group_size=group, double=double)
    for quantize in both_ways(function):
        leaf = quantize(x)
        same(leaf.values, codes)
        assert leaf.values.dtype == jnp.uint4
        if double:
            for a, b in zip(
                (leaf.scale.values, leaf.scale.step, leaf.scale.mean), scales_of(scale), strict=True
            ):
                same(a, b)
        else:
            same(leaf.scale, scale)
    assert set(codes.ravel()) == set(range(16))


def test_nf4_has_the_published_levels():
    same(np.array(quant.NF4_LEVELS, F32), NF4)
    codes = jnp.arange(16, dtype=jnp.uint8).astype(jnp.uint4)[None]
    leaf = quant.NF4(codes, jnp.ones((1, 1)), np.dtype(F32))
    same(leaf.dequantize(F32)[0], NF4)
    again = quant.NF4.quantize(NF4[None])  # levels are their own nearest
    same(again.values[0], np.arange(16, dtype=np.uint8))


@pytest.mark.parametrize("out", [512, 48, 6])
def test_scales_come_back_within_half_a_step(out):
    scale = np.random.default_rng(0).uniform(0.5, 1.5, (out, 4)).astype(F32)
    quantized = Scales.quantize(jnp.asarray(scale))
    step = np.repeat(quantized.step, out // len(quantized.step), axis=0)
    error = np.abs(np.asarray(quantized.dequantize()) - scale)
    assert (error <= 0.5001 * step + 1e-7).all()


# --- products ---

QUANTIZATIONS = [
    *(Quantization(kind) for kind in KINDS),
    Quantization("int4", group_size=32),
    Quantization("nf4", double_quantization=True),
]


def name_of(quantization):
    return "-".join(str(value) for value in quantization.to_dict().values() if value)


@pytest.fixture(params=QUANTIZATIONS, ids=name_of)
def quantization(request):
    return request.param


def random(*shape, seed=0, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def rms(x):
    return float(np.sqrt(np.mean(np.square(np.asarray(x, np.float64)))))


ERROR = {"int8": 0.0077, "w8a8": 0.0077, "llm_int8": 0.0077, "int4": 0.096, "nf4": 0.094}


def test_errors_are_those_of_normal_weights(quantization):
    """Root mean squares for normal weights, rows of 512: what was measured is at most 5 % less."""
    w = random(256, 512)
    error = quantization.quantize(w).dequantize(jnp.float32) - w
    bound = 0.088 if quantization.group_size == 32 else ERROR[quantization.kind]
    assert 0.95 * bound < rms(error) < bound


@pytest.mark.parametrize("shape", [(1, 1), (40,)])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_products_are_those_with_what_the_leaf_stands_for(quantization, shape, dtype):
    leaf = quantization.quantize(random(96, 128))
    x = random(*shape, 128, seed=1, dtype=dtype)
    exact = np.asarray(x, np.float64) @ np.asarray(leaf.dequantize(F32), np.float64).T
    y = jax.jit(quant.dot)(x, leaf)
    assert (y.shape, y.dtype) == ((*shape, 96), dtype)
    # W8A8 rounds activations to 8 bits; bfloat16 has 8 of its own, in the kernel too where it is
    # dequantized.
    bound = 0.012 if quantization.kind in ("w8a8", "llm_int8") else 2e-6
    assert rms(y - exact) < max(bound, 0.006 * (dtype != np.float32)) * rms(exact)
    assert quant.dot(x, leaf, jnp.float32).dtype == jnp.float32


@pytest.mark.parametrize("kind", [Int4, quant.NF4])
@pytest.mark.parametrize("form", ["_dot_groups", "_dot_blocks", "_dot_loop"])
@pytest.mark.parametrize("shape", [(1, 1), (2, 5)])
def test_the_forms_for_accelerators_are_the_same_product(kind, form, shape):
    leaf = kind.quantize(random(96, 128), group_size=32)
    x = random(*shape, 128, seed=1)
    y = getattr(leaf, form)(x)
    exact = np.asarray(x, np.float64) @ np.asarray(leaf.dequantize(F32), np.float64).T
    assert y.shape == exact.shape
    assert rms(y - exact) < 1e-6 * rms(exact)


def test_programs_for_tpus_multiply_two_rows_rather_than_one():
    def text(platform, kernel):
        traced = jax.jit(quant.dot).trace(random(1, 1, 128), kernel)
        return traced.lower(lowering_platforms=(platform,)).as_text()

    for kernel in (random(96, 128), Int8.quantize(random(96, 128))):
        assert "tensor<2x128xf32>" in text("tpu", kernel)
        assert "tensor<2x128xf32>" not in text("cpu", kernel)


def test_gradients_are_those_of_the_dequantized_kernel(quantization):
    leaf = quantization.quantize(random(96, 128))
    x, weight = random(2, 3, 128, seed=1), random(2, 3, 96, seed=2)
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(quant.dot(x, leaf) * weight)))(x)
    exact = np.asarray(weight, np.float64) @ np.asarray(leaf.dequantize(F32), np.float64)
    assert rms(gradient - exact) < 1e-6 * rms(exact)
    low = jax.grad(lambda x: jnp.sum(quant.dot(x, leaf, jnp.float32)))(x.astype(jnp.bfloat16))
    assert low.dtype == jnp.bfloat16


@pytest.mark.parametrize("size", [512, 96, 14])  # blocks of scales are of 256, 32 and 2 rows
def test_rows_are_those_of_the_dequantized_table(quantization, size):
    leaf = quantization.quantize(random(size, 128).astype(jnp.bfloat16))
    index = jnp.array([[3, size - 1, 0, 3]])
    rows = jax.jit(quant.rows)(leaf, index)
    assert rows.dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        np.asarray(rows), np.asarray(leaf.dequantize(jnp.bfloat16)[index])
    )


def test_llm_int8_keeps_outliers():
    """A feature of 60 among ones: alone it would take all of the 8 bits (arXiv 2208.07339)."""
    x = random(4, 128, seed=1).clip(-3, 3).at[2, 5].set(60.0)
    leaf, w8a8 = LLMInt8.quantize(random(96, 128)), W8A8.quantize(random(96, 128))
    exact = x @ leaf.dequantize(F32).T
    assert rms(leaf.dot(x, F32) - exact) < 0.01 * rms(exact[:2])
    assert rms(w8a8.dot(x, F32)[2] - exact[2]) > 0.1 * rms(exact[:2])
    # Without one it is W8A8; the threshold itself counts as one.
    calm = x.at[2, 5].set(5.99)
    np.testing.assert_array_equal(leaf.dot(calm, F32), w8a8.dot(calm, F32))
    assert (leaf.dot(x.at[2, 5].set(6), F32) != w8a8.dot(x.at[2, 5].set(6), F32)).any()


def test_llm_int8_multiplies_twice_only_where_there_are_outliers():
    leaf = LLMInt8.quantize(random(96, 128))
    jaxpr = jax.make_jaxpr(lambda x: leaf.dot(x, F32))(random(4, 128))
    outside = [eqn.primitive.name for eqn in jaxpr.eqns]
    assert outside.count("cond") == 1
    assert "dot_general" in str(jaxpr)
    assert outside.count("dot_general") == 1


# --- trees ---


@pytest.mark.parametrize(
    ("kind", "embeddings"), [*((kind, True) for kind in KINDS), ("nf4", False)]
)
def test_a_model_of_quantized_leaves_is_that_of_dequantized_ones(kind, embeddings):
    config = oracle.CONFIGS["6 heads on 2"]
    params = oracle.random_params(config)
    quantization = Quantization(kind, embeddings)
    quantized = jax.jit(quantization)(params)
    plain = jax.tree.map(
        lambda leaf: leaf.dequantize(F32) if isinstance(leaf, quant.Quantized) else leaf,
        quantized,
        is_leaf=lambda node: isinstance(node, quant.Quantized),
    )
    assert isinstance(quantized["embed"]["embedding"], quant.Quantized) == embeddings
    assert isinstance(quantized["head"]["kernel"], quant.Quantized) == embeddings
    assert isinstance(quantized["norm"]["scale"], jax.Array)
    tokens = jnp.arange(12).reshape(2, 6)
    logits, exact = (forward(config, p, tokens)[0] for p in (quantized, plain))
    bound = 0.03 if kind in ("w8a8", "llm_int8") else 1e-5
    assert rms(logits - exact) < bound * rms(exact)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_abstract_trees_are_those_of_the_arrays(quantization, dtype):
    config = dataclasses.replace(oracle.CONFIGS["tied head"], mlp_dim=128, dim=64)
    plain = checkpoint.abstract(config, dtype=dtype)
    if quantization.group_size == 32:
        assert config.n_heads * config.head_dim % 32 == 0
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), plain)
    quantized = quantization(params)
    abstract = checkpoint.abstract(config, quantization, dtype)
    assert jax.tree.structure(abstract) == jax.tree.structure(quantized)
    for a, b in zip(jax.tree.leaves(abstract), jax.tree.leaves(quantized), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "int3"}, "'int3' is unknown; choose from int8, w8a8, llm_int8, int4, nf4"),
        ({"kind": "int8", "group_size": 64}, "int8 has no group size"),
        ({"kind": "int4", "group_size": 1}, "group size is 1, expected"),
        ({"kind": "int4", "double_quantization": True}, "int4 has no double quantization"),
    ],
)
def test_what_no_kind_knows_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        Quantization(**options)


def test_a_group_that_does_not_fit_names_the_tensor():
    params = {"mlp": {"down": {"kernel": jnp.ones((8, 172))}}}
    with pytest.raises(UserError, match=r"64 does not divide the 172 inputs of mlp\.down\.kernel"):
        Quantization("int4", group_size=64)(params)
    fitting = Quantization("int4")(params)["mlp"]["down"]["kernel"]
    assert fitting.scale.shape == (8, 4)  # groups of 43

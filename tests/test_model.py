"""The model against transformers, published sizes, and what any causal model must satisfy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from llama_jax.cache import append, init_cache
from llama_jax.checkpoint import param_shapes
from llama_jax.config import PRESETS
from llama_jax.model import Llama, forward

# float32 with sums in another order: errors of 1e-5 on logits of order 3 to 10.
LOGITS_ATOL = 1e-4
# The same operations on the same numbers in other shapes: a few roundings of float32.
SAME_ATOL = 2e-5
# Relative RMS error of bfloat16: each value is rounded by up to 2**-9 about twenty times on its
# way through two layers, and the errors add up as a random walk.
BF16_RELATIVE_RMS = 0.03

CONFIG = oracle.CONFIGS["6 heads on 2"]
T = 11

run = jax.jit(forward, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def run_lengths(config, params, tokens_BT, cache, lengths_B):
    """As `forward`, for rows of `lengths_B` tokens each: the last logits of each, and the cache."""
    logits, new = Llama(config).apply({"params": params}, tokens_BT, cache, lengths_B)
    return logits, append(cache, new, lengths_B)


@pytest.fixture(scope="module")
def params():
    return oracle.random_params(CONFIG)


def random_tokens(*shape, seed=1):
    return np.random.default_rng(seed).integers(0, oracle.V, shape).astype(np.int32)


# --- against transformers ---


@pytest.mark.parametrize("name", oracle.CONFIGS)
def test_logits_are_those_of_transformers(name):
    config = oracle.CONFIGS[name]
    params = oracle.random_params(config)
    model = oracle.transformers_model(config, params)
    torch = pytest.importorskip("torch")
    tokens = random_tokens(2, T)
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens).long()).logits.numpy()
    logits, _ = run(config, params, tokens)
    assert logits.dtype == jnp.float32
    assert np.std(expected) > 1  # so that the tolerance means something
    np.testing.assert_allclose(logits, expected, rtol=0, atol=LOGITS_ATOL)


@pytest.mark.parametrize("name", ["llama 3.1", "llama 3.2"])
def test_logits_beyond_8192_positions_are_those_of_transformers(name):
    """Both read 8320 tokens in chunks through their own caches; the last chunk is compared.

    One layer of one head, for speed: keys of all positions, queries of 7680 to 8319.
    """
    config = dataclasses.replace(oracle.CONFIGS[name], n_layers=1, n_heads=1)
    params = oracle.random_params(config)
    model = oracle.transformers_model(config, params)
    torch = pytest.importorskip("torch")
    chunk, chunks = 640, 13
    tokens = random_tokens(1, chunk * chunks)

    parts = np.split(tokens, chunks, axis=1)

    past = None
    with torch.no_grad():
        for part in parts:
            out = model(torch.from_numpy(part).long(), past_key_values=past, use_cache=True)
            past = out.past_key_values
    expected = out.logits[0].numpy()
    assert past.get_seq_length() == chunk * chunks > 8192

    cache = init_cache(config, 1, chunk * chunks, jnp.float32)
    for part in parts[:-1]:
        _, cache = run(config, params, part, cache)
    logits, _ = run(config, params, parts[-1], cache)
    np.testing.assert_allclose(logits[0], expected, rtol=0, atol=LOGITS_ATOL)

    # The scaling matters here: a factor that is wrong by 1% fails by far.
    scaling = dataclasses.replace(config.rope_scaling, factor=1.01 * config.rope_scaling.factor)
    wrong, _ = run(dataclasses.replace(config, rope_scaling=scaling), params, parts[-1], cache)
    assert np.abs(wrong[0] - expected).max() > 100 * LOGITS_ATOL


# --- sizes ---

PUBLISHED_PARAMETERS = {
    "llama-1-7b": 6_738_415_616,
    "llama-1-13b": 13_015_864_320,
    "llama-1-30b": 32_528_943_616,
    "llama-1-65b": 65_285_660_672,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.3-70b": 70_553_706_496,
}


def test_every_preset_has_a_published_size():
    assert set(PUBLISHED_PARAMETERS) == set(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_init_makes_the_published_number_of_parameters(name):
    config = PRESETS[name]
    tree = jax.eval_shape(Llama(config).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    leaves = jax.tree.leaves(tree["params"])
    assert sum(int(np.prod(leaf.shape)) for leaf in leaves) == PUBLISHED_PARAMETERS[name]
    assert config.count_parameters() == PUBLISHED_PARAMETERS[name]
    assert jax.tree.map(lambda leaf: leaf.shape, tree["params"]) == param_shapes(config)


def test_init_gives_finite_logits():
    init = jax.jit(Llama(CONFIG).init)
    params = init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    logits, cache = run(CONFIG, params, random_tokens(1, T))
    assert cache is None
    assert logits.shape == (1, T, oracle.V)
    assert np.isfinite(logits).all()
    assert (logits[0, 0] != logits[0, 1]).any()


# --- causality ---


@pytest.mark.parametrize("split", [None, 4], ids=["whole", "through the cache"])
def test_no_logit_depends_on_a_later_token(params, split):
    """By gradient: each token has an embedding of its own, and the head is another table."""
    tokens = jnp.arange(T, dtype=jnp.int32)[None]
    mix_V = jnp.asarray(np.random.default_rng(0).normal(size=oracle.V), jnp.float32)

    def mixed_logits(embedding):
        tree = {**params, "embed": {"embedding": embedding}}
        if split is None:
            return forward(CONFIG, tree, tokens)[0][0] @ mix_V
        cache = init_cache(CONFIG, 1, T, jnp.float32)
        first, cache = forward(CONFIG, tree, tokens[:, :split], cache)
        second, _ = forward(CONFIG, tree, tokens[:, split:], cache)
        return jnp.concatenate([first, second], axis=1)[0] @ mix_V

    jacobian = jax.jit(jax.jacrev(mixed_logits))(params["embed"]["embedding"])
    influence = np.abs(jacobian[:, :T]).max(axis=-1)  # [logits at t, token at t]
    assert (influence[np.triu_indices(T, 1)] == 0).all()
    assert (influence[np.tril_indices(T)] > 1e-4).all()


# --- the cache changes nothing ---


@pytest.mark.parametrize("chunks", [[T], [1] * T, [3, 5, 3]], ids=["whole", "one by one", "3 5 3"])
def test_through_the_cache_logits_are_the_same(params, chunks):
    tokens = random_tokens(2, T)
    expected, _ = run(CONFIG, params, tokens)
    cache = init_cache(CONFIG, 2, T + 3, jnp.float32)
    logits = []
    for part in np.split(tokens, np.cumsum(chunks)[:-1], axis=1):
        part_logits, cache = run(CONFIG, params, part, cache)
        logits.append(part_logits)
    assert cache.length.tolist() == [T, T]
    np.testing.assert_allclose(np.concatenate(logits, 1), expected, rtol=0, atol=SAME_ATOL)


def test_ragged_rows_equal_each_row_alone(params):
    """Rows of 5, 0, 11 and 1 tokens padded on the right, then of 2, 11, 0 and 3."""
    lengths = [(5, 2), (0, 11), (11, 0), (1, 3)]
    tokens = random_tokens(2, len(lengths), T)
    cache = init_cache(CONFIG, len(lengths), 2 * T, jnp.float32)
    logits = []
    for i in range(2):
        each = jnp.asarray([pair[i] for pair in lengths])
        part_logits, cache = run_lengths(CONFIG, params, tokens[i], cache, each)
        assert np.isfinite(part_logits).all()
        logits.append(part_logits)
    assert cache.length.tolist() == [sum(pair) for pair in lengths]

    for row, pair in enumerate(lengths):
        alone = np.concatenate([tokens[i, row, : pair[i]] for i in range(2)])
        alone = np.pad(alone, (0, 2 * T - len(alone)))[None]  # later tokens do not matter
        expected, filled = run(CONFIG, params, alone, init_cache(CONFIG, 1, 2 * T, jnp.float32))
        for i in range(2):
            if pair[i]:
                np.testing.assert_allclose(
                    logits[i][row, 0], expected[0, sum(pair[: i + 1]) - 1], rtol=0, atol=SAME_ATOL
                )
        for ours, theirs in zip(
            jax.tree.leaves(cache.layers), jax.tree.leaves(filled.layers), strict=True
        ):
            np.testing.assert_allclose(
                ours[row, :, : sum(pair)], theirs[0, :, : sum(pair)], rtol=0, atol=SAME_ATOL
            )
            assert (ours[row, :, sum(pair) :] == 0).all()


def test_slots_beyond_the_length_are_never_read(params):
    tokens = random_tokens(2, T)
    clean = init_cache(CONFIG, 2, 2 * T, jnp.float32)
    _, clean = run(CONFIG, params, tokens, clean)
    stale = clean.replace(layers=jax.tree.map(lambda x: x.at[:, :, T:].set(1e9), clean.layers))
    for cache in (clean, stale):
        logits, _ = run(CONFIG, params, tokens[:, :1], cache)
        if cache is clean:
            expected = logits
    assert (np.asarray(logits) == np.asarray(expected)).all()


# --- dtypes ---


def test_bfloat16_is_close_to_float32(params):
    """On the same weights, so that only the arithmetic differs."""
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    same = jax.tree.map(lambda x: x.astype(jnp.float32), half)
    tokens = random_tokens(2, T)
    expected, _ = run(CONFIG, same, tokens)
    logits, cache = run(CONFIG, half, tokens, init_cache(CONFIG, 2, T, jnp.bfloat16))
    assert logits.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(cache.layers)} == {jnp.dtype(jnp.bfloat16)}
    error = np.sqrt(np.mean((logits - expected) ** 2) / np.mean(np.square(expected)))
    assert 0 < error < BF16_RELATIVE_RMS

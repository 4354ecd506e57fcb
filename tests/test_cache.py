"""Appending to the cache: what is written, what is left alone, what is dropped."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from llama_jax.cache import append, init_cache

CONFIG = oracle.CONFIGS["6 heads on 2"]  # 2 layers, 2 KV heads of 8
K, H = CONFIG.n_kv_heads, CONFIG.head_dim

jitted_append = jax.jit(append)


def filled(length, capacity):
    """A cache whose every number differs, and the same as nested NumPy arrays."""
    cache = init_cache(CONFIG, len(length), capacity, jnp.float32)
    leaves, tree = jax.tree.flatten(cache.layers)
    rng = np.random.default_rng(0)
    leaves = [rng.normal(size=leaf.shape).astype(np.float32) for leaf in leaves]
    return cache.replace(
        layers=jax.tree.unflatten(tree, [jnp.asarray(leaf) for leaf in leaves]),
        length=jnp.asarray(length, jnp.int32),
    )


def entries(batch, T):
    rng = np.random.default_rng(1)

    def array():
        return jnp.asarray(rng.normal(size=(batch, K, T, H)), jnp.float32)

    return tuple((array(), array()) for _ in range(CONFIG.n_layers))


def expected_append(old, new, length, lengths, capacity):
    """The docstring of `append`, one number at a time."""
    result = np.array(old)
    for row, (start, count) in enumerate(zip(length, lengths, strict=True)):
        for t in range(count):
            if start + t < capacity:
                result[row, :, start + t] = new[row, :, t]
    return result


def check(length, lengths, capacity, T):
    cache, new = filled(length, capacity), entries(len(length), T)
    before = jax.tree.map(np.array, cache)
    after = jitted_append(cache, new, jnp.asarray(lengths, jnp.int32))
    for old, of_new, result in zip(
        jax.tree.leaves(before.layers),
        jax.tree.leaves(new),
        jax.tree.leaves(after.layers),
        strict=True,
    ):
        np.testing.assert_array_equal(
            result, expected_append(old, of_new, length, lengths, capacity)
        )
    assert after.length.tolist() == [a + b for a, b in zip(length, lengths, strict=True)]
    for old, unchanged in zip(jax.tree.leaves(before), jax.tree.leaves(cache), strict=True):
        np.testing.assert_array_equal(unchanged, old)  # the argument is no output
    return before, after


def test_init_cache_is_empty():
    cache = init_cache(CONFIG, 3, 5, jnp.bfloat16)
    assert cache.capacity == 5
    assert cache.length.tolist() == [0, 0, 0]
    assert cache.length.dtype == jnp.int32
    leaves = jax.tree.leaves(cache.layers)
    assert len(leaves) == 2 * CONFIG.n_layers
    for leaf in leaves:
        assert (leaf.shape, leaf.dtype) == ((3, K, 5, H), jnp.bfloat16)
        assert not leaf.any()


def test_append_of_the_docstring():
    before, after = check([2, 5], [3, 1], capacity=8, T=3)
    old, new = before.layers[0][0], np.asarray(after.layers[0][0])
    changed = (old != new).any(axis=(1, 3))
    assert np.argwhere(changed).tolist() == [[0, 2], [0, 3], [0, 4], [1, 5]]


def test_rows_of_length_0_are_untouched():
    before, after = check([4, 3, 0], [0, 2, 0], capacity=6, T=2)
    for row in (0, 2):
        for old, new in zip(
            jax.tree.leaves(before.layers), jax.tree.leaves(after.layers), strict=True
        ):
            np.testing.assert_array_equal(new[row], old[row])


@pytest.mark.parametrize(
    ("length", "lengths"), [([4, 5], [3, 3]), ([6, 0], [3, 3]), ([9, 6], [1, 0])]
)
def test_positions_beyond_the_capacity_are_dropped(length, lengths):
    check(length, lengths, capacity=6, T=3)


def test_values_are_cast_to_the_dtype_of_the_cache():
    cache = init_cache(CONFIG, 1, 4, jnp.bfloat16)
    new = entries(1, 2)
    after = jitted_append(cache, new, jnp.asarray([2]))
    for of_new, result in zip(jax.tree.leaves(new), jax.tree.leaves(after.layers), strict=True):
        assert result.dtype == jnp.bfloat16
        np.testing.assert_array_equal(result[:, :, :2], of_new.astype(jnp.bfloat16))


def test_in_two_parts_is_in_one():
    new = entries(2, 5)
    empty = init_cache(CONFIG, 2, 6, jnp.float32)
    whole = jitted_append(empty, new, jnp.asarray([5, 5]))
    first = jitted_append(empty, jax.tree.map(lambda x: x[:, :, :3], new), jnp.asarray([3, 3]))
    parts = jitted_append(first, jax.tree.map(lambda x: x[:, :, 3:], new), jnp.asarray([2, 2]))
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_array_equal(a, b)

"""The table of names and the RoPE permutation."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest

from convert.names import EMBED, HEAD, halves_from_pairs, pairs_from_halves, weights
from llama_jax.config import PRESETS


@pytest.mark.parametrize("name", ["llama-2-7b", "llama-3.2-1b"])
def test_the_table_names_every_parameter_once(name: str):
    config = PRESETS[name]
    table = list(weights(config))
    for names in ([w.path for w in table], [w.meta for w in table], [w.hf for w in table]):
        assert (
            len(set(names)) == len(names) == 9 * config.n_layers + 2 + (not config.tie_embeddings)
        )
    assert sum(np.prod(w.shape(config)) for w in table) == config.count_parameters()


def test_the_table_is_the_model_directorys_tree():
    from llama_jax.checkpoint import param_shapes

    config = dataclasses.replace(PRESETS["llama-3-8b"], n_layers=11)

    def flat(tree, prefix=""):
        for key, node in tree.items():
            if isinstance(node, dict):
                yield from flat(node, f"{prefix}{key}/")
            else:
                yield prefix + key, node

    assert dict(flat(param_shapes(config))) == {w.path: w.shape(config) for w in weights(config)}


def test_names_of_one_layer():
    layer = {w.path: (w.meta, w.hf) for w in weights(PRESETS["llama-3-8b"])}
    assert layer["layers_7/mlp/down/kernel"] == (
        "layers.7.feed_forward.w2.weight",
        "model.layers.7.mlp.down_proj.weight",
    )
    assert (EMBED.hf, HEAD.hf) == ("model.embed_tokens.weight", "lm_head.weight")


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_permutation_of_the_docstring_and_its_inverse(dtype: type):
    rows = np.arange(2 * 4).reshape(8, 1).astype(dtype)  # two heads of four rows
    halves = halves_from_pairs(rows, 2)
    assert halves.ravel().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert halves.dtype == rows.dtype
    random = np.random.default_rng(0).normal(size=(48, 5)).astype(dtype)
    assert np.array_equal(pairs_from_halves(halves_from_pairs(random, 4), 4), random)
    assert np.array_equal(halves_from_pairs(pairs_from_halves(random, 4), 4), random)


def test_rotating_halves_after_the_permutation_is_rotating_pairs_before_it():
    rng = np.random.default_rng(0)
    n_heads, head_dim, dim = 2, 8, 6
    w, x = rng.normal(size=(n_heads * head_dim, dim)), rng.normal(size=dim)
    angle = rng.normal(size=head_dim // 2)
    turn = np.exp(1j * angle)

    pairs = (w @ x).reshape(n_heads, head_dim // 2, 2)
    by_pairs = (pairs[..., 0] + 1j * pairs[..., 1]) * turn
    halves = (halves_from_pairs(w, n_heads) @ x).reshape(n_heads, 2, head_dim // 2)
    by_halves = (halves[:, 0] + 1j * halves[:, 1]) * turn
    np.testing.assert_allclose(by_halves, by_pairs, rtol=1e-12)

"""Losses: transformers' cross-entropy, packed as unpacked, in blocks as whole."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from llama_jax import lora
from llama_jax.model import REMAT, segment_positions, stack
from llama_jax.quant import Quantization
from train import losses
from train.losses import next_token, token_nats

CONFIG = oracle.CONFIGS["6 heads on 2"]
TIED = oracle.CONFIGS["tied head"]
ATOL = 2e-5  # nats, float32
NATS = jax.jit(lambda params, batch: token_nats(CONFIG, params, batch))
LOSS = jax.jit(next_token(CONFIG))


def batch_of(texts, T):
    """Rows of packed texts: each row a list of texts (lists of token ids)."""
    rows = len(texts)
    batch = {name: np.zeros((rows, T), np.int32) for name in ("tokens", "targets", "segments")}
    batch["weights"] = np.zeros((rows, T), np.float32)
    for row, packed in enumerate(texts):
        begin = 0
        for number, text in enumerate(packed, 1):
            end = begin + len(text) - 1
            batch["tokens"][row, begin:end] = text[:-1]
            batch["targets"][row, begin:end] = text[1:]
            batch["segments"][row, begin:end] = number
            batch["weights"][row, begin:end] = 1
            begin = end
    return jax.tree.map(jnp.asarray, batch)


def texts(*lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, oracle.V, n).tolist() for n in lengths]


@pytest.fixture(scope="module")
def params():
    return oracle.random_params(CONFIG)


@pytest.mark.parametrize("config", [CONFIG, TIED], ids=["head", "tied"])
def test_the_loss_is_that_of_transformers(config):
    torch = pytest.importorskip("torch")
    params = oracle.random_params(config)
    model = oracle.transformers_model(config, params)
    (text,) = texts(20)
    total, weight, _ = jax.jit(next_token(config))(params, batch_of([[text]], 24), None)
    ids = torch.tensor([text])
    theirs = model(ids, labels=ids).loss.item()
    assert weight == 19
    np.testing.assert_allclose(total / weight, theirs, rtol=1e-5)


def test_packed_texts_cost_what_they_cost_alone(params):
    a, b, c = texts(7, 12, 5)
    packed = NATS(params, batch_of([[a, b, c], [b, c, a]], 24))
    alone = [NATS(params, batch_of([[text]], 24))[0] for text in (a, b, c)]
    expected = np.concatenate(
        [nats[: len(t) - 1] for nats, t in zip(alone, (a, b, c), strict=True)]
    )
    np.testing.assert_allclose(packed[0, : len(expected)], expected, atol=ATOL)


def test_positions_begin_anew_in_each_segment():
    segments = jnp.array([[1, 1, 1, 2, 2, 0, 0], [3, 3, 4, 5, 5, 5, 5]])
    expected = [[0, 1, 2, 0, 1, 0, 1], [0, 1, 0, 0, 1, 2, 3]]
    np.testing.assert_array_equal(segment_positions(segments), expected)


def test_no_gradient_flows_between_packed_texts(params):
    a, b = texts(9, 9)
    batch = batch_of([[a, b]], 16)
    only_b = batch | {"weights": batch["weights"] * (batch["segments"] == 2)}

    def loss(embedding, batch):
        changed = params | {"embed": {"embedding": embedding}}
        return next_token(CONFIG)(changed, batch, None)[0]

    gradient = jax.jit(jax.grad(loss))(params["embed"]["embedding"], only_b)
    elsewhere = sorted(set(a[:-1]) - set(b[:-1]))
    assert elsewhere
    assert not np.any(gradient[np.array(elsewhere)])
    assert np.any(gradient[np.array(b[:-1])])


@pytest.mark.parametrize("T", [24, 13])
def test_logits_in_blocks_are_all_logits(params, monkeypatch, T):
    """Of 24 positions, and of 13 that do not divide: the third block is padded."""
    batch = batch_of([texts(T - 4), texts(T, seed=1)], T)

    def value_and_gradient():
        loss = lambda p: next_token(CONFIG)(p, batch, None)[0]  # noqa: E731
        return jax.jit(jax.value_and_grad(loss))(params), token_nats(CONFIG, params, batch)

    whole = value_and_gradient()
    monkeypatch.setattr(losses, "LOGITS", 2 * 5 * oracle.V)
    for ours, theirs in zip(*map(jax.tree.leaves, (value_and_gradient(), whole)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("T", "most", "blocks", "width"),
    [(24, 24, 1, 24), (24, 5, 5, 5), (13, 5, 3, 5), (13, 12, 2, 7), (7, 1, 7, 1), (7, 0, 7, 1)],
)
def test_blocks_are_few_and_hold_at_most_the_logits_that_they_may(
    params, monkeypatch, T, most, blocks, width
):
    """So few positions as `most` may be in memory at once, though never none."""
    monkeypatch.setattr(losses, "LOGITS", (2 * most + 1) * oracle.V)
    batch = batch_of([texts(T), texts(T, seed=1)], T)
    program = str(jax.make_jaxpr(lambda p: token_nats(CONFIG, p, batch))(params))
    assert set(re.findall(rf"f32\[2,(\d+),{oracle.V}\]", program)) == {str(width)}
    assert blocks == 1 or f"f32[{blocks},2,{width},{CONFIG.dim}]" in program


@pytest.mark.parametrize(("kind", "remat"), list(zip([None, "int8", "nf4"], REMAT, strict=True)))
def test_rematerialized_and_stacked_layers_give_the_same_gradient(params, kind, remat):
    """Adapters on any base, with dropout off."""
    base = Quantization(kind)(params) if kind else params
    adapted = lora.add(base, lora.LoraConfig(rank=4, targets=lora.TARGETS), jax.random.key(0))
    adapted = jax.tree.map_with_path(
        lambda path, x: x + 0.02 if lora.is_adapter(path) else x, adapted
    )
    batch = batch_of([texts(20)], 20)
    trained, frozen = lora.split(adapted)

    def gradient(remat, view):
        def total(trained):
            return next_token(CONFIG, remat=remat)(view(lora.join(trained, frozen)), batch, None)[0]

        return jax.jit(jax.grad(total))(trained)

    plain = gradient("none", lambda params: params)
    for view in (lambda params: params, stack):
        for ours, theirs in zip(*map(jax.tree.leaves, (gradient(remat, view), plain)), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-3)


def test_full_rematerialization_keeps_less(params):
    batch = batch_of([texts(60)], 60)

    def temporaries(remat):
        gradient = jax.grad(lambda p: next_token(CONFIG, remat=remat)(stack(p), batch, None)[0])
        return jax.jit(gradient).lower(params).compile().memory_analysis().temp_size_in_bytes

    assert temporaries("full") < 0.8 * temporaries("none")


def test_dropout_changes_the_loss_with_a_key_and_not_without(params):
    batch = batch_of([texts(20)], 20)
    loss = jax.jit(next_token(CONFIG, dropout=0.5))
    still, *_ = LOSS(params, batch, None)
    np.testing.assert_allclose(loss(params, batch, None)[0], still, rtol=1e-5)
    first, second, again = (loss(params, batch, jax.random.key(k))[0] for k in (0, 1, 0))
    assert first != second
    assert first == again
    assert abs(first - still) > 0.1

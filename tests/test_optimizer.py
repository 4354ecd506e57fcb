"""Optimizers: PyTorch's AdamW, frozen leaves untouched, norms not decayed, published schedules."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest

from llama_jax import lora
from llama_jax.errors import UserError
from train.optimizer import OPTIMIZERS, OptimizerConfig, learning_rate, make_optimizer

CONFIG = oracle.CONFIGS["6 heads on 2"]


def everything(path):
    return True


def adapted():
    return lora.add(oracle.random_params(CONFIG), lora.LoraConfig(rank=4), jax.random.key(0))


def noise(tree, seed=0):
    leaves, structure = jax.tree.flatten(tree)
    rng = np.random.default_rng(seed)
    return structure.unflatten([jnp.asarray(rng.normal(size=x.shape), x.dtype) for x in leaves])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_frozen_leaves_are_bit_identical_and_have_no_state(name):
    """By the whole tree with gradients of everything, as Optax masks it."""
    params = before = adapted()
    config = OptimizerConfig(name, weight_decay=0.1)
    optimizer = make_optimizer(config, 20, lora.is_adapter)
    state = optimizer.init(params)
    trained, _ = lora.split(params)
    largest = {
        "adamw": 2 * sum(x.size for x in jax.tree.leaves(trained)),
        "lion": sum(x.size for x in jax.tree.leaves(trained)),
        "sgd": sum(x.size for x in jax.tree.leaves(trained)),
        "adafactor": 3 * sum(x.size for x in jax.tree.leaves(trained)),
    }[name]
    assert sum(x.size for x in jax.tree.leaves(state)) <= largest + 100
    update = jax.jit(optimizer.update)
    for step in range(20):
        updates, state = update(noise(params, step), state, params)
        params = optax.apply_updates(params, updates)
    for (path, old), new in zip(
        jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(params), strict=True
    ):
        assert np.array_equal(old, new) != lora.is_adapter(path), path


def test_what_is_clipped_is_the_norm_of_the_adapters_alone():
    params = adapted()
    gradient = jax.tree.map_with_path(
        lambda path, g: g if lora.is_adapter(path) else 1e6 * g, noise(params)
    )
    config = OptimizerConfig("sgd", learning_rate=1.0, schedule="constant", clip=0.5)
    optimizer = make_optimizer(config, 1, lora.is_adapter)
    updates, _ = optimizer.update(gradient, optimizer.init(params), params)
    moved, _ = lora.split(updates)
    np.testing.assert_allclose(optax.tree.norm(moved), 0.5, rtol=1e-6)
    trained, _ = lora.split(gradient)
    expected = jax.tree.map(lambda g: -g * (0.5 / optax.tree.norm(trained)), trained)
    for ours, theirs in zip(*map(jax.tree.leaves, (moved, expected)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_the_tree_of_adapters_alone_moves_as_in_the_whole_tree():
    params = adapted()
    gradient = noise(params)
    optimizer = make_optimizer(OptimizerConfig(weight_decay=0.1), 5, lora.is_adapter)
    whole, _ = optimizer.update(gradient, optimizer.init(params), params)
    (trained, _), (gradient, _), (whole, _) = map(lora.split, (params, gradient, whole))
    alone, _ = optimizer.update(gradient, optimizer.init(trained), trained)
    for ours, theirs in zip(*map(jax.tree.leaves, (alone, whole)), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_adamw_is_that_of_pytorch():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    start = rng.normal(size=(5, 7)).astype(np.float32)
    theirs = torch.nn.Parameter(torch.from_numpy(start.copy()))
    torch_optimizer = torch.optim.AdamW([theirs], lr=0.1, betas=(0.9, 0.95), weight_decay=0.1)
    ours = {"kernel": jnp.asarray(start)}
    config = OptimizerConfig(
        learning_rate=0.1, schedule="constant", weight_decay=0.1, clip=0, b2=0.95
    )
    optimizer = make_optimizer(config, 10, everything)
    state = optimizer.init(ours)
    for _ in range(10):
        gradient = rng.normal(size=(5, 7)).astype(np.float32)
        theirs.grad = torch.from_numpy(gradient)
        torch_optimizer.step()
        updates, state = optimizer.update({"kernel": jnp.asarray(gradient)}, state, ours)
        ours = optax.apply_updates(ours, updates)
        np.testing.assert_allclose(ours["kernel"], theirs.detach().numpy(), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_all_but_norms_decay_by_the_rate(name):
    """Where the gradient is 0, decay alone moves anything: rate * decay * parameter, as in AdamW."""
    params = oracle.random_params(CONFIG)
    config = OptimizerConfig(name, learning_rate=0.01, weight_decay=0.1)
    optimizer = make_optimizer(config, 5, everything)
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zero, optimizer.init(params), params)
    expected = jax.tree.map_with_path(
        lambda path, x: 0 * x if path[-1].key == "scale" else -0.01 * 0.1 * x, params
    )
    for update, theirs in zip(*map(jax.tree.leaves, (updates, expected)), strict=True):
        np.testing.assert_allclose(update, theirs, rtol=1e-5)


def test_adafactor_follows_the_gradient_as_in_optax():
    params, config = (
        oracle.random_params(CONFIG),
        OptimizerConfig("adafactor", 0.01, "constant", clip=0),
    )
    ours, theirs = make_optimizer(config, 5, everything), optax.adafactor(0.01)
    our_state, their_state = ours.init(params), theirs.init(params)
    for seed in range(3):
        gradient = noise(params, seed)
        updates, our_state = ours.update(gradient, our_state, params)
        expected, their_state = theirs.update(gradient, their_state, params)
        for update, other in zip(*map(jax.tree.leaves, (updates, expected)), strict=True):
            np.testing.assert_allclose(update, other, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [  # of 10 steps, 4 of them warm-up
        ("constant", [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1, 1]),
        ("linear", [0.25, 0.5, 0.75, 1, 1, 0.85, 0.7, 0.55, 0.4, 0.25, 0.1]),
        (
            "cosine",
            [0.25, 0.5, 0.75, 1] + [0.1 + 0.9 * (1 + np.cos(np.pi * i / 6)) / 2 for i in range(7)],
        ),
    ],
)
def test_learning_rates(schedule, expected):
    rate = learning_rate(OptimizerConfig(learning_rate=1.0, schedule=schedule, warmup=4), 10)
    np.testing.assert_allclose([rate(i) for i in range(11)], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "adam"}, "'adam' is unknown; choose from adamw, lion, sgd, adafactor"),
        ({"schedule": "step"}, "'step' is unknown; choose from cosine, linear, constant"),
        ({"learning_rate": 0.0}, "learning rate is 0.0, expected more than 0 and finite"),
        ({"learning_rate": float("nan")}, "learning rate is nan, expected more than 0"),
        ({"learning_rate": float("inf")}, "learning rate is inf, expected more than 0 and finite"),
        ({"clip": -1}, "clip norm is -1, expected 0 or more"),
        ({"clip": float("nan")}, "clip norm is nan, expected 0 or more and finite"),
        ({"weight_decay": float("inf")}, "weight decay is inf, expected 0 or more and finite"),
    ],
)
def test_what_makes_no_sense_is_refused(fields, message):
    with pytest.raises(UserError, match=message):
        OptimizerConfig(**fields)

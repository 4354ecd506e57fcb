"""DPO: losses and implicit rewards by NumPy, the reference is the base, padding counts nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from test_losses import batch_of, texts

from llama_jax import lora
from llama_jax.model import forward
from llama_jax.quant import Quantization
from train.losses import preference, rewards

CONFIG = oracle.CONFIGS["6 heads on 2"]
BETA, T = 0.3, 16
LOGITS = jax.jit(lambda params, tokens: forward(CONFIG, params, tokens)[0])
LOSS = jax.jit(preference(CONFIG, BETA))


@pytest.fixture(scope="module")
def params():
    """With adapters that do something."""
    base = oracle.random_params(CONFIG)
    adapted = lora.add(base, lora.LoraConfig(rank=4), jax.random.key(0))
    return jax.tree.map_with_path(lambda path, x: x + 0.02 if lora.is_adapter(path) else x, adapted)


def pairs():
    """Three pairs; of each answer the last tokens count."""
    prompts, answers = texts(3, 5, 4), texts(6, 4, 2, 8, 7, 5, seed=1)
    batch = batch_of([[prompts[i // 2] + answer] for i, answer in enumerate(answers)], T)
    for i in range(6):
        batch["weights"] = batch["weights"].at[i, : len(prompts[i // 2]) - 1].set(0)
    return batch


def log_p(params, batch):
    """Of each row, in float64 from the logits."""
    total = []
    for row in range(len(batch["tokens"])):
        logits = np.asarray(LOGITS(params, batch["tokens"][row : row + 1])[0], np.float64)
        nats = np.log(np.exp(logits).sum(-1)) - logits[np.arange(T), batch["targets"][row]]
        total.append(-(nats * np.asarray(batch["weights"][row])).sum())
    return np.array(total)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_and_rewards_are_those_of_the_paper(params, smoothing):
    batch = pairs()
    reward = BETA * (log_p(lora.merge(params), batch) - log_p(lora.drop(params), batch))
    chosen, rejected = reward[::2], reward[1::2]
    sigmoid = 1 / (1 + np.exp(-(chosen - rejected)))
    losses = -(1 - smoothing) * np.log(sigmoid) - smoothing * np.log(1 - sigmoid)
    ours = jax.jit(lambda p, b: rewards(CONFIG, p, b, BETA))(params, batch)
    np.testing.assert_allclose(ours, (chosen, rejected), atol=1e-4)
    loss = preference(CONFIG, BETA, label_smoothing=smoothing)
    total, weight, seen = jax.jit(loss)(params, batch, None)
    assert weight == 3
    np.testing.assert_allclose(total, losses.sum(), rtol=1e-4)
    expected = {
        "reward_chosen": chosen.sum(),
        "reward_rejected": rejected.sum(),
        "margin": (chosen - rejected).sum(),
        "accuracy": (chosen > rejected).sum(),
    }
    assert seen.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(seen[name], value, atol=3e-4)


def test_a_new_adapter_is_the_reference(params):
    new = lora.add(lora.drop(params), lora.LoraConfig(), jax.random.key(1))
    total, weight, seen = LOSS(new, pairs(), None)
    np.testing.assert_allclose(total / weight, np.log(2), rtol=1e-6)
    assert seen["margin"] == 0


def test_pairs_of_padding_count_nothing(params):
    batch = pairs()
    padded = jax.tree.map(lambda x: jnp.concatenate([x, jnp.zeros_like(x[:2])]), batch)
    sums = (LOSS(params, padded, None), LOSS(params, batch, None))
    for ours, theirs in zip(*map(jax.tree.leaves, sums), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("kind", [None, "nf4"])
def test_the_gradient_prefers_the_chosen_answer(params, kind):
    """A step of it raises the margin of every kind of base; the reference does not move."""
    base = lora.drop(params)
    base = Quantization(kind)(base) if kind else base
    new = lora.add(base, lora.LoraConfig(rank=4), jax.random.key(1))
    trained, frozen = lora.split(new)
    batch = pairs()

    def loss(trained):
        total, _, seen = preference(CONFIG, BETA)(lora.join(trained, frozen), batch, None)
        return total, seen["margin"]

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (_, before), gradient = step(trained)
    moved = jax.tree.map(lambda x, g: x - 0.02 * g, trained, gradient)
    (_, after), _ = step(moved)
    assert before == 0
    assert after > 0.01

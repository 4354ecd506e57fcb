"""A training step: PyTorch's and PEFT's losses, windows that are one batch, float16."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from test_losses import batch_of, texts

from llama_jax import lora
from llama_jax.quant import Quantization
from train.losses import next_token
from train.optimizer import OptimizerConfig, make_optimizer
from train.step import LossScale, cast, init_state, make_step

CONFIG = oracle.CONFIGS["6 heads on 2"]
OPTIMIZER = OptimizerConfig(learning_rate=2e-3, warmup=3, weight_decay=0.1)
STEPS = 20
LENGTHS = [(5, 9), (17,), (3, 3), (20,)]  # of the texts packed in each row


def everything(path):
    return True


@pytest.fixture(scope="module")
def params():
    return oracle.random_params(CONFIG)


def windows(count, rows, micro=1):
    """`count` windows of `rows` rows in `micro` micro-batches, with much and little padding."""
    for i in range(count):
        lengths = [LENGTHS[(i + row) % len(LENGTHS)] for row in range(rows)]
        batch = batch_of([texts(*n, seed=10 * i + row) for row, n in enumerate(lengths)], 20)
        yield jax.tree.map(lambda x: x.reshape(micro, -1, *x.shape[1:]), batch)


def run(params, chosen, windows, *, dtype=jnp.float32, optimizer=OPTIMIZER, seed=None, loss=None):
    """The state after all windows, frozen leaves, and the metrics of each step."""
    transform = make_optimizer(optimizer, STEPS, chosen)
    trained, frozen = lora.split(params, chosen)
    step = jax.jit(make_step(loss or next_token(CONFIG), transform, dtype=dtype, seed=seed))
    state, history = init_state(trained, transform, dtype), []
    for window in windows:
        state, metrics = step(state, frozen, window)
        history.append({name: float(value) for name, value in metrics.items()})
    return state, frozen, history


def torch_losses(model, decayed, plain):
    """What the same 20 steps give with PyTorch: AdamW, the same warm-up and cosine."""
    torch = pytest.importorskip("torch")
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=OPTIMIZER.learning_rate)

    def rate(i):
        if i < 3:
            return (i + 1) / 3
        return 0.1 + 0.9 * (1 + np.cos(np.pi * (i - 3) / (STEPS - 3))) / 2

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    losses = []
    for i in range(STEPS):
        nats, count = 0, 0
        for row in range(4):
            for text in texts(*LENGTHS[(i + row) % len(LENGTHS)], seed=10 * i + row):
                logits = model(torch.tensor([text])).logits[0, :-1]
                target = torch.tensor(text[1:])
                nats += torch.nn.functional.cross_entropy(logits, target, reduction="sum")
                count += len(target)
        (nats / count).backward()
        losses.append((nats / count).item())
        torch.nn.utils.clip_grad_norm_([*decayed, *plain], OPTIMIZER.clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return losses


def test_twenty_steps_of_full_fine_tuning_are_those_of_pytorch(params):
    model = oracle.transformers_model(CONFIG, params).train()
    named = list(model.named_parameters())
    decayed = [p for name, p in named if "norm" not in name]
    theirs = torch_losses(model, decayed, [p for name, p in named if "norm" in name])
    _, _, history = run(params, everything, windows(STEPS, 4))
    np.testing.assert_allclose([step["loss"] for step in history], theirs, rtol=1e-4)
    assert theirs[-1] != pytest.approx(theirs[0], rel=0.05)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of PEFT's calls of transformers
def test_twenty_steps_of_lora_are_those_of_peft(params):
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    config = lora.LoraConfig(rank=4, alpha=16, targets=("q", "v", "down"))
    adapted = lora.add(params, config, jax.random.key(0))
    modules = ["q_proj", "v_proj", "down_proj"]
    model = peft.get_peft_model(
        oracle.transformers_model(CONFIG, params),
        peft.LoraConfig(r=4, lora_alpha=16, target_modules=modules, lora_dropout=0.0),
    )
    trained = []
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            continue
        layer, _, projection, matrix = name.split(".")[4:8]
        group = "mlp" if projection == "down_proj" else "attention"
        leaf = adapted[f"layers_{layer}"][group][projection.removesuffix("_proj")]["lora"]
        own = np.array(leaf.a if matrix == "lora_A" else leaf.b)
        parameter.data.copy_(torch.from_numpy(own))
        trained.append(parameter)
    assert len(trained) == 2 * len(modules) * CONFIG.n_layers
    theirs = torch_losses(model.train(), trained, [])
    _, _, history = run(adapted, lora.is_adapter, windows(STEPS, 4))
    np.testing.assert_allclose([step["loss"] for step in history], theirs, rtol=1e-4)
    assert theirs[-1] != pytest.approx(theirs[0], rel=0.02)


@pytest.mark.parametrize("kind", [None, "int8", "int4", "nf4"])
def test_the_base_is_bit_identical_after_20_steps(params, kind):
    base = Quantization(kind)(params) if kind else params
    adapted = lora.add(base, lora.LoraConfig(rank=4), jax.random.key(0))
    window = next(iter(windows(1, 4)))
    state, frozen, history = run(adapted, lora.is_adapter, [window] * STEPS)
    after = lora.drop(lora.join(state.trained, frozen))
    for ours, theirs in zip(*map(jax.tree.leaves, (after, base)), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert history[-1]["loss"] < history[0]["loss"] - 0.05  # of one batch, learnt by heart
    adapters = jax.tree.leaves(lora.split(adapted)[0])
    of_state = [x for x in jax.tree.leaves(state.optimizer) if x.ndim]
    assert sorted(x.shape for x in of_state) == sorted([x.shape for x in adapters] * 2)


@pytest.mark.parametrize("micro", [2, 4, 8])
def test_micro_batches_are_one_large_batch(params, micro):
    """Their texts differ in length, so a mean of means would be another number. The last is empty."""

    def all_windows(micro):
        for window in windows(3, 8, micro):
            last = window["weights"].at[-1].set(0) if micro == 8 else window["weights"]
            yield window | {"weights": last}

    def one_batch():
        for window in all_windows(micro):
            yield jax.tree.map(lambda x: x.reshape(1, -1, x.shape[-1]), window)

    optimizer = OptimizerConfig("sgd", learning_rate=1e-2)
    many, _, ours = run(params, everything, all_windows(micro), optimizer=optimizer)
    one, _, theirs = run(params, everything, one_batch(), optimizer=optimizer)
    for a, b in zip(ours, theirs, strict=True):
        assert a["weight"] == b["weight"]
        np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-6)
        np.testing.assert_allclose(a["grad_norm"], b["grad_norm"], rtol=1e-5)
    for a, b in zip(*map(jax.tree.leaves, (many.trained, one.trained)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_a_window_without_a_token_that_counts_changes_nothing(params):
    window = next(iter(windows(1, 4)))
    empty = window | {"weights": jnp.zeros_like(window["weights"])}
    optimizer = OptimizerConfig("sgd", schedule="constant")
    state, _, history = run(params, everything, [empty], optimizer=optimizer)
    assert (history[0]["loss"], history[0]["grad_norm"]) == (0, 0)
    for a, b in zip(*map(jax.tree.leaves, (state.trained, params)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_bfloat16_computes_with_float32_parameters(params):
    state, _, history = run(params, everything, windows(5, 4), dtype=jnp.bfloat16)
    _, _, exact = run(params, everything, windows(5, 4))
    assert {x.dtype for x in jax.tree.leaves(state.trained)} == {jnp.dtype(jnp.float32)}
    for ours, theirs in zip(history, exact, strict=True):
        np.testing.assert_allclose(ours["loss"], theirs["loss"], rtol=0.02)
        assert ours["loss"] != theirs["loss"]


def test_float16_skips_steps_that_overflow_and_follows_float32_then(params):
    window = next(iter(windows(1, 4)))

    def loss(params, batch, key):
        """As many times too large as makes the gradient overflow at first."""
        total, weight, seen = next_token(CONFIG)(params, batch, key)
        return total * batch["tokens"].size, weight * batch["tokens"].size, seen

    huge = functools.partial(run, params, everything, [window] * 12, loss=loss)
    state, _, history = huge(dtype=jnp.float16)
    skipped = [step["skipped"] for step in history]
    assert skipped[0] == 1
    assert sum(skipped) < len(skipped)
    for before, after in itertools.pairwise(history):
        assert after["loss_scale"] == before["loss_scale"] * (0.5 if before["skipped"] else 1)
        assert (after["loss"] == before["loss"]) == bool(before["skipped"])
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.trained))
    learned = [step["loss"] for step in history if not step["skipped"]]
    _, _, exact = huge()
    np.testing.assert_allclose(learned, [s["loss"] for s in exact][: len(learned)], rtol=0.01)
    assert int(state.step) == 12


def test_the_loss_scale_grows_after_a_while():
    scale = LossScale(jnp.float32(8), jnp.int32(LossScale.INTERVAL - 2))
    once = scale.update(jnp.bool(True))
    assert (once.scale, once.good_steps) == (8, LossScale.INTERVAL - 1)
    twice = once.update(jnp.bool(True))
    assert (twice.scale, twice.good_steps) == (16, 0)
    assert twice.update(jnp.bool(False)).scale == 8
    assert LossScale(jnp.float32(1), jnp.int32(5)).update(jnp.bool(False)).scale == 1


def test_dropout_depends_on_seed_and_step(params):
    """So a run that goes on from a checkpoint draws what it would have drawn."""
    config = lora.LoraConfig(rank=4, dropout=0.5)
    adapted = lora.add(params, config, jax.random.key(0))
    adapted = jax.tree.map_with_path(
        lambda path, x: x + 0.05 if lora.is_adapter(path) else x, adapted
    )
    window = next(iter(windows(1, 4)))
    still = OptimizerConfig("sgd", learning_rate=1e-30)

    def losses(seed):
        history = run(adapted, lora.is_adapter, [window] * 3, seed=seed, optimizer=still)[2]
        return [step["loss"] for step in history]

    first = losses(0)
    assert len(set(first)) == 3
    assert losses(0) == first
    assert set(losses(1)).isdisjoint(first)
    assert len(set(losses(None))) == 1


def test_casting_leaves_quantized_arrays_and_adapters_as_they_are(params):
    base = lora.add(Quantization("int8")(params), lora.LoraConfig(), jax.random.key(0))
    out = cast(base, jnp.bfloat16)
    q = out["layers_0"]["attention"]["q"]
    assert (q["kernel"].values.dtype, q["kernel"].scale.dtype) == (jnp.int8, jnp.float32)
    assert q["kernel"].dtype == jnp.bfloat16
    assert q["lora"].a.dtype == jnp.float32
    assert out["embed"]["embedding"].dtype == jnp.bfloat16

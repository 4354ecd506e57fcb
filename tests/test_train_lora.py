"""The command `train.lora`: the same losses however a run is computed, and what it leaves."""

import dataclasses
import json
import random

import jax
import numpy as np
import pytest
from oracle import random_params, tiny
from test_sharding import save_tokenizer

import llama_jax
from llama_jax.checkpoint import load_params, save_model
from llama_jax.errors import UserError
from llama_jax.lora import TARGETS
from train import lora

# Float32 sums in another order.
LOSS_RTOL = 1e-5
CONFIG = dataclasses.replace(tiny(4, 2, dim=64, head_dim=16, context=64), vocab_size=304)
MESHES = "fsdp=8", "data=2,fsdp=4", "fsdp=4,tensor=2"
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog"]
SHORT = ["--seq-len", "32", "--batch", "8", "--steps", "3", "--learning-rate", "0.01"]


def sentence(rng, least, most):
    return " ".join(rng.choices(WORDS, k=rng.randint(least, most)))


def write_rows(path, n=40):
    """Alpaca rows of one to some dozen tokens."""
    rng = random.Random(0)
    rows = [
        {"instruction": sentence(rng, 1, 3), "input": "", "output": sentence(rng, 1, 6)}
        for _ in range(n)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_text(path, n=400):
    rng = random.Random(1)
    path.write_text("\n".join(sentence(rng, 3, 9) for _ in range(n // 6)) + "\n")
    return path


def write_model(folder, config=CONFIG):
    params = random_params(config)
    tokenizer = save_tokenizer(folder, config.vocab_size)
    save_model(folder / "model", config, params, tokenizer=tokenizer, provenance={})
    return folder / "model"


def metrics(output):
    """(lines of steps, lines of validations)"""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return (
        [line for line in lines if "loss" in line],
        [line for line in lines if "validation_loss" in line],
    )


def losses(output):
    return [line["loss"] for line in metrics(output)[0]]


@pytest.fixture(autouse=True)
def no_compilations_on_disk(monkeypatch):
    """Other tests must not see JAX's cache on disk."""
    monkeypatch.setattr(lora, "keep_compilations", lambda: None)


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """`--checkpoint` and `--data` of a model and of plain text."""
    folder = tmp_path_factory.mktemp("lora")
    model, text = write_model(folder), write_text(folder / "text.txt")
    return ["--checkpoint", str(model), "--data", str(text)]


@pytest.fixture(scope="module")
def train(given, tmp_path_factory):
    """`train(*flags)`: the output directory of a run, of one for the same flags."""
    runs = {}

    def train(*flags):
        if flags not in runs:
            output = tmp_path_factory.mktemp("run") / "out"
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(lora, "keep_compilations", lambda: None)
                lora.main([*given, *SHORT, "--output", str(output), *flags])
            runs[flags] = output
        return runs[flags]

    return train


@pytest.mark.parametrize("mesh", MESHES)
def test_devices_together_have_the_losses_of_one(train, mesh):
    np.testing.assert_allclose(losses(train("--mesh", mesh)), losses(train()), rtol=LOSS_RTOL)


def test_losses_fall(train):
    found = losses(train())
    assert found[0] > found[1] > found[2]


@pytest.mark.parametrize("flags", [("--remat", "dots"), ("--remat", "full"), ("--scan",)])
def test_how_it_is_computed_changes_no_loss(train, flags):
    np.testing.assert_allclose(losses(train(*flags)), losses(train()), rtol=LOSS_RTOL)


def test_batches_added_up_are_one_batch(train):
    several = train("--batch", "2", "--accumulate", "4")
    np.testing.assert_allclose(losses(several), losses(train()), rtol=LOSS_RTOL)


@pytest.mark.parametrize("flags", [(), ("--scan",), ("--mesh", "fsdp=4,tensor=2")])
def test_the_adapter_is_there_and_changes_the_model(train, given, flags):
    model = given[1]
    tokens = np.array([[3, 14, 15, 92]])
    base = llama_jax.load(model)
    adapted = llama_jax.load(model, lora=train(*flags) / "adapter")
    before, _ = llama_jax.forward(base.config, base.params, tokens)
    after, _ = llama_jax.forward(adapted.config, adapted.params, tokens)
    assert np.max(np.abs(before - after)) > 0.01
    plain = llama_jax.load(model, lora=train() / "adapter")
    same, _ = llama_jax.forward(plain.config, plain.params, tokens)
    np.testing.assert_allclose(after, same, atol=1e-4)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_the_base_may_be_quantized(train, kind):
    """The losses are near to those of the base as it is, and fall."""
    found = losses(train("--quantize", kind, "--targets", "all", "--rank", "4"))
    assert found[0] > found[-1]
    assert found[0] == pytest.approx(losses(train())[0], rel=0.05)


def test_all_targets_have_adapters(train):
    fields = json.loads(
        (
            train("--quantize", "nf4", "--targets", "all", "--rank", "4") / "adapter/adapter.json"
        ).read_text()
    )
    assert set(fields["targets"]) == set(TARGETS)
    assert (fields["rank"], fields["alpha"]) == (4, 8.0)


def test_float16_and_dropout_run(train):
    found = metrics(train("--dtype", "float16", "--dropout", "0.5"))[0]
    assert [line["skipped"] for line in found] == [0.0, 0.0, 0.0]
    assert found[0]["loss"] != losses(train())[0]
    assert found[0]["loss"] == pytest.approx(losses(train())[0], rel=0.05)


def test_before_it_trains_it_says_what_learns(given, tmp_path, capsys):
    lora.main([*given, *SHORT, "--output", str(tmp_path / "out"), "--rank", "2"])
    adapters = 2 * 2 * (64 + 64 + 64 + 32)  # layers, rank, in and out of q and v
    total = CONFIG.count_parameters() + adapters
    said = capsys.readouterr().err.splitlines()
    assert said[1].startswith(f"{adapters:,} of {total:,} parameters learn; ")
    assert "3 steps of 8 x 32; memory " in said[1]


def test_frozen_parameters_are_those_of_the_checkpoint(given):
    base = load_params(given[1])
    config = lora.LoraConfig(rank=2)
    trained, frozen = lora.new_adapters(base, config, 0, None)
    assert len(jax.tree.leaves(trained)) == 2 * 2 * 2
    for ours, theirs in zip(jax.tree.leaves(frozen), jax.tree.leaves(base), strict=True):
        assert ours is theirs


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--rank", "0"], "the rank of an adapter is 0"),
        (["--targets", "q,w"], "an adapter's targets are q,w"),
        (["--dropout", "1"], "--dropout is 1.0, expected 0 to below 1"),
        (["--batch", "0"], "--batch is 0, expected at least 1"),
        (["--group-size", "32"], "--group-size is for --quantize int4 or nf4"),
        (["--double-quantization"], "--double-quantization is for --quantize nf4"),
        (["--epochs", "1"], "both --epochs and --steps given"),
        (["--eval-every", "2"], "--eval-every is for --validation"),
        (["--validation", "1.5"], "expected a file, or a share between 0 and 1"),
        (["--seq-len", "65"], "the sequence length is 65, expected 2 to 64"),
        (["--mesh", "fsdp=3"], "--batch is 8, but the mesh splits a batch into 3 parts"),
        (["--mesh", "fsdp=16"], "needs 16 devices"),
        (["--learning-rate", "0"], "the learning rate is 0.0, expected more than 0"),
        (["--clip", "nan"], "the clip norm is nan, expected 0 or more and finite"),
        (["--plot", "curve.txt"], "--plot is curve.txt, expected a name that ends in"),
    ],
)
def test_mistakes_are_told_in_a_line_and_leave_nothing(given, tmp_path, capsys, flags, words):
    with pytest.raises((UserError, SystemExit)) as raised:
        lora.main([*given, *SHORT, "--output", str(tmp_path / "out"), *flags])
    said = str(raised.value) if raised.type is UserError else capsys.readouterr().err
    assert words in said
    assert list(tmp_path.iterdir()) == []

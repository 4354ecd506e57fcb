"""The command `train.full`: a checkpoint or new parameters, and the model that comes of them."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from test_train_lora import CONFIG, LOSS_RTOL, MESHES, losses, metrics, write_model, write_text

import llama_jax
from llama_jax.checkpoint import load_params
from llama_jax.errors import UserError
from train import full

SHORT = ["--seq-len", "32", "--batch", "8", "--steps", "3", "--learning-rate", "0.003"]
VOCABULARY = 288


@pytest.fixture(autouse=True)
def no_compilations_on_disk(monkeypatch):
    """Other tests must not see JAX's cache on disk."""
    monkeypatch.setattr(full, "keep_compilations", lambda: None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, a config and a text."""
    folder = tmp_path_factory.mktemp("full")
    write_model(folder)
    write_text(folder / "text.txt", 1600)
    (folder / "config.json").write_text(json.dumps(CONFIG.to_dict()))
    return folder


@pytest.fixture(scope="module")
def train(folder, tmp_path_factory):
    """`train(*flags)`: the output directory of a run, of one for the same flags."""
    runs = {}

    def train(*flags):
        if flags not in runs:
            output = tmp_path_factory.mktemp("run") / "out"
            data = ["--data", str(folder / "text.txt"), "--output", str(output)]
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(full, "keep_compilations", lambda: None)
                full.main([*data, *SHORT, *flags])
            runs[flags] = output
        return runs[flags]

    return train


@pytest.fixture(scope="module")
def tuned(train, folder):
    return lambda *flags: train("--checkpoint", str(folder / "model"), *flags)


@pytest.fixture(scope="module")
def fresh(train, folder):
    return lambda *flags: train(
        "--config", str(folder / "config.json"), "--train-tokenizer", str(VOCABULARY), *flags
    )


@pytest.mark.parametrize("mesh", MESHES)
def test_devices_together_have_the_losses_of_one(tuned, mesh):
    np.testing.assert_allclose(losses(tuned("--mesh", mesh)), losses(tuned()), rtol=LOSS_RTOL)


def test_losses_fall(tuned):
    found = losses(tuned())
    assert found[0] > found[1] > found[2]


@pytest.mark.parametrize("flags", [(), ("--mesh", "fsdp=8"), ("--scan",)])
def test_the_model_is_the_one_that_learnt(tuned, folder, flags):
    """All its tensors differ from the checkpoint's, and it loads as any other."""
    found = llama_jax.load(tuned(*flags) / "model")
    before, one = load_params(folder / "model"), load_params(tuned() / "model")
    assert found.config == CONFIG
    assert found.tokenizer.vocab_size <= CONFIG.vocab_size
    for after, old, same in zip(*map(jax.tree.leaves, (found.params, before, one)), strict=True):
        assert after.dtype == old.dtype
        assert np.any(np.asarray(after) != np.asarray(old))
        # Of a weight that hardly matters Adam makes a step of one size in either direction.
        assert np.mean(np.abs(np.asarray(after) - np.asarray(same)) > 1e-4) < 0.01


def test_from_scratch_on_any_mesh(fresh):
    first = losses(fresh())
    assert first[0] == pytest.approx(np.log(VOCABULARY), rel=0.02)
    np.testing.assert_allclose(losses(fresh("--mesh", "fsdp=4,tensor=2")), first, rtol=LOSS_RTOL)
    model = llama_jax.load(fresh() / "model")
    assert model.config == dataclasses.replace(CONFIG, vocab_size=VOCABULARY)
    assert model.tokenizer.vocab_size == VOCABULARY
    assert model.params["norm"]["scale"].dtype == np.float32


def test_the_best_parameters_are_saved(fresh, folder):
    """A rate so large that the loss rises again; the result is of the step before."""
    flags = ["--validation", "0.2", "--eval-every", "1", "--steps", "6", "--schedule", "constant"]
    output = fresh(*flags, "--learning-rate", "0.1", "--save-dtype", "bfloat16")
    found = metrics(output)[1]
    assert [line["step"] for line in found] == [1, 2, 3, 4, 5, 6]
    best = min(found, key=lambda line: line["validation_loss"])
    assert best["step"] < 6
    assert best["perplexity"] == pytest.approx(np.exp(best["validation_loss"]))
    params = load_params(output / "model")
    assert params["norm"]["scale"].dtype == "bfloat16"
    again = fresh(
        *flags, "--learning-rate", "0.1", "--save-dtype", "float32", "--steps", str(best["step"])
    )
    for ours, theirs in zip(
        *map(jax.tree.leaves, (params, load_params(again / "model"))), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs.astype("bfloat16"))
    assert not (output / "best").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "one of the arguments --checkpoint --preset --config is required"),
        (["--config", "{config}"], "training from scratch needs --train-tokenizer"),
        (["--preset", "llama-9", "--train-tokenizer", "300"], "no preset is called 'llama-9'"),
        (["--config", "{text}", "--train-tokenizer", "300"], "cannot be read as JSON"),
        (["--config", "{config}", "--train-tokenizer", "9"], "expected at least 260"),
        (["--config", "{config}", "--train-tokenizer", "9999"], "too short to learn 9999 pieces"),
        (["--checkpoint", "{model}", "--train-tokenizer", "300"], "a checkpoint has its own"),
        (["--checkpoint", "{text}"], "is a file, expected a model directory"),
        (["--checkpoint", "{model}", "--steps", "0"], "--steps is 0, expected at least 1"),
        (["--checkpoint", "{model}", "--warmup", "nan"], "--warmup is nan, expected 0 or more"),
        (["--checkpoint", "{model}", "--validation", "nowhere.txt"], "nowhere.txt is no file"),
    ],
)
def test_mistakes_are_told_in_a_line_and_leave_nothing(folder, tmp_path, capsys, flags, words):
    names = {
        "config": folder / "config.json",
        "text": folder / "text.txt",
        "model": folder / "model",
    }
    flags = [flag.format(**names) for flag in flags]
    with pytest.raises((UserError, SystemExit)) as raised:
        full.main(["--data", str(folder / "text.txt"), "--output", str(tmp_path / "out"), *flags])
    said = str(raised.value) if raised.type is UserError else capsys.readouterr().err
    assert words in said
    assert list(tmp_path.iterdir()) == []

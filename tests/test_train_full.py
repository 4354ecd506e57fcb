"""The command `train.full`: a checkpoint or new parameters, and the model that comes of them."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from test_train_lora import CONFIG, LOSS_RTOL, MESHES, losses, metrics, write_model, write_text

import llama_jax
from convert import orbax_to_hf
from infer import sample
from llama_jax.checkpoint import load_params
from llama_jax.config import RopeScaling
from llama_jax.errors import UserError
from llama_jax.tokenizer import load_tokenizer
from train import full, plot

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


def test_a_shape_of_llama_3_with_a_new_vocabulary_can_be_used(
    folder, tmp_path, capsys, monkeypatch
):
    """Its stop ids and chats are those of the tokenizer."""
    monkeypatch.setattr(sample, "keep_compilations", lambda: None)
    scaled = dataclasses.replace(CONFIG, version="3.2", rope_scaling=RopeScaling(32.0))
    file = tmp_path / "config.json"
    file.write_text(json.dumps(scaled.to_dict()))
    output = tmp_path / "out"
    flags = ["--config", str(file), "--train-tokenizer", str(VOCABULARY), "--output", str(output)]
    full.main(["--data", str(folder / "text.txt"), *SHORT, "--steps", "1", *flags])
    model = ["--checkpoint", str(output / "model")]
    expected = dataclasses.replace(scaled, version="2", vocab_size=VOCABULARY)
    assert llama_jax.load(output / "model").config == expected
    capsys.readouterr()
    for more in [], ["--chat"]:
        sample.main([*model, "--prompt", "the", "--max-new-tokens", "2", *more])
        assert capsys.readouterr().out
    orbax_to_hf.main([*model, "--output", str(tmp_path / "hf")])
    generation = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [2]


def pieces(folder, path, vocab_size=VOCABULARY):
    file = folder / "tokenizer.model"
    file.write_bytes(full.train_tokenizer(str(path), vocab_size))
    tokenizer = load_tokenizer(file)
    return [tokenizer.token_bytes(i) for i in range(3, vocab_size)]


def test_of_rows_the_vocabulary_is_that_of_their_texts(folder, tmp_path):
    lines = (folder / "text.txt").read_text().splitlines()
    rows = tmp_path / "rows.jsonl"
    messages = [
        [{"role": "user", "content": a}, {"role": "assistant", "content": a}] for a in lines
    ]
    rows.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in messages))
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{line}\n{line}\n" for line in lines))
    assert pieces(tmp_path, rows) == pieces(tmp_path, text)


def test_a_vocabulary_is_learnt_from_long_lines_too_and_not_from_a_byte_order_mark(
    folder, tmp_path
):
    text = (folder / "text.txt").read_text()
    one_line = tmp_path / "line.txt"
    one_line.write_text(" ".join(text.splitlines() * 5), encoding="utf-8-sig")
    assert one_line.stat().st_size > 5000
    assert set(pieces(tmp_path, one_line)) == set(pieces(tmp_path, folder / "text.txt"))


def test_what_no_vocabulary_can_be_learnt_from_says_so(tmp_path):
    for content, words in (
        (b'{"instruction": "a", "output": "b"}', "rows.jsonl is too short to learn 999 pieces"),
        (b'{"instruction": "\\ud800", "output": "b"}', "rows.jsonl line 1: the text has a lone"),
        (b'{"instruction": "", "output": ""}', "rows.jsonl is too short to learn 999 pieces"),
        (b"{", "rows.jsonl line 1 is not JSON"),
    ):
        (tmp_path / "rows.jsonl").write_bytes(content)
        with pytest.raises(UserError, match=words) as caught:
            full.train_tokenizer(str(tmp_path / "rows.jsonl"), 999)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("perplexity", [{}, {"perplexity": 7.4}])
@pytest.mark.parametrize("n", [20, 200])  # steps, drawn as they are or smoothed
def test_a_picture_leaves_out_what_is_no_number(tmp_path, monkeypatch, n, perplexity):
    figure = pytest.importorskip("matplotlib.figure").Figure
    drawn = []
    monkeypatch.setattr(figure, "savefig", lambda figure, file: drawn.append(figure))
    lines = [{"step": i, "loss": 2.0, "learning_rate": 0.1} for i in range(1, n + 1)]
    lines[3]["loss"], lines[5]["loss"], lines[7]["loss"] = None, float("nan"), float("inf")
    checks = [{"step": i, "validation_loss": 2.0, **perplexity} for i in (1, 2)]
    checks[0]["validation_loss"] = float("nan")
    for some in lines, lines + checks:
        file = tmp_path / "metrics.jsonl"
        file.write_text("".join(json.dumps(line) + "\n" for line in some))
        plot.draw(file, "curve.png")
        loss, _ = drawn[-1].axes
        for line in loss.lines:
            np.testing.assert_allclose(line.get_ydata(), 2.0)
        assert len(loss.lines[0].get_xdata()) == n - 3
        training = "training, smoothed" if n > 100 else "training"
        found = [text.get_text() for text in loss.get_legend().get_texts()]
        assert found == [training, "validation"][: 1 + (some is not lines)]
        of_tokens = bool(perplexity) and some is not lines
        assert loss.get_ylabel() == ("loss, nats a token" if of_tokens else "loss")


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

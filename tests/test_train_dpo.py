"""The command `train.dpo`: a run that learns to prefer, what it leaves, and what it refuses."""

import json

import pytest
from test_train_lora import metrics, write_model

import llama_jax
from llama_jax.errors import UserError
from train import dpo, lora


@pytest.fixture(autouse=True)
def no_compilations_on_disk(monkeypatch):
    """Other tests must not see JAX's cache on disk."""
    monkeypatch.setattr(lora, "keep_compilations", lambda: None)


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dpo")
    rows = [
        {"prompt": f"the {word} ", "chosen": "fox jumps", "rejected": "dog is lazy"}
        for word in ("quick", "brown", "over", "lazy", "dog", "fox", "the", "jumps")
    ]
    data = folder / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["--checkpoint", str(write_model(folder)), "--data", str(data)]


def test_a_run_learns_to_prefer_and_leaves_an_adapter(given, tmp_path):
    """On a quantized base, split over devices: the reference is that base."""
    flags = ["--seq-len", "32", "--batch", "4", "--epochs", "6", "--learning-rate", "0.003"]
    flags += ["--quantize", "int8", "--mesh", "fsdp=2", "--validation", "0.25", "--eval-every", "4"]
    dpo.main([*given, *flags, "--output", str(tmp_path / "run")])
    steps, validations = metrics(tmp_path / "run")
    first, last = steps[0], steps[-1]
    assert first["loss"] == pytest.approx(0.6931, abs=1e-4)
    assert (first["margin"], first["reward_chosen"]) == (0, 0)
    assert last["loss"] < 0.6
    assert last["margin"] == pytest.approx(
        last["reward_chosen"] - last["reward_rejected"], abs=1e-4
    )
    assert last["accuracy"] == 1
    assert validations[-1]["validation_loss"] < 0.65
    assert "perplexity" not in validations[-1]
    model = llama_jax.load(given[1], quantize="int8", lora=tmp_path / "run" / "adapter")
    assert "lora" in model.params["layers_0"]["attention"]["q"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--beta", "0"], "--beta is 0.0, expected more than 0"),
        (["--label-smoothing", "0.5"], "--label-smoothing is 0.5, expected 0 to below 0.5"),
        (["--group-size", "32"], "--group-size is for --quantize int4 or nf4"),
    ],
)
def test_a_mistake_is_one_line(given, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as exit:
        dpo.main([*given, "--output", str(tmp_path / "run"), *flags])
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "run").exists()


def test_rows_of_another_format_are_refused(given, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text('{"instruction": "a", "output": "b"}\n')
    with pytest.raises(
        UserError, match="holds Alpaca rows, expected JSON or JSONL rows with prompt"
    ):
        dpo.main([*given, "--data", str(data), "--output", str(tmp_path / "run")])

"""The command `train.tiny`: what it cannot learn. That it learns is what `make sample` shows."""

import pytest

from llama_jax.errors import UserError
from train import tiny


@pytest.fixture(autouse=True)
def no_compilations_on_disk(monkeypatch):
    """Other tests must not see JAX's cache on disk."""
    monkeypatch.setattr(tiny, "keep_compilations", lambda: None)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "is too short to learn 512 pieces from; take a longer text"),
        (b"a text\nof two lines\n", "is too short"),
        (b"caf\xe9", "is not a UTF-8 text file"),
        (None, "is not a UTF-8 text file"),
    ],
)
def test_texts_that_cannot_be_learnt_say_so(tmp_path, text, words):
    file = tmp_path / "text"
    if text is not None:
        file.write_bytes(text)
    with pytest.raises(UserError, match=words):
        tiny.main(["--output", str(tmp_path / "out"), "--text", str(file)])
    assert not (tmp_path / "out").exists()


def test_an_output_that_exists_is_refused_before_training(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="exists already; "):
        tiny.main(["--output", str(tmp_path)])


def test_it_writes_a_model_directory(tmp_path, monkeypatch):
    from llama_jax.checkpoint import load

    monkeypatch.setattr(tiny, "STEPS", 25)
    tiny.main(["--output", str(tmp_path / "out")])
    model = load(tmp_path / "out/model")
    assert model.config == tiny.CONFIG
    assert model.tokenizer.vocab_size == 512

"""python -m train.tiny: a small Llama that this repository can make by itself, in half a minute.

It learns one text by heart (by default the licence beside this file), so that conversion and
sampling have a real trained checkpoint to work on: 0.5 million parameters, grouped-query
attention, tied head, a SentencePiece vocabulary of its own. It knows nothing else.
"""

import argparse
import io
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import sentencepiece

from llama_jax.checkpoint import save_model
from llama_jax.command import ArgumentParser, keep_compilations, run
from llama_jax.config import LlamaConfig
from llama_jax.errors import UserError
from llama_jax.model import Llama, Params, forward

PROG = "train.tiny"
TEXT = Path(__file__).parents[1] / "LICENSE"
CONFIG = LlamaConfig(
    vocab_size=512,
    dim=128,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=32,
    mlp_dim=384,
    norm_eps=1e-5,
    rope_theta=10000.0,
    rope_scaling=None,
    context=512,
    tie_embeddings=True,
    version="2",
)
BATCH, LENGTH, STEPS = 12, 128, 300


def train_tokenizer(text: str) -> bytes:
    """A SentencePiece BPE model with byte fallback, as Llama 1 and 2 have."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.splitlines()),
        model_writer=model,
        vocab_size=CONFIG.vocab_size,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return model.getvalue()


def train(ids: np.ndarray) -> Params:
    """Parameters after `STEPS` steps of AdamW on random windows of `ids`."""
    params = Llama(CONFIG).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    schedule = optax.warmup_cosine_decay_schedule(0.0, 4e-3, 20, STEPS, 1e-4)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.95))

    def loss(params, windows):
        logits, _ = forward(CONFIG, params, windows[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean()

    @jax.jit
    def step(params, state, windows):
        value, gradient = jax.value_and_grad(loss)(params, windows)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    rng = np.random.default_rng(0)
    state = optimizer.init(params)
    for i in range(STEPS):
        starts = rng.integers(0, len(ids) - LENGTH, BATCH)
        windows = np.stack([ids[start : start + LENGTH + 1] for start in starts])
        params, state, value = step(params, state, windows)
        if (i + 1) % 50 == 0:
            print(f"{PROG}: step {i + 1} of {STEPS}, loss {value:.3f}", file=sys.stderr)
    return params


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; raises `UserError` if the output exists or the text is no text."""
    parser = ArgumentParser(prog=PROG, description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", metavar="DIR", required=True, help="model directory to write")
    parser.add_argument("--text", metavar="FILE", default=TEXT, type=Path, help="(the licence)")
    args: argparse.Namespace = parser.parse_args(arguments)
    if Path(args.output).exists():
        raise UserError(f"{args.output} exists already; name a new directory or remove it")
    try:
        text = args.text.read_text(encoding="utf-8")
    except (FileNotFoundError, IsADirectoryError, UnicodeDecodeError):
        raise UserError(f"{args.text} is not a UTF-8 text file, expected one to learn") from None
    keep_compilations()
    try:
        tokenizer = train_tokenizer(text)
    except RuntimeError:  # SentencePiece's, where a text has too few different pieces
        raise UserError(
            f"{args.text} is too short to learn {CONFIG.vocab_size} pieces from; take a longer text"
        ) from None
    ids = sentencepiece.SentencePieceProcessor(model_proto=tokenizer).encode(text)
    params = train(np.array(ids, np.int32))
    with tempfile.NamedTemporaryFile(suffix=".model") as file:
        file.write(tokenizer)
        file.flush()
        provenance = {"text": args.text.name, "steps": STEPS}
        save_model(args.output, CONFIG, params, tokenizer=file.name, provenance=provenance)


if __name__ == "__main__":
    run(main, PROG)

"""python -m train.tiny: a small Llama that this repository can make by itself, in half a minute.

It learns one text by heart (by default the licence beside this file), so that conversion and
sampling have a real trained checkpoint to work on: 0.5 million parameters, grouped-query
attention, tied head, a SentencePiece vocabulary of its own. It knows nothing else.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from llama_jax.checkpoint import save_model
from llama_jax.command import ArgumentParser, keep_compilations, run
from llama_jax.config import LlamaConfig
from llama_jax.lora import split
from llama_jax.model import Params
from llama_jax.tokenizer import load_tokenizer
from train import flags
from train.data import Sample, pack
from train.full import new_params, train_tokenizer
from train.loop import Run, Task, fit
from train.losses import next_token
from train.optimizer import OptimizerConfig

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
STRIDE = 8  # between the beginnings of two windows: a text is to go on from anywhere
OPTIMIZER = OptimizerConfig(learning_rate=4e-3, warmup=20, weight_decay=1e-4, b2=0.95)


def windows(ids: Sequence[int]) -> list[Sample]:
    """All windows of a text that begin at a multiple of `STRIDE`."""
    starts = range(0, len(ids) - LENGTH, STRIDE)
    counts = np.arange(LENGTH + 1) > 0
    return [Sample(np.array(ids[i : i + LENGTH + 1], np.int32), counts) for i in starts]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; raises `UserError` if the output exists or the text is no text."""
    parser = ArgumentParser(prog=PROG, description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", metavar="DIR", required=True, help="of the run; model in it")
    parser.add_argument("--text", metavar="FILE", default=str(TEXT), help="(the licence)")
    args: argparse.Namespace = parser.parse_args(arguments)
    settings = Run(args.output, "model", {"text": Path(args.text).name, "steps": STEPS})
    settings.refuse()
    keep_compilations()
    tokenizer = train_tokenizer(args.text, CONFIG.vocab_size)
    with tempfile.NamedTemporaryFile(suffix=".model") as file:
        file.write(tokenizer)
        file.flush()
        learn(args.text, file.name, settings)


def learn(text: str, tokenizer_file: str, settings: Run) -> None:
    """Trains on the windows of a text."""
    tokenizer = load_tokenizer(Path(tokenizer_file))
    ids = tokenizer.encode(Path(text).read_text(encoding="utf-8"))
    trained, frozen = split(new_params(CONFIG, seed=0), lambda _: True)

    def save(path: Any, params: Params) -> None:
        told = settings.settings
        save_model(path, CONFIG, params, tokenizer=tokenizer_file, provenance=told)

    task = Task(
        loss=next_token(CONFIG),
        trained=trained,
        frozen=frozen,
        optimizer=OPTIMIZER,
        rows=pack(windows(ids), LENGTH),
        validation=None,
        batch=BATCH,
        accumulate=1,
        steps=STEPS,
        epochs=None,
        dtype=jnp.float32,
        seed=0,
        dropout=False,
        mesh=None,
        flops=flags.flops_per_token(CONFIG, LENGTH, None),
    )
    fit(task, settings, save, flags.texts(tokenizer))


if __name__ == "__main__":
    run(main, PROG)

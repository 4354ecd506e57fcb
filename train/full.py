"""python -m train.full: all parameters of a model, a trained one's or new ones.

With `--checkpoint` a model is fine-tuned. With `--preset` or `--config`, and `--train-tokenizer`,
one is trained from scratch, with a SentencePiece vocabulary learnt from the data. Parameters and
optimizer are float32, whatever is computed in.
"""

import argparse
import dataclasses
import io
import json
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import sentencepiece
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from llama_jax import sharding
from llama_jax.adapter import fingerprint
from llama_jax.checkpoint import (
    LazyArray,
    abstract_params,
    load_config,
    load_params,
    refuse_quantized,
    save_model,
)
from llama_jax.command import (
    ArgumentParser,
    is_first_process,
    join_processes,
    keep_compilations,
    report,
    run,
)
from llama_jax.config import LlamaConfig, get_preset
from llama_jax.errors import UserError
from llama_jax.lora import everything, split
from llama_jax.model import Llama, Params, unstack
from llama_jax.tokenizer import Tokenizer, load_tokenizer, tokenizer_file
from train import flags
from train.data import pack, read, texts
from train.loop import Task, fit, refuse_taken
from train.losses import next_token
from train.stacked import stack_layers

PROG = "train.full"
LONGEST_LINE = 1 << 30  # bytes: SentencePiece takes no more, and drops what is longer


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; exits with status 2 and one line on a mistake."""
    parser = ArgumentParser(prog=PROG, description="Train all parameters of a model.")
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", metavar="DIR", help="model directory to fine-tune")
    source.add_argument("--preset", metavar="NAME", help="from scratch, with a released shape")
    source.add_argument("--config", metavar="FILE", help="from scratch, with a config.json")
    add(
        "--train-tokenizer", type=int, metavar="N", help="from scratch: pieces to learn from --data"
    )
    add(
        "--save-dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the result (as the checkpoint; from scratch float32)",
    )
    flags.add_rows(parser)
    flags.add_shared(
        parser,
        learning_rate="0.00001; from scratch 0.001",
        weight_decay="0; from scratch 0.1",
        formats="plain text (.txt), or Alpaca or chat rows (.json, .jsonl)",
    )
    args = parser.parse_args(arguments)
    flags.check_shared(parser, args)
    if args.checkpoint is None and args.train_tokenizer is None:
        parser.error("training from scratch needs --train-tokenizer, such as 4096 pieces")
    if args.checkpoint is not None and args.train_tokenizer is not None:
        parser.error("--train-tokenizer is for --preset and --config: a checkpoint has its own")
    parser.refuse_below(args, train_tokenizer=260)  # 256 bytes and the special tokens
    return args


@dataclass(frozen=True)
class Source:
    """What is trained: a checkpoint, or a model that is still to be made."""

    config: LlamaConfig
    tokenizer: Tokenizer
    file: epath.Path  # of the tokenizer
    dtype: np.dtype  # of the result
    params: Callable[[Mesh | None], Params]  # float32
    model: str  # fingerprint of the checkpoint, or the config of a new model


def checkpoint_source(path: str) -> Source:
    """Raises `UserError` for what is no model directory, or a quantized one."""
    config = load_config(path)
    refuse_quantized(path)
    stored = abstract_params(path)["norm"]["scale"].dtype

    def params(mesh: Mesh | None) -> Params:
        return load_params(path, dtype=jnp.float32, mesh=mesh)

    file = tokenizer_file(epath.Path(path))
    return Source(config, load_tokenizer(file), file, stored, params, fingerprint(path))


def new_source(args: argparse.Namespace, folder: Path) -> Source:
    """A model of new parameters; the tokenizer is learnt here and lies in `folder`.

    Whatever shape is asked for, the version is "2", that of the tokenizer: chat format and stop ids
    of Llama 3 are special tokens, which SentencePiece does not have.

    Raises `UserError` for an unknown preset, a file that is no config, and data from which no
    such vocabulary can be learnt.
    """
    config = get_preset(args.preset) if args.preset else read_config(args.config)
    file = folder / "tokenizer.model"
    file.write_bytes(train_tokenizer(args.data, args.train_tokenizer))
    if config.version != "2":
        report(f"version {config.version} is of another tokenizer; the new model has version 2")
    config = dataclasses.replace(config, vocab_size=args.train_tokenizer, version="2")

    def params(mesh: Mesh | None) -> Params:
        return new_params(config, args.seed, mesh)

    return Source(
        config, load_tokenizer(file), epath.Path(file), np.dtype(np.float32), params, str(config)
    )


def new_params(config: LlamaConfig, seed: int, mesh: Mesh | None = None) -> Params:
    """New float32 parameters on their devices, the same on any mesh."""

    def make() -> Params:
        tokens = jnp.zeros((1, 1), jnp.int32)
        return Llama(config).init(jax.random.key(seed), tokens)["params"]

    return jax.jit(make, out_shardings=sharding.shardings(jax.eval_shape(make), mesh))()


def read_config(path: str) -> LlamaConfig:
    """A `config.json` as model directories have; raises `UserError` for any other file."""
    try:
        fields = json.loads(epath.Path(path).read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"--config {path} cannot be read as JSON ({error}); give a config.json as model "
            "directories have"
        ) from None
    if not isinstance(fields, dict):
        raise UserError(f"--config {path} holds no JSON object, expected a config.json")
    return LlamaConfig.from_dict(fields)


def train_tokenizer(path: str, vocab_size: int) -> bytes:
    """A SentencePiece BPE model with byte fallback, as Llama 1 and 2 have, learnt from a file.

    Of rows all texts are learnt from, as `train.data.texts` has them. Raises `UserError` where the
    file has too few different pieces, or cannot be read.
    """
    lines = list(texts(path))  # what is wrong with them is told before SentencePiece asks
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            max_sentence_length=LONGEST_LINE,
            minloglevel=2,
        )
    except RuntimeError as error:
        if least := re.search(r"required_chars.*?\d+ vs (\d+)", str(error)):
            raise UserError(
                f"--train-tokenizer is {vocab_size}, but the characters of {path} and all bytes "
                f"are {least[1]} pieces; take more than that"
            ) from None
        raise UserError(
            f"{path} is too short to learn {vocab_size} pieces from; take a longer text, or a "
            "smaller --train-tokenizer"
        ) from None
    return model.getvalue()


def on_hosts(params: Params, dtype: Any) -> Params:
    """`params` in `dtype` as they are to be written, an array read when its turn comes.

    Where several processes hold them, all are brought to the first one's memory, in which they
    must fit; the others have None.
    """

    def leaf(x: jax.Array) -> LazyArray | None:
        if x.is_fully_addressable:
            return LazyArray(x.shape, np.dtype(dtype), lambda: np.asarray(x.astype(dtype)))
        whole: Any = multihost_utils.process_allgather(x.astype(dtype), tiled=True)
        return LazyArray(x.shape, np.dtype(dtype), lambda: whole) if is_first_process() else None

    return jax.tree.map(leaf, params)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; raises `UserError` for what the user can mend."""
    args = parse(arguments)
    if not args.resume:
        refuse_taken(args.output)
    keep_compilations()
    join_processes()
    with tempfile.TemporaryDirectory() as folder:
        if args.checkpoint is not None:
            train(args, checkpoint_source(args.checkpoint))
        else:
            train(args, new_source(args, Path(folder)))


def train(args: argparse.Namespace, source: Source) -> None:
    """Trains `source` as the command line says."""
    config, scratch = source.config, args.checkpoint is None
    args.seq_len = flags.seq_len(args, config)
    args.dtype = flags.compute_dtype(args.dtype).name
    mesh = flags.make_mesh(args, config)
    rows, validation = flags.read_all(
        args,
        lambda path: read(
            path,
            source.tokenizer,
            config,
            seq_len=args.seq_len,
            chat=args.chat,
            train_on_prompts=args.train_on_prompts,
        ),
        lambda samples: pack(samples, args.seq_len, packing=not args.no_packing),
    )
    steps, epochs = flags.count_steps(args, rows)
    optimizer = flags.optimizer_config(
        args,
        steps,
        learning_rate=1e-3 if scratch else 1e-5,
        weight_decay=0.1 if scratch else 0.0,
        b2=0.95 if scratch else 0.999,
    )
    settings = flags.make_run(args, "model", rows, validation, steps, source.model)
    if settings.is_finished():
        return
    params = source.params(mesh)
    if args.scan:
        params = stack_layers(params, mesh)
    trained, frozen = split(params, everything)
    del params

    def save(path: Any, trained: Params) -> None:
        whole = on_hosts(
            unstack(trained) if args.scan else trained, args.save_dtype or source.dtype
        )
        if is_first_process():
            provenance = {"settings": settings.settings}
            save_model(path, config, whole, tokenizer=source.file, provenance=provenance)

    fit(
        Task(
            loss=next_token(config, remat=args.remat, dropout=args.dropout),
            learns=everything,
            trained=trained,
            frozen=frozen,
            optimizer=optimizer,
            rows=rows,
            validation=validation,
            batch=args.batch,
            accumulate=args.accumulate,
            steps=steps,
            epochs=epochs,
            dtype=jnp.dtype(args.dtype),
            seed=args.seed,
            dropout=args.dropout > 0,
            mesh=mesh,
            flops=flags.flops_per_token(config, args.seq_len, None),
        ),
        settings,
        save,
        flags.texts(source.tokenizer),
    )


if __name__ == "__main__":
    run(main, PROG)

"""The flags that all training commands share, and what they mean for the loop."""

import argparse
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from infer import plot
from llama_jax import sharding
from llama_jax.command import ArgumentParser, report
from llama_jax.config import LlamaConfig
from llama_jax.errors import UserError
from llama_jax.model import REMAT
from llama_jax.tokenizer import Tokenizer
from train.data import Batch, Counts, Rows, n_windows, split
from train.loop import Run
from train.optimizer import OPTIMIZERS, SCHEDULES, OptimizerConfig
from train.placement import refuse_batch
from train.progress import refuse_missing_board

# What may differ where a run goes on: it changes no number, or sums in another order at most.
FREE = ("output", "resume", "save_every", "keep", "tensorboard", "plot", "mesh")
# What is compared by its content.
FILES = ("data", "validation", "checkpoint", "preset", "config")
T = TypeVar("T")


def add_shared(
    parser: ArgumentParser, *, learning_rate: str, weight_decay: str, formats: str
) -> None:
    """Adds them; defaults that depend on the command are told by the arguments."""
    add = parser.add_argument
    add("--data", metavar="FILE", required=True, help=formats)
    add("--output", metavar="DIR", required=True, help="directory of the run, local or gs://")
    add("--resume", action="store_true", help="go on where the run in --output was stopped")
    add("--validation", metavar="FILE", help="data file, or a share of --data such as 0.1 (none)")
    add("--eval-every", type=int, metavar="N", help="steps between validations (a tenth of all)")
    add("--seq-len", type=int, metavar="N", help="tokens of a row (1024, or the context)")
    add("--batch", type=int, default=8, metavar="N", help="rows at once, over all devices (8)")
    add("--accumulate", type=int, default=1, metavar="N", help="batches to a step (1)")
    add("--epochs", type=int, metavar="N", help="times through the data (1)")
    add("--steps", type=int, metavar="N", help="instead of --epochs")
    add("--optimizer", choices=OPTIMIZERS, default="adamw", help="(adamw)")
    add("--learning-rate", type=float, metavar="R", help=f"the largest ({learning_rate})")
    add("--schedule", choices=SCHEDULES, default="cosine", help="to a tenth of it (cosine)")
    add("--warmup", type=float, default=0.03, metavar="N", help="steps, or a share below 1 (0.03)")
    add("--weight-decay", type=float, metavar="R", help=f"of all but norms ({weight_decay})")
    add("--clip", type=float, default=1.0, metavar="R", help="norm of gradients, 0 for any (1)")
    add("--dropout", type=float, default=0.0, metavar="R", help="in training (0)")
    add("--seed", type=int, default=0, metavar="N", help="of order, dropout and what is new (0)")
    add("--remat", choices=tuple(REMAT), default="none", help="compute again, for memory (none)")
    add("--scan", action="store_true", help="one loop over layers: compiles deep models faster")
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="to compute in (bfloat16; float32 on CPU)",
    )
    add("--mesh", metavar="SIZES", help="data=2,fsdp=4,tensor=1 (one device; fsdp over hosts)")
    add("--save-every", type=int, default=100, metavar="N", help="steps between checkpoints (100)")
    add("--keep", type=int, default=2, metavar="N", help="checkpoints that are kept (2)")
    add("--tensorboard", action="store_true", help="write DIR/tensorboard as well")
    add("--plot", metavar="FILE", help="write the loss curve as .png, .pdf or .svg")


def add_rows(parser: ArgumentParser) -> None:
    """Adds the flags of what is made of a data file where next tokens are learnt."""
    add = parser.add_argument
    add("--chat", action="store_true", help="write Alpaca rows as chats of the model's format")
    add("--train-on-prompts", action="store_true", help="learn questions as well as answers")
    add("--no-packing", action="store_true", help="one sample a row; otherwise they share rows")


def check_shared(parser: ArgumentParser, args: argparse.Namespace) -> None:
    """Exits, or raises `UserError`, for values that cannot be."""
    parser.refuse_below(
        args,
        seq_len=2,
        batch=1,
        accumulate=1,
        epochs=1,
        steps=1,
        save_every=1,
        keep=1,
        eval_every=1,
    )
    for name, valid, expected in (
        ("dropout", 0 <= args.dropout < 1, "0 to below 1"),
        ("warmup", 0 <= args.warmup < math.inf, "0 or more"),
        ("seed", 0 <= args.seed < 2**32, "0 to 4294967295"),
    ):
        if not valid:
            parser.error(f"--{name} is {getattr(args, name)}, expected {expected}")
    if args.epochs is not None and args.steps is not None:
        parser.error("both --epochs and --steps given, expected one of them")
    if args.eval_every is not None and args.validation is None:
        parser.error("--eval-every is for --validation; add a file or a share such as 0.1")
    # Its own checks, before anything is read; the defaults of a command pass them.
    optimizer_config(args, 1, learning_rate=1.0, weight_decay=0.0, b2=0.999)
    if args.plot is not None:
        plot.refuse(args.plot)
    if args.tensorboard:
        refuse_missing_board()


def compute_dtype(given: str | None) -> Any:
    """`--dtype`: XLA on CPU multiplies 16-bit numbers many times slower."""
    if given is None:
        given = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(given)


def seq_len(args: argparse.Namespace, config: LlamaConfig) -> int:
    """`--seq-len`."""
    return min(1024, config.context) if args.seq_len is None else args.seq_len


def make_mesh(args: argparse.Namespace, config: LlamaConfig) -> Mesh | None:
    """`--mesh`: by default one device, or all of several processes as fsdp.

    Raises `UserError` where it does not fit the devices, the model or `--batch`.
    """
    sizes = args.mesh
    if sizes is None and jax.process_count() > 1:
        sizes = f"fsdp={jax.device_count()}"
    mesh = None if sizes is None else sharding.make_mesh(sizes, config)
    refuse_batch(args.batch, mesh)
    return mesh


def read_all(
    args: argparse.Namespace,
    read: Callable[[Any], tuple[list[T], Counts]],
    pack: Callable[[Sequence[T]], Rows],
) -> tuple[Rows, Rows | None]:
    """The rows of `--data` and of `--validation`; says of each file what was read."""

    def samples(path: str) -> list[T]:
        found, counts = read(path)
        report(f"{path}: {counts}")
        return found

    share = None if args.validation is None else _share(args.validation)
    validation = None
    if args.validation is not None and share is None:
        validation = samples(args.validation)
    training = samples(args.data)
    if share is not None:
        training, validation = split(training, share)
    return pack(training), None if validation is None else pack(validation)


def _share(given: str) -> float | None:
    """A number is a share, anything else a file."""
    try:
        share = float(given)
    except ValueError:
        return None
    if not 0 < share < 1:
        raise UserError(f"--validation is {given}, expected a file, or a share between 0 and 1")
    return share


def count_steps(args: argparse.Namespace, rows: Rows) -> tuple[int, int | None]:
    """How many steps there are, and how often the rows are seen (None: as long as they last)."""
    if args.steps is not None:
        return args.steps, None
    epochs = args.epochs or 1
    return n_windows(rows, args.batch, epochs=epochs, micro=args.accumulate), epochs


def optimizer_config(
    args: argparse.Namespace, steps: int, *, learning_rate: float, weight_decay: float, b2: float
) -> OptimizerConfig:
    """With the defaults of a command for what is not given."""
    warmup = round(args.warmup * steps) if args.warmup < 1 else round(args.warmup)
    return OptimizerConfig(
        name=args.optimizer,
        learning_rate=learning_rate if args.learning_rate is None else args.learning_rate,
        schedule=args.schedule,
        warmup=min(warmup, steps - 1),
        weight_decay=weight_decay if args.weight_decay is None else args.weight_decay,
        clip=args.clip,
        b2=b2,
    )


def make_run(
    args: argparse.Namespace,
    result: str,
    rows: Rows,
    validation: Rows | None,
    steps: int,
    model: str,
) -> Run:
    """`model` is the fingerprint of what is trained, or says all of what is made anew."""
    settings = {
        "--" + name.replace("_", "-"): value
        for name, value in vars(args).items()
        if name not in (*FREE, *FILES) and value is not None and value is not False
    }
    settings |= {"the model": model, "the data": rows.fingerprint(), "the steps": steps}
    if validation is not None:
        settings["the validation data"] = validation.fingerprint()
    return Run(
        output=args.output,
        result=result,
        settings=settings,
        resume=args.resume,
        save_every=args.save_every,
        keep=args.keep,
        eval_every=args.eval_every or max(1, steps // 10),
        tensorboard=args.tensorboard,
        plot=args.plot,
    )


def texts(tokenizer: Tokenizer) -> Callable[[Batch], list[str]]:
    """What the examples of a batch say, each text that is packed in a row for itself."""

    def say(batch: Batch) -> list[str]:
        width = batch["tokens"].shape[-1]
        found = []
        rows = (batch[name].reshape(-1, width) for name in ("tokens", "segments"))
        for tokens, segments in zip(*rows, strict=True):
            found += [
                tokenizer.decode(int(i) for i in tokens[segments == number])
                for number in range(1, int(segments.max(initial=0)) + 1)
            ]
        return found

    return say


def flops_per_token(
    config: LlamaConfig, seq_len: int, adapters: int | None, *, reference: bool = False
) -> float:
    """Floating-point operations that a step needs for one token, recomputation left out.

    Args:
      adapters: parameters in adapters, where these alone learn; None where all do.
      reference: whether the base computes the same tokens once more, forward, as in DPO.
    """
    table = config.vocab_size * config.dim
    weights = config.count_parameters() - (0 if config.tie_embeddings else table)
    passes = 3 if adapters is None else 2  # forward, to the activations, to the weights
    attention = 2 * seq_len * config.n_layers * config.n_heads * config.head_dim
    again = int(reference)
    return 2.0 * (passes + again) * weights + (3 + again) * attention + 6 * (adapters or 0)

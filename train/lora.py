"""python -m train.lora: adapters for a model, whose own weights stay as they are.

The base may be quantized while it is loaded (`--quantize nf4`: QLoRA, arXiv 2305.14314). Adapters
and optimizer are float32, whatever is computed in.
"""

import argparse
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from llama_jax import lora, sharding
from llama_jax.adapter import fingerprint, save_adapter
from llama_jax.checkpoint import load_config, load_params, load_quantization
from llama_jax.command import ArgumentParser, join_processes, keep_compilations, run
from llama_jax.config import LlamaConfig
from llama_jax.lora import LoraConfig
from llama_jax.model import Params
from llama_jax.quant import GROUPED, KINDS, Quantization
from llama_jax.tokenizer import Tokenizer, load_tokenizer
from train import flags
from train.data import Counts, Rows, pack, read
from train.loop import Task, fit, refuse_taken
from train.losses import Loss, next_token
from train.stacked import stack_layers

PROG = "train.lora"
T = TypeVar("T")  # what a data file is read to


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; exits with status 2 and one line on a mistake."""
    parser = ArgumentParser(prog=PROG, description="Train adapters (LoRA) for a model.")
    add_adapters(parser)
    flags.add_rows(parser)
    flags.add_shared(
        parser,
        learning_rate="0.0002",
        weight_decay="0",
        formats="Alpaca or chat rows (.json, .jsonl), or plain text (.txt)",
    )
    args = parser.parse_args(arguments)
    check_adapters(parser, args)
    return args


def add_adapters(parser: ArgumentParser) -> None:
    """Adds the flags of the base and its adapters."""
    add = parser.add_argument
    add("--checkpoint", metavar="DIR", required=True, help="model directory, the base")
    add("--targets", default="q,v", metavar="NAMES", help="of q,k,v,o,gate,up,down, or all (q,v)")
    add("--rank", type=int, default=16, metavar="N", help="of the adapters (16)")
    add("--alpha", type=float, metavar="A", help="scale times rank (twice the rank)")
    add("--rslora", action="store_true", help="scale is alpha / sqrt(rank), for high ranks")
    add("--quantize", choices=("none", *KINDS), default="none", help="the base (as stored)")
    parser.add_shared("--group-size", "--double-quantization")


def check_adapters(parser: ArgumentParser, args: argparse.Namespace) -> None:
    """Exits for values that cannot be."""
    flags.check_shared(parser, args)
    for flag, given, kinds in (
        ("--group-size", args.group_size, GROUPED),
        ("--double-quantization", args.double_quantization, ("nf4",)),
    ):
        if given and args.quantize not in kinds:
            parser.error(f"{flag} is for --quantize {' or '.join(kinds)}")


def lora_config(args: argparse.Namespace) -> LoraConfig:
    """Raises `UserError` for what makes no adapter."""
    return LoraConfig.of(
        args.targets,
        rank=args.rank,
        alpha=2.0 * args.rank if args.alpha is None else args.alpha,
        dropout=args.dropout,
        rslora=args.rslora,
    )


def quantization(args: argparse.Namespace) -> Quantization | None:
    if args.quantize == "none":
        return None
    return Quantization(
        args.quantize,
        group_size=args.group_size,
        double_quantization=args.double_quantization,
    )


def new_adapters(
    base: Params, config: LoraConfig, seed: int, mesh: Mesh | None
) -> tuple[Params, Params]:
    """(adapters, base) as the two parts of one tree; the arrays of the base stay where they are.

    Adapters lie as their kernels do, and are the same on any mesh.
    """
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), base)

    def make() -> Params:
        return lora.adapters(lora.add(abstract, config, jax.random.key(seed)))

    places = sharding.shardings(jax.eval_shape(make), mesh)
    return lora.split(lora.attach(base, jax.jit(make, out_shardings=places)()))


def train_adapters(
    args: argparse.Namespace,
    read: Callable[[str, Tokenizer, LlamaConfig], tuple[list[T], Counts]],
    pack: Callable[[Sequence[T]], Rows],
    loss: Callable[[LlamaConfig], Loss],
    *,
    learning_rate: float,
    reference: bool,
) -> None:
    """Trains adapters on what `read` and `pack` make of the data files, for `loss`.

    Args:
      learning_rate: the largest, by default.
      reference: whether the loss compares with the base, and is no perplexity's logarithm.
    """
    adapters = lora_config(args)
    quantize = quantization(args)
    if not args.resume:
        refuse_taken(args.output)
    keep_compilations()
    join_processes()
    config = load_config(args.checkpoint)
    tokenizer = load_tokenizer(args.checkpoint)
    args.seq_len = flags.seq_len(args, config)
    args.dtype = flags.compute_dtype(args.dtype).name
    mesh = flags.make_mesh(args, config)
    rows, validation = flags.read_all(args, lambda path: read(path, tokenizer, config), pack)
    steps, epochs = flags.count_steps(args, rows)
    optimizer = flags.optimizer_config(
        args, steps, learning_rate=learning_rate, weight_decay=0.0, b2=0.999
    )
    mark, (stored, _) = fingerprint(args.checkpoint), load_quantization(args.checkpoint)
    model = mark if stored is None else f"{mark} as {stored}"
    settings = flags.make_run(args, "adapter", rows, validation, steps, model)
    if settings.is_finished():
        return
    base = load_params(args.checkpoint, dtype=args.dtype, quantize=quantize, mesh=mesh)
    trained, frozen = new_adapters(base, adapters, args.seed, mesh)
    del base
    if args.scan:
        trained, frozen = stack_layers(trained, mesh), stack_layers(frozen, mesh)

    def save(path: Any, trained: Params) -> None:
        save_adapter(path, trained, adapters, mark, {"settings": settings.settings})

    fit(
        Task(
            loss=loss(config),
            learns=lora.is_adapter,
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
            flops=flags.flops_per_token(
                config,
                args.seq_len,
                sum(x.size for x in jax.tree.leaves(trained)),
                reference=reference,
            ),
            perplexity=not reference,
        ),
        settings,
        save,
        flags.texts(tokenizer),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; raises `UserError` for what the user can mend."""
    args = parse(arguments)
    train_adapters(
        args,
        lambda path, tokenizer, config: read(
            path,
            tokenizer,
            config,
            seq_len=args.seq_len,
            chat=args.chat,
            train_on_prompts=args.train_on_prompts,
        ),
        lambda samples: pack(samples, args.seq_len, packing=not args.no_packing),
        lambda config: next_token(config, remat=args.remat),
        learning_rate=2e-4,
        reference=False,
    )


if __name__ == "__main__":
    run(main, PROG)

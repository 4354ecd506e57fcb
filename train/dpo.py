"""python -m train.dpo: adapters that prefer one answer to another (DPO, arXiv 2305.18290).

The reference model is the base itself, without the adapters, so it takes no memory of its own.
"""

import argparse
import math
from collections.abc import Sequence

from llama_jax.command import ArgumentParser, run
from train import flags
from train.data import pack_pairs, read_preferences
from train.lora import add_adapters, check_adapters, train_adapters
from train.losses import preference

PROG = "train.dpo"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; exits with status 2 and one line on a mistake."""
    parser = ArgumentParser(prog=PROG, description="Train adapters on preferences (DPO).")
    add_adapters(parser)
    add = parser.add_argument
    add("--beta", type=float, default=0.1, metavar="R", help="how dear leaving the base is (0.1)")
    add(
        "--label-smoothing",
        type=float,
        default=0.0,
        metavar="R",
        help="share of pairs that are the wrong way round (0)",
    )
    add("--chat", action="store_true", help="write texts as chats of the model's format")
    flags.add_shared(
        parser,
        learning_rate="0.00005",
        weight_decay="0",
        formats="rows of prompt, chosen, rejected (.json, .jsonl); --batch counts pairs",
    )
    args = parser.parse_args(arguments)
    check_adapters(parser, args)
    if not 0 < args.beta < math.inf:
        parser.error(f"--beta is {args.beta}, expected more than 0 and finite")
    if not 0 <= args.label_smoothing < 0.5:
        parser.error(f"--label-smoothing is {args.label_smoothing}, expected 0 to below 0.5")
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; raises `UserError` for what the user can mend."""
    args = parse(arguments)
    train_adapters(
        args,
        lambda path, tokenizer, config: read_preferences(
            path, tokenizer, config, seq_len=args.seq_len, chat=args.chat
        ),
        lambda pairs: pack_pairs(pairs, args.seq_len),
        lambda config: preference(
            config, args.beta, label_smoothing=args.label_smoothing, remat=args.remat
        ),
        learning_rate=5e-5,
        reference=True,
    )


if __name__ == "__main__":
    run(main, PROG)

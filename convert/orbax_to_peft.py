"""Converts an adapter directory to an adapter that Hugging Face's PEFT loads.

    python -m convert.orbax_to_peft --lora DIR --checkpoint DIR --output DIR

Writes `adapter_config.json` and `adapter_model.safetensors`. The base of the result is the model in
Hugging Face's format, as convert.orbax_to_hf writes it.
"""

import json
import time
from typing import Any

import numpy as np

from convert.names import adapted, peft_name
from convert.orbax_to_hf import write_safetensors
from convert.peft_to_orbax import CONFIG, SAFETENSORS
from convert.progress import say
from convert.source import DTYPES
from llama_jax.adapter import fingerprint, open_adapter, read
from llama_jax.checkpoint import LazyArray, abstract, load_config, new_directory
from llama_jax.command import ArgumentParser, run
from llama_jax.errors import UserError
from llama_jax.lora import NAME, LoraConfig

PROG = "convert.orbax_to_peft"


def main(arguments: list[str]) -> None:
    """The command; raises `UserError` for what the user can mend."""
    parser = ArgumentParser(prog=PROG, description=(__doc__ or "").partition("\n\n")[0])
    add = parser.add_argument
    add("--lora", required=True, metavar="DIR", help="adapter directory")
    add("--checkpoint", required=True, metavar="DIR", help="model directory of its base")
    add("--output", required=True, metavar="DIR", help="directory to write")
    args = parser.parse_args(arguments)
    started = time.monotonic()

    # What is there
    config = load_config(args.checkpoint)
    opened = open_adapter(args.lora, abstract(config), fingerprint(args.checkpoint))
    tree, how = read(opened), opened.config
    leaves, modules = {}, set()
    for path, module in adapted(config):
        layer, half, target = path.split("/")
        if target in how.targets:
            pair = tree[layer][half][target][NAME]
            leaves[peft_name(module, "A")] = _lazy(args.lora, pair.a)
            leaves[peft_name(module, "B")] = _lazy(args.lora, pair.b)
            modules.add(module.rpartition(".")[2])
    size = sum(leaf.nbytes for leaf in leaves.values())

    # Write it
    with new_directory(args.output, size) as staging:
        fields = json.dumps(peft_config(how, sorted(modules)), indent=2)
        (staging / CONFIG).write_text(fields + "\n")
        with (staging / SAFETENSORS).open("wb") as stream:
            write_safetensors(stream, leaves, lambda *_: None)
    seconds = time.monotonic() - started
    say(
        f"{PROG}: wrote {args.output}: {len(leaves)} tensors, {size / 1e6:.2f} MB in {seconds:.1f} s"
    )


def peft_config(config: LoraConfig, modules: list[str]) -> dict[str, Any]:
    """What PEFT's `LoraConfig` takes; `modules` are Hugging Face's names of the targets."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.rslora,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": modules,
    }


def _lazy(path: str, array: Any) -> LazyArray:
    if np.dtype(array.dtype) not in DTYPES.values():
        raise UserError(f"{path} is of {array.dtype}, expected one of {', '.join(DTYPES)}")
    return LazyArray(tuple(array.shape), np.dtype(array.dtype), lambda: np.asarray(array))


if __name__ == "__main__":
    run(main, PROG)

"""Converts an adapter of Hugging Face's PEFT to an adapter directory.

    python -m convert.peft_to_orbax --input DIR --checkpoint DIR --output DIR

Reads `adapter_config.json` and `adapter_model.safetensors` (or `.bin`). The model directory is
that of the model which PEFT trained. Names change, values do not: Hugging Face rotates halves
(RoPE) as this project does, so the rows of B for queries and keys stay where they are. What would
change the result and cannot be said here, such as DoRA or ranks by layer, is refused by its key.
"""

import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert.hf_to_orbax import STORED
from convert.meta_to_orbax import require_safe_torch
from convert.names import adapted, peft_name
from convert.progress import say
from convert.source import DTYPES, input_directory, provenance, read_json, unreadable_is_user_error
from llama_jax.adapter import fingerprint, save_adapter
from llama_jax.checkpoint import LazyArray, abstract, load_config, nested
from llama_jax.command import ArgumentParser, run
from llama_jax.config import LlamaConfig
from llama_jax.errors import UserError
from llama_jax.lora import NAME, TARGETS, Lora, LoraConfig

PROG = "convert.peft_to_orbax"
CONFIG, SAFETENSORS, PICKLED = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
)
LINEAR = "all-linear"

# Keys that say where an adapter came from or how it began, and change nothing of what it computes.
_HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config",
    "inference_mode", "loftq_config", "lora_ga_config", "layers_pattern", "megatron_core",
    "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type",
}  # fmt: skip
_READ = {
    "peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules",
    "exclude_modules", "layers_to_transform", "init_lora_weights", "bias",
}  # fmt: skip
_KEEP_THE_BASE = (None, True, False, "gaussian", "eva", "orthogonal")  # of init_lora_weights


def main(arguments: list[str]) -> None:
    """The command; raises `UserError` for what the user can mend."""
    parser = ArgumentParser(prog=PROG, description=(__doc__ or "").partition("\n\n")[0])
    add = parser.add_argument
    add("--input", required=True, metavar="DIR", help="what PEFT's save_pretrained wrote")
    add("--checkpoint", required=True, metavar="DIR", help="model directory of its base")
    add("--output", required=True, metavar="DIR", help="adapter directory to write")
    args = parser.parse_args(arguments)
    started = time.monotonic()

    # What is there
    config = load_config(args.checkpoint)
    base = fingerprint(args.checkpoint)
    directory = input_directory(args.input)
    fields = _fields(directory / CONFIG, config)
    file, tensors = _tensors(directory)
    how = _lora_config(directory / CONFIG, fields, config)
    leaves = _leaves(file, tensors, how, config)
    size = sum(leaf.nbytes for pair in leaves.values() for leaf in (pair.a, pair.b))
    dtype = str(next(iter(leaves.values())).a.dtype)
    origin = {
        "peft": {name: fields.get(name) for name in ("base_model_name_or_path", "peft_version")}
    }

    # Write it
    tree = nested({f"{path}/{NAME}": leaf for path, leaf in leaves.items()})
    save_adapter(args.output, tree, how, base, provenance(PROG, dtype) | origin)
    seconds = time.monotonic() - started
    say(
        f"{PROG}: wrote {args.output}: rank {how.rank} on {','.join(how.targets)}, {dtype}, "
        f"{size / 1e6:.2f} MB in {seconds:.1f} s"
    )


# --- adapter_config.json ---


def _fields(file: Path, config: LlamaConfig) -> dict[str, Any]:
    """PEFT's config; raises `UserError` for each key that we cannot follow."""
    if not file.exists():
        raise UserError(f"{file} is missing; name the directory that PEFT's save_pretrained wrote")
    fields = read_json(file)

    def refuse(key: str, expected: str) -> None:
        value = repr(fields.get(key))[:80]
        raise UserError(f"{file}: {key} is {value}, expected {expected}; it cannot be converted")

    if fields.get("peft_type") != "LORA":
        refuse("peft_type", "'LORA'")
    if fields.get("bias", "none") != "none":
        refuse("bias", "'none'")
    if fields.get("init_lora_weights", True) not in _KEEP_THE_BASE:
        refuse("init_lora_weights", "one that leaves the model as it is")
    layers = fields.get("layers_to_transform")
    layers = [layers] if isinstance(layers, int) else layers
    all_layers = list(range(config.n_layers))
    if layers and (not isinstance(layers, list) or [n for n in all_layers if n not in layers]):
        refuse("layers_to_transform", "all layers, or null")
    for key, value in fields.items():
        if key not in _READ | _HARMLESS and value not in (None, False, "", [], {}):
            refuse(key, "that it is not used")
    return fields


def _lora_config(file: Path, fields: Mapping[str, Any], config: LlamaConfig) -> LoraConfig:
    """Raises `UserError` where a value is missing, or layers differ in what they adapt."""
    kinds: dict[str, tuple[tuple[type, ...], str, Any]] = {  # with what PEFT takes by default
        "r": ((int,), "a whole number", 8),
        "lora_alpha": ((int, float), "a number", 8),
        "lora_dropout": ((int, float), "a number", 0.0),
        "use_rslora": ((bool,), "true or false", False),
    }
    values = {name: fields.get(name, default) for name, (*_, default) in kinds.items()}
    for name, value in values.items():
        if type(value) not in kinds[name][0]:
            raise UserError(f"{file}: {name} is {value!r}, expected {kinds[name][1]}")
    chosen = {path for path, module in adapted(config) if _is_targeted(file, fields, module)}
    targets = tuple(t for t in TARGETS if any(path.endswith(f"/{t}") for path in chosen))
    for path, module in adapted(config):
        if path.split("/")[-1] in targets and path not in chosen:
            raise UserError(
                f"{file}: target_modules leaves {module} out, but has the same of other layers; "
                "it cannot be converted"
            )
    if not targets:
        raise UserError(
            f"{file}: target_modules is {fields.get('target_modules')!r}, expected some of q_proj, "
            "k_proj, v_proj, o_proj, gate_proj, up_proj and down_proj"
        )
    try:
        return LoraConfig(
            rank=values["r"],
            alpha=values["lora_alpha"],
            targets=targets,
            dropout=values["lora_dropout"],
            rslora=values["use_rslora"],
        )
    except UserError as error:
        raise UserError(f"{file}: {error}") from None


def _is_targeted(file: Path, fields: Mapping[str, Any], module: str) -> bool:
    """Whether PEFT gives this module an adapter: lists name ends of names, texts are patterns."""

    def matches(key: str) -> bool:
        wanted = fields.get(key)
        if wanted is None:
            return False
        if isinstance(wanted, str):
            if key == "target_modules" and wanted.lower() == LINEAR:
                return True
            try:
                return re.fullmatch(wanted, module) is not None
            except re.error as error:
                raise UserError(f"{file}: {key} is {wanted!r}, no pattern ({error})") from None
        if not isinstance(wanted, list) or not all(isinstance(name, str) for name in wanted):
            raise UserError(f"{file}: {key} is {wanted!r}, expected a list of names or a pattern")
        return any(f".{module}".endswith(f".{name}") for name in wanted)

    return matches("target_modules") and not matches("exclude_modules")


# --- the tensors ---


def _leaves(
    file: Path, tensors: Mapping[str, LazyArray], how: LoraConfig, config: LlamaConfig
) -> dict[str, Lora]:
    """The adapters by path, unread; `UserError` names what is missing, unknown or of a wrong shape."""
    kernels: Any = abstract(config)
    leaves, known = {}, set()
    for path, module in adapted(config):
        layer, half, target = path.split("/")
        if target not in how.targets:
            continue
        out, width = kernels[layer][half][target]["kernel"].shape
        pair = {}
        for matrix, shape in (("A", (how.rank, width)), ("B", (out, how.rank))):
            name = peft_name(module, matrix)
            known.add(name)
            if name not in tensors:
                raise UserError(f"{file}: {name} is missing, but {CONFIG} tells of it")
            if tensors[name].shape != shape:
                raise UserError(
                    f"{file}: {name} has shape {tensors[name].shape}, expected {shape}; give the "
                    "model that the adapter was trained on"
                )
            pair[matrix] = tensors[name]
        leaves[path] = Lora(pair["A"], pair["B"], how.scale, how.dropout)
    if unknown := sorted(set(tensors) - known):
        raise UserError(
            f"{file}: {unknown[0]} is not what {CONFIG} tells of a Llama with {config.n_layers} "
            "layers; it cannot be converted"
        )
    return leaves


def _tensors(directory: Path) -> tuple[Path, dict[str, LazyArray]]:
    """The file with the weights, and its tensors by PEFT's names, unread where that is possible."""
    for name, read in ((SAFETENSORS, _safetensors), (PICKLED, _pickled)):
        if (directory / name).is_file():
            return directory / name, read(directory / name)
    raise UserError(f"neither {SAFETENSORS} nor {PICKLED} in {directory}; copy it whole")


def _safetensors(file: Path) -> dict[str, LazyArray]:
    try:
        from safetensors import safe_open
    except ImportError:
        raise UserError(
            "safetensors is not installed, needed for PEFT's files; pip install safetensors"
        ) from None
    with unreadable_is_user_error(file, "safetensors, it is truncated or no such file"):
        handle = safe_open(file, framework="np")
        views = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118
        types = {name: STORED.get(view.get_dtype()) for name, view in views.items()}
        shapes = {name: tuple(view.get_shape()) for name, view in views.items()}
    _refuse_types(file, types)

    def reader(name: str) -> Callable[[], np.ndarray]:
        return lambda: handle.get_tensor(name)

    return {name: LazyArray(shapes[name], DTYPES[str(types[name])], reader(name)) for name in types}


def _pickled(file: Path) -> dict[str, LazyArray]:
    require_safe_torch()
    import torch

    with unreadable_is_user_error(file, "PyTorch's weights"):
        stored = torch.load(file, map_location="cpu", weights_only=True)
        types = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in stored.items()}
        _refuse_types(
            file, {name: kind if kind in DTYPES else None for name, kind in types.items()}
        )
        arrays = {
            name: tensor.contiguous().view(torch.uint8).numpy().view(DTYPES[types[name]])
            for name, tensor in stored.items()
        }

    def reader(array: np.ndarray) -> Callable[[], np.ndarray]:
        return lambda: array

    return {
        name: LazyArray(array.shape, array.dtype, reader(array)) for name, array in arrays.items()
    }


def _refuse_types(file: Path, types: Mapping[str, str | None]) -> None:
    for name, kind in types.items():
        if kind is None:
            raise UserError(f"{file}: {name} is not of {', '.join(DTYPES)}; save it as one of them")


if __name__ == "__main__":
    run(main, PROG)

"""Prefill and decode on CPU beside Hugging Face transformers, with the same weights, in one run.

    python -m benchmarks.decode_vs_transformers [--new-tokens 128] [--repeats 5]
        [--llama-cpp llamacpp/bin/python]

The model has the shape of a 110M-parameter Llama with random weights; all sides are greedy, and
those in float32 must draw the same tokens. Ours runs in float32 and with all weights as int8. Sides
alternate, so that a machine that drifts is fair to all; medians are reported. No step can be faster
than its weights are read, so the rate at which the machine reads memory is measured beside it.
"startup" is a whole process from the shell to the first token, the second time it is run. With
`--llama-cpp`, the interpreter of an environment as `llama_cpp_peer.py` describes it, llama.cpp takes
its turns too. The last line is JSON.
"""

import argparse
import base64
import functools
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"  # for the processes of "startup" as well

import jax
import numpy as np
import torch
import transformers

from benchmarks.shape import CONFIG
from convert.names import weights
from infer.generate import compile_programs, request_shapes, stream
from infer.sampling import settings
from llama_jax.checkpoint import nested, save_model
from llama_jax.quant import Quantization
from llama_jax.tokenizer import N_SPECIAL

ROOT = Path(__file__).parents[1]
PROMPT = 64
READ = torch.ones(1 << 28)
THEIR_STARTUP = """
import sys, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
model.generate(torch.ones((1, 8), dtype=torch.long), max_new_tokens=1, do_sample=False)
"""


def their_model() -> transformers.LlamaForCausalLM:
    """A random model; larger weights than usual, so that greedy tokens vary."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**CONFIG.to_hf("float32"), initializer_range=0.05)
    return transformers.LlamaForCausalLM(config).eval()


def our_params(model: transformers.LlamaForCausalLM) -> dict:
    """The same weights in our tree."""
    tensors = model.state_dict()
    leaves = {w.path: jax.numpy.asarray(tensors[w.hf].numpy()) for w in weights(CONFIG)}
    return nested(leaves)


def ours(params: dict, prompts: np.ndarray, n: int) -> tuple[float, float, np.ndarray]:
    """Seconds to the first token, seconds for the n - 1 after it, and the tokens."""
    rows = prompts.tolist()
    began = time.perf_counter()
    sampling = settings([(0, 0)] * len(rows), temperature=0)
    steps = stream(CONFIG, params, rows, sampling, max_new_tokens=n, steps_a_fetch=n)
    progress = next(steps)
    first = time.perf_counter()
    for progress in steps:  # noqa: B007
        pass
    return first - began, time.perf_counter() - first, progress.tokens[:, :n]


def theirs(model: transformers.LlamaForCausalLM, prompts: np.ndarray, n: int):
    """The same of transformers: `generate` for one token, and for all."""
    ids = torch.from_numpy(prompts)
    arguments = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "use_cache": True}
    mask = torch.ones_like(ids)
    began = time.perf_counter()
    model.generate(ids, attention_mask=mask, max_new_tokens=1, **arguments)
    first = time.perf_counter() - began
    began = time.perf_counter()
    out = model.generate(ids, attention_mask=mask, max_new_tokens=n, **arguments)
    return first, time.perf_counter() - began - first, out[:, ids.shape[1] :].numpy()


def llama_cpp(python: Path, kind: str, prompts: np.ndarray, n: int) -> tuple[float, float, None]:
    """The same of llama.cpp, in a process of its own; its tokens are drawn beforehand."""
    peer = Path(__file__).with_name("llama_cpp_peer.py")
    options = f"--kind {kind} --batch {len(prompts)} --new-tokens {n} --repeats 1".split()
    out = subprocess.run([python, peer, *options], check=True, stdout=subprocess.PIPE, text=True)
    (case,) = json.loads(out.stdout.splitlines()[-1])["cases"]
    first, rest = prompts.size / case["prefill_tok_s"], len(prompts) * (n - 1)
    return first, rest / case["decode_tok_s"], None


def read_gb_s() -> float:
    """What both cores read from memory at best: the sum of 1 GiB, in GB/s."""
    began = time.perf_counter()
    READ.sum()
    return READ.nbytes / 1e9 / (time.perf_counter() - began)


def timed(*command: str) -> float:
    began = time.perf_counter()
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def startup(model: transformers.LlamaForCausalLM, params: dict, repeats: int):
    """Whole processes to the first token, our compilations kept on disk from a first run."""
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = any_tokenizer(Path(scratch))
        save_model(f"{scratch}/ours", CONFIG, params, tokenizer=tokenizer, provenance={})
        model.save_pretrained(f"{scratch}/theirs")
        os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{scratch}/cache"
        sample = f"-m infer.sample --checkpoint {scratch}/ours --prompt hello --max-new-tokens 1"
        commands = (
            (sys.executable, *sample.split()),
            (sys.executable, "-c", THEIR_STARTUP, f"{scratch}/theirs"),
        )
        for command in commands:
            timed(*command)
        return [[timed(*command) for command in commands] for _ in range(repeats)]


def any_tokenizer(directory: Path) -> Path:
    """A tiktoken file of the model's size: start-up needs a tokenizer, the weights are random."""
    pairs = (bytes([a, b]) for a in range(256) for b in range(256))
    tokens = [bytes([a]) for a in range(256)]
    tokens += itertools.islice(pairs, CONFIG.vocab_size - N_SPECIAL - len(tokens))
    lines = (f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(tokens))
    path = directory / "tokenizer.model"
    path.write_text("\n".join(lines) + "\n")
    return path


def median(runs: list, side: int, measure: Callable) -> float:
    return statistics.median(measure(run[side]) for run in runs)


def measure_batch(batch: int, model: Any, ours_by_kind: dict[str, Any], args: argparse.Namespace):
    """Prefill and decode of `batch` rows, all sides in turn."""
    n = args.new_tokens
    prompts = np.random.default_rng(0).integers(5, CONFIG.vocab_size, (batch, PROMPT))
    sides = [functools.partial(ours, params) for params in ours_by_kind.values()]
    sides.append(functools.partial(theirs, model))
    names = [*ours_by_kind, "transformers"]
    if args.llama_cpp:
        sides += [functools.partial(llama_cpp, args.llama_cpp, kind) for kind in ("f32", "q8_0")]
        names += ["llama_cpp_f32", "llama_cpp_q8_0"]
    for params in ours_by_kind.values():
        compile_programs(CONFIG, params, request_shapes(CONFIG, prompts.tolist(), n))
    for side in sides:
        side(prompts, 2)
    runs, reads = [], []
    for _ in range(args.repeats):
        runs.append([side(prompts, n) for side in sides])
        reads.append(read_gb_s())
    tokens = dict(zip(names, (run[2] for run in runs[0]), strict=True))
    same = (tokens["f32"] == tokens["transformers"]).mean()
    speed = statistics.median(reads)
    print(
        f"batch {batch}: {same:.1%} of the greedy tokens are the same in float32; memory is read at "
        f"{speed:.1f} GB/s"
    )
    for name, count, part in (("prefill", batch * PROMPT, 0), ("decode", batch * (n - 1), 1)):
        rates = {
            side: count / median(runs, i, lambda run: run[part])  # noqa: B023
            for i, side in enumerate(names)
        }
        case = {"name": f"{name}_b{batch}"}
        case |= {f"{side}_tok_s": rate for side, rate in rates.items()}
        case["f32_over_transformers"] = rates["f32"] / rates["transformers"]
        case["int8_over_f32"] = rates["int8"] / rates["f32"]
        case["int8_over_transformers"] = rates["int8"] / rates["transformers"]
        if args.llama_cpp:
            case["f32_over_llama_cpp"] = rates["f32"] / rates["llama_cpp_f32"]
            case["int8_over_llama_cpp"] = rates["int8"] / rates["llama_cpp_q8_0"]
        if name == "decode":
            for kind, params in ours_by_kind.items():
                nbytes = sum(x.nbytes for x in jax.tree.leaves(params))
                case[f"{kind}_memory_limit_tok_s"] = batch * speed * 1e9 / nbytes
        yield case


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--llama-cpp", type=Path, metavar="PYTHON")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = their_model()
    params = our_params(model)
    quantize = jax.jit(Quantization("int8", embeddings=True))
    by_kind = {"f32": params, "int8": quantize(params)}
    print(
        f"jax {jax.__version__}, transformers {transformers.__version__}, torch "
        f"{torch.__version__}, {os.cpu_count()} cores, prompt {PROMPT}, {args.new_tokens} new "
        f"tokens, median of {args.repeats}"
    )
    cases = [case for batch in (1, 8) for case in measure_batch(batch, model, by_kind, args)]
    pairs = startup(model, params, args.repeats)
    seconds = [median(pairs, side, float) for side in (0, 1)]
    columns = {
        "float32": "f32_tok_s",
        "int8": "int8_tok_s",
        "transformers": "transformers_tok_s",
        "float32 / theirs": "f32_over_transformers",
        "int8 / float32": "int8_over_f32",
    }
    if args.llama_cpp:
        columns |= {
            "llama.cpp": "llama_cpp_f32_tok_s",
            "Q8_0": "llama_cpp_q8_0_tok_s",
            "float32 / llama.cpp": "f32_over_llama_cpp",
            "int8 / Q8_0": "int8_over_llama_cpp",
        }
    print(f"\n| tok/s | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
    for case in cases:
        row = (f"{case[key]:.{2 if '_over_' in key else 1}f}" for key in columns.values())
        print(f"| {case['name']} | {' | '.join(row)} |")
    print(f"\nsecond start to the first token: {seconds[0]:.2f} s, transformers {seconds[1]:.2f} s")
    print(json.dumps({"cases": cases, "startup_s": seconds}))


if __name__ == "__main__":
    main()

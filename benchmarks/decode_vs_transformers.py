"""Prefill and decode on CPU beside Hugging Face transformers, with the same weights, in one run.

    python -m benchmarks.decode_vs_transformers [--new-tokens 128] [--repeats 5]

The model has the shape of a 110M-parameter Llama with random weights; both sides are greedy and
must draw the same tokens. Sides alternate, so that a machine that drifts is fair to both; medians
are reported. No step can be faster than its weights are read, so the rate at which the machine
reads memory is measured beside it. "startup" is a whole process from the shell to the first token, the second time it is
run. The last line is JSON.
"""

import argparse
import base64
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

import jax
import numpy as np
import torch
import transformers

from convert.names import weights
from infer.generate import compile_programs, request_shapes, stream
from infer.sampling import settings
from llama_jax.checkpoint import nested, save_model
from llama_jax.config import LlamaConfig
from llama_jax.tokenizer import N_SPECIAL

ROOT = Path(__file__).parents[1]
CONFIG = LlamaConfig(
    vocab_size=32000,
    dim=768,
    n_layers=12,
    n_heads=12,
    n_kv_heads=12,
    head_dim=64,
    mlp_dim=2048,
    norm_eps=1e-5,
    rope_theta=10000.0,
    rope_scaling=None,
    context=2048,
    tie_embeddings=True,
    version="2",
)
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


def median(pairs: list, side: int, measure: Callable) -> float:
    return statistics.median(measure(pair[side]) for pair in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    n = args.new_tokens
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = their_model()
    params = our_params(model)
    print(
        f"jax {jax.__version__}, transformers {transformers.__version__}, torch "
        f"{torch.__version__}, {os.cpu_count()} cores, prompt {PROMPT}, {n} new tokens, "
        f"median of {args.repeats}"
    )
    weights_gb = CONFIG.count_parameters() * 4 / 1e9
    cases = []
    for batch in (1, 8):
        prompts = np.random.default_rng(0).integers(5, CONFIG.vocab_size, (batch, PROMPT))
        compile_programs(CONFIG, params, request_shapes(CONFIG, prompts.tolist(), n))
        ours(params, prompts, 2), theirs(model, prompts, 2)
        pairs, reads = [], []
        for _ in range(args.repeats):
            pairs.append((ours(params, prompts, n), theirs(model, prompts, n)))
            reads.append(read_gb_s())
        same = np.mean([(a[2] == b[2]).mean() for a, b in pairs])
        steps_s = statistics.median(reads) / weights_gb
        print(
            f"batch {batch}: {same:.1%} of the greedy tokens are the same; memory is read at "
            f"{steps_s * weights_gb:.1f} GB/s, the {weights_gb:.3f} GB of weights {steps_s:.1f} "
            "times a second"
        )
        for name, tokens, part in (("prefill", batch * PROMPT, 0), ("decode", batch * (n - 1), 1)):
            rates = [tokens / median(pairs, side, lambda run: run[part]) for side in (0, 1)]  # noqa: B023
            case = {
                "name": f"{name}_b{batch}_f32",
                "ours_tok_s": rates[0],
                "transformers_tok_s": rates[1],
                "ratio": rates[0] / rates[1],
            }
            if name == "decode":
                case["memory_limit_tok_s"] = batch * steps_s
            cases.append(case)
    pairs = startup(model, params, args.repeats)
    seconds = [median(pairs, side, float) for side in (0, 1)]
    cases.append(
        {
            "name": "startup_second_run",
            "ours_s": seconds[0],
            "transformers_s": seconds[1],
            "ratio": seconds[1] / seconds[0],
        }
    )
    print("\n| case | llama_jax | transformers | ratio |\n|---|---|---|---|")
    for case in cases:
        unit = "s" if "ours_s" in case else "tok/s"
        left, right = list(case.values())[1:3]
        print(f"| {case['name']} | {left:.2f} {unit} | {right:.2f} {unit} | {case['ratio']:.2f} |")
    print(json.dumps({"cases": cases}))


if __name__ == "__main__":
    main()

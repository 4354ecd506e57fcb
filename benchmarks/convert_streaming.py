"""Memory and speed of the converters on a synthetic checkpoint, beside a plain copy of it.

    python -m benchmarks.convert_streaming --gigabytes 3 --ranks 2

The model has the shapes of Llama 3.2 1B with a head of its own and as many layers as it takes,
random finite bfloat16 values and a made-up tokenizer. Every command runs as a process of its
own, the start of Python included in its time; its anonymous memory (RssAnon of
/proc/PID/status: mapped files are not in it) is polled. Before each run the same bytes are
copied with `shutil.copyfile`, so that both find the page cache in the same state.
Exits with 1 if a converter takes more than 3 times the largest tensor + 500 MB.
"""

import argparse
import base64
import dataclasses
import itertools
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from convert.names import weights
from llama_jax.checkpoint import LazyArray, nested, save_model
from llama_jax.config import LlamaConfig, get_preset

SPECIAL_TOKENS = 256  # that a Llama 3 tokenizer adds to those in its file
POLL_SECONDS = 0.01
ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Case:
    """One command; its output is kept where a later case reads it."""

    name: str
    module: str
    source: str
    target: str
    options: tuple[str, ...] = ()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--dir", metavar="DIR", help="where to work; default: a temporary one")
    parser.add_argument("--gigabytes", type=float, default=3.0, help="size of the model, about")
    parser.add_argument("--ranks", type=int, default=2, help="files of the Meta checkpoint")
    parser.add_argument("--repeats", type=int, default=3, help="the median is reported")
    args = parser.parse_args()

    cases = [
        Case("orbax_to_meta", "orbax_to_meta", "model", "meta", (f"--ranks={args.ranks}",)),
        Case("meta_to_orbax", "meta_to_orbax", "meta", "from_meta"),
        Case("meta_to_orbax --verify", "meta_to_orbax", "meta", "from_meta", ("--verify",)),
        Case("orbax_to_hf", "orbax_to_hf", "model", "hf"),
        Case("hf_to_orbax", "hf_to_orbax", "hf", "from_hf"),
        Case("hf_to_orbax --verify", "hf_to_orbax", "hf", "from_hf", ("--verify",)),
    ]
    with tempfile.TemporaryDirectory(dir=args.dir, prefix="convert_streaming-") as temporary:
        directory = Path(temporary)
        config = model_config(args.gigabytes)
        largest = write_model(directory / "model", config)
        bound = 3 * largest + 500e6
        print(
            f"{config.count_parameters():,} parameters in bfloat16, largest tensor "
            f"{largest / 1e6:.0f} MB, bound 3 x largest + 500 MB = {bound / 1e6:.0f} MB"
        )
        print(f"{'command':24}{'GB':>6}{'s':>8}{'MB/s':>8}{'copy':>8}{'ratio':>7}{'peak MB':>9}")
        results = []
        for case in cases:
            result = measure(case, directory, args.repeats) | {"bound_mb": bound / 1e6}
            result["ranks"] = args.ranks if "meta" in case.name else 1
            print(
                "{name:24}{gigabytes:6.2f}{seconds:8.2f}{mb_per_s:8.0f}{copy_mb_per_s:8.0f}"
                "{ratio:7.2f}{peak_anon_mb:9.0f}".format(**result),
                flush=True,
            )
            results.append(result)
    print(json.dumps({"cases": results}))
    sys.exit(any(result["peak_anon_mb"] > result["bound_mb"] for result in results))


def measure(case: Case, directory: Path, repeats: int) -> dict[str, Any]:
    """Copies and converts by turns; the medians, and the highest memory of all repeats."""
    source, target, copy = directory / case.source, directory / case.target, directory / "copy"
    files = [file for file in source.rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in files)
    given = "--checkpoint" if case.module.startswith("orbax") else "--input"
    command = [sys.executable, "-m", f"convert.{case.module}", given, str(source)]
    command += ["--output", str(target), *case.options]
    copying, converting, peaks = [], [], []
    for _ in range(repeats):
        os.sync()  # nothing of the run before is left to write
        copying.append(copy_seconds(files, copy))
        shutil.rmtree(copy)
        shutil.rmtree(target, ignore_errors=True)
        os.sync()
        seconds, peak = run(command)
        converting.append(seconds)
        peaks.append(peak)
    seconds = statistics.median(converting)
    speed, copy_speed = size / 1e6 / seconds, size / 1e6 / statistics.median(copying)
    return {
        "name": case.name,
        "gigabytes": size / 1e9,
        "seconds": seconds,
        "mb_per_s": speed,
        "copy_mb_per_s": copy_speed,
        "ratio": speed / copy_speed,
        "peak_anon_mb": max(peaks) / 1e6,
    }


def copy_seconds(files: list[Path], directory: Path) -> float:
    directory.mkdir()
    started = time.monotonic()
    for i, file in enumerate(files):
        shutil.copyfile(file, directory / str(i))
    return time.monotonic() - started


def run(command: list[str]) -> tuple[float, int]:
    """Seconds that the command took, and the most anonymous memory it was seen with, in bytes."""
    started, peak = time.monotonic(), 0
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        status = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            if found := re.search(r"RssAnon:\s*(\d+) kB", status.read_text()):
                peak = max(peak, int(found[1]) * 1024)
            time.sleep(POLL_SECONDS)
        seconds = time.monotonic() - started
        if process.returncode:
            sys.exit(f"{' '.join(command)} failed:\n{process.stderr.read()}")
    return seconds, peak


def model_config(gigabytes: float) -> LlamaConfig:
    """Llama 3.2 1B's shapes, untied, and the layers that make it at least that large."""
    config = dataclasses.replace(
        get_preset("llama-3.2-1b"),
        n_layers=1,
        version="3",
        rope_scaling=None,
        context=8192,
        tie_embeddings=False,
    )
    one = config.count_parameters()
    layer = dataclasses.replace(config, n_layers=2).count_parameters() - one
    layers = 1 + max(0, math.ceil((gigabytes * 1e9 / 2 - one) / layer))
    return dataclasses.replace(config, n_layers=layers)


def write_model(directory: Path, config: LlamaConfig) -> int:
    """Writes a random model directory, a tensor at a time; returns the largest tensor's bytes."""

    def random(path: str, shape: tuple[int, ...]) -> LazyArray:
        def read() -> np.ndarray:
            rng = np.random.default_rng(zlib.crc32(path.encode()))
            bits = rng.integers(0, 1 << 16, shape, np.uint16)
            bits &= 0xBFFF  # the exponent's highest bit: what is left is finite, below 2
            return bits.view(ml_dtypes.bfloat16)

        return LazyArray(shape, np.dtype(ml_dtypes.bfloat16), read)

    leaves = {weight.path: random(weight.path, weight.shape(config)) for weight in weights(config)}
    with tempfile.TemporaryDirectory() as temporary:
        tokenizer = Path(temporary) / "tokenizer.model"
        tokenizer.write_bytes(tokens(config.vocab_size - SPECIAL_TOKENS))
        save_model(directory, config, nested(leaves), tokenizer=tokenizer, provenance={})
    return max(leaf.nbytes for leaf in leaves.values())


def tokens(n: int) -> bytes:
    """A tiktoken file of the first `n` byte strings: all of one byte, then of two, then three."""
    strings = (
        bytes(string)
        for length in itertools.count(1)
        for string in itertools.product(range(256), repeat=length)
    )
    return b"".join(
        b"%s %d\n" % (base64.b64encode(string), rank)
        for rank, string in enumerate(itertools.islice(strings, n))
    )


if __name__ == "__main__":
    main()

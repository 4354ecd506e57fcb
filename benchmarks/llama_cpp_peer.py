"""llama.cpp on CPU: the shape of `decode_vs_transformers`, in float32 and in Q8_0.

    python -m venv llamacpp
    CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX512=ON -DGGML_AVX512_VBMI=ON -DGGML_AVX512_VNNI=ON" \\
        llamacpp/bin/pip install --no-cache-dir --no-binary llama-cpp-python llama-cpp-python gguf
    llamacpp/bin/python benchmarks/llama_cpp_peer.py [--threads 2] [--new-tokens 128] [--repeats 5]

It has an environment of its own, because it is a peer and not a dependency. The build takes a
quarter of an hour and is for the instructions named: take those of /proc/cpuinfo. GGML_NATIVE=ON
finds them by itself, but then also AMX, which dies with SIGILL where the system does not allow it.
Where other programs want the cores, its threads wait for each other in vain and it is many times
slower: OMP_WAIT_POLICY=passive helps then.

The weights are random, so each step reads tokens drawn beforehand: what is timed is `llama_decode`
with one token for each of B sequences, without sampling. Model files are made once, under
`--directory`. Repeats take the cases in turn, medians are reported. No step can be faster than its
weights are read: the table says how many GB/s of them were. The last line is JSON.
`decode_vs_transformers --llama-cpp` runs this beside the others.
"""

import argparse
import ctypes
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np

VOCAB, DIM, LAYERS, HEADS, MLP = 32000, 768, 12, 12, 2048
PROMPT = 64
KINDS = {"f32": gguf.GGMLQuantizationType.F32, "q8_0": gguf.GGMLQuantizationType.Q8_0}
KERNELS = {
    "attn_q": (DIM, DIM),
    "attn_k": (DIM, DIM),
    "attn_v": (DIM, DIM),
    "attn_output": (DIM, DIM),
    "ffn_gate": (MLP, DIM),
    "ffn_up": (MLP, DIM),
    "ffn_down": (DIM, MLP),
}


def write_model(path: Path, kind: gguf.GGMLQuantizationType) -> None:
    """A model of random weights; kernels [out, in] in `kind`, norms in float32, a tied head."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(2048)
    writer.add_embedding_length(DIM)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(DIM // HEADS)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("no_vocab")

    def kernel(name: str, shape: tuple[int, int]) -> None:
        array = rng.standard_normal(shape, np.float32) * np.float32(0.05)
        writer.add_tensor(f"{name}.weight", gguf.quantize(array, kind), raw_dtype=kind)

    def norm(name: str) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(DIM, np.float32))

    kernel("token_embd", (VOCAB, DIM))
    for i in range(LAYERS):
        norm(f"blk.{i}.attn_norm")
        norm(f"blk.{i}.ffn_norm")
        for name, shape in KERNELS.items():
            kernel(f"blk.{i}.{name}", shape)
    norm("output_norm")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@dataclass(frozen=True)
class Case:
    """A model with room for `batch` sequences."""

    kind: str
    batch: int
    weights_bytes: int
    context: Any  # of llama.cpp

    def read(self, tokens_BT: np.ndarray, begin: int) -> None:
        """Reads the next T tokens of each sequence; the logits of the last one are computed."""
        B, T = tokens_BT.shape
        batch = llama_cpp.llama_batch_init(B * T, 0, 1)
        batch.n_tokens = B * T
        for i in range(B * T):
            row, column = divmod(i, T)
            batch.token[i] = int(tokens_BT[row, column])
            batch.pos[i] = begin + column
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = row
            batch.logits[i] = column == T - 1
        status = llama_cpp.llama_decode(self.context, batch)
        llama_cpp.llama_synchronize(self.context)
        llama_cpp.llama_batch_free(batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status}, expected 0")

    def tokens_per_second(self, new_tokens: int) -> tuple[float, float]:
        """Of all sequences together: the prompt, and the new tokens but the first, as of others."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        tokens = np.random.default_rng(1).integers(5, VOCAB, (self.batch, PROMPT + new_tokens - 1))
        began = time.perf_counter()
        self.read(tokens[:, :PROMPT], 0)
        first = time.perf_counter()
        for i in range(PROMPT, tokens.shape[1]):
            self.read(tokens[:, i : i + 1], i)
        decode = self.batch * (new_tokens - 1) / (time.perf_counter() - first)
        return self.batch * PROMPT / (first - began), decode


def make_cases(
    kind: str, batches: Sequence[int], new_tokens: int, threads: int, directory: Path
) -> list[Case]:
    """Contexts of one model, with a float32 cache as the others have."""
    path = directory / f"tied-{kind}.gguf"
    if not path.exists():
        part = path.with_suffix(f".{os.getpid()}")
        write_model(part, KINDS[kind])
        part.rename(path)
    params = llama_cpp.llama_model_default_params()
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    if not model:
        raise RuntimeError(f"llama.cpp could not read {path}; delete it to have it made anew")
    cases = []
    for batch in batches:
        params = llama_cpp.llama_context_default_params()
        params.n_seq_max = batch
        params.n_ctx = batch * (PROMPT + new_tokens)
        params.n_batch = params.n_ubatch = batch * PROMPT
        params.n_threads = params.n_threads_batch = threads
        params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
        context = llama_cpp.llama_init_from_model(model, params)
        if not context:
            raise RuntimeError(f"llama.cpp made no context for {kind}, batch {batch}")
        size = llama_cpp.llama_model_size(model)
        cases.append(Case(kind, batch, size, context))
    return cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--kind", choices=KINDS, help="one of them alone")
    parser.add_argument("--batch", type=int, help="rows, instead of 1 and then 8")
    default = Path(tempfile.gettempdir()) / "llama_cpp_peer"
    parser.add_argument("--directory", type=Path, default=default)
    args = parser.parse_args()
    args.directory.mkdir(parents=True, exist_ok=True)
    silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()

    batches = [args.batch] if args.batch else [1, 8]
    kinds = [args.kind] if args.kind else list(KINDS)
    setup = args.new_tokens, args.threads, args.directory
    cases = [case for kind in kinds for case in make_cases(kind, batches, *setup)]
    for case in cases:
        case.tokens_per_second(2)
    runs = [
        [case.tokens_per_second(args.new_tokens) for case in cases] for _ in range(args.repeats)
    ]

    version, instructions = llama_cpp.__version__, llama_cpp.llama_print_system_info().decode()
    print(
        f"llama-cpp-python {version}, {args.threads} threads, prompt {PROMPT}, {args.new_tokens} "
        f"new tokens, median of {args.repeats}\n{instructions}\n\n"
        "| tok/s | prefill | decode | weights read in decode |\n|---|---|---|---|"
    )
    results = []
    for case, rates in zip(cases, zip(*runs, strict=True), strict=True):
        prefill, decode = (statistics.median(rate) for rate in zip(*rates, strict=True))
        speed = decode / case.batch * case.weights_bytes / 1e9
        print(
            f"| {case.kind}, batch {case.batch} | {prefill:.1f} | {decode:.1f} | {speed:.1f} GB/s |"
        )
        results.append(
            {
                "kind": case.kind,
                "batch": case.batch,
                "prefill_tok_s": prefill,
                "decode_tok_s": decode,
                "weights_gb_s": speed,
            }
        )
    print(json.dumps({"version": version, "threads": args.threads, "cases": results}))


if __name__ == "__main__":
    main()

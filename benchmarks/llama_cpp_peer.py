"""Decode of llama.cpp on CPU: the 110M shape of `decode_vs_transformers`, float32 and Q8_0.

    python benchmarks/llama_cpp_peer.py [--threads 2] [--new-tokens 64] [--repeats 5]

Runs in an environment of its own, because llama.cpp is a peer and not a dependency; it is built for
the processor at hand, which takes 10 minutes and more:

    python -m venv llamacpp
    CMAKE_ARGS="-DGGML_NATIVE=ON" llamacpp/bin/pip install llama-cpp-python gguf

The weights are random, so tokens mean nothing and each step reads tokens drawn beforehand: what is
measured is `llama_decode`, with one token for each of B sequences, without sampling. The embedding
and the head are separate tables. Model files are made once, under `--directory`. Each repeat
measures every case in turn and the median is reported. The last line is JSON.
"""

import argparse
import ctypes
import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

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
    """A model of random weights; kernels [out, in] in `kind`, norms in float32."""
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
    kernel("output", (VOCAB, DIM))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@dataclass(frozen=True)
class Case:
    """A model with room for B sequences."""

    name: str
    batch: int
    context: ctypes.c_void_p

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

    def tokens_per_second(self, steps: int) -> float:
        """Of all sequences together, after a prompt that is not timed."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        tokens = np.random.default_rng(1).integers(5, VOCAB, (self.batch, PROMPT + steps))
        self.read(tokens[:, :PROMPT], 0)
        began = time.perf_counter()
        for i in range(PROMPT, PROMPT + steps):
            self.read(tokens[:, i : i + 1], i)
        return self.batch * steps / (time.perf_counter() - began)


def make_case(model: ctypes.c_void_p, name: str, batch: int, threads: int, steps: int) -> Case:
    """A context of llama.cpp for `batch` sequences with a float32 cache, as ours."""
    params = llama_cpp.llama_context_default_params()
    params.n_seq_max = batch
    params.n_ctx = batch * (PROMPT + steps)
    params.n_batch = params.n_ubatch = batch * PROMPT
    params.n_threads = params.n_threads_batch = threads
    params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
    context = llama_cpp.llama_init_from_model(model, params)
    if not context:
        raise RuntimeError(f"llama.cpp made no context for {name}")
    return Case(name, batch, context)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    default = Path(tempfile.gettempdir()) / "llama_cpp_peer"
    parser.add_argument("--directory", type=Path, default=default)
    args = parser.parse_args()
    args.directory.mkdir(parents=True, exist_ok=True)
    silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()

    cases = []
    for name, kind in KINDS.items():
        path = args.directory / f"{name}.gguf"
        if not path.exists():
            part = path.with_suffix(".part")
            write_model(part, kind)
            part.rename(path)
        params = llama_cpp.llama_model_default_params()
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        if not model:
            raise RuntimeError(f"llama.cpp could not read {path}; delete it to have it made anew")
        for batch in (1, 8):
            case = f"decode_b{batch}_{name}"
            cases.append(make_case(model, case, batch, args.threads, args.new_tokens))

    rates: dict[str, list[float]] = {case.name: [] for case in cases}
    for _ in range(args.repeats):
        for case in cases:
            rates[case.name].append(case.tokens_per_second(args.new_tokens))
    results = [{"name": name, "tok_s": statistics.median(r)} for name, r in rates.items()]
    print(
        f"llama-cpp-python {llama_cpp.__version__}, {args.threads} threads, prompt {PROMPT}, "
        f"{args.new_tokens} new tokens, median of {args.repeats}\n\n| case | tok/s |\n|---|---|"
    )
    for result in results:
        print(f"| {result['name']} | {result['tok_s']:.1f} |")
    print(json.dumps({"threads": args.threads, "cases": results}))


if __name__ == "__main__":
    main()

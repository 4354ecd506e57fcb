"""What conversion and loading hold in memory: a few tensors, never the model."""

import base64
import json
import re
import select
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from llama_jax import checkpoint
from llama_jax.config import LlamaConfig

torch = pytest.importorskip("torch")

ROOT = Path(__file__).parents[1]
MB = 1 << 20
LAYERS, DIM, MLP, VOCAB = 8, 1024, 8192, 512
LARGEST = 2 * MLP * DIM  # bytes in bfloat16
TOTAL = LAYERS * 3 * LARGEST  # of the large ones

# Converts what it is told to on standard input, keeping every tensor if it is told "hold".
CONVERTER = """
import json, sys
from convert import meta_to_orbax

read, held = meta_to_orbax._read, []

def hold(*args):
    held.append(read(*args).copy())
    return held[-1]

for line in sys.stdin:
    source, output, how = json.loads(line)
    meta_to_orbax._read = hold if how == "hold" else read
    meta_to_orbax.main(["--input", source, "--output", output])
    print("done", flush=True)
"""


def anonymous(pid: int) -> int:
    """Bytes of memory that are of no file."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"RssAnon:\s*(\d+) kB", status)[1]) << 10


def write_meta(directory: Path, dim: int, mlp: int) -> Path:
    """A Meta checkpoint of two ranks, with a tokenizer of the 256 bytes.

    Every tensor is a constant of its own; none is 0, because zarr does not store what is all 0.
    """
    directory.mkdir()
    half, kv = dim // 2, dim // 8  # a rank holds half of each matrix; 16 heads, 4 of them KV
    shapes = {
        "attention.wq": (half, dim), "attention.wk": (kv, dim), "attention.wv": (kv, dim),
        "attention.wo": (dim, half), "feed_forward.w1": (mlp // 2, dim),
        "feed_forward.w2": (dim, mlp // 2), "feed_forward.w3": (mlp // 2, dim),
        "attention_norm": (dim,), "ffn_norm": (dim,),
    }  # fmt: skip
    shapes = {f"layers.{i}.{name}": shape for i in range(LAYERS) for name, shape in shapes.items()}
    table = (VOCAB // 2, dim)
    shapes |= {"tok_embeddings": table, "norm": (dim,), "output": table}
    tensors = {
        f"{name}.weight": torch.full(shape, 1 + i, dtype=torch.bfloat16)
        for i, (name, shape) in enumerate(shapes.items())
    }
    for rank in range(2):
        torch.save(tensors, directory / f"consolidated.0{rank}.pth")
    params = {"dim": dim, "n_layers": LAYERS, "n_heads": 16, "n_kv_heads": 4, "vocab_size": VOCAB}
    params |= {"multiple_of": mlp, "norm_eps": 1e-5}
    (directory / "params.json").write_text(json.dumps(params))
    lines = [f"{base64.b64encode(bytes([i])).decode()} {i}\n" for i in range(256)]
    (directory / "tokenizer.model").write_text("".join(lines))
    return directory


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/PID/status")
def test_the_converter_holds_a_few_tensors(tmp_path: Path):
    """The bound that is promised, 3 x largest + 500 MB, leaves 500 MB to Python and its packages.

    Here those are measured by a small conversion, and the rest must be 3 x largest + 64 MB.
    """
    small = write_meta(tmp_path / "small", 64, 192)
    large = write_meta(tmp_path / "large", DIM, MLP)
    command = [sys.executable, "-c", CONVERTER]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as process:

        def peak(source: Path, how: str) -> int:
            request = [str(source), str(tmp_path / f"{source.name}-{how}"), how]
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            most = 0
            while not select.select([process.stdout], [], [], 0.002)[0]:
                most = max(most, anonymous(process.pid))
            assert process.stdout.readline() == "done\n"
            return most

        peak(small, "stream")
        packages = anonymous(process.pid)
        bound = packages + 3 * LARGEST + 64 * MB
        assert peak(large, "stream") < bound
        held = peak(large, "hold")
        assert held > packages + TOTAL > bound  # a converter that held everything would be seen


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
@pytest.mark.parametrize("dtype", [None, "float32"])
def test_loading_on_cpu_maps_the_files_and_a_cast_to_the_same_type_keeps_that(
    tmp_path: Path, dtype: str | None
):
    config = LlamaConfig(
        vocab_size=96, dim=32, n_layers=1, n_heads=4, n_kv_heads=2, head_dim=8, mlp_dim=96,
        norm_eps=1e-5, rope_theta=1e4, rope_scaling=None, context=64, tie_embeddings=False,
        version="2",
    )  # fmt: skip
    params = jax.tree.map(
        lambda shape: np.ones(shape, np.float32),
        checkpoint.param_shapes(config),
        is_leaf=lambda node: isinstance(node, tuple),
    )
    checkpoint.save_model(tmp_path / "model", config, params, tokenizer=None, provenance={})

    loaded = checkpoint.load_params(tmp_path / "model", dtype=dtype)
    mappings = [
        line for line in Path("/proc/self/maps").read_text().splitlines() if "model" in line
    ]
    for path, leaf in jax.tree.leaves_with_path(loaded):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        start = f"{leaf.unsafe_buffer_pointer():x}-"
        assert any(line.startswith(start) and f"/{name}/" in line for line in mappings), name

"""convert.quantize: what loading makes, one tensor at a time, all or nothing."""

import json
import os
import select
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_convert_hf import write_tokenizer
from test_convert_memory import MB, ROOT, anonymous

from convert import orbax_to_hf, orbax_to_meta, quantize
from llama_jax import checkpoint
from llama_jax.config import LlamaConfig
from llama_jax.errors import UserError
from llama_jax.quant import Quantization


def config_of(dim: int, mlp: int, layers: int, vocab: int = 512) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab, dim=dim, n_layers=layers, n_heads=4, n_kv_heads=2, head_dim=dim // 4,
        mlp_dim=mlp, norm_eps=1e-5, rope_theta=1e4, rope_scaling=None, context=64,
        tie_embeddings=False, version="2",
    )  # fmt: skip


CONFIG = config_of(64, 128, 2)


def write_model(path: Path, config: LlamaConfig = CONFIG, dtype=jnp.bfloat16) -> Path:
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda shape: rng.standard_normal(shape, np.float32).astype(dtype),
        checkpoint.param_shapes(config),
        is_leaf=lambda node: isinstance(node, tuple),
    )
    write_tokenizer(path.parent)
    [tokenizer] = path.parent.glob("tokenizer.*")
    origin = {"tool": "a test"}
    checkpoint.save_model(path, config, params, tokenizer=tokenizer, provenance=origin)
    return path


def convert(source: Path, output: Path, *more: str) -> Path:
    quantize.main(["--checkpoint", str(source), "--output", str(output), *more])
    return output


@pytest.mark.parametrize(
    ("flags", "quantization"),
    [
        (["--quantize=int8"], Quantization("int8")),
        (["--quantize=llm_int8", "--quantize-embeddings"], Quantization("llm_int8", True)),
        (["--quantize=int4", "--group-size=32"], Quantization("int4", group_size=32)),
        (
            ["--quantize=nf4", "--double-quantization"],
            Quantization("nf4", double_quantization=True),
        ),
    ],
)
def test_it_writes_what_loading_makes(tmp_path, capsys, monkeypatch, flags, quantization):
    model = write_model(tmp_path / "model")
    reads = []
    read = quantize.model_leaves

    def counted(*arguments):
        def leaf(path, lazy):
            def count():
                reads.append(path)
                return lazy.read()

            return checkpoint.LazyArray(lazy.shape, lazy.dtype, count)

        return {path: leaf(path, lazy) for path, lazy in read(*arguments).items()}

    monkeypatch.setattr(quantize, "model_leaves", counted)
    output = convert(model, tmp_path / "quantized", *flags)
    assert len(reads) == len(set(reads)) == len(read(str(model), CONFIG))  # each once
    written = checkpoint.load_params(output)
    made = checkpoint.load_params(model, quantize=quantization)
    assert jax.tree.structure(written) == jax.tree.structure(made)
    for a, b in zip(jax.tree.leaves(written), jax.tree.leaves(made), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()

    [tokenizer] = model.glob("tokenizer.*")
    assert (output / tokenizer.name).read_bytes() == tokenizer.read_bytes()
    told = json.loads((output / "provenance.json").read_text())
    assert told["tool"] == "convert.quantize"
    assert told["quantization"] == quantization.to_dict() | {"dtype": "bfloat16"}
    assert told["made_of"] == {"tool": "a test"}
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"{quantization.kind} of bfloat16" in last
    assert checkpoint.load(output).quantization == quantization


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--quantize=int8", "--group-size=64"], "int8 has no group size"),
        (["--quantize=int8", "--double-quantization"], "int8 has no double quantization"),
        (["--quantize=int4", "--group-size=48"], "48 does not divide the 64 inputs of layers_0"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(tmp_path, flags, message):
    model = write_model(tmp_path / "model")
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(UserError, match=message) as caught:
        convert(model, tmp_path / "out", *flags)
    assert "\n" not in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == before


def test_the_command_exits_with_2(tmp_path):
    command = [sys.executable, "-m", "convert.quantize", "--output", str(tmp_path / "out")]
    for more in (["--checkpoint=nowhere", "--quantize=int8"], ["--quantize=int3"]):
        done = subprocess.run([*command, *more], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1
    assert os.listdir(tmp_path) == []


def test_quantized_models_are_not_quantized_or_converted_again(tmp_path):
    model = convert(write_model(tmp_path / "model"), tmp_path / "int8", "--quantize=int8")
    before = sorted(os.listdir(tmp_path))
    flags = ["--checkpoint", str(model), "--output", str(tmp_path / "out")]
    with pytest.raises(UserError, match="is quantized to int8, expected the model"):
        quantize.main([*flags, "--quantize=int8"])
    for back in (orbax_to_hf, orbax_to_meta):
        with pytest.raises(UserError, match="is quantized to int8, expected the model"):
            back.main(flags)
    assert sorted(os.listdir(tmp_path)) == before


CONVERTER = """
import sys
from convert import quantize

for line in sys.stdin:
    source, output, kind = line.split()
    quantize.main(["--checkpoint", source, "--output", output, "--quantize", kind])
    print("done", flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/PID/status")
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_the_converter_holds_a_few_tensors(tmp_path, kind):
    """As in test_convert_memory: 500 MB of the bound are for Python and its packages."""
    layers, dim, mlp = 6, 1024, 8192
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    small = write_model(tmp_path / "a" / "small")
    large = write_model(tmp_path / "b" / "large", config_of(dim, mlp, layers))
    largest = 2 * dim * mlp
    command = [sys.executable, "-c", CONVERTER]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as process:

        def peak(source: Path) -> int:
            process.stdin.write(f"{source} {source}-{kind} {kind}\n")
            process.stdin.flush()
            most = 0
            while not select.select([process.stdout], [], [], 0.002)[0]:
                most = max(most, anonymous(process.pid))
            assert process.stdout.readline() == "done\n"
            return most

        peak(small)
        packages = anonymous(process.pid)
        assert peak(large) < packages + 3 * largest + 64 * MB < packages + 3 * layers * largest

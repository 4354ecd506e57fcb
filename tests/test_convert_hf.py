"""Hugging Face checkpoints to model directories and back: bit for bit, and transformers agrees."""

import base64
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from convert import hf_to_orbax, meta_to_orbax, orbax_to_hf, orbax_to_meta
from convert.source import model_leaves, same_bits
from llama_jax.checkpoint import load_config
from llama_jax.config import RopeScaling
from llama_jax.errors import UserError

safetensors_numpy = pytest.importorskip("safetensors.numpy")

VOCAB, DIM, MLP, LAYERS = 512, 64, 96, 2
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB,
    "hidden_size": DIM, "intermediate_size": MLP, "num_hidden_layers": LAYERS,
    "num_attention_heads": 8, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip

Tensors = dict[str, np.ndarray]


def write_tokenizer(directory: Path) -> None:
    """A tiktoken file of the 256 bytes; with its special tokens it has 512 ids."""
    lines = [f"{base64.b64encode(bytes([i])).decode()} {i}" for i in range(256)]
    (directory / "tokenizer.model").write_text("\n".join(lines) + "\n")


def random_tensors(dtype: Any = ml_dtypes.bfloat16, *, tied: bool = False) -> Tensors:
    """All weights of `CONFIG` by Hugging Face's names."""
    rng = np.random.default_rng(0)
    shapes = {"model.embed_tokens.weight": (VOCAB, DIM), "model.norm.weight": (DIM,)}
    for i in range(LAYERS):
        for name, shape in {
            "self_attn.q_proj": (DIM, DIM), "self_attn.k_proj": (16, DIM),
            "self_attn.v_proj": (16, DIM), "self_attn.o_proj": (DIM, DIM),
            "mlp.gate_proj": (MLP, DIM), "mlp.up_proj": (MLP, DIM), "mlp.down_proj": (DIM, MLP),
            "input_layernorm": (DIM,), "post_attention_layernorm": (DIM,),
        }.items():  # fmt: skip
            shapes[f"model.layers.{i}.{name}.weight"] = shape
    if not tied:
        shapes["lm_head.weight"] = (VOCAB, DIM)
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def write_hf(
    directory: Path,
    tensors: Tensors | None = None,
    config: dict[str, Any] | None = None,
    *,
    shards: int = 1,
) -> Path:
    directory.mkdir(parents=True)
    tensors = random_tensors() if tensors is None else tensors
    if shards == 1:
        safetensors_numpy.save_file(tensors, directory / "model.safetensors")
    else:
        files = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
        weight_map = {name: files[i % shards] for i, name in enumerate(tensors)}
        for file in files:
            of_file = {name: tensors[name] for name in tensors if weight_map[name] == file}
            safetensors_numpy.save_file(of_file, directory / file)
        index = {"metadata": {}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps({**CONFIG, **(config or {})}))
    write_tokenizer(directory)
    return directory


def read_hf(directory: Path) -> Tensors:
    tensors: Tensors = {}
    for file in directory.glob("*.safetensors"):
        tensors |= safetensors_numpy.load_file(file)
    return tensors


def convert(source: Path, output: Path, *more: str) -> Path:
    hf_to_orbax.main(["--input", str(source), "--output", str(output), *more])
    return output


def back(model: Path, output: Path, *more: str) -> Path:
    orbax_to_hf.main(["--checkpoint", str(model), "--output", str(output), *more])
    return output


def assert_same_tensors(a: Tensors, b: Tensors) -> None:
    assert set(a) == set(b)
    for name in a:
        assert same_bits(a[name], b[name]), name


# --- there and back ---


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
@pytest.mark.parametrize("shards", [1, 3])
def test_there_and_back_is_the_identity(tmp_path: Path, dtype: Any, shards: int):
    tensors = random_tensors(dtype)
    source = write_hf(tmp_path / "hf", tensors, shards=shards)
    model = convert(source, tmp_path / "model", "--verify")
    leaves = model_leaves(str(model), load_config(model))
    assert same_bits(
        leaves["layers_1/attention/k/kernel"].read(),
        tensors["model.layers.1.self_attn.k_proj.weight"],
    )
    for size in ("5GB", "20KB"):
        again = back(model, tmp_path / size, "--max-shard-size", size)
        assert_same_tensors(tensors, read_hf(again))
        assert (again / "tokenizer.model").is_file()
        assert_same_tensors(tensors, read_hf(back(convert(again, again / "m"), again / "again")))
    files = list((tmp_path / "20KB").glob("model-*-of-*.safetensors"))
    index = json.loads((tmp_path / "20KB" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {file.name for file in files}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    largest = max(t.nbytes for t in tensors.values())
    assert all(file.stat().st_size < max(20_000, largest) + 4096 for file in files)


def test_through_metas_format_and_back_is_the_identity(tmp_path: Path):
    tensors = random_tensors()
    model = convert(write_hf(tmp_path / "hf", tensors), tmp_path / "model")
    pytest.importorskip("torch")
    for ranks in (1, 4):
        meta, again = tmp_path / f"meta{ranks}", tmp_path / f"again{ranks}"
        orbax_to_meta.main([f"--checkpoint={model}", f"--output={meta}", f"--ranks={ranks}"])
        meta_to_orbax.main([f"--input={meta}", f"--output={again}"])
        assert load_config(again) == load_config(model)
        assert_same_tensors(tensors, read_hf(back(again, tmp_path / f"hf{ranks}")))


def test_a_tied_head_is_left_out(tmp_path: Path):
    tensors = random_tensors(tied=True)
    repeated = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}
    source = write_hf(tmp_path / "hf", repeated, {"tie_word_embeddings": True})
    again = back(convert(source, tmp_path / "model"), tmp_path / "again")
    assert_same_tensors(tensors, read_hf(again))
    assert json.loads((again / "config.json").read_text())["tie_word_embeddings"] is True


def test_stop_ids_are_the_tokenizers(tmp_path: Path):
    rope = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192, "rope_theta": 500000.0,
    }  # fmt: skip
    source = write_hf(tmp_path / "hf", config={"rope_parameters": rope})
    model = convert(source, tmp_path / "model")
    assert load_config(model).rope_scaling == RopeScaling(8.0)
    again = back(model, tmp_path / "again")
    for file in ("config.json", "generation_config.json"):
        fields = json.loads((again / file).read_text())
        assert fields["bos_token_id"] == 256  # <|begin_of_text|>
        assert fields["eos_token_id"] == [257, 264, 265]  # <|end_of_text|>, eom, eot


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_casts_both_ways(tmp_path: Path, dtype: str):
    tensors = random_tensors()
    source = write_hf(tmp_path / "hf", tensors)
    expected = {name: array.astype(dtype) for name, array in tensors.items()}
    there = back(convert(source, tmp_path / "a", f"--dtype={dtype}", "--verify"), tmp_path / "b")
    assert_same_tensors(expected, read_hf(there))
    on_the_way_back = back(convert(source, tmp_path / "c"), tmp_path / "d", f"--dtype={dtype}")
    assert_same_tensors(expected, read_hf(on_the_way_back))
    assert json.loads((on_the_way_back / "config.json").read_text())["torch_dtype"] == dtype


def test_the_tokenizer_of_meta_is_preferred(tmp_path: Path):
    source = write_hf(tmp_path / "hf")
    (source / "original").mkdir()
    shutil.move(source / "tokenizer.model", source / "original" / "tokenizer.model")
    (source / "tokenizer.json").write_text("{}")
    model = convert(source, tmp_path / "model")
    assert (model / "tokenizer.model").is_file()
    assert not (model / "tokenizer.json").exists()


# --- transformers ---


@pytest.mark.parametrize("spelling", ["new", "old"])
def test_transformers_computes_the_same_logits(tmp_path: Path, spelling: str):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    rope = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=DIM, intermediate_size=MLP, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=131072,
        bos_token_id=256, eos_token_id=257, rope_parameters={**rope, "rope_theta": 500000.0},
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    source = tmp_path / "hf"
    model.save_pretrained(source, max_shard_size="50KB")
    assert len(list(source.glob("*.safetensors"))) > 1
    write_tokenizer(source)
    if spelling == "old":
        fields = json.loads((source / "config.json").read_text())
        del fields["rope_parameters"]
        fields |= {"rope_theta": 500000.0, "rope_scaling": rope, "torch_dtype": fields.pop("dtype")}
        (source / "config.json").write_text(json.dumps(fields))

    again = back(
        convert(source, tmp_path / "model", "--verify"), tmp_path / "again", "--max-shard-size=1MB"
    )
    assert_same_tensors(read_hf(source), read_hf(again))
    loaded, problems = transformers.LlamaForCausalLM.from_pretrained(
        again, output_loading_info=True
    )
    assert not any(problems.values())
    tokens = torch.arange(100)[None]
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, loaded(tokens).logits)
    assert loaded.config.rope_parameters == config.rope_parameters
    assert loaded.generation_config.eos_token_id == [257, 264, 265]


# --- what is refused: one line, and nothing left ---


def refused(source: Path, message: str, *more: str) -> None:
    parent = source.parent / "written"
    parent.mkdir(exist_ok=True)
    with pytest.raises(UserError, match=message) as caught:
        convert(source, parent / "model", *more)
    assert "\n" not in str(caught.value)
    assert not list(parent.iterdir())


def test_a_missing_shard(tmp_path: Path):
    source = write_hf(tmp_path / "hf", shards=3)
    (source / "model-00002-of-00003.safetensors").unlink()
    refused(source, r"model-00002-of-00003\.safetensors is missing, but .*index\.json names it")


def test_an_index_that_is_wrong(tmp_path: Path):
    source = write_hf(tmp_path / "hf", shards=2)
    index = source / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    index.write_text("{}")
    refused(source, "holds no weight_map")
    index.write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))
    refused(source, "a is in '../model.safetensors', expected a file beside the index")
    extra = {**weight_map, "absent": "model-00001-of-00002.safetensors"}
    index.write_text(json.dumps({"weight_map": extra}))
    refused(source, r"model-00001-of-00002\.safetensors does not hold absent")
    index.unlink()
    refused(source, "there are shards, copy their model.safetensors.index.json too")


def test_a_tensor_in_two_shards(tmp_path: Path):
    source = write_hf(tmp_path / "hf", shards=2)
    file = source / "model-00002-of-00002.safetensors"
    tensors = safetensors_numpy.load_file(source / "model-00001-of-00002.safetensors")
    safetensors_numpy.save_file(tensors, file)
    refused(source, r"is in both .* the shards are of different models")


@pytest.mark.parametrize("kept", [0, 7, 100, 5000, -1])
def test_a_truncated_file(tmp_path: Path, kept: int):
    source = write_hf(tmp_path / "hf")
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    refused(source, r"model\.safetensors cannot be read as safetensors, it is truncated")


def test_a_web_page_saved_as_safetensors(tmp_path: Path):
    source = write_hf(tmp_path / "hf")
    (source / "model.safetensors").write_text("<!DOCTYPE html><html>Access denied</html>" * 999)
    refused(source, r"model\.safetensors cannot be read as safetensors")


def test_tensors_that_do_not_fit_the_config(tmp_path: Path):
    def source(name: str, tensors: Tensors) -> Path:
        return write_hf(tmp_path / name / "hf", tensors)

    tensors = random_tensors()
    del tensors["model.layers.1.mlp.up_proj.weight"]
    refused(source("a", tensors), r"model\.layers\.1\.mlp\.up_proj\.weight is missing")
    refused(source("b", random_tensors(tied=True)), r"lm_head\.weight is missing")
    tensors = random_tensors() | {"model.layers.0.self_attn.q_proj.bias": np.zeros(DIM, np.float32)}
    refused(source("c", tensors), r"unknown tensor model\.layers\.0\.self_attn\.q_proj\.bias")
    tensors = random_tensors() | {"model.norm.weight": np.zeros(32, np.float32)}
    refused(
        source("d", tensors), r"model\.norm\.weight has shape \(32,\), config\.json says \(64,\)"
    )
    tensors = random_tensors() | {"model.norm.weight": np.zeros(DIM, np.int8)}
    refused(source("e", tensors), r"model\.norm\.weight is I8, expected one of F32, BF16, F16")
    head = {**random_tensors(tied=True), "lm_head.weight": np.zeros((VOCAB, DIM), np.float32)}
    refused(
        write_hf(tmp_path / "f" / "hf", head, {"tie_word_embeddings": True}),
        r"lm_head\.weight differs from model\.embed_tokens\.weight",
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "qwen2"}, "model_type is 'qwen2'"),
        ({"num_hidden_layers": 3}, r"model\.layers\.2\.input_layernorm\.weight is missing"),
        ({"num_hidden_layers": 10**9}, r"model\.layers\.2\.input_layernorm\.weight is missing"),
        ({"rms_norm_eps": None}, r"config\.json: rms_norm_eps is null"),
        ({"num_hidden_layers": 1}, r"unknown tensor model\.layers\.1"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is set"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "RoPE type 'yarn'"),
        ({"sliding_window": 512}, "unknown key sliding_window"),
    ],
)
def test_configs_that_do_not_fit(tmp_path: Path, change: dict[str, Any], message: str):
    refused(write_hf(tmp_path / "hf", config=change), message)


def test_files_that_are_absent_or_of_another_kind(tmp_path: Path):
    source = write_hf(tmp_path / "hf")
    (source / "config.json").write_bytes(b"\xff\xfe{}")
    refused(source, r"config\.json is not UTF-8")
    (source / "config.json").unlink()
    refused(source, r"config\.json is missing")
    (source / "tokenizer.model").unlink()
    (source / "config.json").write_text(json.dumps(CONFIG))
    refused(source, "no tokenizer.model or .* give the tokenizer's file with --tokenizer FILE")
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    refused(source, "it holds pickled weights, download the safetensors ones")
    (source / "pytorch_model.bin").rename(source / "consolidated.00.pth")
    refused(source, "run python -m convert.meta_to_orbax")
    model = convert(write_hf(tmp_path / "other"), tmp_path / "model")
    refused(model, "it is already a model directory")
    refused(tmp_path / "absent", "absent does not exist")


def test_an_overflow_names_its_tensor(tmp_path: Path):
    tensors = random_tensors()
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = -70000
    source = write_hf(tmp_path / "hf", tensors)
    refused(source, r"model\.layers\.1\.mlp\.down_proj\.weight holds .* float16", "--dtype=float16")
    model = convert(source, tmp_path / "model")
    with pytest.raises(UserError, match=r"layers_1/mlp/down/kernel holds .* float16 cannot"):
        back(model, tmp_path / "again", "--dtype=float16")
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "model", "written"}


def test_going_back_refuses(tmp_path: Path):
    model = convert(write_hf(tmp_path / "hf"), tmp_path / "model")
    for size in ("5XB", "-1", "0", "", "GB"):
        with pytest.raises(UserError, match="--max-shard-size is"):
            back(model, tmp_path / "again", f"--max-shard-size={size}")
    (tmp_path / "again").mkdir()
    with pytest.raises(UserError, match="again exists already"):
        back(model, tmp_path / "again")
    with pytest.raises(UserError, match="is not a model directory"):
        back(tmp_path / "hf", tmp_path / "other")
    chunk = max((model / "params" / "head.kernel").glob("[0-9]*"))
    chunk.write_bytes(chunk.read_bytes()[:100])
    with pytest.raises(UserError, match=r"damaged or incomplete .*head\.kernel"):
        back(model, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_sizes():
    assert orbax_to_hf.parse_size("5GB") == 5_000_000_000
    assert orbax_to_hf.parse_size("1.5 MiB") == 3 << 19
    assert orbax_to_hf.parse_size("700") == 700


@pytest.mark.parametrize("direction", ["there", "back"])
def test_a_mistake_is_one_line_and_status_2(tmp_path: Path, direction: str):
    module, flag = (
        ("hf_to_orbax", "input") if direction == "there" else ("orbax_to_hf", "checkpoint")
    )
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            f"convert.{module}",
            f"--{flag}={tmp_path}",
            f"--output={tmp_path}/a",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"convert.{module}: error: ")
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())

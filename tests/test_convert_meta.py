"""Meta checkpoints to model directories and back: bit for bit, or one line that says why not."""

import base64
import concurrent.futures
import dataclasses
import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import time
import weakref
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from convert import meta_to_orbax, orbax_to_hf, orbax_to_meta, to_orbax
from convert.source import cast, model_leaves, same_bits
from llama_jax import checkpoint
from llama_jax.checkpoint import load, load_config, load_params, new_directory
from llama_jax.config import LlamaConfig, RopeScaling
from llama_jax.errors import UserError

torch = pytest.importorskip("torch")

VOCAB = 512  # of `tokenizer_file`
PARAMS = {
    "dim": 64, "n_layers": 2, "n_heads": 8, "n_kv_heads": 4, "vocab_size": -1, "multiple_of": 32,
    "norm_eps": 1e-5,
}  # fmt: skip
MLP = 192
RANK_AXIS = {
    "wq": 0, "wk": 0, "wv": 0, "wo": 1, "w1": 0, "w2": 1, "w3": 0, "output": 0,
}  # fmt: skip

Tensors = dict[str, Any]  # Meta's names to torch tensors


def tokenizer_file(directory: Path) -> Path:
    """A tiktoken file of the 256 bytes; with its special tokens it has 512 ids."""
    file = directory / "tokenizer.model"
    lines = [f"{base64.b64encode(bytes([i])).decode()} {i}" for i in range(256)]
    file.write_text("\n".join(lines) + "\n")
    return file


def random_tensors(dtype: Any = torch.bfloat16, *, tied: bool = False, layers: int = 2) -> Tensors:
    """All weights of a model with the shapes of `PARAMS`."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Any:
        return torch.randn(*shape, generator=generator).to(dtype)

    tensors = {"tok_embeddings.weight": normal(VOCAB, 64), "norm.weight": normal(64)}
    tensors["output.weight"] = tensors["tok_embeddings.weight"] if tied else normal(VOCAB, 64)
    shapes = {
        "attention.wq": (64, 64), "attention.wk": (32, 64), "attention.wv": (32, 64),
        "attention.wo": (64, 64), "feed_forward.w1": (MLP, 64), "feed_forward.w2": (64, MLP),
        "feed_forward.w3": (MLP, 64), "attention_norm": (64,), "ffn_norm": (64,),
    }  # fmt: skip
    for i in range(layers):
        for name, shape in shapes.items():
            tensors[f"layers.{i}.{name}.weight"] = normal(*shape)
    return tensors


def split(tensors: Tensors, ranks: int, embedding_axis: int) -> list[Tensors]:
    """What each rank's file holds, cut here without the project's own table."""
    shards: list[Tensors] = [{} for _ in range(ranks)]
    for name, tensor in tensors.items():
        axis = RANK_AXIS.get(name.split(".")[-2])
        if name == "tok_embeddings.weight":
            axis = embedding_axis
        for rank, shard in enumerate(shards):
            part = tensor if axis is None else tensor.chunk(ranks, axis)[rank]
            shard[name] = part.clone()
        if name.endswith(("wk.weight", "wv.weight")) and ranks > 4:  # more ranks than KV heads
            for rank, shard in enumerate(shards):
                shard[name] = tensor.chunk(4)[rank * 4 // ranks].clone()
    return shards


def write_meta(
    directory: Path,
    tensors: Tensors | None = None,
    params: dict[str, Any] | None = None,
    *,
    ranks: int = 1,
    embedding_axis: int = 1,
) -> Path:
    directory.mkdir(parents=True)
    tensors = random_tensors() if tensors is None else tensors
    for rank, shard in enumerate(split(tensors, ranks, embedding_axis)):
        torch.save(shard, directory / f"consolidated.{rank:02d}.pth")
    (directory / "params.json").write_text(json.dumps(params or PARAMS))
    tokenizer_file(directory)
    return directory


def convert(source: Path, output: Path, *more: str) -> Path:
    meta_to_orbax.main(["--input", str(source), "--output", str(output), *more])
    return output


def back(model: Path, output: Path, ranks: int = 1) -> Path:
    orbax_to_meta.main(["--checkpoint", str(model), "--output", str(output), f"--ranks={ranks}"])
    return output


def shards_of(directory: Path) -> list[Tensors]:
    files = sorted(directory.glob("consolidated.*.pth"))
    return [torch.load(file, weights_only=True) for file in files]


def assert_same_tensors(a: Tensors, b: Tensors) -> None:
    assert set(a) == set(b)
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8)), name


def assert_same_model(a: Path, b: Path) -> None:
    config = load_config(a)
    assert config == load_config(b)
    one, other = model_leaves(str(a), config), model_leaves(str(b), config)
    for path, leaf in one.items():
        assert same_bits(leaf.read(), other[path].read()), path


def bits(tensor: Any) -> np.ndarray:
    return tensor.contiguous().view(torch.int16).numpy()


# --- what arrives ---


def test_every_tensor_arrives_under_its_name(tmp_path: Path):
    tensors = random_tensors()
    model = convert(write_meta(tmp_path / "meta", tensors), tmp_path / "model", "--verify")
    params = load_params(model)

    def arrived(*path: str) -> np.ndarray:
        node = params
        for key in path:
            node = node[key]
        assert node.dtype == ml_dtypes.bfloat16
        return np.asarray(node).view(np.int16)

    def halves(name: str, n_heads: int) -> np.ndarray:
        order = [h * 8 + 2 * j + odd for h in range(n_heads) for odd in (0, 1) for j in range(4)]
        return bits(tensors[name])[order]

    assert np.array_equal(arrived("embed", "embedding"), bits(tensors["tok_embeddings.weight"]))
    assert np.array_equal(arrived("head", "kernel"), bits(tensors["output.weight"]))
    assert np.array_equal(arrived("norm", "scale"), bits(tensors["norm.weight"]))
    for i in range(2):
        layer, meta = f"layers_{i}", f"layers.{i}."
        q, k = meta + "attention.wq.weight", meta + "attention.wk.weight"
        assert np.array_equal(arrived(layer, "attention", "q", "kernel"), halves(q, 8))
        assert np.array_equal(arrived(layer, "attention", "k", "kernel"), halves(k, 4))
        same = {
            ("attention", "v", "kernel"): "attention.wv", ("attention", "o", "kernel"):
            "attention.wo", ("mlp", "gate", "kernel"): "feed_forward.w1",
            ("mlp", "up", "kernel"): "feed_forward.w3", ("mlp", "down", "kernel"):
            "feed_forward.w2", ("attention_norm", "scale"): "attention_norm",
            ("mlp_norm", "scale"): "ffn_norm",
        }  # fmt: skip
        for path, name in same.items():
            assert np.array_equal(arrived(layer, *path), bits(tensors[f"{meta}{name}.weight"])), (
                path
            )

    assert load_config(model) == LlamaConfig(
        vocab_size=VOCAB, dim=64, n_layers=2, n_heads=8, n_kv_heads=4, head_dim=8, mlp_dim=MLP,
        norm_eps=1e-5, rope_theta=10000.0, rope_scaling=None, context=4096, tie_embeddings=False,
        version="2",
    )  # fmt: skip
    assert (model / "tokenizer.model").read_bytes() == (
        tmp_path / "meta" / "tokenizer.model"
    ).read_bytes()
    origin = json.loads((model / "provenance.json").read_text())
    assert origin["dtype"] == "bfloat16"
    for entry in origin["source"]:
        data = (tmp_path / "meta" / entry["file"]).read_bytes()
        assert (entry["bytes"], entry["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())


@pytest.mark.parametrize("embedding_axis", [0, 1])
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_any_split_gives_the_same_model(tmp_path: Path, ranks: int, embedding_axis: int):
    """8 ranks hold each of the 4 KV heads twice, as 405B on 16 ranks does."""
    whole = convert(write_meta(tmp_path / "whole"), tmp_path / "a")
    parts = write_meta(tmp_path / "parts", ranks=ranks, embedding_axis=embedding_axis)
    assert_same_model(whole, convert(parts, tmp_path / "b"))


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("embedding_axis", [0, 1])
def test_a_tied_head_is_stored_once(tmp_path: Path, ranks: int, embedding_axis: int):
    tied = write_meta(
        tmp_path / "meta", random_tensors(tied=True), ranks=ranks, embedding_axis=embedding_axis
    )
    model = convert(tied, tmp_path / "model")
    assert load_config(model).tie_embeddings
    assert "head" not in load_params(model)


def test_one_different_element_unties(tmp_path: Path):
    tensors = random_tensors(tied=True)
    tensors["output.weight"] = tensors["output.weight"].clone()
    tensors["output.weight"][-1, -1] += 1
    model = convert(write_meta(tmp_path / "meta", tensors, ranks=2), tmp_path / "model")
    assert not load_config(model).tie_embeddings


@pytest.mark.parametrize(
    ("dtype", "params", "tied", "version", "scaling"),
    [
        ("float16", {}, False, "1", None),
        ("bfloat16", {}, False, "2", None),
        ("bfloat16", {"rope_theta": 500000.0}, False, "3", None),
        ("bfloat16", {"rope_theta": 500000.0, "use_scaled_rope": True}, False, "3.1", 8.0),
        ("bfloat16", {"rope_theta": 500000.0, "use_scaled_rope": True}, True, "3.2", 32.0),
    ],
)
def test_versions_and_back_to_meta(
    tmp_path: Path, dtype: str, params: dict, tied: bool, version: str, scaling: float | None
):
    tensors = random_tensors(getattr(torch, dtype), tied=tied)
    axis = 1 if version in "12" else 0
    meta = write_meta(
        tmp_path / "meta", tensors, {**PARAMS, **params}, ranks=2, embedding_axis=axis
    )
    model = convert(meta, tmp_path / "model")
    config = load_config(model)
    assert config.version == version
    assert config.rope_scaling == (scaling and RopeScaling(scaling))
    for ranks in (1, 2, 8):
        again = back(model, tmp_path / f"again{ranks}", ranks)
        for one, other in zip(split(tensors, ranks, axis), shards_of(again), strict=True):
            assert_same_tensors(one, other)
        assert load_config(convert(again, tmp_path / f"model{ranks}")) == config
        assert (again / "tokenizer.model").is_file()


@pytest.mark.external
@pytest.mark.parametrize("embedding_axis", [0, 1])
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_trained_model_split_anew(
    tmp_path: Path, shared_data: Path, ranks: int, embedding_axis: int
):
    source = shared_data / "stories260K"
    whole = convert(source, tmp_path / "whole", "--verify")
    tensors = shards_of(source)[0]
    parts = tmp_path / "parts"
    parts.mkdir()
    for rank, shard in enumerate(split(tensors, ranks, embedding_axis)):
        torch.save(shard, parts / f"consolidated.{rank:02d}.pth")
    for name in ("params.json", "tokenizer.model"):
        shutil.copy(source / name, parts)
    assert_same_model(whole, convert(parts, tmp_path / "again"))
    del tensors["rope.freqs"]
    assert_same_tensors(tensors, shards_of(back(whole, tmp_path / "meta"))[0])


def test_old_files_hold_rope_frequencies_that_are_dropped(tmp_path: Path):
    tensors = random_tensors()
    tensors["rope.freqs"] = torch.ones(4)
    tensors["layers.0.attention.inner_attention.rope.freqs"] = torch.ones(4)
    convert(write_meta(tmp_path / "meta", tensors), tmp_path / "model")


def test_params_nested_and_tokenizer_above(tmp_path: Path):
    meta = write_meta(tmp_path / "above" / "meta", params={"model": PARAMS})
    shutil.move(meta / "tokenizer.model", tmp_path / "above" / "tokenizer.model")
    convert(meta, tmp_path / "model")


def test_a_tokenizer_of_any_name_is_stored_under_the_usual_one(tmp_path: Path):
    meta = write_meta(tmp_path / "meta")
    given = shutil.move(meta / "tokenizer.model", tmp_path / "other.bpe")
    model = convert(meta, tmp_path / "model", "--tokenizer", str(given))
    assert (model / "tokenizer.model").read_bytes() == Path(given).read_bytes()


def test_one_tensor_at_a_time_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The measured bound, 3 x the largest tensor + 500 MB, rests on this."""
    read, alive, most = meta_to_orbax._read, 0, 0

    def counted(*args: Any) -> np.ndarray:
        nonlocal alive, most
        array = read(*args).copy()
        alive += 1
        most = max(most, alive)
        weakref.finalize(array, gone)
        return array

    def gone() -> None:
        nonlocal alive
        alive -= 1

    monkeypatch.setattr(meta_to_orbax, "_read", counted)
    convert(write_meta(tmp_path / "meta", ranks=2), tmp_path / "model", "--verify")
    assert most <= 3  # of 20; one, and what tensorstore's threads have not let go of yet


# --- casts ---


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_casts_are_torchs(tmp_path: Path, dtype: str):
    tensors = random_tensors(torch.float32)
    model = convert(
        write_meta(tmp_path / "meta", tensors), tmp_path / "model", "--dtype", dtype, "--verify"
    )
    again = shards_of(back(model, tmp_path / "again"))[0]
    assert_same_tensors({k: v.to(getattr(torch, dtype)) for k, v in tensors.items()}, again)


def test_an_overflow_names_its_tensor(tmp_path: Path):
    tensors = random_tensors()
    tensors["layers.1.feed_forward.w2.weight"][3, 5] = 1e6
    refused(
        write_meta(tmp_path / "meta", tensors),
        r"layers\.1\.feed_forward\.w2\.weight holds 999424, which float16 cannot",
        "--dtype=float16",
    )


def test_infinities_that_were_there_are_kept():
    array = np.array([[np.inf, -np.inf, np.nan, 1]], np.float32)
    assert np.array_equal(cast(array, np.dtype(np.float16), "w"), array, equal_nan=True)


def test_same_bits_tells_signed_zeros_apart():
    zeros = np.zeros((3, 2), ml_dtypes.bfloat16)
    assert same_bits(zeros, zeros.copy())
    assert not same_bits(zeros, -zeros)
    nans = np.full((2, 2), np.nan, np.float32)
    assert same_bits(nans, nans.copy())


# --- what is refused: one line, and nothing left ---


def refused(source: Path, message: str, *more: str) -> None:
    parent = source.parent / "written"
    parent.mkdir(exist_ok=True)
    with pytest.raises(UserError, match=message) as caught:
        convert(source, parent / "model", *more)
    assert "\n" not in str(caught.value)
    assert not list(parent.iterdir())


def test_a_gap_in_the_ranks(tmp_path: Path):
    meta = write_meta(tmp_path / "meta", ranks=4)
    (meta / "consolidated.02.pth").unlink()
    refused(meta, r"consolidated\.02\.pth is missing")


@pytest.mark.parametrize("name", ["consolidated.00.pth", "params.json"])
def test_a_directory_where_a_file_belongs(tmp_path: Path, name: str):
    meta = write_meta(tmp_path / "meta")
    (meta / name).unlink()
    (meta / name).mkdir()
    refused(meta, f"{name} is (no file|a directory), expected")


def test_the_last_rank_missing(tmp_path: Path):
    meta = write_meta(tmp_path / "meta", ranks=4)
    (meta / "consolidated.03.pth").unlink()
    refused(meta, r"one of 4 ranks .* holds 3; copy the others up to consolidated\.03\.pth")


def test_one_rank_too_many(tmp_path: Path):
    meta = write_meta(tmp_path / "meta", ranks=2)
    shutil.copy(meta / "consolidated.01.pth", meta / "consolidated.02.pth")
    refused(meta, "one of 2 ranks .* holds 3; remove the others")


def test_shards_of_different_models(tmp_path: Path):
    meta = write_meta(tmp_path / "meta", ranks=2)
    shards = shards_of(meta)
    other = meta / "consolidated.01.pth"

    torch.save({**shards[1], "norm.weight": shards[1]["norm.weight"] + 1}, other)
    refused(meta, r"norm\.weight differs between .*consolidated\.00\.pth and consolidated\.01")
    torch.save({k: v.float() for k, v in shards[1].items()}, other)
    refused(meta, r"is torch\.bfloat16 .* but torch\.float32 .* different models")
    torch.save({k: v for k, v in shards[1].items() if "layers.1" not in k}, other)
    refused(meta, r"holds layers\.1\..* different models")


def test_kv_copies_that_differ(tmp_path: Path):
    meta = write_meta(tmp_path / "meta", ranks=8)
    shard = shards_of(meta)[3]
    shard["layers.1.attention.wv.weight"] += 1
    torch.save(shard, meta / "consolidated.03.pth")
    refused(meta, r"layers\.1\.attention\.wv\.weight holds 8 KV heads, params\.json says 4")


@pytest.mark.parametrize("kept", [0, 100, 5000, -1])
def test_a_truncated_file(tmp_path: Path, kept: int):
    meta = write_meta(tmp_path / "meta")
    file = meta / "consolidated.00.pth"
    file.write_bytes(file.read_bytes()[:kept])
    refused(meta, r"consolidated\.00\.pth is truncated at .* bytes; download it again")


def test_a_web_page_saved_as_pth(tmp_path: Path):
    meta = write_meta(tmp_path / "meta")
    (meta / "consolidated.00.pth").write_text("\n<!DOCTYPE html><html>Access denied</html>" * 999)
    refused(meta, r"consolidated\.00\.pth is a web page")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS pointer"),
        (b"\x93NUMPY nonsense", "is not a PyTorch checkpoint"),
        (pickle.dumps({"norm.weight": [1.0]}), "is not a PyTorch checkpoint"),
    ],
)
def test_other_files_named_pth(tmp_path: Path, content: bytes, message: str):
    meta = write_meta(tmp_path / "meta")
    (meta / "consolidated.00.pth").write_bytes(content)
    refused(meta, message)


def test_a_zip_that_is_no_checkpoint(tmp_path: Path):
    meta = write_meta(tmp_path / "meta")
    with zipfile.ZipFile(meta / "consolidated.00.pth", "w") as archive:
        archive.writestr("hello.txt", "hello")
    refused(meta, "cannot be read as a PyTorch checkpoint")


class _Evil:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.system, (f"touch {self.marker}",)


def test_a_pickle_that_would_run_code_does_not(tmp_path: Path):
    meta = write_meta(tmp_path / "meta")
    marker = tmp_path / "it_ran"
    torch.save({"norm.weight": _Evil(marker)}, meta / "consolidated.00.pth")
    refused(meta, "asks to run code")
    assert not marker.exists()


_WO = "layers.0.attention.wo.weight"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1.0], "holds a list, expected a dict of tensors"),
        ({"norm.weight": 3}, "norm.weight is a int, expected a tensor"),
        ({"norm.weight": torch.zeros(3, dtype=torch.int64)}, "norm.weight is int64, expected"),
        ({}, "is missing from the checkpoint"),
        ({3: torch.zeros(3)}, r"consolidated\.00\.pth: key 3 is no string"),
        ({"norm.weight": torch.zeros(3).to_sparse()}, "norm.weight is torch.sparse_coo, expected"),
        ({_WO: torch.zeros(64, 0)}, r"00\.pth: layers.0.attention.wo.weight has shape \(64, 0\)"),
        ({"layers.0.feed_forward.w1.weight": torch.tensor(1.0)}, r"w1.weight has shape \(\), exp"),
    ],
)
def test_a_checkpoint_of_other_things(tmp_path: Path, content: Any, message: str):
    meta = write_meta(tmp_path / "meta")
    torch.save(content, meta / "consolidated.00.pth")
    refused(meta, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": 128}, "params.json says dim 128"),
        ({"dim": None}, "dim is None, expected a whole number"),
        ({"n_layers": 3}, "layers.2.attention_norm.weight is missing"),
        ({"n_layers": 10**9}, "layers.2.attention_norm.weight is missing"),
        ({"n_layers": 1}, "unknown tensor layers.1"),
        ({"n_kv_heads": 8}, "attention.wk.weight has shape .* params.json says"),
        ({"vocab_size": 513}, "vocab_size is 513, but the embedding has 512 rows"),
        ({"multiple_of": 256}, "feed-forward width of 256, but w1 has 192 rows"),
        ({"lora_args": {}}, "unknown key lora_args"),
    ],
)
def test_params_that_contradict_the_weights(tmp_path: Path, change: dict, message: str):
    refused(write_meta(tmp_path / "meta", params={**PARAMS, **change}), message)


def test_a_tensor_of_the_wrong_shape_an_unknown_one_and_a_missing_one(tmp_path: Path):
    tensors = random_tensors()
    tensors["layers.1.feed_forward.w3.weight"] = torch.zeros(MLP, 32, dtype=torch.bfloat16)
    refused(write_meta(tmp_path / "a" / "meta", tensors), r"w3\.weight has shape \(192, 32\)")
    tensors = random_tensors() | {"layers.0.attention.wq.bias": torch.zeros(64)}
    refused(
        write_meta(tmp_path / "b" / "meta", tensors),
        r"unknown tensor layers\.0\.attention\.wq\.bias",
    )
    tensors = random_tensors()
    del tensors["layers.0.ffn_norm.weight"]
    refused(write_meta(tmp_path / "c" / "meta", tensors), r"layers\.0\.ffn_norm\.weight is missing")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"params\.json is missing"),
        (b"{'dim': 64}", r"params\.json is not valid JSON"),
        (b"[1, 2]", r"params\.json holds a JSON list, expected an object"),
        (b'{"dim": "\xff\xfe"}', r"params\.json is not UTF-8"),
    ],
)
def test_params_that_cannot_be_read(tmp_path: Path, content: bytes | None, message: str):
    meta = write_meta(tmp_path / "meta")
    (meta / "params.json").unlink()
    if content is not None:
        (meta / "params.json").write_bytes(content)
    refused(meta, message)


def test_tokenizers_that_do_not_fit(tmp_path: Path):
    meta = write_meta(tmp_path / "meta")
    with open(meta / "tokenizer.model", "a") as stream:
        stream.write(f"{base64.b64encode(b'ab').decode()} 256\n")
    refused(meta, "tokenizer of the wrong size: .* has 513 ids, but the embedding has 512 rows")
    (tmp_path / "LICENSE").write_text("You may use it.")
    refused(meta, f"^{tmp_path}/LICENSE is no tok", f"--tokenizer={tmp_path}/LICENSE")
    (meta / "tokenizer.model").unlink()
    refused(meta, "no tokenizer.model .* give the tokenizer's file with --tokenizer FILE")
    refused(meta, "--tokenizer .* is no file", "--tokenizer", str(tmp_path / "absent"))


def test_inputs_and_outputs_that_do_not_fit(tmp_path: Path):
    meta = write_meta(tmp_path / "meta")
    refused(tmp_path / "absent", "absent does not exist, expected the directory of a checkpoint")
    refused(meta / "params.json", r"params\.json is a file, expected the directory")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", r"no consolidated\.NN\.pth in .*empty")
    (tmp_path / "empty" / "model.safetensors").touch()
    refused(tmp_path / "empty", "run python -m convert.hf_to_orbax")
    model = convert(meta, tmp_path / "whole")
    refused(model, r"no consolidated\.NN\.pth in .*; it is already a model directory")
    (tmp_path / "model").mkdir()
    with pytest.raises(UserError, match="model exists already"):
        convert(meta, tmp_path / "model")
    assert not list((tmp_path / "model").iterdir())


def test_checklist(tmp_path: Path):
    meta = write_meta(tmp_path / "meta", ranks=2)
    names = ("consolidated.00.pth", "consolidated.01.pth", "params.json")
    md5 = {name: hashlib.md5((meta / name).read_bytes()).hexdigest() for name in names}
    checklist = meta / "checklist.chk"
    checklist.write_text("".join(f"{value}  {name}\n" for name, value in md5.items()))
    convert(meta, tmp_path / "model")
    md5["consolidated.01.pth"] = "0" * 32
    checklist.write_text("".join(f"{value}  {name}\n" for name, value in md5.items()))
    refused(meta, r"consolidated\.01\.pth has md5 .*, checklist\.chk says 0000")
    checklist.write_text("<html>")
    refused(meta, r"checklist\.chk: '<html>' is no 'md5  file' line")


def test_old_torch_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    meta = write_meta(tmp_path / "meta")
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    refused(meta, r"torch 2\.9\.1\+cpu can be made to run code .*CVE-2026-24747.*torch>=2\.10")


def test_packages_that_are_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    meta = write_meta(tmp_path / "meta")
    model = convert(meta, tmp_path / "model")
    monkeypatch.setitem(sys.modules, "torch", None)
    refused(meta, r"PyTorch is not installed, .* pip install 'torch>=2\.10'")
    with pytest.raises(UserError, match="PyTorch is not installed"):
        back(model, tmp_path / "again")


def test_verify_finds_a_flipped_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save = to_orbax.save_model

    def damaged(path: str, *args: Any, **kwargs: Any) -> None:
        save(path, *args, **kwargs)
        chunk = max((Path(path) / "params" / "layers_1.mlp.up.kernel").iterdir(), key=_size)
        data = bytearray(chunk.read_bytes())
        data[77] ^= 1
        chunk.write_bytes(data)

    monkeypatch.setattr(to_orbax, "save_model", damaged)
    with pytest.raises(RuntimeError, match=r"layers_1/mlp/up/kernel differs from its source"):
        convert(write_meta(tmp_path / "meta"), tmp_path / "model", "--verify")


def _size(file: Path) -> int:
    return file.stat().st_size


@pytest.mark.parametrize("module", [orbax_to_meta, orbax_to_hf])
def test_a_disk_that_fills_up_on_the_way_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: Any
):
    model = convert(write_meta(tmp_path / "meta"), tmp_path / "model")
    size = sum(file.stat().st_size for file in (model / "params").rglob("*"))
    small = tmp_path / "small"
    small.mkdir()
    option = f"size={size * 5 // 4 if module is orbax_to_meta else size // 2}"
    command = ["mount", "-t", "tmpfs", "-o", option, "tmpfs", small]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("cannot mount a small tmpfs here (needs root)")
    arguments = ["--checkpoint", str(model), "--output", str(small / "again")]
    try:
        with pytest.raises(UserError, match=r"disk full: needs 0\.\d\d MB, .* MB free; make room"):
            module.main(arguments)
        monkeypatch.setattr(checkpoint, "_refuse_small_disk", lambda *_: None)
        with pytest.raises(UserError, match=r"disk full: needs 0\.\d\d MB, .* MB free; make room"):
            module.main(arguments)
        assert not list(small.iterdir())
    finally:
        subprocess.run(["umount", small], check=True)


@pytest.mark.parametrize(
    ("ranks", "message"), [(0, "divisor of n_heads"), (3, "divisor of n_heads"), (16, "n_heads 8")]
)
def test_ranks_that_do_not_divide(tmp_path: Path, ranks: int, message: str):
    model = convert(write_meta(tmp_path / "meta"), tmp_path / "model")
    with pytest.raises(UserError, match=message):
        back(model, tmp_path / "again", ranks)
    assert not (tmp_path / "again").exists()


def test_ranks_and_kv_heads_that_share_no_factor():
    config = LlamaConfig(
        vocab_size=96, dim=96, n_layers=1, n_heads=12, n_kv_heads=6, head_dim=8, mlp_dim=96,
        norm_eps=1e-5, rope_theta=1e4, rope_scaling=None, context=64, tie_embeddings=False,
        version="2",
    )  # fmt: skip
    with pytest.raises(
        UserError, match=r"divisor or a multiple of 6 KV heads; 1, 2, 3, 6, 12 would work"
    ):
        orbax_to_meta.check_ranks(config, 4)
    orbax_to_meta.check_ranks(config, 12)
    orbax_to_meta.check_ranks(dataclasses.replace(config, n_kv_heads=12), 4)


# --- through the command line ---


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "convert.meta_to_orbax", *arguments]


def test_a_mistake_is_one_line_and_status_2(tmp_path: Path):
    meta = write_meta(tmp_path / "meta")
    (meta / "consolidated.00.pth").write_text("<html>")
    done = subprocess.run(
        command(f"--input={meta}", f"--output={tmp_path / 'model'}"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("convert.meta_to_orbax: error: ")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "model").exists()


def test_success_says_what_was_written_on_standard_error(tmp_path: Path):
    meta = write_meta(tmp_path / "meta")
    output = tmp_path / "model"
    done = subprocess.run(
        command(f"--input={meta}", f"--output={output}", "--verify"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "")
    verified, written = done.stderr.splitlines()
    assert "every element" in verified
    assert f"wrote {output}: Llama 2, " in written
    assert f"{load_config(output).count_parameters():,} parameters, bfloat16" in written


def test_killed_at_any_moment_it_leaves_nothing_that_loads(tmp_path: Path):
    layers = 100  # 903 tensors: about a second of writing
    meta = write_meta(
        tmp_path / "meta", random_tensors(layers=layers), {**PARAMS, "n_layers": layers}
    )

    def start(directory: Path) -> tuple[subprocess.Popen, float]:
        """The converter, at the moment when it begins to write."""
        directory.mkdir()
        process = subprocess.Popen(
            command(f"--input={meta}", f"--output={directory / 'model'}"),
            stderr=subprocess.DEVNULL,
        )
        while process.poll() is None and not list(directory.iterdir()):
            time.sleep(0.002)
        return process, time.monotonic()

    whole = tmp_path / "whole"
    process, began = start(whole)
    while not (whole / "model").exists():
        time.sleep(0.002)
    writing = time.monotonic() - began
    assert process.wait() == 0

    def kill(i: int) -> int | None:
        """How many tensors were there when it was killed; None if it had finished."""
        directory = tmp_path / f"killed{i}"
        process, _ = start(directory)
        time.sleep(writing * moments[i])
        process.kill()
        process.wait()
        if (directory / "model").exists():  # whole, because it is renamed at the end
            assert_same_model(whole / "model", directory / "model")
            return None
        for path in directory.iterdir():
            with pytest.raises(UserError):
                load_config(path)
        return len(list(directory.glob(".model*/params*/*")))

    moments = np.random.default_rng(0).uniform(0, 0.9, size=10)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        written = [n for n in pool.map(kill, range(len(moments))) if n is not None]
    assert len(written) >= 7  # a busy machine may finish one early
    assert len(set(written)) > 3  # at different moments of the writing


def test_killed_before_the_renaming_a_complete_directory_does_not_load(tmp_path: Path):
    meta = write_meta(tmp_path / "meta")
    model = convert(meta, tmp_path / "model")

    def unfinished(function: Callable[..., Any], *arguments: Any) -> None:
        with pytest.raises(UserError, match=r"is unfinished: .* run it again and delete") as caught:
            function(*arguments)
        assert "\n" not in str(caught.value)

    with new_directory(tmp_path / "again") as staging:
        shutil.copytree(model, staging, dirs_exist_ok=True)
        for function in (load, load_config, load_params):
            unfinished(function, staging)
        unfinished(back, staging, tmp_path / "other")
    assert_same_model(model, tmp_path / "again")
    with new_directory(tmp_path / "meta2") as staging:
        shutil.copytree(meta, staging, dirs_exist_ok=True)
        unfinished(convert, staging, tmp_path / "other")
    assert not (tmp_path / "other").exists()

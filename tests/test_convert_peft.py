"""PEFT's adapters there and back: the same logits in both, and the same bits on return."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import random_params, tiny, transformers_model

from convert import orbax_to_peft, peft_to_orbax
from convert.names import adapted, peft_name
from llama_jax import adapter, checkpoint, lora
from llama_jax.errors import UserError
from llama_jax.lora import LoraConfig
from llama_jax.model import forward

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
safetensors = pytest.importorskip("safetensors.numpy")

# PEFT asks transformers for what that is about to rename.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")
ROOT = Path(__file__).parents[1]
LOGITS_ATOL = 1e-4  # logits are of order 1
CONFIG = tiny(6, 2)
PARAMS = random_params(CONFIG)
TOKENS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 16))
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES = {
    "q and v": LoraConfig(rank=4, alpha=6.0),
    "all": LoraConfig.of("all", rank=4, alpha=8),
    "rslora": LoraConfig(rank=8, alpha=3.0, targets=("k", "down"), rslora=True, dropout=0.25),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "model"
    checkpoint.save_model(path, CONFIG, PARAMS, tokenizer=None, provenance={})
    return path


def to_orbax(source, base, output):
    flags = ["--input", source, "--checkpoint", base, "--output", output]
    peft_to_orbax.main(list(map(str, flags)))
    return output


def to_peft(source, base, output):
    flags = ["--lora", source, "--checkpoint", base, "--output", output]
    orbax_to_peft.main(list(map(str, flags)))
    return output


def their_logits(model):
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS)).logits.numpy()


def our_logits(params):
    return np.asarray(jax.jit(lambda p: forward(CONFIG, p, jnp.asarray(TOKENS))[0])(params))


def peft_model(**options):
    """A model with adapters of order 0.1."""
    options = {"r": 4, "lora_alpha": 6, "target_modules": ALL, **options}
    model = peft.get_peft_model(transformers_model(CONFIG, PARAMS), peft.LoraConfig(**options))
    generator = torch.Generator().manual_seed(0)
    for name, tensor in model.named_parameters():
        if "lora_" in name:
            tensor.data.normal_(0, 0.1, generator=generator)
    return model.eval()


def params_with(config, dtype=jnp.float32):
    params = lora.add(PARAMS, config, jax.random.key(0), dtype)
    rng = np.random.default_rng(0)

    def noise(path, leaf):
        if not lora.is_adapter(path):
            return leaf
        return jnp.asarray(rng.normal(0, 0.1, leaf.shape), leaf.dtype)

    return jax.tree.map_with_path(noise, params)


@pytest.mark.parametrize("name", list(CASES))
def test_peft_computes_with_ours_what_we_do(base, tmp_path, name):
    config = CASES[name]
    params = params_with(config)
    adapter.save_adapter(tmp_path / "ours", params, config, adapter.fingerprint(base), {})
    to_peft(tmp_path / "ours", base, tmp_path / "theirs")
    plain = transformers_model(CONFIG, PARAMS)
    without = their_logits(plain)
    model = peft.PeftModel.from_pretrained(plain, tmp_path / "theirs").eval()
    logits = their_logits(model)
    assert np.abs(logits - without).max() > 0.1
    np.testing.assert_allclose(our_logits(params), logits, atol=LOGITS_ATOL)
    read = model.peft_config["default"]
    assert read.task_type == "CAUSAL_LM"
    assert (read.r, read.lora_alpha, read.lora_dropout) == (
        config.rank,
        config.alpha,
        config.dropout,
    )


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": "all-linear", "task_type": "CAUSAL_LM"},
        {"target_modules": r".*\.(q|down)_proj", "use_rslora": True, "lora_dropout": 0.25},
        {"target_modules": ["q_proj", "self_attn.k_proj"], "init_lora_weights": "gaussian"},
        {"exclude_modules": ["mlp.up_proj"], "layers_to_transform": [1, 0]},
    ],
    ids=["all-linear", "pattern", "ends of names", "all but one"],
)
@pytest.mark.parametrize("safe", [True, False])
def test_we_compute_with_theirs_what_peft_does(base, tmp_path, options, safe):
    model = peft_model(**options)
    model.save_pretrained(tmp_path / "theirs")
    if not safe:
        weights = tmp_path / "theirs" / "adapter_model.safetensors"
        state = {k: torch.from_numpy(v) for k, v in safetensors.load_file(weights).items()}
        torch.save(state, weights.with_name("adapter_model.bin"))
        weights.unlink()
    ours = to_orbax(tmp_path / "theirs", base, tmp_path / "ours")
    params = adapter.load_adapter(ours, PARAMS, adapter.fingerprint(base))
    np.testing.assert_allclose(our_logits(params), their_logits(model), atol=LOGITS_ATOL)
    told = json.loads((ours / "provenance.json").read_text())
    assert told["tool"] == "convert.peft_to_orbax"
    assert told["peft"]["peft_version"] == peft.__version__


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", list(CASES))
def test_there_and_back_is_the_same_bit_for_bit(base, tmp_path, name, dtype):
    config = CASES[name]
    params = params_with(config, jnp.dtype(dtype))
    fingerprint = adapter.fingerprint(base)
    adapter.save_adapter(tmp_path / "a", params, config, fingerprint, {})
    to_peft(tmp_path / "a", base, tmp_path / "theirs")
    to_orbax(tmp_path / "theirs", base, tmp_path / "b")
    assert (tmp_path / "a/adapter.json").read_text() == (tmp_path / "b/adapter.json").read_text()
    again = adapter.load_adapter(tmp_path / "b", PARAMS, fingerprint)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(params), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    to_peft(tmp_path / "b", base, tmp_path / "again")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "theirs" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()


def test_pickled_bfloat16_keeps_its_bits(base, tmp_path):
    config = CASES["q and v"]
    params = params_with(config, jnp.bfloat16)
    (tmp_path / "theirs").mkdir()
    fields = orbax_to_peft.peft_config(config, ["q_proj", "v_proj"])
    (tmp_path / "theirs" / "adapter_config.json").write_text(json.dumps(fields))
    state = {}
    for path, module in adapted(CONFIG):
        layer, half, target = path.split("/")
        if pair := params[layer][half][target].get("lora"):
            for matrix, array in (("A", pair.a), ("B", pair.b)):
                bits = torch.from_numpy(np.asarray(array).view(np.int16).copy())
                state[peft_name(module, matrix)] = bits.view(torch.bfloat16)
    torch.save(state, tmp_path / "theirs" / "adapter_model.bin")
    to_orbax(tmp_path / "theirs", base, tmp_path / "ours")
    again = adapter.load_adapter(tmp_path / "ours", PARAMS, adapter.fingerprint(base))
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(params), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


# --- what is refused ---


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "theirs"
    peft_model(target_modules=["q_proj", "v_proj"]).save_pretrained(path)
    return path


def change(**fields):
    def damage(path):
        file = path / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))

    return damage


def tensors(edit):
    def damage(path):
        file = path / "adapter_model.safetensors"
        state = safetensors.load_file(file)
        edit(state)
        safetensors.save_file(state, file)

    return damage


def rename(state):
    name = next(iter(state))
    state[name.replace("base_model.model.", "")] = state.pop(name)


A = peft_name("model.layers.1.self_attn.v_proj", "A")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change(peft_type="IA3"), "peft_type is 'IA3', expected 'LORA'"),
        (change(bias="all"), "bias is 'all', expected 'none'"),
        (change(use_dora=True), "use_dora is True, expected that it is not used"),
        (change(rank_pattern={"q_proj": 2}), "rank_pattern is {'q_proj': 2}, expected"),
        (change(alpha_pattern={"q_proj": 2}), "alpha_pattern is"),
        (change(modules_to_save=["lm_head"]), r"modules_to_save is \['lm_head'\]"),
        (change(layers_to_transform=[1]), r"layers_to_transform is \[1\], expected all layers"),
        (change(layers_to_transform=0), "layers_to_transform is 0, expected all layers"),
        (change(fan_in_fan_out=True), "fan_in_fan_out is True"),
        (change(init_lora_weights="pissa"), "init_lora_weights is 'pissa', expected one that"),
        (change(of_a_later_version=3), "of_a_later_version is 3"),
        (change(r=8), r"has shape \(4, 48\), expected \(8, 48\)"),
        (change(r="8"), "r is '8', expected a whole number"),
        (change(lora_alpha=0), "alpha of an adapter is 0"),
        (change(target_modules=None), "target_modules is None, expected some of q_proj"),
        (change(target_modules=["lm_head"]), "expected some of q_proj"),
        (change(target_modules=3), "target_modules is 3, expected a list of names or a pattern"),
        (change(target_modules="("), r"target_modules is '\(', no pattern"),
        (change(target_modules=["q_proj"]), r"v_proj\.lora_A\.weight is not what"),
        (
            change(target_modules=["q_proj", "v_proj", "k_proj"]),
            r"k_proj\.lora_A\.weight is missing",
        ),
        (
            change(target_modules=["0.self_attn.q_proj"]),
            "leaves model.layers.1.self_attn.q_proj out",
        ),
        (tensors(lambda state: state.pop(A)), "layers.1.self_attn.v_proj.lora_A.weight is missing"),
        (tensors(rename), "is missing, but adapter_config.json tells of it"),
        (
            tensors(lambda s: s.update({A: s[A].astype(np.int8)})),
            "is not of float32, bfloat16, float16",
        ),
        (tensors(lambda s: s.update({A: s[A][:, :9].copy()})), "has shape .* give the model that"),
        (
            lambda p: (p / "adapter_model.safetensors").unlink(),
            "neither adapter_model.safetensors nor",
        ),
        (lambda p: (p / "adapter_model.safetensors").write_bytes(b"x" * 99), "cannot be read as"),
        (lambda p: (p / "adapter_config.json").unlink(), "name the directory that PEFT's"),
        (lambda p: (p / "adapter_config.json").write_text("{"), "is not valid JSON"),
        (shutil.rmtree, "does not exist"),
    ],
)
def test_what_cannot_be_converted_is_one_line_and_leaves_nothing(
    base, saved, tmp_path, damage, message
):
    shutil.copytree(saved, tmp_path / "theirs")
    damage(tmp_path / "theirs")
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(UserError, match=message) as caught:
        to_orbax(tmp_path / "theirs", base, tmp_path / "ours")
    assert "\n" not in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize(
    "data", [b"", b"no pickle", b"PK\x03\x04" + b"x" * 50, b"version https://git-lfs"]
)
def test_files_that_are_no_pickles(base, saved, tmp_path, data):
    shutil.copytree(saved, tmp_path / "theirs")
    (tmp_path / "theirs" / "adapter_model.safetensors").unlink()
    (tmp_path / "theirs" / "adapter_model.bin").write_bytes(data)
    with pytest.raises(UserError, match="cannot be read as PyTorch's weights") as caught:
        to_orbax(tmp_path / "theirs", base, tmp_path / "ours")
    assert "\n" not in str(caught.value)


def test_another_base_and_an_existing_output_are_refused_on_the_way_back(base, tmp_path):
    config = CASES["q and v"]
    adapter.save_adapter(tmp_path / "a", params_with(config), config, "f" * 64, {})
    with pytest.raises(UserError, match="belongs to a model with the fingerprint ffffffffffff"):
        to_peft(tmp_path / "a", base, tmp_path / "theirs")
    fingerprint = adapter.fingerprint(base)
    adapter.save_adapter(tmp_path / "b", params_with(config), config, fingerprint, {})
    with pytest.raises(UserError, match="exists already"):
        to_peft(tmp_path / "b", base, tmp_path / "a")
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


@pytest.mark.parametrize("command", ["peft_to_orbax --input", "orbax_to_peft --lora"])
def test_the_commands_exit_with_2(base, tmp_path, command):
    module, flag = command.split()
    words = [sys.executable, "-m", f"convert.{module}", "--checkpoint", str(base)]
    for more in ([flag, "nowhere", "--output", str(tmp_path / "out")], ["--output", "x"]):
        done = subprocess.run([*words, *more], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1
    assert os.listdir(tmp_path) == []

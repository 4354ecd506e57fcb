"""Adapter directories: bit for bit, beside any form of their base, and of no other model."""

import dataclasses
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import random_params
from test_convert_memory import MB, anonymous
from test_convert_quantize import config_of
from test_convert_quantize import write_model as write_bfloat16_model
from test_processes import free_port
from test_sharding import CONFIG, LOGITS_ATOL, save_tokenizer

import llama_jax
from convert import merge_lora, quantize
from llama_jax import adapter, checkpoint, lora, sharding
from llama_jax.errors import UserError
from llama_jax.lora import LoraConfig
from llama_jax.model import forward, stack
from llama_jax.quant import Quantization

ROOT = Path(__file__).parents[1]
SECONDS = 300  # for two processes
LORA = LoraConfig.of("q,v,down", rank=4, alpha=8.0, dropout=0.1)
BASE = "0123456789abcdef" * 4  # as good a fingerprint as any where there is no base
UP = "layers_1.mlp.down.lora.a"


def write_model(path, params, config=CONFIG):
    tokenizer = save_tokenizer(path.parent, config.vocab_size)
    checkpoint.save_model(path, config, params, tokenizer=tokenizer, provenance={"tool": "test"})
    return path


def adapted(params, config=LORA, dtype=jnp.float32):
    params = lora.add(params, config, jax.random.key(0), dtype)

    def trained(path, leaf):
        if not lora.is_adapter(path):
            return leaf
        noise = np.random.default_rng(leaf.size).normal(0, 0.05, leaf.shape)
        return leaf + jnp.asarray(noise, leaf.dtype)

    return jax.tree.map_with_path(trained, params)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("base") / "model", random_params(CONFIG))


@pytest.fixture(scope="module")
def params(base):
    """Those of `base` with adapters."""
    return adapted(checkpoint.load_params(base))


@pytest.fixture(scope="module")
def saved(base, params, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "adapter"
    adapter.save_adapter(path, params, LORA, adapter.fingerprint(base), {"tool": "test"})
    return path


@pytest.fixture
def copy(saved, tmp_path):
    """An adapter directory of the test's own."""
    subprocess.run(["cp", "-r", saved, tmp_path / "adapter"], check=True)
    return tmp_path / "adapter"


def assert_same(tree, expected):
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


# --- saving and loading ---


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("form", ["whole", "split", "stacked"])
def test_adapters_come_back_bit_for_bit(base, tmp_path, dtype, form):
    plain = checkpoint.load_params(base)
    params = adapted(plain, dtype=dtype)
    given = {
        "whole": lambda: params,
        "split": lambda: lora.split(params)[0],
        "stacked": lambda: stack(params),
    }[form]()
    written = []
    adapter.save_adapter(
        tmp_path / "a", given, LORA, BASE, {"tool": "x"}, lambda *args: written.append(args)
    )
    assert_same(adapter.load_adapter(tmp_path / "a", plain, BASE), params)
    assert_same(adapter.load_adapter(tmp_path / "a", params, BASE), params)
    assert json.loads((tmp_path / "a" / "adapter.json").read_text()) == {
        "format": 1, "rank": 4, "alpha": 8.0, "targets": ["q", "v", "down"], "dropout": 0.1,
        "rslora": False, "base": BASE,
    }  # fmt: skip
    assert json.loads((tmp_path / "a" / "provenance.json").read_text()) == {"tool": "x"}
    assert len(written) == 2 * 3 * CONFIG.n_layers
    assert (UP, 4 * CONFIG.mlp_dim * np.dtype(dtype).itemsize) in written


def test_stock_orbax_restores_what_we_wrote_and_we_what_it_wrote(copy, params, base):
    import orbax.checkpoint as ocp

    restored = ocp.StandardCheckpointer().restore(copy / "params")
    a = restored["layers_1"]["mlp"]["down"]["lora"]["a"]
    np.testing.assert_array_equal(a, params["layers_1"]["mlp"]["down"]["lora"].a)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(copy / "params", restored, force=True)
    assert_same(llama_jax.load(base, lora=copy).params, params)
    assert_same(llama_jax.load(base, lora=copy, mesh="fsdp=2").params, params)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_they_stand_beside_quantized_weights(base, saved, params, tmp_path, kind):
    output = tmp_path / kind
    quantize.main(["--checkpoint", str(base), "--output", str(output), "--quantize", kind])
    assert adapter.fingerprint(output) == adapter.fingerprint(base)
    loaded = llama_jax.load(output, lora=saved)
    assert_same(lora.adapters(loaded.params), lora.adapters(params))
    assert_same(lora.drop(loaded.params), checkpoint.load_params(output))
    assert loaded.quantization == Quantization(kind)
    assert_same(llama_jax.load(base, quantize=kind, lora=saved).params, loaded.params)
    cast = llama_jax.load(base, dtype="bfloat16", lora=saved).params["layers_0"]["attention"]["q"]
    assert (cast["kernel"].dtype, cast["lora"].a.dtype) == (jnp.bfloat16, np.float32)


@pytest.mark.parametrize("mesh", ["data=2,tensor=4", "tensor=8", "fsdp=4"])
@pytest.mark.parametrize("kind", [None, "int8"])
def test_they_are_split_as_their_kernels_are(base, saved, params, mesh, kind):
    loaded = llama_jax.load(base, mesh=mesh, lora=saved, quantize=kind)
    assert_same(lora.adapters(loaded.params), lora.adapters(params))
    down = loaded.params["layers_0"]["mlp"]["down"]
    kernel = down["kernel"] if kind is None else down["kernel"].values
    out, width = kernel.sharding.shard_shape(kernel.shape)
    assert down["lora"].a.sharding.shard_shape(down["lora"].a.shape) == (4, width)
    assert down["lora"].b.sharding.shard_shape(down["lora"].b.shape) == (out, 4)
    expected = sharding.shardings(loaded.params, sharding.mesh_of(loaded.params))
    assert [leaf.sharding for leaf in jax.tree.leaves(lora.adapters(loaded.params))] == (
        jax.tree.leaves(lora.adapters(expected))
    )


def test_split_and_merged_models_say_the_same(base, saved, params):
    """Within the tolerance of sums in another order."""
    tokens = jnp.asarray([[3, 14, 15, 292, 65, 8, 9, 79]])
    expected = forward(CONFIG, lora.merge(params), tokens)[0]
    assert np.abs(forward(CONFIG, lora.drop(params), tokens)[0] - expected).max() > 0.1
    split = llama_jax.load(base, mesh="fsdp=2,tensor=4", lora=saved).params
    with sharding.use(sharding.mesh_of(split)):
        logits = jax.jit(lambda p: forward(CONFIG, p, tokens)[0])(split)
    np.testing.assert_allclose(logits, expected, atol=LOGITS_ATOL)


def test_adapters_of_other_numbers_are_a_defect_of_the_caller(params, tmp_path):
    for wrong, message in (
        (dataclasses.replace(LORA, rank=8, alpha=16.0), "has rank"),
        (dataclasses.replace(LORA, alpha=4.0), "scale 2.0"),
        (dataclasses.replace(LORA, targets=("q", "v")), "has adapters of"),
    ):
        with pytest.raises(ValueError, match=message):
            adapter.save_adapter(tmp_path / "a", params, wrong, BASE, {})
    with pytest.raises(ValueError, match="no adapters"):
        adapter.save_adapter(tmp_path / "a", lora.drop(params), LORA, BASE, {})
    assert os.listdir(tmp_path) == []


def test_what_cannot_be_written_leaves_what_there_was(params, copy, monkeypatch):
    before = sorted(copy.rglob("*"))
    with pytest.raises(UserError, match="exists already"):
        adapter.save_adapter(copy, params, LORA, BASE, {})
    usage = checkpoint.shutil.disk_usage(copy)._replace(free=100)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match="disk full: needs"):
        adapter.save_adapter(copy.parent / "new", params, LORA, BASE, {})
    assert sorted(copy.rglob("*")) == before
    assert os.listdir(copy.parent) == ["adapter"]


SLOW_SAVE = """
import sys, time
sys.path.insert(0, "tests")
import jax, numpy as np
from test_adapter import BASE, CONFIG, LORA, adapter, checkpoint, lora

def lazy(leaf):
    def read():
        time.sleep(0.02)
        return np.ones(leaf.shape, np.float32)
    return checkpoint.LazyArray(leaf.shape, np.dtype("f4"), read)

shapes = jax.eval_shape(
    lambda p: lora.add(p, LORA, jax.random.key(0)), checkpoint.abstract(CONFIG)
)
tree = jax.tree.map(lazy, lora.adapters(shapes))
adapter.save_adapter(sys.argv[1], tree, LORA, BASE, {}, lambda *_: print(flush=True))
"""


@pytest.mark.parametrize("arrays", [1, 12])
def test_a_killed_save_leaves_nothing_that_loads(tmp_path, params, arrays):
    command = [sys.executable, "-c", SLOW_SAVE, tmp_path / "a"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
        for _ in range(arrays):
            assert process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "a").exists()
    for leftover in tmp_path.iterdir():
        with pytest.raises(UserError):
            adapter.load_adapter(leftover, params, BASE)


PROCESS = """
import sys
import jax
from jax.experimental import multihost_utils

address, process, base, output, back = sys.argv[1:]
jax.distributed.initialize(coordinator_address=address, num_processes=2, process_id=int(process))
sys.path.insert(0, "tests")
import llama_jax
from llama_jax import adapter
from test_adapter import LORA, lora

params = llama_jax.load(base, mesh="fsdp=2,tensor=4", lora=output).params
leaves = jax.tree.leaves(lora.adapters(params))
assert not all(leaf.is_fully_addressable for leaf in leaves)
adapter.save_adapter(back, params, LORA, adapter.fingerprint(base), {"tool": "two"})
multihost_utils.sync_global_devices("saved")
adapter.load_adapter(back, params, adapter.fingerprint(base))
"""


def test_two_processes_write_one_directory(base, saved, params, tmp_path):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
    address, back = f"127.0.0.1:{free_port()}", tmp_path / "back"
    errors = [tmp_path / f"{process}.err" for process in range(2)]
    started = []
    try:
        for process, file in enumerate(errors):
            command = [sys.executable, "-c", PROCESS, address, str(process), base, saved, back]
            with open(file, "w") as err:
                started.append(
                    subprocess.Popen(
                        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=err
                    )
                )
        end = time.monotonic() + SECONDS
        # A process that fails leaves the other one waiting.
        while any(process.poll() is None for process in started) and time.monotonic() < end:
            if any(process.poll() for process in started):
                break
            time.sleep(0.1)
    finally:
        for process in started:
            process.kill()
            process.wait()
    said = "\n---\n".join(file.read_text() for file in errors)
    assert [process.returncode for process in started] == [0, 0], said
    assert sorted(os.listdir(tmp_path)) == ["0.err", "1.err", "back"]
    assert_same(llama_jax.load(base, lora=back).params, params)


# --- which model ---


def test_the_fingerprint_is_of_the_config_and_of_every_tensor(base, tmp_path):
    told = {adapter.fingerprint(base)}
    plain = random_params(CONFIG)

    def fingerprint(name, params, config=CONFIG):
        told.add(adapter.fingerprint(write_model(tmp_path / name, params, config)))
        return len(told)

    assert fingerprint("same", plain) == 1
    assert fingerprint("context", plain, dataclasses.replace(CONFIG, context=128)) == 2
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), plain)
    assert fingerprint("dtype", half) == 3
    for count, path in enumerate(["layers_1/mlp/down/kernel", "norm/scale", "head/kernel"], 4):
        changed = random_params(CONFIG)
        *parents, name = path.split("/")
        node = changed
        for key in parents:
            node = node[key]
        node[name] = node[name].at[(0,) * (node[name].ndim - 1) + (-1,)].add(1)
        assert fingerprint(name + str(count), changed) == count


def test_the_fingerprint_is_the_same_in_any_layout(base, tmp_path):
    import orbax.checkpoint as ocp

    write_model(tmp_path / "model", random_params(CONFIG))
    stored = checkpoint.open_tree(checkpoint.epath.Path(tmp_path / "model/params"))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "model/params", stored, force=True)
    assert not (tmp_path / "model/params/norm.scale").exists()
    assert adapter.fingerprint(tmp_path / "model") == adapter.fingerprint(base)


def test_a_quantized_model_that_does_not_tell_its_base(base, saved, tmp_path):
    quantization = Quantization("int8")
    params = jax.jit(quantization)(random_params(CONFIG))
    tokenizer = base / "tokenizer.model"
    checkpoint.save_model(
        tmp_path / "m",
        CONFIG,
        params,
        tokenizer=tokenizer,
        provenance={},
        quantization=quantization,
    )
    checkpoint.load(tmp_path / "m")
    with pytest.raises(UserError, match=r"does not tell which .* python -m convert\.quantize"):
        checkpoint.load(tmp_path / "m", lora=saved)


def test_an_adapter_of_another_model_is_refused_before_that_is_read(base, saved, monkeypatch, copy):
    file = copy / "adapter.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base": BASE}))
    monkeypatch.setattr(checkpoint, "load_params", lambda *_, **__: pytest.fail("read"))
    with pytest.raises(UserError) as caught:
        llama_jax.load(base, lora=copy)
    assert "\n" not in str(caught.value)
    assert BASE[:12] in str(caught.value)
    assert adapter.fingerprint(base)[:12] in str(caught.value)
    assert "give the model that the adapter was trained on" in str(caught.value)


# --- damage ---


def change(**fields):
    def damage(path):
        file = path / "adapter.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))

    return damage


def without(name):
    def damage(path):
        file = path / "adapter.json"
        fields = json.loads(file.read_text())
        del fields[name]
        file.write_text(json.dumps(fields))

    return damage


def rewrite(edit):
    def damage(path):
        tree = checkpoint.open_tree(checkpoint.epath.Path(path / "params"))
        tree = jax.tree.map(np.array, tree)
        edit(tree)
        (path / "params").rename(path.parent / "old")
        checkpoint.save_tree(checkpoint.epath.Path(path / "params"), tree)

    return damage


def integers(tree):
    leaf = tree["layers_0"]["mlp"]["down"]["lora"]
    leaf["a"] = leaf["a"].astype(np.int8)


def write(name, data):
    return lambda path: (path / name).write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change(rank=8), r"\.lora\.a has shape \(4, \d+\), adapter\.json says \(8, \d+\)"),
        (change(rank="4"), "rank is '4', expected a whole number"),
        (change(rank=True), "rank is True, expected a whole number"),
        (change(rank=0), r"adapter\.json: the rank of an adapter is 0"),
        (change(targets=["q", "v"]), "mlp.down.lora.a is unknown to adapter.json"),
        (change(targets=["q", "v", "down", "up"]), "mlp.up.lora.a is missing"),
        (change(targets=["q", "w"]), "targets are q,w"),
        (change(targets="q,v"), "targets is 'q,v', expected a list"),
        (change(dropout=None), "dropout is None, expected a number"),
        (change(base=7), "base is 7, expected a fingerprint"),
        (change(color="red"), "color is unknown"),
        (change(format=2), "is of format 2, this version reads 1; upgrade"),
        (without("format"), "is of format None"),
        (without("alpha"), "alpha is missing"),
        (write("adapter.json", b"{"), "is not valid JSON"),
        (write("adapter.json", b"\xff"), "is not valid JSON"),
        (write("adapter.json", b"[" * 200_000), "is not valid JSON"),
        (write("adapter.json", b"[]"), "holds a list, expected an object"),
        (write(f"params/{UP}/0.0", b""), "has 0 bytes"),
        (lambda path: (path / f"params/{UP}/0.0").unlink(), "damaged or incomplete"),
        (lambda path: (path / "params/_METADATA").unlink(), "damaged or incomplete"),
        (rewrite(lambda tree: tree.pop("layers_1")), "layers_1.attention.q.lora.a is missing"),
        (rewrite(lambda tree: tree["layers_0"]["mlp"].update(up=np.ones(3))), "mlp.up is unknown"),
        (rewrite(integers), "mlp.down.lora.a is of int8, expected floats"),
        (lambda path: (path / "adapter.json").unlink(), "no adapter.json in it"),
        (lambda path: (path / "params").rename(path / "other"), "no params in it"),
    ],
)
def test_damage_is_a_one_line_user_error(base, copy, params, damage, message, capfd):
    damage(copy)
    with pytest.raises(UserError, match=message) as caught:
        adapter.load_adapter(copy, params, adapter.fingerprint(base))
    assert "\n" not in str(caught.value)
    assert str(copy) in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_other_directories_are_told_apart(base, copy, params, tmp_path):
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "adapter_config.json").touch()
    for path, message in (
        (tmp_path / "none", "does not exist, expected an adapter directory"),
        (copy / "adapter.json", "is a file, expected an adapter directory"),
        (base, "it holds a model, not an adapter"),
        (tmp_path / "peft", r"it is one of PEFT's; run python -m convert\.peft_to_orbax"),
        (tmp_path, f"name {copy}, which is one"),
    ):
        with pytest.raises(UserError, match=message):
            adapter.load_adapter(path, params, BASE)
    unfinished = copy.rename(tmp_path / ".a.partial-01234567")
    with pytest.raises(UserError, match="is unfinished"):
        adapter.load_adapter(unfinished, params, BASE)


# --- merging ---


def merge(base, saved, output):
    flags = {"--checkpoint": base, "--lora": saved, "--output": output}
    merge_lora.main([str(word) for pair in flags.items() for word in pair])
    return output


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_merging_by_blocks_is_merging(tmp_path, monkeypatch, dtype):
    """float32 to 1e-6; bfloat16 but for a few sums that lie between two numbers."""
    monkeypatch.setattr(merge_lora, "_BLOCK_BYTES", 4 * 128 * 24)  # 256 rows are no multiple of 24
    plain = jax.tree.map(lambda x: x.astype(dtype), random_params(CONFIG))
    base = write_model(tmp_path / "model", plain)
    params = adapted(plain)
    adapter.save_adapter(tmp_path / "a", params, LORA, adapter.fingerprint(base), {"tool": "me"})
    merged = llama_jax.load(merge(base, tmp_path / "a", tmp_path / "merged")).params
    for (path, leaf), expected in zip(
        jax.tree.leaves_with_path(merged), jax.tree.leaves(lora.merge(params)), strict=True
    ):
        assert (leaf.dtype, leaf.shape) == (dtype, expected.shape)
        if dtype == np.float32:
            np.testing.assert_allclose(leaf, expected, atol=1e-6, err_msg=str(path))
        else:
            assert np.mean(np.asarray(leaf) != np.asarray(expected)) < 1e-3
    told = json.loads((tmp_path / "merged" / "provenance.json").read_text())
    assert told["made_of"] == {"tool": "test"}
    assert told["adapter"]["made_of"] == {"tool": "me"}
    assert told["adapter"]["rank"] == 4
    assert adapter.fingerprint(tmp_path / "merged") != adapter.fingerprint(base)


def test_what_cannot_be_merged_is_one_line_and_leaves_nothing(base, saved, tmp_path):
    quantized = tmp_path / "int8"
    quantize.main(["--checkpoint", str(base), "--output", str(quantized), "--quantize", "int8"])
    other = write_model(tmp_path / "other", random_params(CONFIG, seed=1))
    half = jax.tree.map(lambda x: x.astype(np.float16), random_params(CONFIG))
    large = write_model(tmp_path / "large", half)
    params = jax.tree.map_with_path(
        lambda path, x: 1e4 * jnp.ones_like(x) if lora.is_adapter(path) else x, adapted(half)
    )
    adapter.save_adapter(tmp_path / "a", params, LORA, adapter.fingerprint(large), {})
    before = sorted(os.listdir(tmp_path))
    for base_path, lora_path, message in (
        (quantized, saved, "is quantized to int8, expected the model that it was made of"),
        (other, saved, "belongs to a model with the fingerprint"),
        (base, base, "it holds a model, not an adapter"),
        (large, tmp_path / "a", r"kernel holds .*, which float16 cannot"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            merge(base_path, lora_path, tmp_path / "out")
        assert "\n" not in str(caught.value)
        assert sorted(os.listdir(tmp_path)) == before


def test_the_command_exits_with_2(base, tmp_path):
    command = [sys.executable, "-m", "convert.merge_lora", "--checkpoint", str(base)]
    for more in (["--lora", "nowhere", "--output", str(tmp_path / "out")], ["--output", "x"]):
        done = subprocess.run([*command, *more], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1
    assert os.listdir(tmp_path) == []


CONVERTER = """
import sys
from convert import merge_lora

for line in sys.stdin:
    base = line.strip()
    merge_lora.main(["--checkpoint", base, "--lora", base + "-a", "--output", base + "-m"])
    print("done", flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/PID/status")
def test_merging_holds_a_few_tensors(tmp_path):
    """As in test_convert_memory: 500 MB of the bound are for Python and its packages."""
    layers, dim, mlp = 6, 1024, 8192
    largest = 2 * dim * mlp
    for name, config in (("small", config_of(64, 128, 2)), ("large", config_of(dim, mlp, layers))):
        (tmp_path / name).mkdir()
        base = write_bfloat16_model(tmp_path / name / "model", config)
        shapes = jax.eval_shape(
            lambda p: lora.add(p, LORA, jax.random.key(0)), checkpoint.abstract(config)
        )
        adapters = jax.tree.map(lambda leaf: np.ones(leaf.shape, "f4"), lora.adapters(shapes))
        adapter.save_adapter(f"{base}-a", adapters, LORA, adapter.fingerprint(base), {})
    command = [sys.executable, "-c", CONVERTER]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as process:

        def peak(name):
            process.stdin.write(f"{tmp_path / name / 'model'}\n")
            process.stdin.flush()
            most = 0
            while not select.select([process.stdout], [], [], 0.002)[0]:
                most = max(most, anonymous(process.pid))
            assert process.stdout.readline() == "done\n"
            return most

        peak("small")
        packages = anonymous(process.pid)
        reached = peak("large")
        assert reached < packages + 3 * largest + 64 * MB < packages + 3 * layers * largest

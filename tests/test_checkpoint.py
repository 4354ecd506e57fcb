"""Model directories: bit-exact, streamed, readable by stock Orbax, and all or nothing."""

import json
import os
import signal
import subprocess
import sys
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import checkpoint
from llama_jax.checkpoint import LazyArray
from llama_jax.config import LlamaConfig
from llama_jax.errors import UserError
from llama_jax.quant import Quantization, whole_bytes

CONFIG = LlamaConfig(
    vocab_size=256,
    dim=64,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=16,
    mlp_dim=128,
    norm_eps=1e-5,
    rope_theta=1e4,
    rope_scaling=None,
    context=128,
    tie_embeddings=False,
    version="2",
)


def map_shapes(function, config=CONFIG):
    shapes = checkpoint.param_shapes(config)
    return jax.tree.map(function, shapes, is_leaf=lambda node: isinstance(node, tuple))


def random_params(dtype=np.float32):
    rng = np.random.default_rng(0)
    return map_shapes(lambda shape: rng.normal(size=shape).astype(dtype))


def save(path, params, **options):
    arguments = {"tokenizer": None, "provenance": {"tool": "test"}, **options}
    checkpoint.save_model(path, CONFIG, params, **arguments)


@pytest.fixture
def model(tmp_path):
    save(tmp_path / "model", random_params())
    return tmp_path / "model"


def assert_same(restored, expected):
    """Bit for bit; 4-bit integers are bytes on a CPU."""
    expected = whole_bytes(expected)
    assert jax.tree.structure(restored) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.float16, np.int8])
def test_round_trip_is_bit_exact(tmp_path, dtype):
    params = random_params(dtype)
    written = []
    tokenizer = tmp_path / "some.model"
    tokenizer.write_bytes(b"tokens")
    save(tmp_path / "m", params, tokenizer=tokenizer, progress=lambda *args: written.append(args))

    restored = checkpoint.load_params(tmp_path / "m")
    assert_same(restored, params)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(restored))
    assert checkpoint.load_config(tmp_path / "m") == CONFIG
    abstract = checkpoint.abstract_params(tmp_path / "m")
    assert abstract["head"]["kernel"] == jax.ShapeDtypeStruct((256, 64), dtype)
    assert (tmp_path / "m" / "tokenizer.model").read_bytes() == b"tokens"
    assert json.loads((tmp_path / "m" / "provenance.json").read_text()) == {"tool": "test"}
    assert len(written) == len(set(written)) == len(jax.tree.leaves(params))
    assert sum(size for _, size in written) == sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert ("layers_1.mlp.up.kernel", 128 * 64 * np.dtype(dtype).itemsize) in written


def test_special_values_keep_their_bits(tmp_path):
    bits = np.arange(1 << 16, dtype=np.uint16)  # every bfloat16, NaN payloads and -0.0 included
    params = random_params(jnp.bfloat16)
    params["embed"]["embedding"] = bits[: 256 * 64].view(jnp.bfloat16).reshape(256, 64)
    params["head"]["kernel"] = bits[-256 * 64 :].view(jnp.bfloat16).reshape(256, 64)
    params["norm"]["scale"] = np.zeros(64, jnp.bfloat16)
    save(tmp_path / "m", params)
    assert_same(checkpoint.load_params(tmp_path / "m"), params)


def test_jax_arrays_save_and_a_loaded_model_saves_again(model, tmp_path):
    save(tmp_path / "again", checkpoint.load_params(model))
    assert_same(checkpoint.load_params(tmp_path / "again"), random_params())


def test_loaded_arrays_may_be_donated(model):
    double = jax.jit(lambda tree: jax.tree.map(lambda x: 2 * x, tree), donate_argnums=0)
    doubled = double(checkpoint.load_params(model))
    assert_same(doubled, jax.tree.map(lambda x: 2 * x, random_params()))
    assert_same(checkpoint.load_params(model), random_params())


def test_stock_orbax_restores_what_we_wrote(model):
    import orbax.checkpoint as ocp

    params = random_params()
    assert_same(ocp.StandardCheckpointer().restore(model / "params"), params)
    assert_same(ocp.PyTreeCheckpointer().restore(model / "params"), params)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), params
    )
    restored = ocp.StandardCheckpointer().restore(model / "params", target)
    assert_same(restored, params)
    assert restored["norm"]["scale"].sharding == sharding


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_we_restore_what_stock_orbax_wrote(model, dtype):
    import orbax.checkpoint as ocp

    params = random_params()
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(model / "params", params, force=True)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    restored = checkpoint.load_params(model, dtype=dtype, shardings=sharding)
    assert_same(restored, jax.tree.map(lambda x: x.astype(dtype or x.dtype), params))
    assert restored["norm"]["scale"].sharding == sharding


def test_shards_go_straight_to_their_devices_and_are_cast(model):
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def sharding(leaf):
        axes = ("a", "b") if len(leaf.shape) == 2 else ()
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))

    shardings = jax.tree.map(sharding, checkpoint.abstract_params(model))
    params = random_params()
    assert_same(checkpoint.load_params(model, shardings=shardings), params)
    cast = checkpoint.load_params(model, dtype=jnp.bfloat16, shardings=shardings)
    assert_same(cast, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))
    kernel = cast["layers_0"]["mlp"]["up"]["kernel"]
    assert kernel.sharding == shardings["layers_0"]["mlp"]["up"]["kernel"]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(64, 16)}


def test_lazy_leaves_are_read_one_at_a_time(tmp_path):
    alive, most = 0, 0

    def dead(size):
        nonlocal alive
        alive -= size

    def lazy(shape):
        def read():
            nonlocal alive, most
            array = np.ones(shape, np.float32)
            alive += array.nbytes
            most = max(most, alive)
            weakref.finalize(array, dead, array.nbytes)
            return array

        return LazyArray(shape, np.dtype(np.float32), read)

    tree = map_shapes(lazy)
    save(tmp_path / "m", tree)
    sizes = [leaf.nbytes for leaf in jax.tree.leaves(tree)]
    # One, and what tensorstore's threads have not let go of yet.
    assert most <= 2 * max(sizes) < sum(sizes) / 3
    assert_same(checkpoint.load_params(tmp_path / "m"), map_shapes(lambda s: np.ones(s, "f4")))


def rewrite(model, change):
    """Writes `model/params` again after `change(params)`, config.json staying what it is."""
    params = random_params()
    change(params)
    (model / "params").rename(model / "old")
    checkpoint.save_tree(checkpoint.epath.Path(model / "params"), params)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p["layers_1"]["mlp"].pop("up"), r"layers_1\.mlp\.up\.kernel is missing"),
        (lambda p: p.update(rope={"freqs": np.ones(4)}), r"rope\.freqs is unknown"),
        (
            lambda p: p["norm"].update(scale=np.ones(63, np.float32)),
            r"norm\.scale has shape \(63,\), config\.json says \(64,\)",
        ),
    ],
)
def test_tree_mismatch_names_the_tensor(model, change, message):
    rewrite(model, change)
    with pytest.raises(UserError, match=message):
        checkpoint.load_params(model)


def test_tied_embeddings_have_no_head():
    tied = LlamaConfig(**{**CONFIG.__dict__, "tie_embeddings": True})
    assert "head" not in checkpoint.param_shapes(tied)


def test_existing_output_is_refused_before_anything_is_read(model):
    tree = map_shapes(lambda shape: LazyArray(shape, np.dtype("f4"), lambda: pytest.fail("read")))
    with pytest.raises(UserError, match="exists already"):
        save(model, tree)
    assert os.listdir(model.parent) == ["model"]


def test_output_that_appears_meanwhile_is_kept(tmp_path):
    def save():
        with checkpoint.new_directory(tmp_path / "m"):
            (tmp_path / "m").mkdir()
            (tmp_path / "m" / "precious").touch()

    with pytest.raises(UserError, match="exists already"):
        save()
    assert os.listdir(tmp_path) == ["m"]
    assert (tmp_path / "m" / "precious").exists()


def test_output_under_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="not a directory"):
        save(tmp_path / "file" / "m", random_params())


@pytest.mark.parametrize("error", [UserError("shard 3 is damaged"), KeyboardInterrupt()])
def test_interrupted_save_leaves_nothing(tmp_path, error):
    def read():
        raise error

    params = random_params()
    params["layers_1"]["mlp"]["up"]["kernel"] = LazyArray((128, 64), np.dtype("f4"), read)
    with pytest.raises(type(error)) as caught:
        save(tmp_path / "m", params)
    assert caught.value is error
    assert os.listdir(tmp_path) == []


def test_small_disk_is_refused_early(tmp_path, monkeypatch):
    usage = checkpoint.shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage)
    params = map_shapes(lambda s: LazyArray(s, np.dtype("f4"), lambda: pytest.fail("read")))
    with pytest.raises(UserError, match=r"disk full: needs 0\.\d\d MB, 0\.10 MB free"):
        save(tmp_path / "new" / "m", params)
    assert os.listdir(tmp_path) == []


def test_disk_that_fills_up_is_reported_and_left_clean(tmp_path, monkeypatch, capfd):
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", tmp_path],
        check=False,
        capture_output=True,
    )
    if mount.returncode:
        pytest.skip("cannot mount a small tmpfs here (needs root)")
    try:
        monkeypatch.setattr(checkpoint, "_refuse_small_disk", lambda *_: None)
        with pytest.raises(UserError, match=r"disk full: needs .* MB free; make room"):
            save(tmp_path / "m", random_params())
        assert os.listdir(tmp_path) == []
        assert capfd.readouterr() == ("", "")
    finally:
        subprocess.run(["umount", tmp_path], check=True)


SLOW_SAVE = """
import sys, time
sys.path.insert(0, "tests")
from test_checkpoint import CONFIG, LazyArray, map_shapes, np, save

def lazy(shape):
    def read():
        time.sleep(0.02)
        return np.ones(shape, np.float32)
    return LazyArray(shape, np.dtype("f4"), read)

save(sys.argv[1], map_shapes(lazy), progress=lambda name, size: print(name, flush=True))
"""


@pytest.mark.parametrize("tensors", [1, 12])
def test_killed_save_leaves_nothing_that_loads(tmp_path, tensors):
    root = Path(checkpoint.__file__).parents[1]
    command = [sys.executable, "-c", SLOW_SAVE, tmp_path / "m"]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE) as process:
        for _ in range(tensors):
            assert process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "m").exists()
    for leftover in tmp_path.iterdir():
        with pytest.raises(UserError):
            checkpoint.load_params(leftover)
    save(tmp_path / "m", random_params())
    checkpoint.load_params(tmp_path / "m")


def become(path, make):
    path.rename(path.with_name("old"))
    make(path)


def truncate(path, size):
    path.write_bytes(path.read_bytes()[:size])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda m: truncate(m / "params/norm.scale/0", 100), "has 100 bytes"),
        (lambda m: (m / "params/norm.scale/0").unlink(), "damaged or incomplete"),
        (lambda m: truncate(m / "params/norm.scale/.zarray", 9), "damaged or incomplete"),
        (lambda m: (m / "params/norm.scale/.zarray").unlink(), "damaged or incomplete"),
        (lambda m: truncate(m / "params/_METADATA", 100), "damaged or incomplete"),
        (lambda m: (m / "params/_METADATA").write_text("{}"), "damaged or incomplete"),
        (lambda m: (m / "params/_METADATA").unlink(), "damaged or incomplete"),
        (lambda m: truncate(m / "config.json", 50), "not valid JSON"),
        (lambda m: (m / "config.json").write_bytes(b"\xff{}"), "not UTF-8"),
        (lambda m: (m / "config.json").write_text("[]"), "expected a JSON object"),
        (lambda m: (m / "config.json").write_text("[" * 200_000), "not valid JSON"),
        (lambda m: become(m / "config.json", Path.mkdir), "config.json is no file in it"),
        (lambda m: become(m / "params", Path.touch), "params is a file in it"),
        (lambda m: (m / "config.json").unlink(), "no config.json in it"),
        (lambda m: (m / "params").rename(m / "elsewhere"), "no params in it"),
    ],
)
def test_damage_is_a_one_line_user_error(model, damage, message, capfd):
    damage(model)
    with pytest.raises(UserError, match=message) as caught:
        checkpoint.load_params(model)
    assert "\n" not in str(caught.value)
    assert str(model) in str(caught.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("consolidated.00.pth", "convert.meta_to_orbax"),
        ("model-00001-of-00002.safetensors", "convert.hf_to_orbax"),
        ("notes.txt", "no config.json and no params"),
    ],
)
def test_other_directories_are_told_apart(tmp_path, file, message):
    (tmp_path / file).touch()
    with pytest.raises(UserError, match=message):
        checkpoint.load_config(tmp_path)
    with pytest.raises(UserError, match="is a file"):
        checkpoint.load_config(tmp_path / file)
    with pytest.raises(UserError, match="does not exist"):
        checkpoint.load_config(tmp_path / "nowhere")


# --- quantized models ---

QUANTIZATIONS = [
    Quantization("int8", embeddings=True),
    Quantization("int4", group_size=32),
    Quantization("nf4", group_size=32, double_quantization=True),
]
each_quantization = pytest.mark.parametrize("quantization", QUANTIZATIONS, ids=lambda q: q.kind)


@pytest.fixture(scope="module")
def plain_model(tmp_path_factory):
    path = tmp_path_factory.mktemp("plain") / "model"
    save(path, random_params(jnp.bfloat16))
    return path


def quantized_model(path, quantization, dtype=jnp.bfloat16):
    params = jax.jit(quantization)(random_params(dtype))
    save(path, params, quantization=quantization)
    return params


@each_quantization
def test_quantized_leaves_come_back_bit_for_bit(tmp_path, quantization):
    params = quantized_model(tmp_path / "m", quantization)
    assert_same(checkpoint.load_params(tmp_path / "m"), params)
    assert checkpoint.load_quantization(tmp_path / "m") == (quantization, jnp.dtype(jnp.bfloat16))
    abstract = checkpoint.abstract_params(tmp_path / "m")
    assert jax.tree.structure(abstract) == jax.tree.structure(params)
    split = checkpoint.load_params(tmp_path / "m", mesh="data=4,tensor=2")
    assert_same(split, params)
    up = split["layers_0"]["mlp"]["up"]["kernel"].values
    assert {shard.data.shape for shard in up.addressable_shards} == {(64, 64)}
    told = json.loads((tmp_path / "m" / "provenance.json").read_text())["quantization"]
    assert (told["kind"], told["dtype"]) == (quantization.kind, "bfloat16")


@each_quantization
def test_what_was_loaded_is_stored_as_it_was(tmp_path, quantization):
    """4-bit integers are bytes once they are loaded on a CPU, and two to a byte in a file."""
    params = quantized_model(tmp_path / "m", quantization)
    loaded = checkpoint.load_params(tmp_path / "m")
    assert checkpoint.stored_bytes(loaded) == checkpoint.stored_bytes(params)
    save(tmp_path / "again", loaded, quantization=quantization)
    assert_same(checkpoint.load_params(tmp_path / "again"), loaded)


@each_quantization
def test_dtype_is_what_quantized_leaves_stand_for(tmp_path, quantization):
    params = quantized_model(tmp_path / "m", quantization)
    loaded = checkpoint.load_params(tmp_path / "m", dtype="float32")
    kernel, same = loaded["layers_1"]["attention"]["o"]["kernel"], params["layers_1"]["attention"]
    assert kernel.dtype == np.float32
    assert_same(kernel.replace(dtype=jnp.dtype(jnp.bfloat16)), same["o"]["kernel"])
    assert loaded["norm"]["scale"].dtype == np.float32


@each_quantization
@pytest.mark.parametrize("mesh", [None, "data=4,tensor=2"])
def test_quantizing_on_load_is_quantizing_what_is_stored(plain_model, quantization, mesh):
    expected = jax.jit(quantization)(random_params(jnp.bfloat16))
    assert_same(checkpoint.load_params(plain_model, quantize=quantization, mesh=mesh), expected)


def test_stock_orbax_restores_the_arrays_of_quantized_leaves(tmp_path):
    import orbax.checkpoint as ocp

    params = quantized_model(tmp_path / "m", QUANTIZATIONS[2])
    kernel = params["layers_0"]["mlp"]["up"]["kernel"]
    restored = ocp.StandardCheckpointer().restore(tmp_path / "m" / "params")
    stored = restored["layers_0"]["mlp"]["up"]["kernel"]
    assert_same(stored["scale"], {name: getattr(kernel.scale, name) for name in stored["scale"]})
    assert stored["values"].shape == (128, 32)
    codes = np.asarray(kernel.values).astype(np.uint8)
    np.testing.assert_array_equal(stored["values"], codes[:, ::2] | codes[:, 1::2] << 4)
    unpacked = checkpoint.unpack(stored["values"], jnp.uint4)
    assert unpacked.dtype == jnp.uint4
    np.testing.assert_array_equal(unpacked, kernel.values)


@pytest.mark.parametrize("quantize", [None, QUANTIZATIONS[1]])
def test_what_stock_orbax_wrote_is_quantized_or_read_as_quantized(tmp_path, quantize):
    """Remote directories and foreign layouts go by way of Orbax, not of mapped files."""
    import orbax.checkpoint as ocp

    path, params = tmp_path / "m", random_params()
    expected = jax.jit(QUANTIZATIONS[1])(params)
    save(
        path,
        *([params] if quantize else [expected]),
        quantization=None if quantize else QUANTIZATIONS[1],
    )
    stored = checkpoint.open_tree(checkpoint.epath.Path(path / "params"))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "params", stored, force=True)
    assert_same(checkpoint.load_params(path, quantize=quantize), expected)
    assert_same(checkpoint.load_params(path, quantize=quantize, mesh="tensor=2"), expected)


def test_a_model_is_never_on_its_devices_unquantized(plain_model, monkeypatch):
    """When a kernel is read, those before it are int8 already."""
    live = []
    make = jax.make_array_from_callback

    def measured(shape, *arguments):
        arrays = [x for x in jax.live_arrays() if x.shape == (128, 64) and x.dtype == jnp.bfloat16]
        live.append(len(arrays))
        return make(shape, *arguments)

    before = [x for x in jax.live_arrays() if x.shape == (128, 64) and x.dtype == jnp.bfloat16]
    monkeypatch.setattr(jax, "make_array_from_callback", measured)
    params = checkpoint.load_params(plain_model, quantize=Quantization("int8"))
    kernels = [x for x in jax.tree.leaves(params) if x.dtype == jnp.int8 and x.shape == (128, 64)]
    assert len(kernels) == 4
    assert max(live) - len(before) <= 1
    plain = checkpoint.load_params(plain_model)  # without, all of them are there
    assert max(live) - len(before) >= 3, plain.keys()


def test_a_quantized_model_is_not_quantized_again(tmp_path, plain_model):
    quantized_model(tmp_path / "m", QUANTIZATIONS[0])
    with pytest.raises(UserError, match="is quantized to int8 already; load it as it is"):
        checkpoint.load_params(tmp_path / "m", quantize=Quantization("int8"))
    with pytest.raises(UserError, match="is quantized to int8, expected the model"):
        checkpoint.refuse_quantized(tmp_path / "m")
    checkpoint.refuse_quantized(plain_model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "int4"}, r"embed\.embedding\.scale has shape \(256,\), quantization\.json says"),
        ({"kind": "int3"}, "'int3' is unknown"),
        ({"embeddings": False}, r"embed\.embedding is missing"),
        ({"bits": 8}, "is not what convert.quantize writes"),
        ({"dtype": "bfloat17"}, "is not what convert.quantize writes"),
    ],
)
def test_metadata_that_does_not_fit_the_tree(tmp_path, change, message):
    quantized_model(tmp_path / "m", QUANTIZATIONS[0])
    file = tmp_path / "m" / "quantization.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=message) as caught:
        checkpoint.load_params(tmp_path / "m")
    assert "\n" not in str(caught.value)
    file.write_text("{")
    with pytest.raises(UserError, match=r"is not what convert\.quantize writes"):
        checkpoint.load_params(tmp_path / "m")


def test_groups_that_would_lie_on_two_devices_are_refused(plain_model):
    message = r"groups of 64 of layers_0\.attention\.o\.kernel .* --group-size 32, or split"
    with pytest.raises(UserError, match=message):
        checkpoint.load_params(plain_model, quantize=Quantization("int4"), mesh="tensor=2")


def test_small_memory_is_refused_before_anything_is_read(plain_model, monkeypatch):
    monkeypatch.setattr(checkpoint, "_host_memory", lambda: 100_000)
    monkeypatch.setattr(checkpoint, "load_tree", lambda *_, **__: pytest.fail("read"))
    with pytest.raises(
        UserError, match=r"model needs 0\.\d\d MB of memory, this machine has 0\.10"
    ):
        checkpoint.load_params(plain_model)
    with pytest.raises(UserError, match="--mesh"):  # eight devices share the same memory
        checkpoint.load_params(plain_model, quantize=Quantization("int8"), mesh="data=8")


def test_small_device_memory_is_refused():
    class Device:
        platform = "gpu"

        def __init__(self, stats):
            self.memory_stats = lambda: stats

        def __str__(self):
            return "gpu:3"

    full = Device({"bytes_limit": 10_000_000_000, "bytes_in_use": 2_000_000_000})
    checkpoint.refuse_small_memory({full: 7_000_000_000, Device(None): 1 << 60}, "out/llama")
    with pytest.raises(
        UserError, match=r"out/llama needs 9\.00 GB of memory, gpu:3 has 8\.00 GB left"
    ):
        checkpoint.refuse_small_memory({full: 9_000_000_000}, "out/llama")


def test_a_leaf_of_zeros_is_stored(tmp_path):
    params = random_params()
    params["layers_0"]["mlp"]["up"]["kernel"][:] = 0
    quantized = jax.jit(Quantization("int4"))(params)
    save(tmp_path / "m", quantized, quantization=Quantization("int4"))
    assert_same(checkpoint.load_params(tmp_path / "m"), quantized)


def test_loading_a_mapped_model_needs_no_orbax(model):
    code = (
        "import sys; from llama_jax import checkpoint; checkpoint.load_params(sys.argv[1]);"
        "assert not any(name.startswith('orbax') for name in sys.modules)"
    )
    root = Path(checkpoint.__file__).parents[1]
    subprocess.run([sys.executable, "-W", "error", "-c", code, model], cwd=root, check=True)

"""infer.bench: the same tokens with and without a cache, what the figures mean, every mistake."""

import dataclasses
import json
import struct
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import CONFIGS, random_params

from infer import bench, generate, machine, plot, random_weights, workload
from infer.bench import Prepared
from infer.sampling import settings
from infer.workload import Case, Driver, Run, Setup
from llama_jax import checkpoint, config, sharding
from llama_jax.checkpoint import save_model
from llama_jax.errors import UserError
from llama_jax.quant import Int8, Quantization

ROOT = Path(__file__).parents[1]
CONFIG = dataclasses.replace(CONFIGS["6 heads on 2"], n_layers=1)
SHORT = ["--prompt-tokens", "5", "--new-tokens", "4", "--repeats", "2"]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "model"
    save_model(path, CONFIG, random_params(CONFIG), tokenizer=None, provenance={})
    return path


@pytest.fixture(scope="module", autouse=True)
def small():
    """A model that is no release, and a copy that takes no time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "COPY_BYTES", 1 << 16)
        patch.setitem(config.PRESETS, "tiny", CONFIG)
        yield


def make_setup(**changes):
    fields = {
        "model": "tiny",
        "config": CONFIG,
        "stored": False,
        "quantizations": {"none": None, "int8": Quantization("int8")},
        "dtype": "float32",
        "mesh": None,
        "int8_cache": False,
        "prompt_tokens": 5,
        "new_tokens": 12,
    }
    return Setup(**(fields | changes))


# --- what is run ---


@pytest.mark.parametrize("mesh", [None, "data=2,tensor=2"])
def test_tokens_are_those_of_generate_with_a_cache_and_without(monkeypatch, mesh):
    monkeypatch.setattr(generate, "CHUNK", 16)  # the prompt takes two
    mesh = mesh and sharding.make_mesh(mesh, CONFIG)
    setup = make_setup(mesh=mesh, prompt_tokens=20)
    params = random_params(CONFIG)
    if mesh is not None:
        params = jax.device_put(params, sharding.shardings(params, mesh))
    expected = generate.generate(
        CONFIG,
        params,
        setup.prompts(2),
        settings([(0, 0)] * 2, temperature=0),
        max_new_tokens=12,
    ).tokens[:, :12]
    for cache, make in ((True, workload.with_cache), (False, workload.without_cache)):
        compiled = bench.compile_case(setup, Case("none", cache, 2))
        run = bench.run_once(make(setup, compiled.programs, params, 2), 12)
        np.testing.assert_array_equal(run.tokens, expected)
        assert len(run.step_s) == workload.WINDOWS
    assert len(np.unique(expected)) > 8  # a model that repeats itself would prove little


def test_windows_make_all_tokens():
    taken = []

    def steps(state, n):
        taken.append(n)
        return state + n

    driver = Driver(lambda: np.int32(1), steps, lambda state: state)
    assert bench.run_once(driver, 128).tokens == 128
    assert sum(taken) == 127
    assert set(taken) == {15, 16}
    assert len(bench.run_once(driver, 3).step_s) == 2


def test_a_larger_batch_begins_with_the_rows_of_a_smaller_one():
    setup = make_setup()
    assert setup.prompts(8)[:3] == setup.prompts(3)


# --- what is reported ---


@pytest.fixture(scope="module")
def printed(model_dir, tmp_path_factory):
    """What one run of the command printed, and its picture."""
    picture = tmp_path_factory.mktemp("picture") / "bench.png"
    flags = ["--quantize", "none,int8", "--cache", "on,off", "--batch", "2", "--plot", str(picture)]
    with pytest.MonkeyPatch.context() as patch:
        lines = []
        patch.setattr("builtins.print", lambda text, file=None, **_: file or lines.append(text))
        bench.main(["--checkpoint", str(model_dir), *flags, *SHORT])
    return "\n".join(lines).splitlines(), picture


def test_the_last_line_is_json_that_agrees_with_itself(printed, model_dir):
    result = json.loads(printed[0][-1])
    rows = result.pop("rows")
    device = result.pop("device")
    assert device
    assert result == {
        "model": str(model_dir),
        "devices": 1,
        "mesh": None,
        "jax": jax.__version__,
        "dtype": "float32",
        "kv_cache": "as dtype",
        "prompt_tokens": 5,
        "new_tokens": 4,
        "repeats": 2,
        "interleaved": True,
        "peak_source": "process",
    }
    assert [(row["quantize"], row["cache"], row["batch"]) for row in rows] == [
        ("none", True, 2),
        ("none", False, 2),
        ("int8", True, 2),
        ("int8", False, 2),
    ]
    for row in rows:
        assert list(row) == list(bench.Row.__dataclass_fields__)
        assert row["tokens_per_s"] == pytest.approx(2 * 1000 / row["ms_per_token"])
        assert row["prefill_tokens_per_s"] == pytest.approx(2 * 5 / row["ttft_s"])
        assert row["gb_s"] == pytest.approx(row["step_bytes"] / row["ms_per_token"] / 1e6)
        assert row["share_of_copy"] == pytest.approx(row["gb_s"] / row["copy_gb_s"])
        for name in ("ttft_s", "ms_per_token"):
            assert 0 < row[f"{name}_min"] <= row[name] <= row[f"{name}_max"]
        assert row["compile_s"] > 0
        assert row["program_bytes"] > row["step_bytes"]  # its weights, and more
        assert row["peak_bytes"] > row["program_bytes"]
    assert rows[2]["step_bytes"] < rows[0]["step_bytes"] / 2


def test_the_table_has_a_line_for_each_configuration(printed):
    lines = printed[0]
    assert ", float32, 5 + 4 tokens, on " in lines[0]
    header, rule, *rows = [line for line in lines if line.startswith("|")]
    assert len(rows) == 4
    assert len({line.count("|") for line in (header, rule, *rows)}) == 1
    assert rows[1].startswith("| none | off | 2 |")
    assert "peak (process)" in header


def png_size(path):
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(data) > 10_000
    return struct.unpack(">II", data[16:24])


def test_pictures_are_of_a_size_to_read(printed, tmp_path):
    lines, picture = printed
    bars = png_size(picture)
    result = json.loads(lines[-1])
    rows = result["rows"]
    for batch, name in ((8, "points.png"), (16, "lines.png")):
        result["rows"] = result["rows"] + [
            row | {"batch": batch, "tokens_per_s": 100 * row["tokens_per_s"]} for row in rows
        ]
        plot.draw(result, "title\nof two lines", str(tmp_path / name))
        assert bars == png_size(tmp_path / name) == (1430, 650)


def test_a_row_has_the_medians_of_all_repeats():
    runs = [Run(0.3, [0.002, 0.004], np.zeros(0)), Run(0.1, [0.001, 0.002], np.zeros(0))]
    driver = Driver(lambda: None, lambda state, n: state, lambda state: state)
    costs = {
        "compile_s": 1.5,
        "program_bytes": 100,
        "step_bytes": 2_000_000,
        "peak_bytes": 300,
        "peak_is_bound": True,
    }
    prepared = Prepared(Case("int8", True, 4), driver, costs, runs)
    row = bench.make_row(make_setup(), prepared, 4.0)
    assert (row.ttft_s, row.ttft_s_min, row.ttft_s_max) == (pytest.approx(0.2), 0.1, 0.3)
    assert (row.ms_per_token, row.ms_per_token_min, row.ms_per_token_max) == (2, 1, 4)
    assert row.tokens_per_s == 2000
    assert row.prefill_tokens_per_s == pytest.approx(100)
    assert (row.gb_s, row.share_of_copy) == (1, 0.25)
    assert "at most 0.00 MB" in bench.table({"peak_source": "device", "rows": [bench.asdict(row)]})


def test_a_step_reads_weights_once_and_what_is_filled_of_the_cache():
    setup = make_setup(prompt_tokens=6, new_tokens=5)  # 6 to 9 positions are read, on average 8
    params = random_params(CONFIG)
    table = 4 * CONFIG.vocab_size * CONFIG.dim
    weights = sum(x.nbytes for x in jax.tree.leaves(params)) - table
    rows = 3 * 4 * CONFIG.dim
    position = 2 * CONFIG.n_layers * CONFIG.n_kv_heads * CONFIG.head_dim * 4
    without = bench.step_bytes(setup, params, Case("none", False, 3))
    assert without == weights + rows
    assert bench.step_bytes(setup, params, Case("none", True, 3)) == without + 3 * 8 * position
    int8 = make_setup(prompt_tokens=6, new_tokens=5, int8_cache=True)
    scales = 2 * CONFIG.n_layers * CONFIG.n_kv_heads * 4
    assert bench.step_bytes(int8, params, Case("none", True, 3)) == without + 3 * 8 * (
        position // 4 + scales
    )


# --- weights and memory ---


def test_random_weights_are_the_same_of_every_kind_and_on_every_mesh():
    setup = make_setup()
    plain = bench.make_weights(setup, "none")
    shapes = jax.tree.map(lambda x: x.shape, plain)
    assert shapes == checkpoint.param_shapes(CONFIG)
    assert float(jnp.std(plain["layers_0"]["mlp"]["up"]["kernel"])) == pytest.approx(0.02, rel=0.05)
    assert np.all(np.asarray(plain["norm"]["scale"]) == 1)
    split = make_setup(mesh=sharding.make_mesh("tensor=2", CONFIG))
    for one, kind in ((setup, "int8"), (split, "none"), (split, "int8")):
        made = bench.make_weights(one, kind)
        expected = plain if kind == "none" else jax.jit(Quantization(kind))(plain)
        jax.tree.map(np.testing.assert_array_equal, made, expected)
        abstract = bench.abstract_weights(one, kind)
        assert jax.tree.structure(abstract) == jax.tree.structure(made)
        assert sharding.device_bytes(abstract) == sharding.device_bytes(made)
    up = made["layers_0"]["mlp"]["up"]["kernel"].values
    assert {shard.data.shape for shard in up.addressable_shards} == {(40, 48)}


def test_no_second_copy_of_random_weights(monkeypatch):
    live = []
    make = random_weights.leaf_maker

    def counted(*arguments):
        kernels = [x for x in jax.live_arrays() if x.shape == (80, 48) and x.dtype == jnp.float32]
        live.append(len(kernels))
        return make(*arguments)

    monkeypatch.setattr(random_weights, "leaf_maker", counted)
    params = bench.make_weights(make_setup(), "int8")
    assert isinstance(params["layers_0"]["mlp"]["up"]["kernel"], Int8)
    assert len(set(live)) == 1


def test_small_memory_is_refused_before_anything_is_made(monkeypatch):
    setup = make_setup()
    monkeypatch.setattr(bench, "make_weights", lambda *_: pytest.fail("made"))
    monkeypatch.setattr(checkpoint, "_host_memory", lambda: 50_000)
    cases = [Case("none", True, 1), Case("int8", True, 1)]
    with pytest.raises(UserError, match=r"tiny needs 0\.\d\d MB of memory, this machine has 0\.05"):
        bench.bench(setup, cases, 1)


def test_kinds_that_do_not_fit_together_are_measured_one_after_the_other(monkeypatch, capsys):
    setup = make_setup(new_tokens=3)
    cases = [Case("none", False, 1), Case("int8", False, 1)]
    needed = []
    monkeypatch.setattr(checkpoint, "refuse_small_memory", lambda sizes, _: needed.append(sizes))
    bench.refuse_small_memory(setup, cases, {})
    monkeypatch.undo()
    monkeypatch.setattr(machine, "COPY_BYTES", 1 << 16)
    monkeypatch.setattr(checkpoint, "_host_memory", lambda: sum(needed[0].values()) - 1)
    result = bench.bench(setup, cases, 1)
    assert not result["interleaved"]
    assert [row["quantize"] for row in result["rows"]] == ["none", "int8"]
    assert "measured after the other, for together tiny needs 0." in capsys.readouterr().err


def test_kinds_whose_programs_do_not_fit_together(monkeypatch):
    """Known only when that of the second kind runs; none is compiled again."""
    setup = make_setup(new_tokens=3)
    prepare, calls, compiled = bench.prepare, [], []

    def full(setup, params, others, case, compiled):
        calls.append((case.quantize, others > 0))
        if others:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return prepare(setup, params, others, case, compiled)

    def counted(setup, case, compile_case=bench.compile_case):
        compiled.append(case.quantize)
        return compile_case(setup, case)

    monkeypatch.setattr(bench, "prepare", full)
    monkeypatch.setattr(bench, "compile_case", counted)
    result = bench.bench(setup, [Case("none", False, 1), Case("int8", False, 1)], 1)
    assert calls == [("none", False), ("int8", True), ("none", False), ("int8", False)]
    assert compiled == ["none", "int8"]
    assert not result["interleaved"]
    assert len(result["rows"]) == 2


def test_a_program_without_room_is_refused_before_there_are_weights(monkeypatch):
    setup = make_setup(new_tokens=3)
    case = Case("none", False, 1)
    compiled = bench.compile_case(setup, case)
    monkeypatch.setattr(bench, "make_weights", lambda *_: pytest.fail("made"))
    monkeypatch.setattr(checkpoint, "_host_memory", lambda: 10**9)
    large = compiled._replace(bytes=2 * 10**9)
    with pytest.raises(UserError, match=r"tiny needs 2\.00 GB of memory, this machine has 1\.00"):
        bench.measure(setup, [case], {case: large}, 1)


def test_memory_that_ends_while_it_runs_is_one_line():
    error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes\nmore")
    with (
        pytest.raises(UserError, match=r"\(Out of memory allocating 9 bytes\); make it smaller"),
        bench.full_memory_is_user_error(),
    ):
        raise error
    with pytest.raises(jax.errors.JaxRuntimeError), bench.full_memory_is_user_error():
        raise jax.errors.JaxRuntimeError("INTERNAL: a defect")


class Device:
    """One whose peak is told."""

    platform = "gpu"
    device_kind = "NVIDIA H100"

    def __init__(self, peak):
        self.memory_stats = lambda: {"peak_bytes_in_use": peak}


def test_the_peak_is_of_the_fullest_device_where_devices_tell():
    devices = [Device(5), Device(7)]
    assert machine.peak_source(devices) == "device"
    assert machine.peak_bytes(devices) == 7
    assert machine.device_name(Device(0)) == "NVIDIA H100"


def test_a_quantized_model_is_measured_as_it_is(tmp_path):
    how = Quantization("int8", embeddings=True)
    path = tmp_path / "int8"
    save_model(
        path, CONFIG, how(random_params(CONFIG)), tokenizer=None, provenance={}, quantization=how
    )
    args = bench.parse(["--checkpoint", str(path), "--quantize", "int8", *SHORT])
    with pytest.raises(UserError, match="is quantized to int8 already; leave --quantize out"):
        bench.make_setup(args)
    args = bench.parse(["--checkpoint", str(path), *SHORT])
    setup = bench.make_setup(args)
    name = "int8, embeddings too"
    assert bench.make_cases(args, setup) == [Case(name, True, 1)]
    made, abstract = bench.make_weights(setup, name), bench.abstract_weights(setup, name)
    assert sharding.device_bytes(made) == sharding.device_bytes(abstract)
    assert jax.tree.structure(made) == jax.tree.structure(abstract)


def test_flags_of_quantization_are_in_the_name():
    flags = ["--quantize", "none,int8,nf4", "--quantize-embeddings", "--group-size", "16"]
    args = bench.parse(["--preset", "tiny", *flags, "--double-quantization", *SHORT])
    setup = bench.make_setup(args)
    assert setup.quantizations == {
        "none": None,
        "int8, embeddings too": Quantization("int8", embeddings=True),
        "nf4 in groups of 16 with double quantization, embeddings too": Quantization(
            "nf4", True, 16, True
        ),
    }
    assert [case.quantize for case in bench.make_cases(args, setup)] == list(setup.quantizations)
    made = bench.make_weights(setup, "int8, embeddings too")
    assert isinstance(made["embed"]["embedding"], Int8)


# --- mistakes ---


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "neither of --preset and --checkpoint given"),
        (["--preset", "a", "--checkpoint", "b"], "both of --preset and --checkpoint given"),
        (["--preset", "a", "--quantize", "none,int3"], "--quantize has 'int3', expected some of"),
        (["--preset", "a", "--quantize", "int8,int8"], "--quantize has twice 'int8'"),
        (["--preset", "a", "--cache", "on,of"], "--cache has 'of', expected on, off or on,off"),
        (["--preset", "a", "--batch", "1,0"], "--batch has '0', expected positive numbers"),
        (["--preset", "a", "--batch", ""], "--batch has '', expected positive numbers"),
        (["--preset", "a", "--repeats", "0"], "--repeats is 0, expected at least 1"),
        (["--preset", "a", "--prompt-tokens", "0"], "--prompt-tokens is 0, expected at least 1"),
        (["--preset", "a", "--new-tokens", "1"], "--new-tokens is 1, expected at least 2"),
        (["--preset", "a", "--cache", "off", "--kv-cache", "int8"], "--kv-cache is of a cache"),
    ],
)
def test_mistakes_are_one_line(capsys, flags, words):
    with pytest.raises(SystemExit) as caught:
        bench.parse(flags)
    assert caught.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert words in line


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--preset", "llama-9"], "no preset is called 'llama-9'"),
        (["--checkpoint", "nowhere"], "nowhere does not exist"),
        (["--preset", "tiny", "--new-tokens", "60"], "exceed the model's context of 64"),
        (["--preset", "tiny", "--mesh", "data=2", *SHORT], "--batch 1 cannot be split over data=2"),
        (["--preset", "tiny", "--mesh", "tensor=16", *SHORT], "needs 16 devices"),
        (["--preset", "tiny", "--plot", "a.gif"], "expected a name that ends in .png, .pdf, .svg"),
        (["--preset", "tiny", "--plot", "no/a.png"], "no is not a directory; make it first"),
    ],
)
def test_mistakes_are_found_before_anything_is_measured(monkeypatch, flags, words):
    monkeypatch.setattr(bench, "bench", lambda *_: pytest.fail("measured"))
    with pytest.raises(UserError) as caught:
        bench.main(flags)
    assert words in str(caught.value)


def test_a_picture_that_cannot_be_written(tmp_path):
    folder = tmp_path / "a.png"
    folder.mkdir()
    with pytest.raises(UserError, match="which cannot be written"):
        plot.refuse(str(folder))
    with pytest.raises(UserError, match="which cannot be written"):
        plot.refuse("/proc/b.png")
    plot.refuse(str(tmp_path / "b.png"))
    assert not (tmp_path / "b.png").exists()


def test_without_matplotlib_a_line_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match=r"install 'llama-jax\[plot\]'"):
        plot.refuse(str(tmp_path / "a.png"))


def test_batches_of_a_profile_of_the_cache():
    assert bench.parse(["--preset", "a"]).batch == [1]
    assert bench.parse(["--preset", "a", "--cache", "on,off"]).batch == [1, 8, 16]
    assert bench.parse(["--preset", "a", "--cache", "on,off", "--batch", "2"]).batch == [2]


def test_the_command_exits_with_status_2():
    command = [sys.executable, "-m", "infer.bench", "--preset", "llama-9"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("infer.bench: error: no preset is called 'llama-9'")
    assert result.stderr.count("\n") == 1

"""The planner: chips, bad inputs, arithmetic, and plans of compiled programs that must add up."""

import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from infer import plan, topology
from infer.cost import Cost
from llama_jax.config import PRESETS
from llama_jax.errors import UserError
from llama_jax.quant import Quantization

ROOT = Path(__file__).parents[1]
TINY = dataclasses.replace(
    PRESETS["llama-3.2-1b"],
    vocab_size=2048,
    dim=512,
    n_layers=2,
    n_heads=8,
    n_kv_heads=8,
    mlp_dim=1024,
    tie_embeddings=False,
)
PROGRAM_KEYS = {
    "hbm_bytes",
    "step_hbm_bytes",
    "padded_hbm_bytes",
    "least_bytes",
    "argument_bytes",
    "temp_bytes",
    "flops",
    "estimated_cycles",
    "unestimated",
    "collectives",
    "roofline_tokens_per_s",
    "compile_s",
}


def needs(chips):
    part = topology.find_slice(chips)
    if not topology.installed(part.chip):
        pytest.skip(f"the compiler for {chips} is absent: pip install 'llama-jax[plan]'")
    return part


def request(chips, config=TINY, **changes):
    base = plan.Request(
        model="test",
        config=config,
        chips=needs(chips),
        mesh=changes.pop("mesh", None) or plan.default_mesh(config, needs(chips), 4),
        quantization=None,
        dtype="bfloat16",
        int8_cache=False,
        batch=4,
        context=256,
        prompt_tokens=16,
    )
    return dataclasses.replace(base, **changes)


@functools.cache
def planned(chips, preset=None):
    return plan.plan(request(chips, PRESETS[preset] if preset else TINY))


# Chips


def test_slices_have_the_names_under_which_they_are_rented():
    sizes = {name: (s.count, s.topology) for name, s in topology.SLICES.items()}
    assert sizes["v5e-1"] == (1, "1x1")
    assert sizes["v5e-16"] == sizes["v6e-16"] == (16, "4x4")
    assert sizes["v5e-256"] == (256, "16x16")
    assert sizes["v4-8"] == sizes["v5p-8"] == (4, "2x2x1")  # TensorCores, two a chip
    assert sizes["v5p-32"] == (16, "2x2x4")
    assert sizes["v4-512"] == (256, "4x8x8")
    assert sizes["h100-8"] == (8, "1x1x8")
    assert topology.find_slice("v5litepod-8") is topology.SLICES["v5e-8"]
    for part in topology.SLICES.values():
        chips = 1
        for side in part.topology.split("x"):
            chips *= int(side)
        assert chips == part.count, part.name


@pytest.mark.parametrize(
    "chips", ["v5e-1", "v5e-8", "v6e-16", "v4-8", "v5p-16", "h100-3", "a100-1", "a100-40g-8"]
)
def test_a_slice_has_a_device_for_each_chip(chips):
    part = needs(chips)
    environment = dict(os.environ)
    found = topology.devices(part)
    assert len(found) == part.count
    assert {d.platform for d in found} == {part.chip.platform.replace("cuda", "gpu")}
    assert os.environ == environment


def test_a_missing_compiler_is_named_with_the_way_to_get_it(monkeypatch):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    for chips, library in (("v5e-1", "libtpu"), ("h100-1", "the CUDA plug-in of JAX")):
        with pytest.raises(UserError, match=f"needs {library}; run: pip install 'llama-jax.plan.'"):
            topology.devices(topology.find_slice(chips))


def test_what_libraries_write_to_standard_error_is_kept_back(capfd):
    with topology.quiet():
        os.write(2, b"noise")
    os.write(2, b"error")
    assert capfd.readouterr().err == "error"
    with pytest.raises(ValueError, match="through"), topology.quiet():
        raise ValueError("comes through")


# The command


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "infer.plan", *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


def test_without_chips_all_are_listed(capsys):
    plan.main([])
    text = capsys.readouterr().out
    assert all(name in text for name in topology.CHIPS)
    plan.main(["--json"])
    listed = json.loads(capsys.readouterr().out)["chips"]
    assert listed["v5e"]["bandwidth"] == 819e9
    assert listed["h100"]["slices"] == [f"h100-{n}" for n in range(1, 9)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--chips v5e-12 --preset llama-3.2-1b", "did you mean v5e-1, v5e-4, v5e-8, v5e-16"),
        ("--chips v5e --preset llama-3.2-1b", "does not say how many; choose from v5e-1, v5e-4"),
        ("--chips h1000-8 --preset llama-3.2-1b", "did you mean h100-8"),
        ("--chips v5e-1 --preset llama-9", "no preset is called 'llama-9'"),
        ("--chips v5e-1 --checkpoint /nowhere", "/nowhere does not exist"),
        ("--chips v5e-1 --preset llama-3.2-1b --context 200000", "--context is 200000, expected"),
        ("--chips v5e-1 --preset llama-3.2-1b --context 1", "--context is 1, expected from 2"),
        (
            "--chips v5e-1 --preset llama-3.2-1b --context 64 --prompt-tokens 64",
            "--prompt-tokens 64 leaves no room in a context of 64",
        ),
        ("--chips v5e-8 --preset llama-3.2-1b --mesh tensor=4", "takes 4 chips, but v5e-8 has 8"),
        ("--chips v5e-8 --preset llama-3.2-1b --mesh tensor=16", "needs 16 devices"),
        ("--chips v5e-8 --preset llama-3.2-1b --mesh pipe=8", "expected sizes such as"),
        (
            "--chips v5e-8 --preset llama-3.2-1b --mesh data=2,tensor=4 --batch 3",
            "--batch 3 cannot be split over data=2",
        ),
        ("--chips v5e-128 --preset llama-3.2-1b", "has 128 chips, but this model splits over at"),
        ("--find --chips v5e-8 --preset llama-3.2-1b", "--find searches all chips or those of"),
        (
            "--chips v5e-8 --preset llama-3.2-1b --quantize int8 --group-size 64",
            "int8 has no group size",
        ),
        (
            "--chips v5e-8 --preset llama-3.2-1b --quantize int4 --double-quantization",
            "int4 has no double quantization",
        ),
        (
            "--chips v5e-8 --preset llama-3.2-1b --quantize nf4 --group-size 96",
            "group size 96 does not divide the 2048 inputs",
        ),
    ],
)
def test_a_mistake_is_one_line(arguments, message):
    needs("v5e-8")
    with pytest.raises(UserError) as error:
        plan.main(arguments.split())
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--chips v5e-1", "neither of --preset and --checkpoint given"),
        ("--chips v5e-1 --preset llama-3.2-1b --checkpoint x", "both of --preset and --checkpoint"),
        ("--chips v5e-1 --preset llama-3.2-1b --batch 0", "--batch is 0, expected at least 1"),
        ("--chips v5e-1 --preset llama-3.2-1b --prompt-tokens -1", "--prompt-tokens is -1"),
        ("--chips v5e-1 --preset llama-3.2-1b --quantize int5", "invalid choice: 'int5'"),
        (
            "--chips v5e-1 --preset llama-3.2-1b --quantize-embeddings",
            "--quantize-embeddings is for --quantize; add a kind",
        ),
        (
            "--chips v5e-1 --preset llama-3.2-1b --group-size 32",
            "--group-size is for --quantize; add a kind",
        ),
        ("--chips v5e-1 --preset llama-3.2-1b --group-size 1", "--group-size is 1, expected at"),
    ],
)
def test_a_mistake_in_the_flags_is_status_2(capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        plan.main(arguments.split())
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_what_cannot_fit_is_said_without_compiling():
    needs("h100-1")
    flags = ("--preset", "llama-3.1-405b", "--chips", "h100-1", "--context", "4096")
    flags += ("--mesh", "tensor=1")
    result = run(*flags, "--json", JAX_PLATFORMS="")  # with all that JAX finds by itself
    assert (result.returncode, result.stderr) == (0, "")
    told = json.loads(result.stdout)
    assert told["fits"] is False
    assert "weights and cache alone take" in told["reason"]
    memory = told["memory"]
    assert memory["weights"] == 2 * PRESETS["llama-3.1-405b"].count_parameters()
    assert memory["cache"] == 2 * 2 * 126 * 4096 * 8 * 128
    assert memory["total"] == memory["weights"] + memory["cache"] > memory["chip"]
    assert told["decode"]["hbm_bytes"] is told["decode"]["roofline_tokens_per_s"] is None
    assert told["decode"]["least_bytes"] > 0.99 * memory["weights"]
    assert set(told["decode"]) == set(told["prefill"]) == PROGRAM_KEYS
    assert told["mesh"] == "data=1,tensor=1"
    text = run(*flags)
    assert (text.returncode, text.stderr) == (0, "")
    assert (
        f"does not fit: weights and cache alone take {memory['total'] / 1e9:.2f} GB a chip of 80.70 GB"
        in text.stdout
    )
    assert "on h100-1: 1 chip, data=1,tensor=1\n" in text.stdout
    assert "decode, a step of 1 token\n" in text.stdout
    assert "prefill of 1 prompt of 512 tokens\n" in text.stdout


def test_find_passes_over_what_is_too_small_without_compiling(monkeypatch, capsys):
    needs("v5e-1")
    compiled = []

    def small(request, arrays):
        compiled.append(request.chips.name)
        return {}, "too small, says the compiler" if request.chips.count < 64 else None

    monkeypatch.setattr(plan, "compile_all", small)
    flags = "--preset llama-3.1-70b --batch 8 --context 4096 --find --chips v5e --json"
    plan.main(flags.split())
    output = capsys.readouterr()
    assert json.loads(output.out)["chips"] == "v5e-64"
    assert json.loads(output.out)["mesh"] == "data=1,tensor=64"
    # 141 GB of weights and 11 GB of cache: 8 chips of 17 GB cannot hold them, 16 can.
    assert compiled == ["v5e-16", "v5e-32", "v5e-64"]
    assert "v5e-8 is too small: weights and cache alone take" in output.err
    assert "v5e-32 is too small: too small, says the compiler" in output.err


# Arithmetic


def test_least_bytes_are_weights_once_and_the_cache():
    arrays = plan.make_arrays(request("v5e-8", mesh="data=1,tensor=8"))
    D, V, F, L = 512, 2048, 1024, 2
    table = V * D * 2 // 8  # embedding and head are split over the vocabulary
    layer = (4 * D * D + 3 * F * D) * 2 // 8 + 2 * D * 2  # norms are on every chip
    assert arrays.weights_bytes == 2 * table + L * layer + D * 2
    cache = 2 * L * 4 * 1 * 256 * 64 * 2  # a KV head a chip
    assert arrays.cache_bytes == cache
    rows = 4 * D * 2 // 8  # of the embedding
    decode = arrays.weights_bytes - table + rows + cache + cache // 256
    assert arrays.least_bytes(TINY, rows=4, positions=1, read=True) == decode
    prefill = arrays.weights_bytes - table + 16 * rows + 16 * cache // 256
    assert arrays.least_bytes(TINY, rows=4, positions=16, read=False) == prefill
    tied = dataclasses.replace(TINY, tie_embeddings=True)
    assert arrays.least_bytes(tied, rows=4, positions=1, read=True) == decode + table - rows


def test_quantized_weights_and_caches_take_less():
    plain, int8 = (
        plan.make_arrays(request("v5e-1", quantization=kind, int8_cache=kind is not None))
        for kind in (None, Quantization("int8"))
    )
    D, V, F, L = 512, 2048, 1024, 2
    kernels, rows = L * (4 * D * D + 3 * F * D), L * (5 * D + 2 * F)
    assert plain.weights_bytes == 2 * TINY.count_parameters()
    assert plain.weights_bytes - int8.weights_bytes == kernels - 4 * rows  # float32 scales
    elements = plain.cache_bytes // 2
    assert int8.cache_bytes == elements + elements // 64 * 4
    assert int8.weights_bytes > V * D * 2 * 2
    embeddings = Quantization("int8", embeddings=True)
    all_int8 = plan.make_arrays(request("v5e-1", quantization=embeddings))
    assert int8.weights_bytes - all_int8.weights_bytes == 2 * V * (D - 4)


def test_a_quantized_checkpoint_is_planned_as_it_is(tmp_path, monkeypatch, capsys):
    """nf4 in groups of 32 with scales of int8, not in the 64 of a model quantized while loading."""
    needs("v5e-1")
    monkeypatch.setattr(plan, "compile_all", lambda request, arrays: ({}, None))
    (tmp_path / "params").mkdir()
    (tmp_path / "config.json").write_text(json.dumps(TINY.to_dict()))
    flags = ["--checkpoint", str(tmp_path), "--chips", "v5e-1", "--context", "64", "--json"]
    how = ["--quantize", "nf4", "--group-size", "32", "--double-quantization"]

    def told(*more):
        plan.main([*flags, *more])
        return json.loads(capsys.readouterr().out)

    plain, halved = told("--quantize", "nf4"), told(*how)
    assert (plain["group_size"], plain["double_quantization"]) == (None, False)
    elements = TINY.n_layers * (4 * 512 * 512 + 3 * 1024 * 512)
    assert plain["memory"]["weights"] - halved["memory"]["weights"] == pytest.approx(
        elements // 64 * 4 - elements // 32, rel=0.1
    )
    stored = Quantization("nf4", group_size=32, double_quantization=True)
    fields = stored.to_dict() | {"dtype": "float32"}
    (tmp_path / "quantization.json").write_text(json.dumps(fields))
    assert told() == halved
    assert "nf4 weights in groups of 32 with int8 scales, " in plan.describe(halved)
    with pytest.raises(UserError, match="is quantized to nf4, expected the model that it was made"):
        plan.main([*flags, *how])


def test_the_mesh_takes_all_chips_for_each_row_if_the_heads_allow():
    of = functools.partial(plan.default_mesh, PRESETS["llama-3.2-1b"])
    assert of(topology.SLICES["v5e-8"], 1) == "data=1,tensor=8"
    assert of(topology.SLICES["v5e-32"], 3) == "data=1,tensor=32"
    assert of(topology.SLICES["v5e-64"], 8) == "data=2,tensor=32"
    with pytest.raises(UserError, match="splits over at most 32"):
        of(topology.SLICES["v5e-64"], 3)


# Compiled


def check(told, batch=4, prompt=16):
    memory, chip = told["memory"], topology.SLICES[told["chips"]].chip
    assert told["fits"] is True
    assert told["reason"] is None
    kinds = ("weights", "cache", "temporaries", "other")
    assert all(memory[kind] >= 0 for kind in kinds)
    assert sum(memory[kind] for kind in kinds) == memory["total"] <= memory["chip"]
    for name, tokens in (("prefill", batch * prompt), ("decode", batch)):
        program = told[name]
        assert set(program) == PROGRAM_KEYS
        assert 0.9 * program["least_bytes"] <= program["hbm_bytes"]
        assert program["hbm_bytes"] <= program["padded_hbm_bytes"]
        moved = program["step_hbm_bytes"] if name == "decode" else program["hbm_bytes"]
        seconds = max(moved / chip.bandwidth, program["flops"] / chip.bf16_flops)
        assert program["roofline_tokens_per_s"] == pytest.approx(tokens / seconds)
        assert program["compile_s"] > 0
        assert program["argument_bytes"] >= memory["weights"]
        assert (program["estimated_cycles"] is None) == (chip.clock is None)
    # Small weights may stay on a TPU from step to step, so a step may move less than the least.
    assert 0 < told["decode"]["step_hbm_bytes"] <= told["decode"]["hbm_bytes"]
    assert told["prefill"]["step_hbm_bytes"] is None
    assert told["decode"]["argument_bytes"] >= memory["weights"] + memory["cache"]


def flops(config, tokens, positions, rows):
    """Of the products with weights, for tokens; of attention at `positions` each; of the head."""
    attention = 2 * (config.n_heads + config.n_kv_heads) * config.head_dim * config.dim
    layer = attention + 3 * config.mlp_dim * config.dim
    mixing = 2 * config.n_heads * config.head_dim * positions
    return 2 * (config.n_layers * tokens * (layer + mixing) + rows * config.vocab_size * config.dim)


@pytest.mark.parametrize("chips", ["v5e-1", "v5e-8", "h100-1"])
def test_a_plan_adds_up(chips):
    told = planned(chips)
    check(told)
    count = topology.SLICES[chips].count
    # Where query heads share no KV head, XLA multiplies and sums instead of making products of
    # attention, and those are not counted.
    for name, tokens, positions in (("decode", 4, 257), ("prefill", 64, 16)):
        least, most = (flops(TINY, tokens, n, 4) / count for n in (0, positions))
        assert least <= told[name]["flops"] <= most
    text = plan.describe(told)
    assert f", data=1,tensor={count}\n" in text
    # On a TPU weights so small are fetched once a call.
    kept = "MB that it needs: the rest stays on the chip; "
    assert (kept in text) == chips.startswith("v5e")
    if chips.startswith("v5e"):
        assert told["decode"]["step_hbm_bytes"] < told["decode"]["least_bytes"]


@pytest.mark.parametrize(
    ("kind", "rate", "told"), [("int8", 197e12, "197 TFLOP/s"), ("w8a8", 393e12, "393 TFLOP/s")]
)
def test_int8_by_int8_has_a_rate_of_its_own(monkeypatch, kind, rate, told):
    program = plan.Compiled(Cost(hbm_bytes=1, flops=10**12), 0, 0, 0, 0.0)
    programs = {"prefill": program, "decode": program}
    monkeypatch.setattr(plan, "compile_all", lambda request, arrays: (programs, None))
    result = plan.plan(request("v5e-1", quantization=Quantization(kind)))
    assert result["prefill"]["roofline_tokens_per_s"] == pytest.approx(64 * rate / 1e12)
    assert told in plan.describe(result)


def test_one_chip_has_no_collectives_and_eight_have_two_a_layer():
    assert planned("v5e-1")["decode"]["collectives"] == {}
    assert planned("h100-1")["decode"]["collectives"] == {}
    found = planned("v5e-8")["decode"]["collectives"]
    reductions = sum(
        found.get(kind, {"count": 0})["count"] for kind in ("all-reduce", "reduce-scatter")
    )
    assert reductions >= 2 * TINY.n_layers
    assert found["all-reduce"]["bytes"] > 0


@pytest.mark.parametrize("chips", ["v5e-8", "h100-1"])
def test_a_released_model(chips):
    config = PRESETS["llama-3.2-1b"]
    told = planned(chips, "llama-3.2-1b")
    check(told)
    count = topology.SLICES[chips].count
    assert told["memory"]["weights"] >= 2 * config.count_parameters() / count
    assert told["memory"]["weights"] <= 1.001 * 2 * config.count_parameters() / count
    least, most = (flops(config, 4, n, 4) / count for n in (256, 258))
    assert least <= told["decode"]["flops"] <= 1.01 * most
    text = plan.describe(told)
    assert "fits: " in text
    assert "a chip to and from memory" in text


def test_json_is_one_object_and_standard_error_is_ours(tmp_path):
    needs("h100-1")
    (tmp_path / "params").mkdir()
    (tmp_path / "config.json").write_text(json.dumps(TINY.to_dict()))
    flags = ("--checkpoint", str(tmp_path), "--chips", "h100-1", "--context", "64", "--json")
    flags += ("--quantize", "int8", "--quantize-embeddings", "--kv-cache", "int8")
    result = run(*flags, "--batch", "2")
    assert result.returncode == 0
    first, *others = re.sub(r"\d+\.\d s", "N s", result.stderr).splitlines()
    assert first == f"infer.plan: tracing {tmp_path} for h100-1 (1x1x1)"
    assert sorted(others) == [
        f"infer.plan: {line}"
        for line in (
            "compiled decode in N s",
            "compiled prefill in N s",
            "compiling decode ...",
            "compiling prefill ...",
        )
    ]
    told = json.loads(result.stdout)
    check(told, batch=2, prompt=32)
    assert told["quantize"] == told["kv_cache"] == "int8"
    assert told["quantize_embeddings"] is True
    assert told["mesh"] == "data=1,tensor=1"


def test_a_long_prompt_is_read_in_chunks():
    one, three = (
        request("h100-1", batch=1, context=2048, prompt_tokens=n).shapes for n in (512, 1300)
    )
    assert (one.chunk, one.long) == (512, False)
    assert (three.chunk, three.long, three.room) == (512, True, 2048)


def test_a_compiler_that_runs_out_of_memory_is_no_traceback(monkeypatch):
    def out_of_memory(lowered, what):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Used 20G of 15.75G hbm.\nmore")

    monkeypatch.setattr(plan, "compile_program", out_of_memory)
    told = plan.plan(request("v5e-1"))
    assert told["fits"] is False
    assert told["reason"] == "Used 20G of 15.75G hbm."
    assert told["memory"]["total"] == told["memory"]["weights"] + told["memory"]["cache"]
    assert told["decode"]["compile_s"] is None

    def broken(lowered, what):
        raise jax.errors.JaxRuntimeError("INTERNAL: a bug")

    monkeypatch.setattr(plan, "compile_program", broken)
    with pytest.raises(jax.errors.JaxRuntimeError, match="a bug"):
        plan.plan(request("v5e-1"))

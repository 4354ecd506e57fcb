"""The planner of training: arithmetic of memory, mistakes, and one plan that is compiled."""

import dataclasses
import json

import jax
import pytest
from test_plan import needs

from infer import topology
from llama_jax.config import PRESETS
from llama_jax.errors import UserError
from llama_jax.lora import LoraConfig
from llama_jax.quant import Quantization
from train import plan

TINY = dataclasses.replace(
    PRESETS["llama-3.2-1b"],
    dim=512, n_layers=2, n_heads=8, n_kv_heads=8, head_dim=64, mlp_dim=1024, vocab_size=2048,
    tie_embeddings=False,
)  # fmt: skip
D, V, F, L, R = 512, 2048, 1024, 2, 16
LAYER = 4 * D * D + 3 * F * D


def request(chips, **changes):
    base = plan.Request(
        model="test",
        config=TINY,
        chips=needs(chips),
        mesh=f"fsdp={needs(chips).count}",
        adapters=LoraConfig(),
        quantization=None,
        optimizer="adamw",
        dtype="bfloat16",
        remat="full",
        batch=8,
        seq_len=128,
        accumulate=2,
    )
    return dataclasses.replace(base, **changes)


def bytes_of(*arguments, **changes):
    return plan.make_arrays(request(*arguments, **changes)).bytes


# Arithmetic


def test_a_device_has_its_part_of_the_base_and_of_the_optimizer():
    """Norms, and b of an adapter, whose output is not split, are on every device."""
    adapters = L * 2 * (R * D // 8 + D * R)
    assert bytes_of("v5e-8") == {
        "weights": 2 * ((2 * V * D + L * LAYER) // 8 + (2 * L + 1) * D),
        "adapters": 4 * adapters,
        "optimizer": 2 * 4 * adapters + 3 * 4,  # and the steps, that of the schedule among them
        "batch": 2 * 4 * 128 * 4,  # 2 micro-batches of a row: tokens, targets, weights, segments
    }


def test_all_parameters_learn_in_float32():
    weights = 4 * ((2 * V * D + L * LAYER) // 8 + (2 * L + 1) * D)
    told = bytes_of("v5e-8", adapters=None)
    assert (told["weights"], told["adapters"]) == (weights, 0)
    assert told["optimizer"] == 2 * weights + 3 * 4
    assert bytes_of("v5e-8", adapters=None, optimizer="lion")["optimizer"] < told["optimizer"] / 1.9


def test_a_quantized_base_takes_less():
    plain, int8, nf4 = (
        bytes_of("v5e-1", quantization=kind and Quantization(kind))["weights"]
        for kind in (None, "int8", "nf4")
    )
    rows = L * (5 * D + 2 * F)  # float32 scales of int8; of nf4 one for 64 weights
    assert plain - int8 == L * LAYER - 4 * rows
    assert plain - nf4 == 2 * L * LAYER - L * LAYER // 2 - 4 * L * LAYER // 64


def test_layers_one_by_one_take_what_stacked_ones_do():
    assert bytes_of("v5e-8", unrolled=True) == bytes_of("v5e-8")


# The command


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--batch 3", "--batch is 3, but the mesh splits a batch into 8 parts"),
        ("--mesh fsdp=4", "takes 4 chips, but v5e-8 has 8"),
        ("--seq-len 200000", "--seq-len is 200000, expected at most 131072"),
        ("--targets q,w", "an adapter's targets are q,w, expected some of q,k,v"),
    ],
)
def test_a_mistake_is_one_line(flags, message):
    needs("v5e-8")
    with pytest.raises(UserError, match=message):
        plan.main(["--preset", "llama-3.2-1b", "--chips", "v5e-8", *flags.split()])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--preset llama-3.2-1b", "no chips given"),
        ("--chips v5e-1", "neither of --preset and --checkpoint given"),
        ("--preset llama-3.2-1b --chips v5e-1 --rank 0", "--rank is 0, expected at least 1"),
        (
            "--preset llama-3.2-1b --chips v5e-1 --method full --quantize nf4",
            "--quantize is for --method lora",
        ),
        (
            "--preset llama-3.2-1b --chips v5e-1 --group-size 32",
            "--group-size is for --quantize; add a kind",
        ),
    ],
)
def test_a_mistake_in_the_flags_is_status_2(capsys, flags, message):
    with pytest.raises(SystemExit) as stop:
        plan.main(flags.split())
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_find_takes_the_smallest_slice_without_compiling_what_cannot_fit(monkeypatch, capsys):
    needs("v5e-1")
    tried = []

    def never(request, arrays):
        tried.append((request.chips.name, request.mesh, request.batch))
        return None, "too small, says the compiler" if len(tried) == 1 else None

    monkeypatch.setattr(plan, "compile_step", never)
    flags = "--preset llama-3.1-8b --method full --find --chips v5e --json"
    plan.main(flags.split())
    # 12 bytes for each of 8 billion parameters: 4 chips of 17 GB cannot hold them.
    assert tried == [("v5e-8", "fsdp=8", 8), ("v5e-16", "fsdp=16", 16)]
    told = json.loads(capsys.readouterr().out)
    assert (told["chips"], told["mesh"], told["fits"]) == ("v5e-16", "fsdp=16", True)
    text = plan.describe(told)
    assert "all parameters (8,030,261,248 parameters)" in text


# Compiled


def test_a_plan_adds_up():
    told = plan.plan(request("v5e-1", accumulate=1))
    assert (told["fits"], told["reason"], told["mesh"]) == (True, None, "")
    memory = told["memory"]
    assert sum(memory[kind] for kind in plan.MEMORY) == memory["total"] <= memory["chip"]
    assert all(memory[kind] >= 0 for kind in plan.MEMORY)
    step, chip = told["step"], topology.CHIPS["v5e"]
    assert step["tokens"] == 8 * 128
    assert step["argument_bytes"] >= memory["weights"] + memory["adapters"] + memory["optimizer"]
    # Layers forward, to the activations, and once more but for `down`, whose result nobody needs;
    # the head once less. Kernels of attention are not counted.
    products = 2 * (2 * V * D + L * (3 * LAYER - F * D))
    assert products <= step["flops_per_token"] <= 1.02 * products
    seconds = {"compute": step["flops"] / chip.bf16_flops, "memory": step["hbm_bytes"] / 819e9}
    assert step["roofline_s"] == max(seconds.values()) == seconds[step["bound"]]
    assert step["roofline_tokens_per_s"] == pytest.approx(step["tokens"] / step["roofline_s"])
    assert step["collectives"] == {}
    text = plan.describe(told)
    assert f"bound by {step['bound']}" in text
    assert "LoRA of rank 16 on q,v (65,536 parameters), adamw, 8 x 128 tokens" in text


def test_a_compiler_that_runs_out_of_memory_is_no_traceback(monkeypatch):
    def out_of_memory(lowered, what, prog):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Used 20G of 15.75G hbm.\nmore")

    monkeypatch.setattr(plan, "compile_program", out_of_memory)
    monkeypatch.setattr(plan, "lower", lambda request, arrays: None)
    told = plan.plan(request("v5e-1"))
    assert (told["fits"], told["reason"]) == (False, "Used 20G of 15.75G hbm.")
    assert told["step"]["flops"] is None
    assert "does not fit: Used 20G" in plan.describe(told)

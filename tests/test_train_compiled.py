"""What compiled training steps cost: figures of their texts that are the same on every machine.

The real compilers need no hardware. Layers are stacked, so that the time to compile is that of one;
a program is compiled once, by the first test that asks for it.

Frozen weights that fsdp splits are to be gathered as they are stored, twice for each step: forward,
and for the backward pass, which is rematerialized. The head is gathered once for all blocks of
logits. What else crosses devices are gradients of adapters and sums of the loss, and the tokens and
their embeddings.
"""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from test_compiled import needs

from infer import hlo, topology
from infer.cost import analyze
from llama_jax import checkpoint, lora, quant, sharding
from llama_jax.config import PRESETS
from llama_jax.lora import LoraConfig, everything
from llama_jax.quant import Quantization
from train import plan
from train.losses import next_token
from train.step import cast


def request(preset, chips, kind=None):
    """LoRA of rank 16 on q and v, a row of 2048 tokens a chip."""
    part = topology.find_slice(chips)
    return plan.Request(
        model=preset,
        config=PRESETS[preset],
        chips=part,
        mesh=f"fsdp={part.count}",
        adapters=LoraConfig(),
        quantization=kind and Quantization(kind),
        optimizer="adamw",
        dtype="bfloat16",
        remat="full",
        batch=part.count,
        seq_len=2048,
        accumulate=1,
    )


@functools.cache
def compiled(request):
    """(arrays, text, cost, total bytes)"""
    needs(request)
    arrays = plan.make_arrays(request)
    with topology.quiet():
        program = plan.lower(request, arrays).compile()
    text, memory = program.as_text(), program.memory_analysis()
    total = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    total += memory.output_size_in_bytes - memory.alias_size_in_bytes
    return arrays, text, analyze(text), total + memory.generated_code_size_in_bytes


def collectives(text, kind):
    """The type and the dimensions, but for those of 1, of every array that such a one makes."""
    found = set()
    for computation in hlo.parse(text).computations.values():
        for instruction in computation.instructions.values():
            if instruction.opcode.removesuffix("-start") == kind:
                found |= {
                    (array.dtype, tuple(n for n in array.dims if n > 1))
                    for array in hlo.leaves(instruction.shape)
                }
    return found


def kernels(config):
    D, F, H = config.dim, config.mlp_dim, config.head_dim
    N, K = config.n_heads * H, config.n_kv_heads * H
    return {"q": (N, D), "k": (K, D), "v": (K, D), "o": (D, N)} | {
        "gate": (F, D), "up": (F, D), "down": (D, F)
    }  # fmt: skip


BASE_8B = request("llama-3.1-8b", "v5e-8")
INT8_70B = request("llama-3.1-70b", "v5e-16", "int8")


@pytest.mark.parametrize(("request_", "dtype"), [(BASE_8B, "bf16"), (INT8_70B, "s8")])
def test_frozen_weights_are_gathered_as_they_are_stored(request_, dtype):
    config = request_.config
    _, text, cost, _ = compiled(request_)
    shapes = kernels(config)
    large = {array for array in collectives(text, "all-gather") if math.prod(array[1]) >= 1 << 20}
    head = {("bf16", (config.vocab_size, config.dim))}
    assert large == {(dtype, shape) for shape in shapes.values()} | head
    stored = quant_bytes = sum(math.prod(shape) for shape in shapes.values())
    stored *= {"bf16": 2, "s8": 1}[dtype]
    least = 2 * config.n_layers * stored + 2 * config.vocab_size * config.dim
    # Beside them scales of int8, adapters, and the ids of tokens.
    assert least <= cost.collectives["all-gather"].bytes <= least + 0.01 * quant_bytes * 64


@pytest.mark.parametrize("request_", [BASE_8B, INT8_70B])
def test_only_gradients_of_adapters_are_summed(request_):
    arrays, text, cost, _ = compiled(request_)
    config, rank = request_.config, request_.adapters.rank
    assert set(cost.collectives) <= {"all-gather", "all-to-all", "all-reduce", "reduce-scatter"}
    sums = collectives(text, "all-reduce") | collectives(text, "reduce-scatter")
    assert all(math.prod(dims) <= rank * config.mlp_dim for _, dims in sums)
    assert all(not dims or rank in dims for _, dims in sums)
    adapters = sum(x.size for x in jax.tree.leaves(arrays.state.trained))
    summed = sum(
        cost.collectives[kind].bytes
        for kind in ("all-reduce", "reduce-scatter")
        if kind in cost.collectives
    )
    assert summed <= 4 * adapters + 1024
    rows = 2 * request_.seq_len * config.dim  # of the embedding, for the tokens of a device
    assert cost.collectives["all-to-all"].bytes <= rows


@pytest.mark.parametrize("request_", [BASE_8B, INT8_70B])
def test_no_matrix_of_scores_and_no_converted_weight_is_in_memory(request_):
    _, _, cost, _ = compiled(request_)
    T, stored = request_.seq_len, set(kernels(request_.config).values())
    assert cost.temporaries
    for temporary in cost.temporaries:
        dtype, _, dims = temporary.shape[:-1].partition("[")
        dims = tuple(int(n) for n in dims.split(",") if int(n) > 1)
        assert dims.count(T) < 2, temporary
        if dims in stored:
            assert dtype == ("s8" if request_.quantization else "bf16"), temporary
        assert "copy" not in temporary.opcode or math.prod(dims) <= max(map(math.prod, stored))


@pytest.mark.parametrize("request_", [BASE_8B, INT8_70B])
def test_a_step_computes_what_it_must(request_):
    """Forward, to the activations, and once more but for `down`, whose result nobody needs."""
    config, (arrays, _, cost, _) = request_.config, compiled(request_)
    sizes = {name: math.prod(shape) for name, shape in kernels(config).items()}
    layer = 3 * sum(sizes.values()) - sizes["down"]
    products = 2 * request_.seq_len * (config.n_layers * layer + 3 * config.vocab_size * config.dim)
    adapters = sum(x.size for x in jax.tree.leaves(arrays.state.trained))
    assert products <= cost.flops <= products + 8 * 2 * request_.seq_len * adapters


def test_lora_on_8b_fits_8_chips():
    *_, total = compiled(BASE_8B)
    assert total <= 0.5 * BASE_8B.chips.chip.memory


def test_lora_on_an_int8_70b_fits_16_chips():
    *_, total = compiled(INT8_70B)
    assert total <= INT8_70B.chips.chip.memory


# --- a product ---


@pytest.mark.parametrize(
    ("kind", "dtype"), [(None, "bf16"), ("int8", "s8"), ("int4", "s4"), ("nf4", "u4")]
)
def test_a_kernel_travels_in_the_type_that_it_is_stored_in(kind, dtype):
    """The largest of 8B, in a product and in its gradient."""
    needs(BASE_8B)
    config = BASE_8B.config
    mesh = plan.make_mesh("fsdp=8", config, BASE_8B.chips)
    base = checkpoint.abstract(config, kind and Quantization(kind), jnp.bfloat16)
    mlp = base["layers_0"]["mlp"]
    kernel = sharding.placed(mlp, sharding.shardings(mlp, mesh))["gate"]["kernel"]
    rows = NamedSharding(mesh, PartitionSpec("fsdp"))
    x = jax.ShapeDtypeStruct((8, 256, config.dim), jnp.bfloat16, sharding=rows)

    def loss(x, kernel):
        return jnp.sum(quant.dot(x, sharding.gathered(kernel, "gate", "kernel")) ** 2)

    with topology.quiet(), sharding.use(mesh):
        text = jax.jit(jax.grad(loss)).lower(x, kernel).compile().as_text()
    gathered = collectives(text, "all-gather")
    assert (dtype, (config.mlp_dim, config.dim)) in gathered
    others = {array for array in gathered if array[0] != dtype}
    scales = jax.tree.leaves(kernel)[1:]
    assert {math.prod(dims) for _, dims in others} <= {x.size for x in scales}


# --- on CPU ---


CONFIG = oracle.CONFIGS["6 heads on 2"]


def gradient(params, mesh, remat, chosen):
    """Of the chosen leaves, on the mesh or on one device; and the text of the program."""
    trained, frozen = lora.split(params, chosen)
    if mesh is not None:
        trained, frozen = (
            jax.device_put(tree, sharding.shardings(tree, mesh)) for tree in (trained, frozen)
        )
    tokens = np.random.default_rng(0).integers(0, oracle.V, (8, 12)).astype(np.int32)
    ones = np.ones_like(tokens)
    batch = {"tokens": tokens, "targets": np.roll(tokens, -1, axis=1), "segments": ones}
    batch["weights"] = ones.astype(np.float32)

    def loss(trained, frozen, batch):
        params = cast(lora.join(trained, frozen), jnp.float32)
        return next_token(CONFIG, remat=remat)(params, batch, None)[0]

    with sharding.use(mesh):
        program = jax.jit(jax.grad(loss)).lower(trained, frozen, batch).compile()
    return program(trained, frozen, batch), program.as_text()


def assert_equal(ours, theirs):
    for a, b in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("sizes", "remat"), [("fsdp=4", "none"), ("data=2,fsdp=2,tensor=2", "full")]
)
def test_all_gradients_are_those_of_one_device(sizes, remat):
    params = oracle.random_params(CONFIG)
    mesh = sharding.make_mesh(sizes, CONFIG)
    ours, _ = gradient(params, mesh, remat, everything)
    theirs, _ = gradient(params, None, remat, everything)
    assert_equal(ours, theirs)


def test_adapters_on_int8_have_the_gradients_of_one_device():
    base = jax.jit(Quantization("int8"))(oracle.random_params(CONFIG))
    params = lora.add(base, LoraConfig(rank=4), jax.random.key(1))
    params = jax.tree.map_with_path(
        lambda path, x: x + 0.01 if lora.is_adapter(path) else x, params
    )  # b as well, which begins as 0
    ours, text = gradient(params, sharding.make_mesh("fsdp=4", CONFIG), "full", lora.is_adapter)
    theirs, _ = gradient(params, None, "full", lora.is_adapter)
    assert_equal(ours, theirs)
    assert re.search(r"= s8\[[\d,]+\]\S* all-gather", text)

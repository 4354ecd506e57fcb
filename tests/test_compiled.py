"""What compiled programs cost: figures of their texts that are the same on every machine.

The real compilers need no hardware. A program is compiled once, by the first test that asks for it.
Layers are alike and unrolled. Where a program of all layers would take too long to compile, one of
fewer stands for it: of 70B those of 8 and of 16 layers, which differ by what 8 layers cost, and so
tell what 80 do.

Of a conditional the dearest branch counts, so a step of decoding draws with top-k and top-p. Bytes
of a kernel are those of its operands, of what it writes in place those that its author estimates.
"""

import dataclasses
import functools
import math
from dataclasses import dataclass

import jax
import pytest

from infer import hlo, plan, topology
from infer.cost import Cost, analyze
from infer.generate import lower_programs
from llama_jax.config import PRESETS
from llama_jax.quant import Quantization

KERNEL = "tpu_custom_call"
FEW, MORE = 8, 16  # layers of 70B


@dataclass(frozen=True)
class Program:
    """What a device holds and does in one compiled program."""

    arrays: plan.Arrays
    cost: Cost
    argument_bytes: int
    text: str


def request(preset, chips, mesh, *, layers=None, **changes):
    """int8 everywhere and prompts of 512 tokens, unless `changes` say otherwise."""
    config = PRESETS[preset]
    base = plan.Request(
        model=preset,
        config=dataclasses.replace(config, n_layers=layers or config.n_layers),
        chips=topology.find_slice(chips),
        mesh=mesh,
        quantization=Quantization("int8", embeddings=True),
        dtype="bfloat16",
        int8_cache=True,
        batch=8,
        context=2048,
        prompt_tokens=plan.PROMPT,
    )
    return dataclasses.replace(base, **changes)


on_v5e_16 = functools.partial(request, chips="v5e-16", mesh="tensor=16")


def needs(request):
    if not topology.installed(request.chips.chip):
        chips = request.chips.name
        pytest.skip(f"the compiler for {chips} is absent: pip install 'llama-jax[plan]'")


@functools.cache
def arrays(request):
    needs(request)
    return plan.make_arrays(request)


@functools.lru_cache(maxsize=1)
def lowered(request):
    with topology.quiet():
        return lower_programs(request.config, arrays(request).params, request.shapes)


@functools.cache
def compiled(request, name="decode"):
    """`name` is that of a program of `infer.generate`."""
    with topology.quiet():
        program = lowered(request)[name].compile()
    text = program.as_text()
    size = program.memory_analysis().argument_size_in_bytes
    return Program(arrays(request), analyze(text), size, text)


def least_bytes(request):
    return arrays(request).least_bytes(request.config, request.batch, 1, read=True)


def even_share(request):
    """Bytes that each chip would hold if weights and cache were split without a remainder."""
    leaves = jax.tree.leaves((arrays(request).params, arrays(request).cache))
    return sum(x.size * x.dtype.itemsize for x in leaves) / request.chips.count


def all_layers(request, figure):
    """A figure of 70B: `figure` of a program of few layers, and what is in it for each further."""
    few, more = (figure(compiled(on_v5e_16(request.model, layers=n))) for n in (FEW, MORE))
    return few + (more - few) * (request.config.n_layers - FEW) // (MORE - FEW)


def smallest_kernel(request):
    """Bytes of the int8 kernel of keys on a chip of v5e-16: less than other kernels and a cache."""
    config = request.config
    return config.n_kv_heads * config.head_dim * config.dim // 8


def all_reduces(program):
    return program.cost.collectives["all-reduce"].count


# --- decoding on v5e-16: 16 chips, int8 weights and cache, 8 rows ---

LLAMA_8B, LLAMA_70B = on_v5e_16("llama-3.1-8b"), on_v5e_16("llama-3.1-70b")


def test_a_step_of_8b_moves_little_more_than_it_must():
    assert compiled(LLAMA_8B).cost.hbm_bytes <= 1.05 * least_bytes(LLAMA_8B)


def test_a_step_of_70b_moves_little_more_than_it_must():
    moved = all_layers(LLAMA_70B, lambda program: program.cost.hbm_bytes)
    assert moved <= 1.05 * least_bytes(LLAMA_70B)


def test_a_chip_holds_its_share_of_8b():
    """Kernels of queries, keys and values are on two chips each."""
    assert compiled(LLAMA_8B).argument_bytes <= 1.1 * even_share(LLAMA_8B)


def test_a_chip_holds_its_share_of_70b():
    held = all_layers(LLAMA_70B, lambda program: program.argument_bytes)
    assert held <= 1.1 * even_share(LLAMA_70B)


@pytest.mark.parametrize("request_", [LLAMA_8B, on_v5e_16("llama-3.1-70b", layers=MORE)])
def test_a_step_makes_no_copy_of_a_kernel_or_the_cache(request_):
    temporaries = compiled(request_).cost.temporaries
    assert temporaries
    assert all(t.bytes < smallest_kernel(request_) for t in temporaries)


@pytest.mark.parametrize(
    ("few", "more"),
    [
        (on_v5e_16("llama-3.1-8b", layers=2), LLAMA_8B),
        (on_v5e_16("llama-3.1-70b", layers=FEW), on_v5e_16("llama-3.1-70b", layers=MORE)),
    ],
)
def test_a_layer_has_two_all_reduces(few, more):
    layers = more.config.n_layers - few.config.n_layers
    assert all_reduces(compiled(more)) - all_reduces(compiled(few)) == 2 * layers
    # Others are of the embedding, of the filters, four bits at a time, and of the draw.
    assert all_reduces(compiled(few)) - 2 * few.config.n_layers <= 28


def test_the_compiler_estimates_a_step_of_8b_at_two_million_cycles():
    """Without the kernels, of which it has no estimate: their bytes are known."""
    cost = compiled(LLAMA_8B).cost
    assert cost.overflowed == ()
    assert 0 < cost.estimated_cycles <= 2.0e6
    kernels = cost.unestimated[KERNEL]
    assert kernels.count == 2 * LLAMA_8B.config.n_layers  # `attend` and `append`
    # All of the cache is read once; of a write in place the tiles around a position count.
    cache = compiled(LLAMA_8B).arrays.cache_bytes
    assert cache <= kernels.bytes <= 1.05 * cache


# --- prefill on v5e-8 ---

PREFILL = request(
    "llama-3.1-8b", "v5e-8", "tensor=8", layers=4, batch=1, context=4096, prompt_tokens=2048
)
CHUNKS = 4  # `start`, and three times `extend`


def test_prefill_computes_little_more_than_it_must():
    """Four layers of 8B: a head for each token, or attention beyond it, would weigh more than in 32.

    No figure tells what the kernel of `start` computes, nor how often the loop of `extend` over
    blocks of the cache runs. For both the whole blocks of 512 are added that a chunk attends to.
    """
    config, T, chunk = PREFILL.config, PREFILL.prompt_tokens, PREFILL.shapes.chunk
    assert CHUNKS * chunk == T
    layer = 2 * (config.n_heads + config.n_kv_heads) * config.head_dim * config.dim
    layer += 3 * config.mlp_dim * config.dim
    score = 4 * config.n_layers * config.n_heads * config.head_dim  # of a query and a key
    products = 2 * (config.n_layers * layer * T + config.vocab_size * config.dim)
    necessary = products + score * T * (T + 1) // 2
    counted = compiled(PREFILL, "start").cost.flops
    counted += (CHUNKS - 1) * compiled(PREFILL, "extend").cost.flops
    attended = sum(chunk * chunk * n for n in range(1, CHUNKS + 1))
    assert products <= PREFILL.chips.count * counted
    assert PREFILL.chips.count * counted + score * attended <= 1.1 * necessary


@pytest.mark.parametrize("name", ["start", "extend"])
def test_prefill_has_no_matrix_of_scores_in_memory(name):
    T, chunk = PREFILL.prompt_tokens, PREFILL.shapes.chunk
    for temporary in compiled(PREFILL, name).cost.temporaries:
        dims = [int(n) for n in temporary.shape.partition("[")[2][:-1].split(",")]
        assert math.prod(dims) < T * T, temporary
        assert dims.count(chunk) < 2, temporary


# --- others ---


def test_an_h100_multiplies_int8_weights_as_they_are():
    """Two layers of 8B, a row. Of 9% that it moves beyond the least 8% are of top-k and top-p."""
    step = request("llama-3.1-8b", "h100-1", "tensor=1", layers=2, batch=1)
    cost = compiled(step).cost
    assert cost.hbm_bytes <= 1.1 * least_bytes(step)
    logits = 4 * step.config.vocab_size
    assert logits < step.config.n_kv_heads * step.config.head_dim * step.config.dim
    assert all(t.bytes <= logits for t in cost.temporaries)


def test_a_bfloat16_cache_is_not_copied_in_a_step():
    """Two layers of 1B. Once a call each array of the cache is copied, before and behind the loop.

    With heads of 64 XLA passes it between programs in another order than the kernel reads it.
    """
    step = request(
        "llama-3.2-1b", "v5e-1", "tensor=1", layers=2, batch=4,
        quantization=None, int8_cache=False,
    )  # fmt: skip
    program = compiled(step)
    outside = hlo.parse(program.text).entry.instructions
    keys = jax.tree.leaves(program.arrays.cache)[0]
    temporaries = program.cost.temporaries
    copies = [t for t in temporaries if t.bytes >= keys.size * keys.dtype.itemsize]
    assert all(copy.name in outside for copy in copies)
    assert len(copies) <= 2 * step.config.n_layers
    assert program.cost.unestimated[KERNEL].count == step.config.n_layers

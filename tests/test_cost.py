"""Traffic, operations and collectives of programs that can be counted by hand.

Each is compiled for the CPU and, without their hardware, for a TPU v5e and an H100.
"""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from infer import topology
from infer.cost import Work, analyze
from llama_jax import decode_kernels

CHIPS = ("cpu", "v5e-4", "h100-4")
SLACK = 64  # bytes of counters and indices, which are scalars


@functools.cache
def devices(chip):
    if chip == "cpu":
        return jax.devices()[:4]
    part = topology.find_slice(chip)
    if not topology.installed(part.chip):
        pytest.skip(f"the compiler for {chip} is absent: pip install 'llama-jax[plan]'")
    return topology.devices(part)


def count(chip, function, *args, donate=(), specs=None, out=None):
    """The cost of `function`; args are (shape, dtype). `specs` splits them over four devices."""
    if specs is None:
        places = [SingleDeviceSharding(devices(chip)[0])] * len(args)
        target = None
    else:
        mesh = Mesh(devices(chip), ("x",))
        places = [NamedSharding(mesh, PartitionSpec(*spec)) for spec in specs]
        target = NamedSharding(mesh, PartitionSpec(*(out or ())))
    shapes = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=place)
        for (shape, dtype), place in zip(args, places, strict=True)
    ]
    with topology.quiet():
        program = jax.jit(function, donate_argnums=donate, out_shardings=target)
        return analyze(program.lower(*shapes).compile().as_text())


def real(chip):
    """The type that a chip computes in: on CPU, XLA turns bfloat16 into float32 first."""
    return jnp.float32 if chip == "cpu" else jnp.bfloat16


def size(chip, *shape):
    n = real(chip).dtype.itemsize
    for dim in shape:
        n *= dim
    return n


@pytest.mark.parametrize("chip", CHIPS)
def test_a_product_reads_its_operands_and_writes_its_result_once(chip):
    kind = real(chip)
    cost = count(chip, lambda x, w: x @ w.T, ((8, 512), kind), ((65536, 512), kind))
    expected = size(chip, 8, 512) + size(chip, 65536, 512) + size(chip, 8, 65536)
    assert cost.hbm_bytes == expected
    assert cost.flops == 2 * 8 * 512 * 65536
    assert not cost.collectives
    assert not cost.temporaries


@pytest.mark.parametrize("chip", CHIPS)
def test_an_int8_weight_is_read_as_int8_except_on_cpu(chip):
    kind = real(chip)
    cost = count(
        chip, lambda x, w: x @ w.T.astype(x.dtype), ((8, 512), kind), ((65536, 512), jnp.int8)
    )
    small = size(chip, 8, 512) + size(chip, 8, 65536)
    if chip == "cpu":  # written as float32 and read again
        assert cost.hbm_bytes == small + 65536 * 512 * (1 + 4 + 4)
        assert cost.temporaries[0].bytes == 65536 * 512 * 4
        assert cost.temporaries[0].shape == "f32[65536,512]"
    else:
        assert cost.hbm_bytes == small + 65536 * 512
        assert not cost.temporaries
    assert cost.flops == 2 * 8 * 512 * 65536


@pytest.mark.parametrize("chip", CHIPS)
def test_int4_weights_take_half_a_byte(chip):
    kind = real(chip)
    cost = count(
        chip, lambda x, w: x @ w.T.astype(x.dtype), ((8, 512), kind), ((65536, 512), jnp.int4)
    )
    dequantized = 2 * 65536 * 512 * 4 if chip == "cpu" else 0
    small = size(chip, 8, 512) + size(chip, 8, 65536)
    assert cost.hbm_bytes - dequantized == small + 65536 * 512 // 2


@pytest.mark.parametrize("chip", CHIPS)
def test_what_lies_between_two_products_counts_where_it_reaches_memory(chip):
    kind = real(chip)
    shapes = ((8, 1024), kind), ((16384, 1024), kind), ((512, 16384), kind)
    cost = count(chip, lambda x, a, b: jnp.tanh(x @ a.T) @ b.T, *shapes)
    operands = size(chip, 8, 1024) + size(chip, 16384, 1024) + size(chip, 512, 16384)
    result, between = size(chip, 8, 512), size(chip, 8, 16384)
    assert cost.flops == 2 * 8 * (1024 * 16384 + 16384 * 512)
    if chip.startswith("v5e"):  # kept on the chip
        assert cost.hbm_bytes == operands + result
    else:  # at least written and read, at most a few times: float32 and partial sums
        assert operands + result + 2 * between <= cost.hbm_bytes
        assert cost.hbm_bytes <= operands + result + 16 * between
        assert between <= sum(t.bytes for t in cost.temporaries)


@pytest.mark.parametrize("chip", CHIPS)
def test_fused_elementwise_operations_count_once(chip):
    kind = real(chip)
    shape = (4096, 8192), kind
    cost = count(chip, lambda x, y: jnp.tanh(x + y) * 2 - y, shape, shape)
    assert cost.hbm_bytes == 3 * size(chip, 4096, 8192)
    assert cost.flops == 0


@pytest.mark.parametrize("chip", CHIPS)
def test_a_gather_reads_rows_not_the_table(chip):
    kind = real(chip)
    # A smaller table the TPU would bring onto the chip as a whole.
    cost = count(chip, lambda table, i: table[i], ((1 << 18, 512), kind), ((8,), jnp.int32))
    assert cost.hbm_bytes == 2 * size(chip, 8, 512) + 8 * 4


@pytest.mark.parametrize("chip", CHIPS)
def test_a_scatter_into_a_donated_buffer_writes_the_updates(chip):
    kind = real(chip)
    shapes = ((65536, 512), kind), ((8,), jnp.int32), ((8, 512), kind)

    def scatter(buffer, i, update):
        return buffer.at[i].set(update, mode="drop")

    rows = size(chip, 8, 512)
    donated = count(chip, scatter, *shapes, donate=0)
    assert 2 * rows <= donated.hbm_bytes <= 2 * rows + 4 * 8 * 4  # the indices, twice on the way
    assert not [t for t in donated.temporaries if t.bytes >= rows]
    kept = count(chip, scatter, *shapes)  # the buffer is copied
    assert kept.hbm_bytes - donated.hbm_bytes == 2 * size(chip, 65536, 512)


def _fill(buffer, row, n):
    """Writes `row` n times, once a step."""

    def step(carry):
        i, buffer = carry
        return i + 1, jax.lax.dynamic_update_slice(buffer, row[None] + i.astype(row.dtype), (i, 0))

    return jax.lax.while_loop(lambda c: c[0] < n, step, (jnp.int32(0), buffer))[1]


@pytest.mark.parametrize("chip", CHIPS)
def test_an_update_in_a_loop_of_unknown_length_counts_one_step(chip):
    kind = real(chip)
    shapes = ((512, 65536), kind), ((65536,), kind), ((), jnp.int32)
    cost = count(chip, _fill, *shapes, donate=0)
    row = size(chip, 65536)
    assert 2 * row <= cost.hbm_bytes <= 2 * row + SLACK + (2 * row if chip == "v5e-4" else 0)
    assert row <= cost.open_loop_bytes <= 2 * row + SLACK
    assert not [t for t in cost.temporaries if t.bytes > row]


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("trips", [1, 3, 7])
def test_a_loop_of_known_length_counts_each_step(chip, trips):
    kind = real(chip)

    def run(x, w):
        return jax.lax.fori_loop(0, trips, lambda i, x: jnp.tanh(x @ w.T), x)

    n = 8192  # the weight is larger than the memory on a chip
    cost = count(chip, run, ((8, n), kind), ((n, n), kind))
    assert cost.flops == trips * 2 * 8 * n * n
    least = trips * size(chip, n, n)
    assert least <= cost.hbm_bytes <= 1.05 * least  # activations, 1/1024 each time, partial sums
    assert cost.open_loop_bytes == 0


@pytest.mark.parametrize("chip", CHIPS)
def test_a_loop_over_stacked_weights_reads_a_slice_each_step(chip):
    kind = real(chip)

    def run(x, stack):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, stack)[0]

    cost = count(chip, run, ((8, 4096), kind), ((6, 4096, 4096), kind))
    weights = size(chip, 6, 4096, 4096)
    copies = 1 if chip.startswith("v5e") else 3  # elsewhere each slice is written and read again
    assert copies * weights <= cost.hbm_bytes <= 1.05 * copies * weights
    assert cost.flops == 6 * 2 * 8 * 4096 * 4096


@pytest.mark.parametrize("chip", CHIPS)
def test_of_a_conditional_the_dearest_branch_counts(chip):
    kind = real(chip)
    small, large = ((8192, 256), kind), ((8192, 8192), kind)

    def run(which, x, a, b):
        return jax.lax.cond(which, lambda: (x @ a).sum(), lambda: (x @ b).sum())

    cost = count(chip, run, ((), bool), ((8, 8192), kind), small, large)
    assert cost.flops == 2 * 8 * 8192 * 8192
    # Activations are 1/1024 of the weight; a GPU writes and reads float32 partial sums of them.
    assert size(chip, 8192, 8192) <= cost.hbm_bytes <= 1.05 * size(chip, 8192, 8192)


@pytest.mark.parametrize("chip", CHIPS)
def test_batched_products_count_no_padding(chip):
    kind = real(chip)

    def scores(q, k):
        return jnp.einsum("bkgh,bksh->bkgs", q, k, preferred_element_type=jnp.float32)

    cost = count(chip, scores, ((8, 4, 4, 128), kind), ((8, 4, 1024, 128), kind))
    assert cost.flops == 2 * 8 * 4 * 4 * 1024 * 128
    inputs = size(chip, 8, 4, 4, 128) + size(chip, 8, 4, 1024, 128)
    assert cost.hbm_bytes == inputs + 8 * 4 * 4 * 1024 * 4


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize(
    ("out", "kind"), [((), "all-reduce"), ((None, "x"), "reduce-scatter")], ids=["all", "scatter"]
)
def test_collectives_are_counted_by_kind(chip, out, kind):
    dtype = real(chip)
    shapes = ((8, 4096), dtype), ((4096, 8192), dtype)
    specs = (None, "x"), ("x", None)
    cost = count(chip, lambda x, w: x @ w, *shapes, specs=specs, out=out)
    if chip == "cpu":
        kind = "all-reduce"  # of which a slice is kept
    assert {name: work.count for name, work in cost.collectives.items()} == {kind: 1}
    assert cost.collectives[kind].bytes == size(chip, 8, 8192)
    assert cost.flops == 2 * 8 * 1024 * 8192  # a quarter, on each device
    assert cost.hbm_bytes >= size(chip, 1024, 8192)


@pytest.mark.parametrize("chip", CHIPS)
def test_collectives_in_a_loop_count_each_time(chip):
    dtype = real(chip)

    def run(x, w):
        return jax.lax.fori_loop(0, 5, lambda i, x: jnp.tanh(x @ w), x)

    shapes = ((8, 4096), dtype), ((4096, 4096), dtype)
    cost = count(chip, run, *shapes, specs=((), ("x", None)), out=())
    in_loop = "all-reduce" if chip == "cpu" else "reduce-scatter"  # GPUs and TPUs keep a slice
    counts = {name: work.count for name, work in cost.collectives.items()}
    assert counts == {in_loop: 5, "all-gather": 1}
    assert cost.collectives[in_loop].bytes == 5 * size(chip, 8, 4096)


def test_a_gather_of_shards_is_an_all_gather():
    cost = count("cpu", lambda x: x * 2, ((4096, 64), jnp.float32), specs=(("x",),), out=())
    assert {name: work.count for name, work in cost.collectives.items()} == {"all-gather": 1}
    assert cost.collectives["all-gather"].bytes == 4096 * 64 * 4


@pytest.mark.parametrize(
    ("layout", "elements"),
    [
        ("{1,0:T(8,128)(2,1)}", 24 * 128),  # rows of 100 take 128 lanes
        ("{0,1:T(8,128)(2,1)}", 104 * 128),  # columns of 20 take 128 lanes, 100 rows take 104
        ("{1,0}", 20 * 100),
    ],
)
def test_tiles_are_padded(layout, elements):
    text = PROGRAM.replace("f32[4,8]{1,0}", f"bf16[20,100]{layout}").replace("CYCLES", "1")
    cost = analyze(text)
    assert cost.hbm_bytes == 5 * 20 * 100 * 2
    assert cost.padded_hbm_bytes == 5 * elements * 2


@pytest.mark.parametrize(("chip", "counts"), [("tpu", False), ("gpu", True)])
def test_memory_on_the_chip_is_free_on_tpus(chip, counts):
    tiles = ":T(8,128)S(1)" if chip == "tpu" else ":S(1)"
    text = PROGRAM.replace("f32[4,8]{1,0}", f"f32[4,8]{{1,0{tiles}}}").replace("CYCLES", "1")
    assert analyze(text).hbm_bytes == (5 * 128 if counts else 0)


def test_tpu_estimates_are_summed_and_the_rest_is_named():
    def run(x, w):
        return jax.lax.fori_loop(0, 4, lambda i, x: jnp.tanh(x @ w.T), x)

    shapes = ((8, 8192), jnp.bfloat16), ((8192, 8192), jnp.bfloat16)
    four = count("v5e-4", run, *shapes)
    one = count("v5e-4", lambda x, w: jnp.tanh(x @ w.T), *shapes)
    # A product at the speed of memory takes the time of its bytes, and the compiler knows it.
    seconds = 8192 * 8192 * 2 / topology.CHIPS["v5e"].bandwidth
    estimate = one.estimated_cycles / topology.CHIPS["v5e"].clock
    assert seconds <= estimate <= 2 * seconds
    assert 3.5 * one.estimated_cycles <= four.estimated_cycles <= 5 * one.estimated_cycles
    assert set(four.unestimated) <= {"copy", "add", "compare"}
    assert not four.overflowed


PROGRAM = """HloModule m, is_scheduled=true, entry_computation_layout={(f32[4,8]{1,0})->f32[4,8]{1,0}}

%body (p: f32[4,8]) -> f32[4,8] {
  %p = f32[4,8]{1,0} parameter(0)
  ROOT %n = f32[4,8]{1,0} negate(%p), metadata={op_name="a, b) {"}
}

ENTRY %main (x: f32[4,8]) -> f32[4,8] {
  %x = f32[4,8]{1,0} parameter(0), metadata={op_name="x"}
  %f = f32[4,8]{1,0} fusion(%x), kind=kLoop, calls=%body, backend_config={"window_config":{"estimated_cycles":"CYCLES"}}
  %c = f32[4,8]{1,0} custom-call(%f), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"body":"AA{==","cost_estimate":{"flops":"77","transcendentals":"0","bytes_accessed":"1000"}}}
  ROOT %k = f32[4,8]{1,0} custom-call(%c), custom_call_target="mine", output_to_operand_aliasing={{}: (0, {})}
}
"""


def test_custom_calls_count_by_their_operands_and_the_estimate_of_operations():
    cost = analyze(PROGRAM.replace("CYCLES", "120"))
    assert cost.hbm_bytes == 2 * 128 + 2 * 128 + 128  # the last one writes into its operand
    assert cost.flops == 77
    assert cost.estimated_cycles == 120
    assert cost.unestimated == {
        "tpu_custom_call": Work(1, 256, 77),
        "mine": Work(1, 128, 0),
    }
    assert [t.name for t in cost.temporaries] == ["c", "f"]


@pytest.mark.parametrize(("estimate", "counted"), [(1000, 256), (100, 100), (0, 128)])
def test_what_a_kernel_writes_in_place_counts_by_its_estimate(estimate, counted):
    """At most read and written as a whole; where no bytes are estimated, as any operand."""
    aliased = '"tpu_custom_call", output_to_operand_aliasing={{}: (0, {})}'
    text = PROGRAM.replace("CYCLES", "1").replace('"tpu_custom_call"', aliased)
    cost = analyze(text.replace('"1000"', f'"{estimate}"'))
    assert cost.unestimated["tpu_custom_call"] == Work(1, counted, 77)
    assert cost.hbm_bytes == 2 * 128 + counted + 128


def test_the_write_of_a_position_counts_the_tiles_around_it_and_not_the_cache():
    B, K, S, H = 1, 4, 4096, 128
    mesh = Mesh(devices("v5e-1"), ("x",))
    place = NamedSharding(mesh, PartitionSpec())

    def shape(*sizes, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=place)

    def run(cached, k, v, n):
        append = decode_kernels.append
        return jax.lax.fori_loop(0, n, lambda i, cached: append(cached, k, v, i[None]), cached)

    entries = shape(B, K, S, H, dtype=jnp.int8), shape(B, K, 1, S, dtype=jnp.float32)
    with jax.set_mesh(mesh), topology.quiet():
        program = jax.jit(run, donate_argnums=0)
        lowered = program.lower(entries * 2, *[shape(B, K, H)] * 2, shape(dtype=jnp.int32))
        cost = analyze(lowered.compile().as_text())
    tiles = 2 * B * K * (decode_kernels.ROWS * H + 4 * decode_kernels.LANES)  # keys and values
    new = 2 * B * K * H * 2
    assert 2 * tiles <= cost.open_loop_bytes <= 2 * tiles + new + SLACK
    assert cost.hbm_bytes <= 2 * tiles + 3 * new + SLACK  # brought onto the chip


@pytest.mark.parametrize("cycles", ["9223372036854775807", "-5"])
def test_estimates_that_overflowed_are_left_out(cycles):
    cost = analyze(PROGRAM.replace("CYCLES", cycles))
    assert cost.estimated_cycles == 0
    assert cost.overflowed == ("f",)


def test_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        analyze("module @jit_f { }")

"""One model on eight devices: the same tokens, really split, with two sums a layer."""

import dataclasses
import functools
import io
import math
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece
from jax.sharding import PartitionSpec
from oracle import random_params, tiny
from test_generate import completions, count_compilations, greedy, sampled

import infer.generate
import llama_jax
from infer import hlo, sample
from infer.cost import COLLECTIVES, analyze
from infer.generate import (
    Shapes,
    chunks,
    compile_programs,
    generate,
    lower_programs,
    make_request,
    request_shapes,
)
from llama_jax import quant, sharding
from llama_jax.checkpoint import abstract, save_model
from llama_jax.command import run
from llama_jax.errors import UserError
from llama_jax.model import forward
from llama_jax.quant import Quantization

# Logits of the same model by float32 sums in another order.
LOGITS_ATOL = 1e-4

V, D, L, N, K, H, F = 304, 128, 2, 8, 4, 8, 256
CONFIG = dataclasses.replace(tiny(N, K, dim=D, head_dim=H), vocab_size=V, mlp_dim=F)
MESHES = "data=2,tensor=4", "tensor=8"  # of the second, `query` takes 2: there are 4 KV heads
INT8 = Quantization("int8", embeddings=True)
# Of lengths 5, 1, 23 and 2.
PROMPTS = [[3, 14, 15, 292, 65], [35], [8, 9, 79, 3, 23, 84, 62, 264] * 2 + [27] * 7, [5, 6]]
NEW = 30

# A device's part of each parameter; that of a norm is all of it.
SHARDS = {
    mesh: {
        "embed.embedding": (V // parts, D),
        "head.kernel": (V // parts, D),
        "q.kernel": (N * H // 4, D),  # copied over `query`, as those of keys and values
        "k.kernel": (K * H // 4, D),
        "v.kernel": (K * H // 4, D),
        "o.kernel": (D, N * H // parts),
        "gate.kernel": (F // parts, D),
        "up.kernel": (F // parts, D),
        "down.kernel": (D, F // parts),
    }
    for mesh, parts in zip(MESHES, (4, 8), strict=True)
}


def save_tokenizer(folder: Path, vocab_size: int) -> Path:
    """A SentencePiece model of at most `vocab_size` tokens."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the quick brown fox jumps over the lazy dog"] * 4),
        model_writer=model,
        vocab_size=vocab_size,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    path = folder / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="session")
def directory(tmp_path_factory):
    """`directory(quantization)` is a model directory of the same weights, quantized so."""
    folder = tmp_path_factory.mktemp("sharding")
    tokenizer = save_tokenizer(folder, V)
    params = random_params(CONFIG)

    @functools.cache
    def directory(quantization=None):
        path = folder / (quantization.kind if quantization else "model")
        leaves = params if quantization is None else jax.jit(quantization)(params)
        save_model(
            path, CONFIG, leaves, tokenizer=tokenizer, provenance={}, quantization=quantization
        )
        return path

    return directory


@pytest.fixture(scope="session")
def load(directory):
    """`load(mesh, quantize)` is the same model, on the first device or straight onto a mesh."""

    @functools.cache
    def load(mesh=None, quantize=None):
        return llama_jax.load(directory(), mesh=mesh, quantize=quantize).params

    return load


def names(tree):
    """Every array of a tree by its path, `layers_0.mlp.up.kernel.values`."""
    flat, _ = jax.tree.flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in flat}


# --- the same model ---


@pytest.fixture(scope="session")
def greedy_tokens(load):
    """Completions of PROMPTS on one device, in float32."""
    return completions(generate(CONFIG, load(), PROMPTS, greedy(PROMPTS), max_new_tokens=NEW))


@pytest.mark.parametrize("mesh", MESHES)
def test_greedy_tokens_are_those_of_one_device(load, greedy_tokens, mesh):
    """A ragged batch that the mesh divides, in float32."""
    assert len({tuple(tokens) for tokens in greedy_tokens}) == len(PROMPTS)
    assert min(len(set(tokens)) for tokens in greedy_tokens) > 3  # no loop of one token
    progress = generate(CONFIG, load(mesh), PROMPTS, greedy(PROMPTS), max_new_tokens=NEW)
    assert completions(progress) == greedy_tokens


def int8_tokens(params, prompts):
    """Completions with an int8 cache; prompts of more than 16 tokens are read in two chunks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(infer.generate, "CHUNK", 16)
        options = {"max_new_tokens": NEW, "int8_cache": True}
        return completions(generate(CONFIG, params, prompts, greedy(prompts), **options))


@pytest.fixture(scope="session")
def greedy_int8_tokens(load):
    """Completions of PROMPTS on one device, with weights, tables and cache of int8."""
    return int8_tokens(load(None, INT8), PROMPTS)


@pytest.mark.parametrize(("mesh", "rows"), [(MESHES[0], [0]), (MESHES[1], [0, 1, 2, 3])])
def test_greedy_tokens_of_int8_are_those_of_one_device(load, greedy_int8_tokens, mesh, rows):
    """Also of a batch of one, which `data` does not divide."""
    tokens = int8_tokens(load(mesh, INT8), [PROMPTS[row] for row in rows])
    assert tokens == [greedy_int8_tokens[row] for row in rows]


@pytest.mark.parametrize("mesh", MESHES)
def test_logits_are_those_of_one_device(load, mesh):
    tokens_BT = np.random.default_rng(0).integers(0, V, (2, 9)).astype(np.int32)
    logits_of = jax.jit(lambda params, tokens_BT: forward(CONFIG, params, tokens_BT)[0])
    expected = np.asarray(logits_of(load(), tokens_BT))
    params = load(mesh)
    with sharding.use(sharding.mesh_of(params)):
        logits_BTV = logits_of(params, tokens_BT)
    parts = sharding.mesh_of(params).shape
    split = parts["tensor"] * parts["query"]
    assert logits_BTV.sharding.shard_shape(logits_BTV.shape)[-1] == V // split
    assert expected.std() > 0.5
    np.testing.assert_allclose(np.asarray(logits_BTV), expected, rtol=0, atol=LOGITS_ATOL)


# --- what crosses devices ---


def transfers(text):
    """The bytes that each collective instruction of a program results in."""

    def size(shape):
        return sum(map(size, shape)) if isinstance(shape, tuple) else shape.size

    return [
        size(instruction.shape)
        for computation in hlo.parse(text).computations.values()
        for instruction in computation.instructions.values()
        if instruction.opcode.removesuffix("-start") in COLLECTIVES
    ]


@pytest.mark.parametrize("mesh", MESHES)
def test_a_layer_sums_twice_and_moves_no_weight_and_no_cache(load, mesh):
    """In a decode step; what does not grow with the layers belongs to embedding and sampling."""
    shapes = request_shapes(CONFIG, PROMPTS, NEW)
    text_2 = compile_programs(CONFIG, load(mesh), shapes).decode.as_text()
    config_4 = dataclasses.replace(CONFIG, n_layers=4)
    plain = abstract(config_4)
    places = sharding.shardings(plain, sharding.mesh_of(load(mesh)))
    params_4 = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        plain,
        places,
    )
    text_4 = lower_programs(config_4, params_4, shapes)["decode"].compile().as_text()

    sums = [analyze(text).collectives["all-reduce"].count for text in (text_2, text_4)]
    assert 0 < sums[1] - sums[0] <= 2 * (4 - 2)

    # Nothing is larger than a vector for each row, which is less than a device's part of any weight
    # or of the cache.
    vectors = len(PROMPTS) * D * 4
    cache = len(PROMPTS) * K * shapes.room * H * 4 // 8
    assert vectors < min(cache, *(4 * math.prod(shape) for shape in SHARDS[mesh].values()))
    for text in (text_2, text_4):
        assert max(transfers(text)) <= vectors


# Of the scales of the last, 19 blocks of 16 rows, a part of the table holds four and three quarters.
TABLES = {
    "float32": None,
    "int8": Quantization("int8"),
    "int4": Quantization("int4", group_size=8),
    "nf4": Quantization("nf4", group_size=8, double_quantization=True),
}


@pytest.fixture(scope="module")
def split_table():
    """`split_table(mesh, kind)`: a table as it lies on one device and on a mesh."""

    def split_table(mesh, kind):
        quantization = TABLES[kind]
        values = np.random.default_rng(0).normal(size=(V, D)).astype(np.float32)
        table = jnp.asarray(values) if quantization is None else quantization.quantize(values)
        table = quant.whole_bytes(table)
        places = sharding.shardings({"embed": {"embedding": table}}, mesh)
        return table, jax.device_put(table, places["embed"]["embedding"])

    return split_table


@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize("sizes", MESHES)
def test_rows_of_a_split_table_cost_one_sum(split_table, sizes, kind):
    """Of what is looked up: nothing of the table moves. Tokens of all parts, the first and last."""
    mesh = sharding.make_mesh(sizes, CONFIG)
    table, split = split_table(mesh, kind)
    tokens_BT = np.array([[0, V - 1, 37], [38, 75, 76], [151, 152, 5], [227, 228, 5]], np.int32)
    expected = quant.rows(table, tokens_BT)
    for tokens in (tokens_BT, tokens_BT[:1]):  # `data` does not divide one row
        with sharding.use(mesh):
            program = jax.jit(quant.rows).lower(split, tokens).compile()
        rows = program(split, tokens)
        np.testing.assert_allclose(rows, expected[: len(tokens)], rtol=1e-6, atol=0)
        sums = analyze(program.as_text()).collectives
        assert {kind: work.count for kind, work in sums.items()} == {"all-reduce": 1}
        assert max(transfers(program.as_text())) <= rows.nbytes


@pytest.mark.parametrize("sizes", MESHES)
def test_rows_of_a_split_table_have_the_gradient_of_one_device(split_table, sizes):
    mesh = sharding.make_mesh(sizes, CONFIG)
    table, split = split_table(mesh, "float32")
    tokens_BT = np.array([[0, V - 1], [38, 75], [5, 5], [76, 5]], np.int32)
    weight = np.random.default_rng(1).normal(size=(*tokens_BT.shape, D)).astype(np.float32)
    gradient = jax.jit(jax.grad(lambda table: jnp.sum(quant.rows(table, tokens_BT) * weight)))
    expected = gradient(table)
    with sharding.use(mesh):
        ours = gradient(split)
    assert ours.sharding.is_equivalent_to(split.sharding, 2)
    np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-6)


# --- what lies where ---


@pytest.mark.parametrize("quantize", [None, INT8], ids=["float32", "int8"])
@pytest.mark.parametrize("mesh", MESHES)
def test_every_device_holds_its_part_of_the_parameters(load, mesh, quantize):
    """Loaded from a directory onto the mesh, bit for bit as on one device."""
    expected, params = names(load(None, quantize)), names(load(mesh, quantize))
    assert params.keys() == expected.keys()
    for name, array in params.items():
        parts = [part for part in name.split(".") if part not in ("values", "scale")]
        shape = SHARDS[mesh].get(".".join(parts[-2:]), (D,))  # of norms
        host = np.asarray(expected[name])
        assert array.dtype == host.dtype
        assert len(array.addressable_shards) == 8
        for shard in array.addressable_shards:
            assert shard.data.shape == shape[: host.ndim], name
            np.testing.assert_array_equal(shard.data, host[shard.index])


@pytest.mark.parametrize("quantize", [None, INT8], ids=["float32", "int8"])
def test_a_device_holds_little_more_than_its_share(load, quantize):
    """Norms, and scales of what is split by columns, are on every device."""
    params = jax.tree.leaves(load("data=2,tensor=4", quantize))
    held = dict.fromkeys(jax.devices(), 0)
    for array in params:
        for shard in array.addressable_shards:
            held[shard.device] += shard.data.nbytes
    assert max(held.values()) <= 1.1 * sum(array.nbytes for array in params) / 4


@pytest.mark.parametrize(
    "quantization",
    [INT8, Quantization("nf4", group_size=8, double_quantization=True)],
    ids=lambda quantization: quantization.kind,
)
def test_a_quantized_directory_is_loaded_onto_a_mesh(directory, quantization):
    path = directory(quantization)
    expected = llama_jax.load(path)
    for mesh in MESHES:
        model = llama_jax.load(path, mesh=sharding.make_mesh(mesh, CONFIG))
        assert model.quantization == quantization
        assert jax.tree.structure(model.params) == jax.tree.structure(expected.params)
        ours, theirs = names(model.params), names(expected.params)
        for name, array in ours.items():
            host = np.asarray(theirs[name])
            assert array.dtype == host.dtype
            for shard in array.addressable_shards:
                np.testing.assert_array_equal(shard.data, host[shard.index])
        down = model.params["layers_1"]["mlp"]["down"]["kernel"].values
        assert down.sharding.shard_shape(down.shape) == SHARDS[mesh]["down.kernel"]


@pytest.mark.parametrize(
    ("mesh", "quantize", "shapes"),
    [
        (MESHES[0], None, Shapes(4, 32, 64, 0)),
        (MESHES[1], INT8, Shapes(4, 16, 64, 0, long=True, int8_cache=True)),
    ],
)
def test_every_device_holds_its_part_of_the_cache(load, mesh, quantize, shapes):
    """Half the rows of one KV head: rows are split over `query` where there is no `data`."""
    params = load(mesh, quantize)
    programs = compile_programs(CONFIG, params, shapes)
    host = make_request(CONFIG, PROMPTS, greedy(PROMPTS), NEW, ()), np.int32(1)
    request, step = sharding.replicate(host, sharding.mesh_of(params))
    first, *others = sharding.replicate(
        list(chunks(PROMPTS, shapes.chunk)), sharding.mesh_of(params)
    )
    state = programs.start(params, request, first)
    for chunk in others:
        state = programs.extend(params, state, request, chunk)
    state = programs.decode(params, state, request, step)
    parts = {(4, K, 64, H): (2, 1, 64, H), (4, K, 1, 64): (2, 1, 1, 64)}  # the second of scales
    arrays = jax.tree.leaves(state.cache.layers)
    assert {array.shape for array in arrays} == set(list(parts)[: 1 + shapes.int8_cache])
    for array in arrays:
        assert {shard.data.shape for shard in array.addressable_shards} == {parts[array.shape]}
        begins = {tuple(axis.start or 0 for axis in s.index[:2]) for s in array.addressable_shards}
        assert begins == {(row, head) for row in (0, 2) for head in range(K)}


# --- what the compiler does ---


def test_nothing_compiles_after_the_first_request_of_a_bucket(load):
    params = load(MESHES[0])
    generate(CONFIG, params, PROMPTS, greedy(PROMPTS), max_new_tokens=NEW)
    rng = np.random.default_rng(0)
    with count_compilations() as compilations:
        for i in range(4):
            lengths = rng.integers(1, 33, len(PROMPTS))
            lengths[0] = 17 + i
            prompts = [rng.integers(0, V, n).tolist() for n in lengths]
            sampling = sampled(prompts, seed=i, temperature=[0.0, 0.3, 1.5][i % 3], top_k=i)
            stop_ids = rng.choice(V, 2 * i, replace=False).tolist()
            options = {"max_new_tokens": 20 + i, "stop_ids": stop_ids}
            generate(CONFIG, params, prompts, sampling, **options)
    assert not compilations

    with count_compilations() as compilations:  # the counter counts
        jax.jit(lambda x: 5 * x)(1.0)
    assert len(compilations) == 1


# --- meshes and their mistakes ---


def test_a_mesh_has_the_sizes_asked_for():
    def shape(sizes, **options):
        return dict(sharding.make_mesh(sizes, CONFIG, **options).shape)

    def sizes(**others):
        return dict.fromkeys(sharding.AXES, 1) | others

    assert shape("data=2,tensor=4") == sizes(data=2, tensor=4)
    assert shape(" tensor=4, data=2 ") == sizes(data=2, tensor=4)
    assert shape("tensor=8") == sizes(tensor=4, query=2)
    assert shape("data=8") == sizes(data=8)
    assert shape("fsdp=2,tensor=4") == sizes(fsdp=2, tensor=4)
    assert sharding.make_mesh("tensor=2", CONFIG).devices.ravel().tolist() == jax.devices()[:2]
    last = jax.devices()[6:]
    mesh = sharding.make_mesh("tensor=2", CONFIG, devices=last)
    assert mesh.devices.ravel().tolist() == last


@pytest.mark.parametrize(
    ("heads", "kv_heads", "mlp_dim", "vocab_size", "expected"),
    [
        (8, 4, F, V, [1, 2, 4, 8]),
        (8, 8, F, V, [1, 2, 4, 8]),
        (12, 6, 240, 240, [1, 2, 3, 6, 12]),
        (6, 2, 240, 240, [1, 2, 6]),
        (7, 1, 7, 7, [1, 7]),
        (8, 4, 12, V, [1, 2, 4]),
        (8, 4, F, 302, [1, 2]),
        (8, 4, F, 301, [1]),
    ],
)
def test_the_sizes_of_tensor_are_those_that_make_a_mesh(
    heads, kv_heads, mlp_dim, vocab_size, expected
):
    config = dataclasses.replace(tiny(heads, kv_heads), mlp_dim=mlp_dim, vocab_size=vocab_size)
    assert sharding.tensor_sizes(config) == expected
    for tensor in range(1, 9):
        if tensor in expected:
            mesh = sharding.make_mesh(f"tensor={tensor}", config)
            assert mesh.size == tensor
        else:
            with pytest.raises(UserError, match=f"tensor={tensor} does not .* do$"):
                sharding.make_mesh(f"tensor={tensor}", config)


@pytest.mark.parametrize(
    ("sizes", "shape", "axes", "expected"),
    [
        (MESHES[0], (4, 9, D), ("batch", None, None), ("data", None, None)),
        (MESHES[0], (1, 9, D), ("batch", None, None), (None, None, None)),
        (MESHES[0], (V, D), ("vocab", None), (("tensor", "query"), None)),
        (MESHES[1], (V, D), ("vocab", None), (("tensor", "query"), None)),
        (MESHES[1], (12, D), ("vocab", None), ("tensor", None)),  # 8 does not divide 12
        (MESHES[1], (N * H, D), ("kv_heads", None), ("tensor", None)),
        (MESHES[1], (4, K), ("cache_batch", "kv_heads"), (("data", "query"), "tensor")),
        (MESHES[1], (3, K), ("cache_batch", "kv_heads"), ("data", "tensor")),
        # The rows have `query`, so the heads do without.
        (MESHES[1], (4, N), ("cache_batch", "heads"), (("data", "query"), "tensor")),
        (MESHES[1], (1, N), ("cache_batch", "heads"), ("data", ("tensor", "query"))),
        (MESHES[1], (N, 64), ("heads", "embed"), (("tensor", "query"), None)),
    ],
)
def test_an_array_is_split_where_its_axes_divide_it(sizes, shape, axes, expected):
    mesh = sharding.make_mesh(sizes, CONFIG)
    spec = sharding.spec(shape, axes, mesh)
    wanted = PartitionSpec(*expected)

    def parts(spec):
        """Of each dimension: the axes with more than one device."""
        entries = [entry if isinstance(entry, tuple) else (entry,) for entry in spec]
        return [[name for name in entry if name and mesh.shape[name] > 1] for entry in entries]

    assert parts(spec) == parts(wanted)


def test_without_a_mesh_nothing_is_constrained(load):
    x = jnp.ones((4, 2))
    with sharding.use(None):
        assert sharding.constrain(x, "batch", None) is x
    assert sharding.mesh_of(load()) is None
    assert sharding.mesh_of(load(MESHES[0])).shape["tensor"] == 4


MALFORMED = (
    "",
    "tensor",
    "tensor=",
    "tensor=0",
    "tensor=-1",
    "tensor=x",
    "tensor=2.0",
    "tensor=\N{SUPERSCRIPT TWO}",
    "foo=2",
    "query=2",
    "tensor=2,tensor=2",
    "tensor=2,",
    "data=2;tensor=2",
    "8",
)
IMPOSSIBLE = {
    "tensor=16": "--mesh tensor=16 needs 16 devices, but there are 8; give sizes whose product",
    "data=4,tensor=4": "--mesh data=4,tensor=4 needs 16 devices, but there are 8",
    "tensor=3": "--mesh tensor=3: tensor=3 does not split 8 query heads on 4 KV heads evenly; 1, 2, 4, 8 do",
    "tensor=6": "--mesh tensor=6: tensor=6 does not split 8 query heads on 4 KV heads evenly; 1, 2, 4, 8 do",
}


def expected_line(sizes):
    malformed = f'--mesh is {sizes!r}, expected sizes such as "data=2,tensor=4"'
    return IMPOSSIBLE.get(sizes, malformed)


@pytest.mark.parametrize("sizes", [*MALFORMED, *IMPOSSIBLE])
def test_a_mesh_that_cannot_be_is_one_line_and_status_2(directory, monkeypatch, capsys, sizes):
    monkeypatch.setattr(sample, "keep_compilations", lambda: None)
    flags = ["--checkpoint", str(directory()), "--prompt", "fox", "--mesh", sizes]
    monkeypatch.setattr(sys, "argv", ["sample", *flags])
    with pytest.raises(SystemExit) as exit:
        run(sample.main, sample.PROG)
    assert exit.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith(f"infer.sample: error: {expected_line(sizes)}")


@pytest.mark.parametrize(
    ("field", "size", "line"),
    [
        ("mlp_dim", 84, "tensor=8 does not divide the feed-forward of 84; 1, 2, 4 do"),
        ("vocab_size", 102, "tensor=8 does not divide the vocabulary of 102; 1, 2 do"),
    ],
)
def test_a_mesh_that_does_not_divide_the_model_says_which_does(field, size, line):
    config = dataclasses.replace(CONFIG, **{field: size})
    with pytest.raises(UserError) as error:
        sharding.make_mesh("tensor=8", config)
    assert str(error.value) == f"--mesh tensor=8: {line}"


def test_groups_that_would_lie_on_two_devices_are_refused(directory):
    quantization = Quantization("int4", group_size=16)
    with pytest.raises(
        UserError,
        match=r"groups of 16 of layers_0\S* do not fit on devices that hold 8 .*--group-size 8, or split",
    ):
        llama_jax.load(directory(), mesh="tensor=8", quantize=quantization)

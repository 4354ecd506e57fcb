"""Generation: transformers' tokens, one loop or a stream, no recompilation, no copy of the cache."""

import contextlib
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from infer import generate as generate_module
from infer.generate import (
    STOP_IDS,
    Shapes,
    chunks,
    compile_programs,
    generate,
    make_request,
    request_shapes,
    stream,
)
from infer.sampling import row_seeds, settings
from llama_jax.checkpoint import load, load_params, save_model
from llama_jax.errors import UserError
from llama_jax.model import forward
from llama_jax.quant import KINDS, Quantization

# Log-probabilities of the same model by differently shaped float32 products.
LOGPROBS_ATOL = 5e-5

CONFIG = oracle.CONFIGS["6 heads on 2"]
# Of lengths 5, 1 and 13; with 40 new tokens each falls in the same buckets, alone or together.
PROMPTS = [[3, 14, 15, 92, 65], [35], [8, 9, 79, 3, 23, 84, 62, 64, 33, 83, 27, 95, 2]]
N = 40


@pytest.fixture(scope="module")
def params():
    return oracle.random_params(CONFIG)


def sampled(prompts, seed=0, temperature=0.8, **options):
    return settings(row_seeds(seed, prompts), temperature=temperature, **options)


def greedy(prompts):
    return sampled(prompts, temperature=0.0)


def completions(progress):
    return [progress.completion(row) for row in range(len(progress.count))]


@pytest.fixture(scope="module")
def greedy_tokens(params):
    """Greedy completions of PROMPTS without stop ids, read off `generate` once."""
    return completions(generate(CONFIG, params, PROMPTS, greedy(PROMPTS), max_new_tokens=N))


@functools.partial(jax.jit, static_argnums=0)
def logits_of(config, params, tokens_BT):
    return forward(config, params, tokens_BT)[0]


def predictions(params, prompt, tokens):
    """The logits that `forward` gives for each of `tokens`, float32 [len(tokens), V]."""
    padded = np.zeros((1, CONFIG.context), np.int32)  # of one shape, to compile once
    text = (prompt + tokens)[: CONFIG.context]
    padded[0, : len(text)] = text
    logits = np.asarray(logits_of(CONFIG, params, padded)[0])
    return logits[len(prompt) - 1 : len(prompt) - 1 + len(tokens)]


# --- which tokens ---


@pytest.mark.parametrize("name", ["6 heads on 2", "tied head", "llama 3.2"])
def test_greedy_tokens_are_those_of_transformers(name):
    """Rows of a ragged batch against transformers with each prompt alone."""
    config = oracle.CONFIGS[name]
    params = oracle.random_params(config)
    model = oracle.transformers_model(config, params)
    torch = pytest.importorskip("torch")
    model.generation_config.eos_token_id = None
    model.generation_config.bos_token_id = None
    expected = []
    for prompt in PROMPTS:
        tokens = torch.tensor([prompt])
        out = model.generate(
            tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=N
        )
        expected.append(out[0, len(prompt) :].tolist())
    assert len({tuple(tokens) for tokens in expected}) == len(PROMPTS)
    assert min(len(set(tokens)) for tokens in expected) > 3  # no loop of one token

    progress = generate(config, params, PROMPTS, greedy(PROMPTS), max_new_tokens=N)
    assert completions(progress) == expected


def test_greedy_is_the_argmax_of_forward(params, greedy_tokens):
    """The same without transformers: feeding a completion back predicts it."""
    for prompt, tokens in zip(PROMPTS, greedy_tokens, strict=True):
        assert predictions(params, prompt, tokens).argmax(-1).tolist() == tokens


@pytest.mark.parametrize("steps", [1, 3, 7, 1000, None])
def test_a_stream_of_any_steps_equals_the_compiled_loop(params, steps):
    sampling = sampled(PROMPTS, top_k=20, top_p=0.95, repetition_penalty=1.1)
    whole = generate(CONFIG, params, PROMPTS, sampling, max_new_tokens=N)
    assert whole.count.tolist() == [N] * 3
    assert whole.done.all()
    assert not whole.stopped.any()
    parts = list(stream(CONFIG, params, PROMPTS, sampling, max_new_tokens=N, steps_a_fetch=steps))
    assert parts[0].count.tolist() == [1] * 3
    if steps:
        assert len(parts) == 1 + -(-(N - 1) // steps)
    for part in parts:
        for row, count in enumerate(part.count):
            assert part.tokens[row, :count].tolist() == whole.tokens[row, :count].tolist()
            np.testing.assert_array_equal(part.logprobs[row, :count], whole.logprobs[row, :count])
    assert completions(parts[-1]) == completions(whole)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_row_does_not_depend_on_its_neighbours(params, temperature):
    def run(prompts):
        sampling = sampled(prompts, seed=3, temperature=temperature)
        return completions(generate(CONFIG, params, prompts, sampling, max_new_tokens=N))

    together = run(PROMPTS)
    assert [run([prompt])[0] for prompt in PROMPTS] == together
    assert run(PROMPTS[::-1]) == together[::-1]


def test_seeds_and_copies_of_a_prompt_differ_and_repeat(params):
    prompts = [PROMPTS[0]] * 3

    def run(seed):
        sampling = sampled(prompts, seed)
        return completions(generate(CONFIG, params, prompts, sampling, max_new_tokens=N))

    first = run(0)
    assert run(0) == first
    assert len({tuple(tokens) for tokens in first + run(1)}) == 6


def test_a_prompt_of_many_chunks_is_one_of_a_single_chunk(params, monkeypatch):
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, oracle.V, n).tolist() for n in (48, 33, 16)]
    options = {"max_new_tokens": 15, "n_logprobs": 1}
    whole = generate(CONFIG, params, prompts, greedy(prompts), **options)
    assert request_shapes(CONFIG, prompts, 15).chunk == 64
    monkeypatch.setattr(generate_module, "CHUNK", 16)
    assert request_shapes(CONFIG, prompts, 15).chunk == 16
    chunked = generate(CONFIG, params, prompts, greedy(prompts), **options)
    assert (whole.logprobs[:, :15] < 0).all()
    assert completions(chunked) == completions(whole)
    np.testing.assert_allclose(chunked.logprobs, whole.logprobs, rtol=0, atol=LOGPROBS_ATOL)


# --- where they end ---


def test_stop_ids_end_rows_and_are_no_part_of_completions(params, greedy_tokens):
    stops = {greedy_tokens[0][4], greedy_tokens[2][20]}
    progress = generate(CONFIG, params, PROMPTS, greedy(PROMPTS), max_new_tokens=N, stop_ids=stops)
    assert progress.done.all()
    for row, tokens in enumerate(greedy_tokens):
        ends = [i for i, token in enumerate(tokens) if token in stops]
        end = ends[0] if ends else N
        assert progress.completion(row) == tokens[:end]
        assert progress.stopped[row] == bool(ends)
        assert progress.count[row] == (end + 1 if ends else N)
    assert progress.stopped[[0, 2]].all()
    assert len(set(progress.count.tolist())) > 1


def test_a_stop_id_drawn_first_gives_an_empty_completion(params, greedy_tokens):
    prompt, stop = PROMPTS[2], greedy_tokens[2][0]
    *parts, last = stream(
        CONFIG, params, [prompt], greedy([prompt]), max_new_tokens=N, stop_ids=[stop]
    )
    assert not parts
    assert last.completion(0) == []
    assert (last.count[0], last.done[0], last.stopped[0]) == (1, True, True)


def test_a_row_ends_at_the_limit_even_with_its_first_token(params, greedy_tokens):
    for limit in (1, 3):
        progress = generate(CONFIG, params, PROMPTS, greedy(PROMPTS), max_new_tokens=limit)
        assert completions(progress) == [tokens[:limit] for tokens in greedy_tokens]
        assert not progress.stopped.any()


def test_each_row_ends_where_the_context_ends(params):
    """Every position of the context is used: prompt and completion together fill it."""
    prompts = [[1] * (CONFIG.context - 1), [2] * 30, [3]]
    progress = generate(CONFIG, params, prompts, greedy(prompts), max_new_tokens=10**12)
    assert progress.count.tolist() == [1, CONFIG.context - 30, CONFIG.context - 1]
    assert progress.done.all()
    for prompt, tokens in zip(prompts, completions(progress), strict=True):
        assert predictions(params, prompt, tokens).argmax(-1).tolist() == tokens


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[1] * 64], {}, "a prompt has 64 tokens, but the model's context ends at 64"),
        ([[1], [1] * 100], {}, "a prompt has 100 tokens"),
        ([], {}, "a prompt of no tokens"),
        ([[1], []], {}, "a prompt of no tokens"),
        (
            [[1], [2, oracle.V]],
            {},
            f"a prompt holds token {oracle.V}, but the model has {oracle.V}",
        ),
        ([[1, -1]], {}, "a prompt holds token -1"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens is 0, expected at least 1"),
        ([[1]], {"stop_ids": range(STOP_IDS + 1)}, "9 stop ids, expected at most 8"),
    ],
)
def test_requests_that_cannot_be_met_say_so(params, prompts, options, message):
    with pytest.raises(UserError, match=re.escape(message)):
        generate(CONFIG, params, prompts, greedy(prompts), **{"max_new_tokens": N, **options})


# --- log-probabilities ---


def test_logprobs_are_the_log_softmax_of_forward(params):
    """Of the model's own distribution, whatever temperature and filters are."""
    n = 4
    sampling = sampled(PROMPTS, temperature=1.7, top_k=30, repetition_penalty=1.3)
    progress = generate(CONFIG, params, PROMPTS, sampling, max_new_tokens=N, n_logprobs=n)
    unlikely = 0
    for row, prompt in enumerate(PROMPTS):
        tokens = progress.completion(row)
        expected = np.asarray(jax.nn.log_softmax(predictions(params, prompt, tokens)))
        drawn = expected[np.arange(N), tokens]
        np.testing.assert_allclose(progress.logprobs[row, :N], drawn, rtol=0, atol=LOGPROBS_ATOL)
        top = progress.top_logprobs[row, :N]
        np.testing.assert_allclose(
            top, -np.sort(-expected, axis=-1)[:, :n], rtol=0, atol=LOGPROBS_ATOL
        )
        np.testing.assert_allclose(
            np.take_along_axis(expected, progress.top_ids[row, :N], axis=-1),
            top,
            rtol=0,
            atol=LOGPROBS_ATOL,
        )
        assert (np.diff(top) <= 0).all()
        unlikely += (drawn < top[:, -1]).sum()
    assert unlikely > 0  # some drawn tokens are not among the likeliest n


# --- what the compiler does ---


@contextlib.contextmanager
def count_compilations():
    """Collects the durations of all compilations by XLA, those of eager operations included."""
    durations: list[float] = []
    counting = True

    def listen(event, duration, **_):
        if counting and event == "/jax/core/compile/backend_compile_duration":
            durations.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield durations
    finally:
        counting = False


def test_nothing_compiles_after_the_first_request_of_a_bucket(params):
    """Lengths, temperatures, filters, seeds, stop ids and limits change; the shapes do not."""
    prompts = [[5, 6, 7], [8], [9] * 10]
    options = {"max_new_tokens": 37, "stop_ids": [1]}
    first = sampled(prompts, temperature=0.7, top_k=3, top_p=0.9, min_p=0.1)
    generate(CONFIG, params, prompts, first, **options)

    rng = np.random.default_rng(0)
    with count_compilations() as compilations:
        for i in range(12):
            lengths = rng.integers(1, 17, 3)
            prompts = [rng.integers(0, oracle.V, n).tolist() for n in lengths]
            limit = int(rng.integers(33 - max(lengths), 65 - max(lengths)))
            options = {
                "max_new_tokens": limit,
                "stop_ids": rng.choice(oracle.V, i % (STOP_IDS + 1), replace=False).tolist(),
            }
            sampling = sampled(
                prompts,
                seed=i,
                temperature=[0.0, 0.3, 1.5][i % 3],
                top_k=i % 5,
                top_p=1 - i / 20,
                min_p=i / 40,
                repetition_penalty=1 + i / 10,
            )
            generate(CONFIG, params, prompts, sampling, **options)
            for _ in stream(CONFIG, params, prompts, sampling, **options, steps_a_fetch=1 + i):
                pass
    assert not compilations

    with count_compilations() as compilations:  # the counter counts
        jax.jit(lambda x: 3 * x)(1.0)
    assert len(compilations) == 1


def test_the_state_is_donated(params):
    """Each program takes over the buffers of the state, so that there is only ever one cache."""
    shapes = request_shapes(CONFIG, PROMPTS, N)._replace(long=True)
    programs = compile_programs(CONFIG, params, shapes)
    request = make_request(CONFIG, PROMPTS, greedy(PROMPTS), N, ())
    (chunk,) = chunks(PROMPTS, shapes.chunk)
    state = programs.start(params, request, chunk)
    first = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state.cache.layers)]
    for program, argument in ((programs.extend, chunk), (programs.decode, np.int32(3))):
        after = program(params, state, request, argument)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
        state = after
        leaves = jax.tree.leaves(state.cache.layers)
        assert [leaf.unsafe_buffer_pointer() for leaf in leaves] == first
    assert state.count.tolist() == [5] * 3
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("n_kv_heads", [6, 2])
def test_programs_write_the_cache_in_place(batch, n_kv_heads):
    """No compiled text holds a copy of a cache, as it does where a cache is read after a write.

    One is left: for grouped queries in a batch of one, XLA transposes the keys to multiply them.
    """
    config = oracle.tiny(6, n_kv_heads)
    params = oracle.random_params(config)
    K, S, H = config.n_kv_heads, 2048, config.head_dim
    sized = re.compile(r"= \(?f32\[([\d,]+)\]\S* (?:copy(?:-start)?|transpose|fusion)\((.*)")

    def copies(text):
        """The cache-sized results that are neither written in place nor broadcast zeros."""
        found = (match.groups() for match in sized.finditer(text))
        return [
            shape
            for shape, rest in found
            if math.prod(map(int, shape.split(","))) == batch * K * S * H
            and not re.search("scatter|update|broadcast", rest)
        ]

    programs = compile_programs(config, params, Shapes(batch, 16, S, 0, long=True))
    for text in (programs.decode.as_text(), programs.extend.as_text()):
        assert f"f32[{batch},{K},{S},{H}]" in text
        left = set(copies(text))
        if n_kv_heads < 6 and batch == 1:
            left -= {f"1,{K},{H},{S}", f"{K},{H},{S}"}
        assert not left

    undonated = jax.jit(lambda cache, i: cache.at[:, :, i].set(1.0)).lower(
        jax.ShapeDtypeStruct((batch, K, S, H), jnp.float32), jax.ShapeDtypeStruct((), jnp.int32)
    )
    assert copies(undonated.compile().as_text())


# --- quantized ---


def gaps(params, prompt, tokens):
    """How far the logit of each token lies below the largest that `forward` gives."""
    logits = predictions(params, prompt, tokens)
    return logits.max(-1) - logits[np.arange(len(tokens)), tokens]


@pytest.mark.parametrize("kind", KINDS)
def test_quantized_weights_generate_what_forward_predicts(params, kind, tmp_path):
    """As loaded from a directory: jax refuses committed 4-bit arrays in compiled programs.

    Where activations are rounded too, a last bit of difference moves one to the next of its 255
    levels: that costs less than rounding all of them, which is what lies between W8A8 and Int8.
    """
    save_model(tmp_path / "model", CONFIG, params, tokenizer=None, provenance={})

    def loaded(kind):
        return load_params(tmp_path / "model", quantize=Quantization(kind, embeddings=True))

    quantized = loaded(kind)
    out = generate(CONFIG, quantized, PROMPTS, greedy(PROMPTS), max_new_tokens=8)
    for prompt, tokens in zip(PROMPTS, completions(out), strict=True):
        bound = 1e-3
        if kind in ("w8a8", "llm_int8"):
            exact, rounded = (predictions(loaded(k), prompt, tokens) for k in ("int8", kind))
            bound += np.abs(rounded - exact).max()
        assert gaps(quantized, prompt, tokens).max() < bound


def test_an_int8_cache_generates_nearly_what_forward_predicts(params):
    """A key or value is off by at most 1/254 of its head's largest."""
    out = generate(CONFIG, params, PROMPTS, greedy(PROMPTS), max_new_tokens=N, int8_cache=True)
    worst = [gaps(params, *pair).max() for pair in zip(PROMPTS, completions(out), strict=True)]
    assert max(worst) < 0.1


# --- a real model ---


@pytest.mark.external
def test_stories260k_tells_its_published_story(shared_data, tmp_path):
    pytest.importorskip("torch")
    from convert import meta_to_orbax

    source = shared_data / "stories260K"
    meta_to_orbax.main(["--input", str(source), "--output", str(tmp_path / "model")])
    model = load(tmp_path / "model")
    prompt = [model.tokenizer.bos_id]
    progress = generate(model.config, model.params, [prompt], greedy([prompt]), max_new_tokens=200)
    text = model.tokenizer.decode(progress.completion(0))
    assert text == (source / "greedy.txt").read_text()

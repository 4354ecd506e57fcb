"""Sampling against a float64 reference, transformers' own filters, and the counts of many draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from infer.sampling import DROPPED, Sampling, keep, penalize, row_seeds, sample, settings

# Rows in which a filter's decision hangs by less than this are left out: a float32 sum of 40
# probabilities is off by at most 40 roundings of 6e-8.
MARGIN = 3e-6
# Draws are from fixed keys, so that a passing test never fails; a wrong distribution would pass
# with this probability.
SIGNIFICANCE = 1e-3
V = 40

jitted_keep, jitted_sample, jitted_penalize = jax.jit(keep), jax.jit(sample), jax.jit(penalize)


def probabilities(logits):
    """Softmax in float64; -inf and `DROPPED` have none."""
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def reference_keep(logits, top_k=0, top_p=1.0, min_p=0.0):
    """Which tokens of one row stay, and by how much the closest decision was not a tie."""
    logits = np.where(np.isneginf(logits), DROPPED, logits.astype(np.float64))
    kept, margins = np.ones(len(logits), bool), [np.inf]
    if top_k:
        kept &= logits >= np.sort(logits)[::-1][min(top_k, len(logits)) - 1]
    if top_p < 1:
        p = probabilities(np.where(kept, logits, DROPPED))
        before = np.array([p[logits > logit].sum() for logit in logits])  # Meta: cumsum - p
        margins += np.abs(before - top_p)[kept & (p > 0)].tolist()
        kept &= before <= top_p
    if min_p:
        p = probabilities(np.where(kept, logits, DROPPED))
        margins += np.abs(p / p.max() - min_p)[kept & (p > 0)].tolist()
        kept &= p >= min_p * p.max()
    return kept & (logits > DROPPED), min(margins)


def random_logits(rows, kind="normal"):
    logits = np.random.default_rng(0).normal(0, 3, (rows, V))
    if kind == "ties":
        logits = np.round(logits)  # 0 and -0 among them, which are equal as well
    elif kind == "masked":  # a third of all tokens, as by -inf and by a large negative number
        logits[:, ::6], logits[:, 1::6] = -np.inf, -1e30
    return logits.astype(np.float32)


def same_settings(rows, **options):
    return settings([(0, row) for row in range(rows)], **options)


def kept_of(logits, **options):
    """bool [B, V] after `keep`, which changes no logit that it keeps."""
    out = np.asarray(jitted_keep(logits, same_settings(len(logits), **options)))
    kept = out > DROPPED
    np.testing.assert_array_equal(out[kept], logits[kept])
    return kept


# --- which tokens stay ---

FILTERS = [
    *[{"top_k": k} for k in (0, 1, 2, 7, V - 1, V, V + 1, 1000)],
    *[{"top_p": p} for p in (0.0, 0.1, 0.5, 0.9, 0.999, 1.0)],
    *[{"min_p": p} for p in (0.0, 0.01, 0.2, 1.0)],
    {"top_k": 10, "top_p": 0.8},
    {"top_k": 5, "min_p": 0.1},
    {"top_p": 0.7, "min_p": 0.2},
    {"top_k": 12, "top_p": 0.9, "min_p": 0.05},
]


@pytest.mark.parametrize("kind", ["normal", "ties", "masked"])
@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_kept_tokens_are_those_of_the_reference(filters, kind):
    logits = random_logits(400, kind)
    kept = kept_of(logits, **filters)
    compared = 0
    for row, row_kept in zip(logits, kept, strict=True):
        expected, margin = reference_keep(row, **filters)
        # On equality float32 and float64 agree only where they compute the same: p = 0 and 1.
        if margin > MARGIN or filters in ({"top_p": 0.0}, {"min_p": 1.0}):
            assert row_kept.tolist() == expected.tolist()
            compared += 1
    assert compared > 0.95 * len(logits)


def test_filters_see_what_the_one_before_has_left():
    """By hand: of 0.4 0.3 0.2 0.1, the 2 largest are 0.57 0.43, and top-p 0.5 keeps the first."""
    logits = np.log([[0.4, 0.3, 0.2, 0.1]]).astype(np.float32)
    assert kept_of(logits, top_p=0.5).tolist() == [[True, True, False, False]]
    assert kept_of(logits, top_k=2, top_p=0.5).tolist() == [[True, False, False, False]]
    assert kept_of(logits, top_p=0.8, min_p=0.6).tolist() == [[True, True, False, False]]


def test_top_p_keeps_the_token_before_which_exactly_p_lies():
    """Meta's rule, dropping where cumsum - p > top_p; here in exact binary fractions."""
    logits = np.log2([[0.5, 0.25, 0.125, 0.125]]).astype(np.float32) * np.float32(np.log(2))
    p = np.asarray(jax.nn.softmax(jnp.asarray(logits)))
    assert kept_of(logits, top_p=float(p[0, 0])).tolist() == [[True, True, False, False]]
    below = float(np.nextafter(p[0, 0], np.float32(0)))
    assert kept_of(logits, top_p=below).tolist() == [[True, False, False, False]]
    assert kept_of(logits, top_p=0.8).tolist() == [[True, True, True, True]]  # ties stay together


@pytest.mark.parametrize("kind", ["normal", "ties"])
def test_filters_of_transformers_agree(kind):
    """Top-p on distinct logits only: transformers splits ties by their order in the sort."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    logits = random_logits(400, kind)

    def theirs(warper):
        return np.isfinite(warper(None, torch.from_numpy(logits.copy())).numpy())

    for k in (1, 3, 17, V):
        expected = theirs(transformers.TopKLogitsWarper(k))
        np.testing.assert_array_equal(kept_of(logits, top_k=k), expected)
    for p in (0.015, 0.3):
        expected = theirs(transformers.MinPLogitsWarper(p))
        np.testing.assert_array_equal(kept_of(logits, min_p=p), expected)
    if kind == "normal":
        for p in (0.05, 0.5, 0.93):
            expected = theirs(transformers.TopPLogitsWarper(p))
            np.testing.assert_array_equal(kept_of(logits, top_p=p), expected)


def test_settings_are_those_of_each_row():
    logits = random_logits(4)
    mixed = same_settings(4).replace(
        top_k=jnp.array([0, 3, 0, 0]),
        top_p=jnp.array([1, 1, 0.5, 1], jnp.float32),
        min_p=jnp.array([0, 0, 0, 0.3], jnp.float32),
    )
    kept = np.asarray(jitted_keep(logits, mixed)) > DROPPED
    filters = [{}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.3}]
    for row, row_filters in enumerate(filters):
        assert kept[row].tolist() == reference_keep(logits[row], **row_filters)[0].tolist()
    assert len(set(kept.sum(axis=1).tolist())) > 2


# --- repetition penalty ---


@pytest.mark.parametrize("penalty", [1.0, 1.3, 0.7])
def test_repetition_penalty_is_that_of_transformers(penalty):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    logits = random_logits(8)
    tokens = np.random.default_rng(1).integers(0, V, (8, 12))
    seen = np.zeros((8, V), bool)
    np.put_along_axis(seen, tokens, True, axis=1)
    processor = transformers.RepetitionPenaltyLogitsProcessor(penalty)
    expected = processor(torch.from_numpy(tokens), torch.from_numpy(logits.copy())).numpy()
    ours = jitted_penalize(logits, seen, np.full(8, penalty, np.float32))
    np.testing.assert_allclose(ours, expected, rtol=1e-6)
    np.testing.assert_array_equal(np.asarray(ours)[~seen], logits[~seen])
    assert (np.asarray(ours) != logits).any() == (penalty != 1)


def test_repetition_penalty_changes_the_greedy_token_and_no_other_row():
    logits = np.array([[2.0, 1.9, -3], [2.0, 1.9, -3], [-1.0, -1.1, -3]], np.float32)
    seen = np.array([[True, False, False], [False] * 3, [True, False, False]])
    options = same_settings(3, temperature=0.0, repetition_penalty=1.2)
    drawn = jitted_sample(logits, seen, np.zeros(3, np.int32), options)
    assert drawn.tolist() == [1, 0, 1]


# --- which token is drawn ---


def draws(logits, options, steps=None):
    """One draw for each row of `options` from the same logits [V]."""
    rows = len(options.temperature)
    many = np.broadcast_to(logits, (rows, len(logits)))
    steps = np.zeros(rows, np.int32) if steps is None else steps
    return np.asarray(jitted_sample(many, np.zeros(many.shape, bool), steps, options))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.6, "top_p": 0.9},
        {"temperature": 1.5, "top_k": 5},
        {"temperature": 0.8, "top_k": 6, "top_p": 0.95, "min_p": 0.05},
    ],
    ids=str,
)
@pytest.mark.parametrize("keys", ["one a row", "one a step"])
def test_many_draws_have_the_reference_distribution(options, keys):
    n = 20_000
    logits = np.random.default_rng(5).normal(0, 1.2, 8).astype(np.float32)
    filters = {name: value for name, value in options.items() if name != "temperature"}
    scaled = logits.astype(np.float64) / options.get("temperature", 1.0)
    kept, margin = reference_keep(scaled, **filters)
    assert margin > MARGIN
    expected = n * probabilities(np.where(kept, scaled, -np.inf))
    assert expected[kept].min() > 5

    if keys == "one a row":
        drawn = draws(logits, same_settings(n, **options))
    else:
        drawn = draws(logits, settings([(7, 0)] * n, **options), np.arange(n, dtype=np.int32))
    counts = np.bincount(drawn, minlength=len(logits))
    assert (counts[~kept] == 0).all()
    assert scipy.stats.chisquare(counts[kept], expected[kept]).pvalue > SIGNIFICANCE
    # The test has teeth: the same counts refute a temperature that is off by a tenth.
    other = n * probabilities(np.where(kept, scaled / 1.1, -np.inf))
    assert scipy.stats.chisquare(counts[kept], other[kept]).pvalue < SIGNIFICANCE / 1000


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"top_k": 1}, {"top_p": 0.0}])
def test_greedy_is_temperature_0_top_k_1_and_top_p_0(options):
    logits = random_logits(200)
    drawn = jitted_sample(
        logits, np.zeros(logits.shape, bool), np.zeros(200, np.int32), same_settings(200, **options)
    )
    assert drawn.dtype == jnp.int32
    np.testing.assert_array_equal(drawn, logits.argmax(axis=-1))


def test_greedy_and_sampled_rows_mix():
    n = 64
    logits = np.random.default_rng(2).normal(0, 0.1, V).astype(np.float32)  # nearly even
    options = same_settings(n)
    mixed = options.replace(temperature=jnp.where(jnp.arange(n) % 2 == 0, 0.0, 1.0))
    drawn = draws(logits, mixed)
    assert (drawn[::2] == logits.argmax()).all()
    np.testing.assert_array_equal(drawn[1::2], draws(logits, options)[1::2])
    assert len(set(drawn[1::2].tolist())) > 10


def test_a_draw_does_not_depend_on_the_other_rows():
    """Alone, among others with other settings, and in another place: the same token."""
    logits, rng = random_logits(6), np.random.default_rng(3)
    seen, steps = rng.random(logits.shape) < 0.3, rng.integers(0, 50, 6).astype(np.int32)
    options = Sampling(
        temperature=jnp.array([0.0, 0.5, 1.0, 2.0, 1.0, 1.3], jnp.float32),
        top_k=jnp.array([0, 5, 0, 0, 20, 0]),
        top_p=jnp.array([1, 0.9, 1, 0.5, 1, 1], jnp.float32),
        min_p=jnp.array([0, 0, 0.1, 0, 0, 0], jnp.float32),
        repetition_penalty=jnp.array([1, 1.3, 1, 1, 0.8, 1], jnp.float32),
        seed=jnp.asarray(rng.integers(0, 2**32, (6, 2), dtype=np.uint32)),
    )

    def at(rows):
        rows = np.array(rows)
        chosen = jax.tree.map(lambda leaf: leaf[rows], options)
        return jitted_sample(logits[rows], seen[rows], steps[rows], chosen).tolist()

    together = at(range(6))
    assert [at([row])[0] for row in range(6)] == together
    assert at([5, 4, 3, 2, 1, 0]) == together[::-1]
    assert at([3, 3, 3]) == [together[3]] * 3


def test_seed_stream_and_step_each_change_the_draw():
    flat, n = np.zeros(1000, np.float32), 50
    zero = np.zeros(n, np.int32)
    by_seed = draws(flat, settings([(i, 0) for i in range(n)]), zero)
    by_stream = draws(flat, settings([(0, i) for i in range(n)]), zero)
    by_step = draws(flat, settings([(0, 0)] * n), np.arange(n, dtype=np.int32))
    for drawn in (by_seed, by_stream, by_step):
        assert len(set(drawn.tolist())) > 40
    assert by_seed[0] == by_stream[0] == by_step[0]
    assert sum(by_seed == by_stream) + sum(by_stream == by_step) + sum(by_seed == by_step) < 10


def test_row_seeds_count_copies_of_a_prompt():
    a, b = [1, 2, 3], [1, 2]
    (seed, of_a), (_, of_b), again = row_seeds(7, [a, b, a])
    assert seed == 7
    assert of_a != of_b
    assert again == (7, of_a + 1)
    assert row_seeds(7, [a]) == [(7, of_a)]
    streams = [of_a, of_a + 1, of_b, of_b + 1, of_a + 2]
    assert row_seeds(7, [a, a, b, b, a]) == [(7, stream) for stream in streams]
    assert row_seeds(0, [tuple(a), a]) == [(0, of_a), (0, of_a + 1)]
    assert row_seeds(0, []) == []


def test_settings_hold_one_value_a_row():
    options = settings(
        [(2**32 - 1, 0), (0, 5)], temperature=0.5, top_k=3, top_p=0.9, min_p=0.1,
        repetition_penalty=1.2,
    )  # fmt: skip
    assert options.seed.tolist() == [[2**32 - 1, 0], [0, 5]]
    for name, value, dtype in [
        ("temperature", 0.5, jnp.float32), ("top_k", 3, jnp.int32), ("top_p", 0.9, jnp.float32),
        ("min_p", 0.1, jnp.float32), ("repetition_penalty", 1.2, jnp.float32),
    ]:  # fmt: skip
        leaf = getattr(options, name)
        assert (leaf.shape, leaf.dtype) == ((2,), dtype)
        np.testing.assert_allclose(leaf, value, rtol=1e-6)


def test_changed_values_do_not_retrace():
    traces = 0

    @jax.jit
    def counted(*arguments):
        nonlocal traces
        traces += 1
        return sample(*arguments)

    logits = random_logits(3)
    for i in range(10):
        options = same_settings(
            3, temperature=i / 5, top_k=i, top_p=1 - i / 20, min_p=i / 30, repetition_penalty=1 + i
        )
        counted(logits, logits > i, np.full(3, i, np.int32), options)
    assert traces == 1


def test_penalized_and_hot_logits_stay_numbers():
    """The smallest and largest settings draw a token of the vocabulary, whatever the logits."""
    logits = np.stack([np.full(V, 1e30), np.full(V, -1e30), np.zeros(V), np.arange(V) * 1e28])
    logits = logits.astype(np.float32)
    for temperature in (1e-4, 1.0, 100.0):
        options = same_settings(4, temperature=temperature, top_k=4, top_p=0.5, min_p=0.5)
        drawn = jitted_sample(logits, logits > 0, np.zeros(4, np.int32), options)
        assert ((drawn >= 0) & (drawn < V)).all()
        assert drawn[3] == V - 1

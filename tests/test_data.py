"""Training data: ids and weights against texts written out here, rows and batches against NumPy."""

import base64
import dataclasses
import importlib
import io
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import train
from llama_jax.chat import Message, encode_chat
from llama_jax.errors import UserError
from llama_jax.tokenizer import load_tokenizer
from train import data
from train.data import Rows, Sample, batches, in_order, n_windows, pack, pack_pairs, read, split
from train.losses import next_token

CONFIGS = {
    version: dataclasses.replace(oracle.tiny(2, 1), vocab_size=640, context=512, version=version)
    for version in ("1", "2", "3")
}
HEAD = "Below is an instruction that describes a task"
ASK = "Write a response that appropriately completes the request."
ALPACA = [
    {"instruction": "Name the cat.", "input": "", "output": "the cat\nsat"},
    {"instruction": "Double\u2028it: é", "input": " 21", "output": "42"},
    {"instruction": "Say mat", "output": " mat "},
]
ALPACA_TEXTS = [  # prompt, answer
    (f"{HEAD}. {ASK}\n\n### Instruction:\nName the cat.\n\n### Response:\n", "the cat\nsat"),
    (
        f"{HEAD}, paired with an input that provides further context. {ASK}\n\n"
        "### Instruction:\nDouble\u2028it: é\n\n### Input:\n 21\n\n### Response:\n",
        "42",
    ),
    (f"{HEAD}. {ASK}\n\n### Instruction:\nSay mat\n\n### Response:\n", " mat "),
]
ROW = b'{"instruction": "a", "output": "b"}\n'
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "the cat?"},
    {"role": "assistant", "content": "it sat"},
    {"role": "user", "content": "the rat?"},
    {"role": "assistant", "content": "it ate"},
]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat sat on the mat", "that cat ate the rat"] * 4),
        model_writer=model,
        model_type="bpe",
        vocab_size=290,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    tokens = [bytes([byte]) for byte in range(256)] + [b"th", b"the", b"at", b"\n\n", b":\n"]
    lines = [b"%s %d\n" % (base64.b64encode(token), i) for i, token in enumerate(tokens)]
    found = {}
    for version, content in (("2", model.getvalue()), ("3", b"".join(lines))):
        file = tmp_path_factory.mktemp(f"llama{version}") / "tokenizer.model"
        file.write_bytes(content)
        found[version] = load_tokenizer(file)
    return found | {"1": found["2"]}


@pytest.fixture
def write(tmp_path):
    """Writes a data file, and returns its path: bytes as they are, rows by the suffix."""

    def write(name, content):
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif name.endswith(".jsonl"):
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in content]
            path.write_text("".join(lines), encoding="utf-8")
        else:
            path.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
        return path

    return write


def samples_of(*lengths, seed=0):
    """Random samples of so many tokens, none of them 0, half of which count."""
    rng = np.random.default_rng(seed)
    made = []
    for n in lengths:
        counts = rng.random(n) < 0.5
        counts[0] = False
        made.append(Sample(rng.integers(1, oracle.V, n, np.int32), counts))
    return made


def numbered(n, together=1):
    """Rows of which row i has the tokens i + 1."""
    tokens = np.repeat(np.arange(1, n + 1, dtype=np.int32)[:, None], 4, axis=1)
    ones = np.ones_like(tokens)
    return Rows(tokens, tokens, ones.astype(np.float32), ones, together)


def seen(windows):
    """The rows of `numbered` in windows, in order, without filler."""
    rows = np.concatenate([window["tokens"][..., 0].ravel() for window in windows])
    return rows[rows > 0] - 1


# Formats


@pytest.mark.parametrize("version", ["1", "2", "3"])
@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_alpaca_rows_are_the_published_text_and_only_the_answer_counts(
    tokenizers, write, name, version
):
    tokenizer = tokenizers[version]
    samples, counts = read(write(name, ALPACA), tokenizer, CONFIGS[version], seq_len=500)
    for sample, (prompt, answer) in zip(samples, ALPACA_TEXTS, strict=True):
        whole = tokenizer.encode(prompt + answer, bos=True)
        assert sample.ids.tolist() == [*whole, tokenizer.eos_id]
        learnt = sample.ids[sample.counts].tolist()
        assert learnt[-1] == tokenizer.eos_id
        assert b"".join(map(tokenizer.token_bytes, learnt)).decode() == answer
        begin = len(sample.ids) - len(learnt)
        assert sample.ids[:begin].tolist() == tokenizer.encode(prompt, bos=True)
        assert sample.counts.tolist() == [False] * begin + [True] * len(learnt)
    read_tokens = sum(len(sample.ids) - 1 for sample in samples)
    learnt = sum(sample.counts.sum() for sample in samples)
    assert counts == data.Counts(3, 0, 0, read_tokens, learnt)
    assert str(counts) == f"3 samples, {read_tokens} tokens, {learnt} to learn"


@pytest.mark.parametrize("version", ["2", "3"])
def test_chats_and_alpaca_rows_written_as_chats(tokenizers, write, version):
    tokenizer, config = tokenizers[version], CONFIGS[version]
    dialogs = [
        [Message("user", "Name the cat."), Message("assistant", "the cat\nsat")],
        [Message("user", "Double\u2028it: é\n\n 21"), Message("assistant", "42")],
        [Message("user", "Say mat"), Message("assistant", " mat ")],
        [Message(**message) for message in CHAT],
    ]
    alpaca, _ = read(write("a.json", ALPACA), tokenizer, config, seq_len=500, chat=True)
    chats, _ = read(write("c.jsonl", [{"messages": CHAT}]), tokenizer, config, seq_len=500)
    for sample, dialog in zip(alpaca + chats, dialogs, strict=True):
        ids, mask = encode_chat(tokenizer, dialog, version, add_generation_prompt=False)
        assert sample.ids.tolist() == ids
        assert sample.counts.tolist() == mask


def test_prompts_count_where_asked_but_never_bos(tokenizers, write):
    path = write("c.json", [{"messages": CHAT}])
    (sample,), _ = read(path, tokenizers["2"], CONFIGS["2"], seq_len=500, train_on_prompts=True)
    assert np.sum(sample.ids == tokenizers["2"].bos_id) == 2  # Llama 2 writes one a turn
    np.testing.assert_array_equal(sample.counts, sample.ids != tokenizers["2"].bos_id)


@pytest.mark.parametrize("name", ["text.txt", "TEXT", "text.md"])
def test_a_plain_text_is_cut_into_windows_that_predict_each_token_once(tokenizers, write, name):
    text = "the cat sat\r\non the mat: é\n" * 3
    ids = tokenizers["3"].encode(text)
    samples, counts = read(write(name, text.encode()), tokenizers["3"], CONFIGS["3"], seq_len=16)
    assert np.concatenate([s.ids[1:] for s in samples]).tolist() == ids
    assert np.concatenate([s.ids[:-1] for s in samples]).tolist() == [
        tokenizers["3"].bos_id,
        *ids[:-1],
    ]
    assert [len(s.ids) for s in samples[:-1]] == [17] * (len(samples) - 1)
    assert all(s.counts.tolist() == [False] + [True] * (len(s.ids) - 1) for s in samples)
    assert counts == data.Counts(len(samples), 0, 0, len(ids), len(ids))
    rows = pack(samples, 16)
    assert rows.tokens.ravel()[: len(ids)].tolist() == [tokenizers["3"].bos_id, *ids[:-1]]
    assert rows.one_text


def test_a_byte_order_mark_is_no_text(tokenizers, write):
    for name, content in ("a.txt", b"the cat"), ("a.json", b"[" + ROW + b"]"):
        plain, marked = (
            read(write(name, mark + content), tokenizers["3"], CONFIGS["3"], seq_len=500)
            for mark in (b"", b"\xef\xbb\xbf")
        )
        assert plain[0][0].ids.tolist() == marked[0][0].ids.tolist()
        assert plain[1] == marked[1]


def test_what_is_cut_or_has_nothing_to_learn_is_counted(tokenizers, write):
    tokenizer = tokenizers["3"]
    row = {"instruction": "a", "input": "", "output": "b" * 20}
    prompt = len(tokenizer.encode(data.alpaca_prompt("a"), bos=True))
    rows = [row, row | {"output": "b"}, row | {"output": " \n"}, row | {"instruction": "a" * 40}]
    path = write("a.jsonl", rows)
    samples, counts = read(path, tokenizer, CONFIGS["3"], seq_len=prompt + 9)
    whole = tokenizer.encode(data.alpaca_prompt("a") + "b" * 20, bos=True)
    assert samples[0].ids.tolist() == whole[: prompt + 10]
    assert [s.counts.sum() for s in samples] == [10, 2]
    assert counts == data.Counts(4, 1, 2, prompt + 9 + prompt + 1, 12)
    assert str(counts).endswith(
        "1 cut to the sequence length; 2 left out, nothing in them to learn"
    )
    with_prompts, _ = read(path, tokenizer, CONFIGS["3"], seq_len=prompt + 9, train_on_prompts=True)
    assert [s.counts.sum() for s in with_prompts] == [prompt + 9, prompt + 1, prompt + 9]
    blank = {"role": "assistant", "content": " "}
    chats = [{"messages": dialog} for dialog in (CHAT, CHAT[:2], [*CHAT[:2], blank])]
    assert read(write("c.jsonl", chats), tokenizer, CONFIGS["3"], seq_len=500)[1].empty == 2


@pytest.mark.parametrize("version", ["1", "2", "3"])
def test_preferences_of_texts_are_joined_as_they_stand(tokenizers, write, version):
    tokenizer = tokenizers[version]
    row = {"prompt": "the cat: ", "chosen": "sat", "rejected": "ate the rat"}
    path = write("p.jsonl", [row, row])
    pairs, counts = data.read_preferences(path, tokenizer, CONFIGS[version], seq_len=99)
    assert len(pairs) == counts.rows == 2
    for sample, answer in zip(pairs[1], ("sat", "ate the rat"), strict=True):
        ids = [*tokenizer.encode("the cat: " + answer, bos=True), tokenizer.eos_id]
        assert sample.ids.tolist() == ids
        prompt = tokenizer.encode("the cat: ", bos=True)
        shared = next(i for i, token_id in enumerate(ids) if [*prompt, None][i] != token_id)
        assert sample.counts.tolist() == [False] * shared + [True] * (len(ids) - shared)


@pytest.mark.parametrize("version", ["2", "3"])
def test_preferences_of_chats_count_the_last_answer_alone(tokenizers, write, version):
    tokenizer, config = tokenizers[version], CONFIGS[version]
    last = [[{"role": "assistant", "content": text}] for text in ("it ate", "mat")]
    row = {"prompt": CHAT[:-1], "chosen": last[0], "rejected": last[1]}
    (pair,), _ = data.read_preferences(write("p.json", [row]), tokenizer, config, seq_len=500)
    before = [Message(**message) for message in CHAT[:-1]]
    prompt, _ = encode_chat(tokenizer, before, version)
    for sample, text in zip(pair, ("it ate", "mat"), strict=True):
        dialog = [*before, Message("assistant", text)]
        ids, _ = encode_chat(tokenizer, dialog, version, add_generation_prompt=False)
        assert sample.ids.tolist() == ids
        assert sample.counts.tolist() == [i >= len(prompt) for i in range(len(ids))]

    texts = {"prompt": "the cat?", "chosen": "it sat", "rejected": "it ate"}
    path = write("t.json", [texts])
    (pair,), _ = data.read_preferences(path, tokenizer, config, seq_len=500, chat=True)
    dialog = [Message("user", "the cat?"), Message("assistant", "it sat")]
    ids, mask = encode_chat(tokenizer, dialog, version, add_generation_prompt=False)
    assert (pair[0].ids.tolist(), pair[0].counts.tolist()) == (ids, mask)


def test_a_pair_without_one_answer_is_left_out(tokenizers, write):
    row = {"prompt": "p" * 8, "chosen": "c" * 20, "rejected": "r"}
    rows = [row, row | {"prompt": "p" * 30}, row | {"chosen": "c" * 3}]
    pairs, counts = data.read_preferences(
        write("p.jsonl", rows), tokenizers["3"], CONFIGS["3"], seq_len=12
    )
    assert [(len(c.ids), len(r.ids)) for c, r in pairs] == [(13, 11), (13, 11)]
    assert counts == data.Counts(3, 1, 1, 2 * (12 + 10), 2 * (4 + 2))


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("version", ["2", "3"])
def test_a_pair_with_a_blank_answer_is_left_out(tokenizers, write, version, chat):
    row = {"prompt": "the cat", "chosen": "sat", "rejected": "ate"}
    dialogs = {"prompt": CHAT[:-1]} | {  # in which the assistant has spoken before
        key: [{"role": "assistant", "content": row[key]}] for key in ("chosen", "rejected")
    }
    blank = [{"role": "assistant", "content": "\n"}]
    for name, kept, left_out in (
        ("t.json", row, [row | {"chosen": " "}, row | {"rejected": ""}]),
        ("m.json", dialogs, [dialogs | {"chosen": blank}, dialogs | {"rejected": blank}]),
    ):
        path = write(name, [*left_out, kept])
        pairs, counts = data.read_preferences(
            path, tokenizers[version], CONFIGS[version], seq_len=500, chat=chat
        )
        assert (len(pairs), counts.rows, counts.empty) == (1, 3, 2)


# Texts


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_plain_text_is_its_lines(write, mark):
    text = "the cat\r\n\n sat\u2028on \xe9\x0bthe mat " + "rat " * 2000
    found = list(data.texts(write("a.txt", mark + text.encode())))
    assert found == text.splitlines()
    assert len(found) == 5


def test_of_rows_the_texts_are_what_is_said(write):
    alpaca = ["Name the cat.", "the cat", "sat", "Double", "it: é", " 21", "42", "Say mat", " mat "]
    assert list(data.texts(write("a.jsonl", ALPACA))) == alpaca
    said = [message["content"] for message in CHAT]
    assert list(data.texts(write("c.json", [{"messages": CHAT}]))) == said
    pair = {"prompt": CHAT[:-1], "chosen": CHAT[-1:], "rejected": CHAT[2:3]}
    assert list(data.texts(write("p.json", [pair]))) == [*said, said[2]]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", ROW + b"{", "a.jsonl line 2 is not JSON"),
        ("a.jsonl", ROW + b"3", "a.jsonl line 2: a row is a number, expected an object"),
        ("a.jsonl", ROW.replace(b'"a"', b'"\\ud800"'), "line 1: the text has a lone surrogate"),
        ("a.txt", b"abc\xff", "a.txt is not UTF-8 at byte 3"),
        ("a.csv", b"a,b", "a.csv ends in .csv"),
    ],
)
def test_files_without_texts_are_refused_in_one_line(write, name, content, words):
    with pytest.raises(UserError, match=words) as caught:
        list(data.texts(write(name, content)))
    assert "\n" not in str(caught.value)


# Rows


@pytest.mark.parametrize("seed", range(4))
def test_packing_keeps_each_sample_once_and_whole(seed):
    T = 32
    lengths = np.random.default_rng(seed).integers(2, T + 2, 60)
    samples = samples_of(*lengths, seed=seed)
    rows = pack(samples, T)
    found, used = [], []
    for tokens, targets, weights, segments in zip(
        rows.tokens, rows.targets, rows.weights, rows.segments, strict=True
    ):
        n = int(np.sum(segments > 0))
        used.append(n)
        assert (np.diff(segments[:n]) >= 0).all()
        assert set(segments[:n]) == set(range(1, segments.max() + 1))
        assert not any(array[n:].any() for array in (tokens, targets, weights, segments))
        for number in range(1, segments.max() + 1):
            at = segments == number
            ids = [*tokens[at], targets[at][-1]]
            assert targets[at].tolist() == ids[1:]
            found.append((*ids, *weights[at]))
    expected = [(*s.ids, *s.counts[1:].astype(np.float32)) for s in samples]
    assert sorted(found) == sorted(expected)
    fewest = sorted(used)[:2]
    assert sum(fewest) > T  # no two rows would fit into one
    assert rows.waste == pytest.approx(1 - sum(lengths - 1) / (len(used) * T))


def test_rows_without_packing_are_the_samples_in_order():
    samples = samples_of(5, 2, 9)
    rows = pack(samples, 8, packing=False)
    assert len(rows) == 3
    for i, sample in enumerate(samples):
        n = len(sample.ids) - 1
        pad = np.zeros(8 - n)
        np.testing.assert_array_equal(rows.tokens[i], [*sample.ids[:-1], *pad])
        np.testing.assert_array_equal(rows.targets[i], [*sample.ids[1:], *pad])
        np.testing.assert_array_equal(rows.weights[i], [*sample.counts[1:], *pad])
        np.testing.assert_array_equal(rows.segments[i], [1] * n + [0] * (8 - n))
    assert {name: getattr(rows, name).dtype for name in data.FIELDS} == data.BATCH


def test_packed_samples_cost_what_they_cost_alone():
    config = oracle.CONFIGS["6 heads on 2"]
    params = oracle.random_params(config)
    samples = samples_of(5, 12, 3, 17, 9, 8, 2, 11)
    loss = jax.jit(next_token(config))
    totals = []
    for packing in (True, False):
        rows = pack(samples, 16, packing=packing)
        (batch,) = in_order(rows, len(rows) + 1)  # one row is filler
        totals.append(loss(params, jax.tree.map(jnp.asarray, batch), None))
    (packed, weight, _), (alone, weight_alone, _) = totals
    assert weight == weight_alone == sum(s.counts.sum() for s in samples)
    np.testing.assert_allclose(packed, alone, rtol=1e-5)


def test_a_fingerprint_changes_with_any_entry():
    samples = samples_of(5, 6, 7)
    rows = pack(samples, 8)
    assert rows.fingerprint() == pack(samples, 8).fingerprint()
    others = [pack(samples, 9), pack(samples, 8, packing=False), pack(samples[:2], 8)]
    for name in ("tokens", "targets", "weights", "segments"):
        changed = getattr(rows, name).copy()
        changed[0, 0] += 1
        others.append(dataclasses.replace(rows, **{name: changed}))
    assert len({other.fingerprint() for other in [rows, *others]}) == 8


def test_the_last_samples_validate():
    assert split(range(10), 0.25) == ([0, 1, 2, 3, 4, 5, 6], [7, 8, 9])
    for fraction in (0.0, 1.0, 0.95, -0.1, float("nan")):
        with pytest.raises(UserError, match="expected at least one each"):
            split(range(10), fraction)


# Batches


def test_each_epoch_has_all_rows_once_in_an_order_of_its_own():
    rows = numbered(11)
    windows = list(batches(rows, 2, seed=3, epochs=3, micro=2))
    assert len(windows) == n_windows(rows, 2, epochs=3, micro=2) == 9
    assert {window["tokens"].shape for window in windows} == {(2, 2, 4)}
    orders = seen(windows).reshape(3, 11)
    np.testing.assert_array_equal(np.sort(orders), np.tile(np.arange(11), (3, 1)))
    assert len({tuple(order) for order in orders}) == 3
    again = seen(batches(rows, 2, seed=3, epochs=3, micro=2))
    np.testing.assert_array_equal(again, orders.ravel())
    assert (seen(batches(rows, 2, seed=9, epochs=3)) != orders.ravel()).any()
    larger = seen(batches(rows, 6, seed=3, epochs=3))  # nor does the order depend on the batch
    np.testing.assert_array_equal(larger, orders.ravel())


@pytest.mark.parametrize("length", [25, 27, 28])  # of ids; the last row is full, or not
def test_one_text_is_cut_elsewhere_in_every_epoch(length):
    ids = np.arange(1, length + 1, dtype=np.int32)
    windows = [ids[i : i + 5] for i in range(0, length - 1, 4)]
    rows = pack([Sample(w, np.arange(len(w)) > 0, continues=w[0] > 1) for w in windows], 4)
    seen = list(batches(rows, 1, seed=0, epochs=12))
    assert len(seen) == 12 * len(rows)
    beginnings = []
    for i in range(0, len(seen), len(rows)):
        epoch = {
            name: np.stack([w[name][0, 0] for w in seen[i : i + len(rows)]]) for name in data.FIELDS
        }
        counts = epoch["weights"] > 0
        np.testing.assert_array_equal(counts, epoch["segments"] > 0)
        np.testing.assert_array_equal(epoch["tokens"][counts] + 1, epoch["targets"][counts])
        np.testing.assert_array_equal(np.sort(epoch["tokens"][counts]), ids[:-1])
        beginnings.append(frozenset(epoch["tokens"][:, 0]))
        for tokens, segments in zip(epoch["tokens"], epoch["segments"], strict=True):
            for number in set(segments) - {0}:  # what sees each other stands together in the text
                assert (np.diff(tokens[segments == number]) == 1).all()
    assert beginnings[0] == set(ids[:-1:4])
    assert len(set(beginnings)) == 4


def test_the_last_window_is_filled_with_rows_that_do_not_count():
    rows = numbered(11)
    *_, last = batches(rows, 3, seed=0, epochs=1, micro=2)
    assert (last["tokens"][1, 2] == 0).all()
    for name in ("tokens", "targets", "weights", "segments"):
        assert last[name].shape == (2, 3, 4)
        assert last[name].dtype == getattr(rows, name).dtype
        assert not last[name][1, 2:].any()
        assert last[name].reshape(6, 4)[:5].all()


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_without_epochs_it_never_ends(batch_size):
    forever = batches(numbered(3), batch_size, seed=data.MAX_SEED)
    windows = [next(forever) for _ in range(15)]
    assert np.bincount(seen(windows)).tolist() == [5 * batch_size] * 3


@pytest.mark.parametrize("parts", [2, 4])
def test_parts_side_by_side_are_the_whole(parts):
    rows = pack(samples_of(*range(2, 18)), 17, packing=False)
    split_by = [
        batches(rows, 4, seed=5, epochs=2, micro=3, part=i, parts=parts) for i in range(parts)
    ]
    whole = list(batches(rows, 4, seed=5, epochs=2, micro=3))
    shares = list(zip(*split_by, strict=True))
    for window, share in zip(whole, shares, strict=True):
        for name, values in window.items():
            joined = np.concatenate([part[name] for part in share], axis=1)
            np.testing.assert_array_equal(joined, values)


@pytest.mark.parametrize("done", [0, 1, 6, 8])
def test_a_restored_iterator_goes_on_bit_for_bit(done):
    rows = pack(samples_of(*range(2, 18)), 17, packing=False)
    whole = list(batches(rows, 4, seed=5, epochs=2))
    first = batches(rows, 4, seed=5, epochs=2, part=1, parts=2)
    for _ in range(done):
        next(first)
    state = json.loads(json.dumps(first.get_state()))
    resumed = batches(rows, 4, seed=5, epochs=2)  # and on another number of processes
    resumed.set_state(state)
    rest = list(resumed)
    assert len(rest) == 8 - done
    for window, expected in zip(rest, whole[done:], strict=True):
        for name, values in expected.items():
            np.testing.assert_array_equal(window[name], values)


def test_pairs_stay_together():
    pairs = list(zip(samples_of(3, 4, 5, 6, 7), samples_of(7, 6, 5, 4, 3, seed=1), strict=True))
    rows = pack_pairs(pairs, 8)
    assert len(rows) == 5
    windows = [*batches(rows, 2, seed=1, epochs=1, micro=2), *in_order(rows, 2)]
    expected = {(tuple(c.ids[:-1]), tuple(r.ids[:-1])) for c, r in pairs}
    for some in windows[:2], windows[2:]:
        tokens = np.concatenate([window["tokens"].reshape(-1, 2, 8) for window in some])
        found = [tuple(tuple(row[row > 0]) for row in pair) for pair in tokens]
        assert len(found) > 5
        assert sorted(found)[-5:] == sorted(expected)
        assert set(found) - expected == {((), ())}
    assert windows[0]["tokens"].shape == (2, 4, 8)
    (half, _), (other, _) = (batches(rows, 4, seed=1, epochs=1, part=i, parts=2) for i in (0, 1))
    assert half["tokens"].shape == (1, 4, 8)
    whole = next(batches(rows, 4, seed=1))
    np.testing.assert_array_equal(
        np.concatenate([half["tokens"], other["tokens"]], axis=1), whole["tokens"]
    )


@pytest.mark.parametrize("parts", [1, 2])
def test_an_evaluation_sees_all_rows_once_in_order(parts):
    rows = numbered(9)
    shares = [list(in_order(rows, 4, part=i, parts=parts)) for i in range(parts)]
    joined = [
        np.concatenate([part["tokens"] for part in batch]) for batch in zip(*shares, strict=True)
    ]
    assert [batch.shape for batch in joined] == [(4, 4)] * 3
    assert np.concatenate(joined)[:, 0].tolist() == [*range(1, 10), 0, 0, 0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 2, "parts": 4}, "2 rows does not divide among 4 processes: take a mul"),
        ({"batch_size": 6, "parts": 4}, "6 rows does not divide among 4 processes"),
        ({"batch_size": 4, "seed": -1}, "the seed is -1, expected 0 to 4294967295"),
        ({"batch_size": 4, "seed": 2**32}, "expected 0 to 4294967295"),
    ],
)
def test_batches_that_cannot_be_say_so(options, words):
    with pytest.raises(UserError, match=words):
        batches(numbered(9), **{"seed": 0} | options)


def test_reading_and_packing_do_without_grain(monkeypatch):
    monkeypatch.setitem(sys.modules, "grain", None)
    monkeypatch.delitem(sys.modules, "train.data")
    monkeypatch.setattr(train, "data", data)  # what the import below sets is undone
    fresh = importlib.import_module("train.data")
    rows = fresh.pack(samples_of(3, 4), 8)
    with pytest.raises(UserError, match=r"pip install 'llama_jax\[train\]'"):
        fresh.batches(rows, 1, seed=0)


# Bad input


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", ROW + b"\n" + b'{"instruction": \n', "a.jsonl line 3 is not JSON"),
        ("a.jsonl", ROW + b"[" * 100_000, "a.jsonl line 2 is not JSON"),
        ("a.jsonl", ROW + b"1" * 5000, "a.jsonl line 2 is not JSON"),
        ("a.json", b"[\n" + ROW + b",\n{'a'}]", "a.json line 4 is not JSON"),
        ("a.json", b"[\n" + ROW + b"\n" + ROW + b"]", "line 4 is not JSON .expected a comma or"),
        ("a.json", b"[\n" + ROW, "a.json line 3 is not JSON .expected a comma or the end"),
        ("a.json", b"[\n" + ROW + b"]\n" + ROW, "line 3 is not JSON .more follows"),
        ("a.json", b"[\n" + ROW + b",\n", "a.json line 4 is not JSON"),
        ("a.json", b" [ \n ]", "a.json has no rows"),
        ("a.jsonl", ROW + b"3", "a.jsonl line 2: a row is a number, expected an object"),
        ("a.jsonl", ROW + b'{"instruction": "a"}', "line 2: missing key 'output', the keys are"),
        (
            "a.jsonl",
            ROW + ROW[:-2] + b', "text": 1}',
            "line 2: unknown key 'text', expected 'instr",
        ),
        (
            "a.jsonl",
            ROW + ROW.replace(b'"b"', b"null"),
            "line 2: 'output' is null, expected a text",
        ),
        (
            "a.jsonl",
            ROW.replace(b'"a"', b"[1]"),
            "line 1: 'instruction' is a list, expected a text",
        ),
        ("a.jsonl", ROW.replace(b'"a"', b"1.5"), "line 1: 'instruction' is a number, expected"),
        ("a.jsonl", ROW.replace(b'"a"', b"true"), "line 1: 'instruction' is a boolean, expected"),
        ("a.jsonl", ROW.replace(b'"a"', b'"\\ud800"'), "line 1: the text has a lone surrogate"),
        ("a.jsonl", ROW + b'{"messages": []}', "line 2: missing key 'instruction', 'output', "),
        ("a.jsonl", b'{"text": "a"}', "line 1: the keys are 'text', expected messages .chat. or"),
        ("a.jsonl", b"{}", "line 1: the keys are none, expected"),
        (
            "a.jsonl",
            b'{"messages": "a"}',
            "line 1: 'messages' is a text, expected a list of messag",
        ),
        ("a.jsonl", b'{"messages": []}', "line 1: the chat has no messages"),
        ("a.jsonl", b'{"messages": ["a"]}', "line 1: a message is a text, expected an object"),
        ("a.jsonl", b'{"messages": [{"role": "user"}]}', "line 1: missing key 'content'"),
        (
            "a.jsonl",
            b'{"messages": [{"role": "pope", "content": "a"}]}',
            "line 1: unknown role 'pope'",
        ),
        ("a.jsonl", b'{"prompt": "", "chosen": "", "rejected": ""}', "train on it with train.dpo"),
        ("a.jsonl", ROW.replace(b'"b"', b'" "') * 2, "nothing to learn: none of 2 rows"),
        ("a.jsonl", ROW.replace(b'"a"', b'"%s"' % (b"a" * 600)), "that begins within 500 tokens"),
        ("a.jsonl", "é".encode("latin-1"), "a.jsonl is not UTF-8 at byte 0, expected UTF-8: conve"),
        ("a.txt", b"abc\xff", "a.txt is not UTF-8 at byte 3"),
        ("a.txt", b"\xef\xbb\xbfabc\xff", "a.txt is not UTF-8 at byte 6"),
        ("a.txt", "abc".encode("utf-16"), "a.txt has a NUL at byte 3"),
        ("a.txt", b" \n", "a.txt is empty, expected training data"),
        ("a.json", b"", "a.json is empty"),
        ("a.csv", b"a,b", "a.csv ends in .csv, expected .json, .jsonl with rows or .txt"),
        ("a.txt", None, "a.txt is no file, expected training data"),
    ],
)
def test_bad_files_are_refused_in_one_line(tokenizers, write, tmp_path, name, content, words):
    path = tmp_path / name if content is None else write(name, content)
    with pytest.raises(UserError, match=words) as caught:
        read(path, tokenizers["3"], CONFIGS["3"], seq_len=500)
    assert "\n" not in str(caught.value)


def test_a_folder_is_no_file(tokenizers, tmp_path):
    with pytest.raises(UserError, match="is no file"):
        read(tmp_path, tokenizers["3"], CONFIGS["3"], seq_len=500)


@pytest.mark.parametrize("seq_len", [1, 513])
def test_sequences_that_the_model_cannot_have(tokenizers, write, seq_len):
    path = write("a.json", ALPACA)
    for reader in read, data.read_preferences:
        with pytest.raises(UserError, match=f"is {seq_len}, expected 2 to 512, the model's cont"):
            reader(path, tokenizers["3"], CONFIGS["3"], seq_len=seq_len)


def test_llama_1_has_no_chats(tokenizers, write):
    with pytest.raises(UserError, match="line 2: Llama 1 has no chat format"):
        read(write("a.json", ALPACA), tokenizers["1"], CONFIGS["1"], seq_len=500, chat=True)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("p.txt", b"abc", "p.txt is a plain text, expected JSON or JSONL rows with prompt, chosen"),
        ("p.jsonl", ROW, "p.jsonl holds Alpaca rows, expected JSON or JSONL rows with prompt"),
        ("p.jsonl", b'{"prompt": "", "chosen": ""}', "line 1: missing key 'rejected'"),
        (
            "p.jsonl",
            b'{"prompt": "a", "chosen": "", "rejected": []}',
            "line 1: 'rejected' is a list, expected a text",
        ),
        (
            "p.jsonl",
            b'{"prompt": [{"role": "user", "content": "a"}], "chosen": [], "rejected": []}',
            "line 1: the last message of an answer is not the assistant's",
        ),
        (
            "p.jsonl",
            b'{"prompt": "%s", "chosen": "a", "rejected": "b"}' % (b"a" * 600),
            "nothing to learn: none of 1 rows has an answer that begins within 500 tokens",
        ),
    ],
)
def test_bad_preferences_are_refused_in_one_line(tokenizers, write, name, content, words):
    with pytest.raises(UserError, match=words) as caught:
        data.read_preferences(write(name, content), tokenizers["3"], CONFIGS["3"], seq_len=500)
    assert "\n" not in str(caught.value)


def test_the_shared_instructions(tokenizers, shared_data):
    path = shared_data / "instruction-data.json"
    samples, counts = read(path, tokenizers["3"], CONFIGS["3"], seq_len=512)
    with path.open(encoding="utf-8") as file:
        rows = json.load(file)
    assert counts.rows == len(rows) == 1100
    assert len(samples) + counts.empty == 1100
    assert pack(samples, 512).waste < 0.1

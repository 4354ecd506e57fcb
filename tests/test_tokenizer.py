"""Tokenizers: ids against the libraries' own, streamed text against whole text, refusals."""

import base64
import contextlib
import io
import json
import pickle
import random
import socket
import subprocess
import sys

import pytest

from llama_jax import tokenizer as tokenizer_module
from llama_jax.errors import UserError
from llama_jax.tokenizer import StreamDecoder, load_tokenizer

TEXTS = (
    "",
    "the cat sat",
    " the  cat ",
    "a\n\n\tb\r\n",
    "naïve 🦙 日本語 👩‍👩‍👧 é",
    "1234 it's I'LL <|eot_id|></s><s> [INST]",
    "   ",
    "\x00\u2581",
)
CORPUS = ["the cat sat on the mat", "that cat ate the rat", "a hat, the hat is it's own"] * 4
MERGES = (b"th", b"the", b" t", b" the", b"at", b"  ")
KINDS = ("sentencepiece", "tiktoken", "hf_bytes", "hf_pieces")


def tiktoken_bytes(merges=MERGES):
    tokens = [bytes([byte]) for byte in range(256)] + list(merges)
    return b"".join(b"%s %d\n" % (base64.b64encode(t), i) for i, t in enumerate(tokens))


@pytest.fixture(scope="session")
def sentencepiece_bytes():
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    return model.getvalue()


def hf_bytes_json():
    """The tiktoken vocabulary above as a byte-level `tokenizer.json`."""
    tokenizers = pytest.importorskip("tokenizers")
    char = {byte: char for char, byte in tokenizer_module._byte_alphabet().items()}
    tokens = [bytes([byte]) for byte in range(256)] + list(MERGES)
    vocab = {"".join(char[byte] for byte in token): i for i, token in enumerate(tokens)}
    merges = [("t", "h"), ("th", "e"), (" ", "t"), (" ", "the"), ("a", "t"), (" ", " ")]
    merges = [(a.replace(" ", char[32]), b.replace(" ", char[32])) for a, b in merges]
    model = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges, ignore_merges=True))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(
                tokenizers.Regex(tokenizer_module.LLAMA3_PATTERN), "isolated"
            ),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    model.decoder = tokenizers.decoders.ByteLevel()
    model.add_special_tokens(list(tokenizer_module._llama3_specials()))
    return model.to_str()


def hf_pieces_json(sentencepiece_bytes):
    """The SentencePiece model as the `tokenizer.json` of Llama 2."""
    tokenizers = pytest.importorskip("tokenizers")
    model = load_bytes(sentencepiece_bytes)._model
    vocab = {model.id_to_piece(i): i for i in range(model.get_piece_size())}
    ordinary = {piece for piece, i in vocab.items() if i > 2 and not model.is_byte(i)}
    merges = [
        (piece[:k], piece[k:])
        for piece in sorted(ordinary, key=vocab.__getitem__)
        for k in range(1, len(piece))
        if {piece[:k], piece[k:]} <= ordinary
    ]
    hf = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    normalizers, decoders = tokenizers.normalizers, tokenizers.decoders
    hf.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    hf.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    hf.add_special_tokens(["<unk>", "<s>", "</s>"])
    return hf.to_str()


def load_bytes(data):
    return tokenizer_module.SentencePiece(data)


@pytest.fixture(scope="session")
def load(sentencepiece_bytes, tmp_path_factory):
    """`load(kind)` reads a tiny tokenizer of that kind from a file without telling name."""

    def load(kind):
        data = {
            "sentencepiece": lambda: sentencepiece_bytes,
            "tiktoken": tiktoken_bytes,
            "hf_bytes": lambda: hf_bytes_json().encode(),
            "hf_pieces": lambda: hf_pieces_json(sentencepiece_bytes).encode(),
        }[kind]()
        file = tmp_path_factory.mktemp(kind) / "file"
        file.write_bytes(data)
        return load_tokenizer(file)

    return load


@pytest.fixture(scope="session", params=KINDS)
def tokenizer(request, load):
    return load(request.param)


def streamed(tokenizer, ids, prompt_ids=()):
    stream = StreamDecoder(tokenizer, prompt_ids)
    return [stream.push(token_id) for token_id in ids] + [stream.flush()]


def random_ids(rng, tokenizer):
    return [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randrange(1, 24))]


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_encode_and_decode(tokenizer, text):
    if tokenizer.leading_space:  # SentencePiece's own sign for a space cannot survive
        text = text.replace("\u2581", " ")
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id]) == text
    assert tokenizer.encode(text, bos=True) == [tokenizer.bos_id, *ids]
    assert all(type(token_id) is int for token_id in ids)
    assert "".join(streamed(tokenizer, ids)) == text


def test_text_of_special_tokens_is_plain_text(tokenizer):
    names = ["<s>", "</s>", "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<unk>"]
    special = {tokenizer.bos_id, tokenizer.eos_id}
    for name in names:
        with contextlib.suppress(UserError):
            special.add(tokenizer.special_id(name))
    text = "a".join(names)
    ids = tokenizer.encode(text)
    assert not special & set(ids)
    assert tokenizer.decode(ids) == text


def test_streamed_text_is_the_text_in_context(tokenizer):
    rng = random.Random(0)
    for _ in range(300):
        prompt, ids = random_ids(rng, tokenizer), random_ids(rng, tokenizer)
        assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)
        whole = tokenizer.decode(prompt + ids)
        stream = StreamDecoder(tokenizer)
        before = "".join(map(stream.push, prompt))  # final text of the prompt alone
        assert before + "".join(streamed(tokenizer, ids, prompt)) == whole


def test_a_character_of_several_tokens_comes_whole(tokenizer):
    ids = tokenizer.encode("a🦙b")
    texts = streamed(tokenizer, ids)
    assert [text for text in texts if text] == ["a", "🦙", "b"]
    assert len(ids) > 5
    assert texts.index("🦙") > texts.index("a") + 3


def test_every_prefix_streams_without_broken_characters(tokenizer):
    text = "naïve 🦙 日本語 👩‍👩‍👧"
    stream = StreamDecoder(tokenizer)
    so_far = ""
    for token_id in tokenizer.encode(text):
        so_far += stream.push(token_id)
        assert text.startswith(so_far)
    assert so_far == text
    assert stream.flush() == ""


def test_an_unfinished_character_is_replaced_at_the_end(tokenizer):
    ids = tokenizer.encode("a🦙")[:-1]
    assert streamed(tokenizer, ids)[-1] == "\ufffd"
    assert tokenizer.decode(ids) == "a\ufffd"
    assert tokenizer.decode(ids + tokenizer.encode("b")[-1:]) == "a\ufffdb"


@pytest.mark.parametrize("kind", ["sentencepiece", "hf_pieces"])
def test_spaces_between_words_survive_streaming(load, kind):
    tokenizer = load(kind)
    bos = tokenizer.bos_id
    prompt, answer = tokenizer.encode("the cat"), tokenizer.encode("sat")
    assert "".join(streamed(tokenizer, answer, [bos])) == "sat"
    assert "".join(streamed(tokenizer, answer, [bos, *prompt])) == " sat"
    assert "".join(streamed(tokenizer, [bos, *prompt, bos, *answer])) == "the cat sat"


@pytest.mark.parametrize("kind", KINDS)
def test_decode_agrees_with_the_library_on_valid_text(load, kind):
    tokenizer = load(kind)
    rng = random.Random(1)
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == library_decode(tokenizer, text=text)
    for _ in range(300):
        ids = random_ids(rng, tokenizer)
        if tokenizer.leading_space:  # a space as a byte, and <unk>, never come first in a text
            ids = [tokenizer.encode("a")[0], *ids]
        ours = tokenizer.decode(ids)
        if "\ufffd" not in ours:  # libraries differ in how many of these an invalid run makes
            assert ours == library_decode(tokenizer, ids=ids)


def library_decode(tokenizer, *, text="", ids=None):
    ids = tokenizer.encode(text) if ids is None else ids
    if isinstance(tokenizer, tokenizer_module.Tiktoken):
        ids = [i for i in ids if i < tokenizer.vocab_size - 256]
    if isinstance(tokenizer, tokenizer_module.HuggingFace) and tokenizer.leading_space:
        ids = [i for i in ids if i != tokenizer.special_id("<unk>")] or ids
    return tokenizer._model.decode(ids)


@pytest.mark.parametrize("pair", [("sentencepiece", "hf_pieces"), ("tiktoken", "hf_bytes")])
def test_two_formats_of_one_vocabulary_agree(load, pair):
    one, other = map(load, pair)
    assert (one.vocab_size, one.bos_id, one.eos_id) == (
        other.vocab_size,
        other.bos_id,
        other.eos_id,
    )
    for text in (*TEXTS, *CORPUS):
        assert one.encode(text) == other.encode(text), text


def test_llama3_ids_by_hand(load):
    tokenizer = load("tiktoken")
    the, space_the, at = 256 + 1, 256 + 3, 256 + 4
    assert tokenizer.encode("the the cat") == [the, space_the, ord(" "), ord("c"), at]
    assert tokenizer.vocab_size == 256 + len(MERGES) + 256
    names = {
        0: "<|begin_of_text|>",
        1: "<|end_of_text|>",
        2: "<|reserved_special_token_0|>",
        4: "<|finetune_right_pad_id|>",
        5: "<|reserved_special_token_2|>",
        6: "<|start_header_id|>",
        7: "<|end_header_id|>",
        8: "<|eom_id|>",
        9: "<|eot_id|>",
        10: "<|python_tag|>",
        11: "<|reserved_special_token_3|>",
        255: "<|reserved_special_token_247|>",
    }
    for offset, name in names.items():
        assert tokenizer.special_id(name) == 256 + len(MERGES) + offset
        assert tokenizer.decode([tokenizer.special_id(name)]) == ""


def test_unknown_special_token_is_refused(tokenizer):
    for name in ("<|nothing|>", "a", "the"):
        with pytest.raises(UserError, match="no special token"):
            tokenizer.special_id(name)


def test_ids_out_of_range_are_refused(tokenizer):
    for token_id in (-1, tokenizer.vocab_size):
        with pytest.raises(UserError, match=rf"token id {token_id} .* {tokenizer.vocab_size} ids"):
            tokenizer.decode([token_id])


def test_lone_surrogates_are_refused(tokenizer):
    with pytest.raises(UserError, match="surrogate at character 1"):
        tokenizer.encode("a\udce9")


def test_tokenizers_travel_to_worker_processes(tokenizer):
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.encode("the cat 🦙") == tokenizer.encode("the cat 🦙")
    assert copy.decode(copy.encode("the cat 🦙")) == "the cat 🦙"


def test_long_runs_are_cut_where_metas_tokenizer_cuts():
    run = tokenizer_module.MAX_RUN
    text = "b" * run + " " * (2 * run + 1) + "c d" + "e" * run
    chunks = list(tokenizer_module._split_runs(text))
    assert "".join(chunks) == text
    assert [len(chunk) for chunk in chunks] == [2 * run, run, 1 + 3 + run - 1, 1]
    assert list(tokenizer_module._split_runs("ab " * run)) == ["ab " * run]


@pytest.mark.parametrize("char", [" ", "a", "\n", "\u3000", "!"])
def test_long_runs_encode(load, char):
    tokenizer = load("tiktoken")
    short = "x" * (char != "a") + char * tokenizer_module.MAX_RUN + " y"
    if char != " ":
        assert tokenizer.encode(short) == tokenizer._model.encode_ordinary(short)
    n = 1_000_000 if char == " " else 60_000  # tiktoken panics on a million spaces at once
    text = "x" + char * n + "y"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_loading_tiktoken_stays_off_the_network(load, monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("opened a socket")

    monkeypatch.setattr(socket, "socket", refuse)
    assert load("tiktoken").encode("the") == [257]


def test_the_libraries_are_imported_only_when_used():
    code = (
        "import sys, llama_jax.tokenizer, llama_jax.chat;"
        "print({'sentencepiece', 'tiktoken', 'tokenizers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_tokenizer_json_truncation_and_padding_are_ignored(tmp_path):
    fields = json.loads(hf_bytes_json())
    fields["truncation"] = {
        "direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0,
    }  # fmt: skip
    fields["padding"] = {
        "strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "!",
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(fields))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode("abcde")) == "abcde"
    assert len(tokenizer.encode("abcde")) == 5


def test_added_tokens_of_tokenizer_json_that_are_not_special_are_text(tmp_path):
    fields = json.loads(hf_bytes_json())
    fields["added_tokens"].append(
        {"id": 518, "content": "<é>", "special": False, "normalized": False}
        | {"single_word": False, "lstrip": False, "rstrip": False}
    )
    (tmp_path / "tokenizer.json").write_text(json.dumps(fields))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.vocab_size == 519
    assert tokenizer.encode("a<é>") == [ord("a"), 518]
    assert tokenizer.decode([ord("a"), 518]) == "a<é>"


def test_a_directory_prefers_tokenizer_model(tmp_path, sentencepiece_bytes):
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_bytes)
    assert load_tokenizer(str(tmp_path)).vocab_size == 300


def refuses(path, *words):
    with pytest.raises(UserError) as caught:
        load_tokenizer(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    for word in words:
        assert word in message


def test_missing_files_are_refused(tmp_path):
    refuses(tmp_path, "tokenizer.model", "tokenizer.json", "copy the tokenizer")
    refuses(tmp_path / "absent", "does not exist")


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        (b"<!DOCTYPE html>\n<html>sign in</html>", "HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 499723\n", "Git LFS"),
        (b"PK\x03\x04 a checkpoint", "is no tokenizer"),
        (b"\nsome text", "SentencePiece"),
        (tiktoken_bytes()[:-3], "truncated or damaged tiktoken"),
        (tiktoken_bytes()[:700], "tiktoken"),
        (tiktoken_bytes((b"th", b"th")), "repeated"),
        (tiktoken_bytes().replace(b" 7\n", b" x\n"), "tiktoken"),
        (tiktoken_bytes().replace(b"AA== 0", b"A=A= 0"), "tiktoken"),
        ('{"model": "é"}'.encode("latin-1"), "not UTF-8"),
        (b'{"model": ', "no valid tokenizer.json"),
        (b"{}", "no valid tokenizer.json"),
        (b'{"vocab_size": 32000}', "no valid tokenizer.json"),
    ],
)
def test_what_is_no_tokenizer_is_refused(tmp_path, data, word):
    file = tmp_path / "tokenizer.model"
    file.write_bytes(data)
    refuses(file, word, "expected a SentencePiece model", "download it again")


def test_a_truncated_sentencepiece_model_is_refused(tmp_path, sentencepiece_bytes):
    file = tmp_path / "tokenizer.model"
    file.write_bytes(sentencepiece_bytes[: len(sentencepiece_bytes) // 2])
    refuses(file, "truncated or damaged SentencePiece")


def test_a_tokenizer_json_of_another_family_is_refused(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    file = tmp_path / "tokenizer.json"
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    file.write_text(model.to_str())
    refuses(file, "<|begin_of_text|>, <s>")
    model.add_special_tokens(["<s>", "</s>"])
    model.decoder = tokenizers.decoders.WordPiece()
    file.write_text(model.to_str())
    refuses(file, "decodes by WordPiece")


def test_without_tokenizers_the_extra_is_named(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match=r"pip install 'llama_jax\[hf\]'"):
        load_tokenizer(tmp_path)


@pytest.mark.external
@pytest.mark.parametrize("name", ["llama2", "llama3"])
def test_the_released_tokenizers(shared_data, name):
    tokenizer = load_tokenizer(shared_data / "tokenizers" / f"{name}.model")
    cases = json.loads((shared_data / "tokenizers" / f"{name}_cases.json").read_text())
    assert len(cases) > 20
    for case in cases:
        assert tokenizer.encode(case["text"]) == case["ids"], case
        assert tokenizer.decode(case["ids"]) == case["text"]
        assert "".join(streamed(tokenizer, case["ids"])) == case["text"]
    rng = random.Random(2)
    for _ in range(200):
        ids = random_ids(rng, tokenizer)
        assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)
    expected = {"llama2": (32000, 1, 2), "llama3": (128256, 128000, 128001)}[name]
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == expected
    if name == "llama3":
        assert tokenizer.special_id("<|eot_id|>") == 128009


@pytest.mark.external
def test_the_story_starts_without_a_space(shared_data):
    tokenizer = load_tokenizer(shared_data / "stories260K" / "tokenizer.model")
    text = (shared_data / "stories260K" / "greedy.txt").read_text()
    ids = tokenizer.encode(text, bos=True)
    assert text.startswith("Once upon a time")
    assert tokenizer.decode(ids) == "".join(streamed(tokenizer, ids)) == text

"""Text to token ids and back, for all three file formats that Llama tokenizers come in.

`load_tokenizer` tells the formats apart by content: SentencePiece (Llama 1 and 2), tiktoken
(Llama 3 and later, as Meta ships it) and Hugging Face's `tokenizer.json`. Each is a `Tokenizer`.

Text is data: `encode` never turns the text of a special token ("<|eot_id|>", "</s>") into its
id; only `llama_jax.chat`, by way of `special_id`, writes special tokens. Decoding concatenates
the bytes of the tokens and reads them as UTF-8, each invalid sequence becoming one U+FFFD;
special tokens are no text and are skipped. `StreamDecoder` is the one decoder, so streamed
text and decoded text cannot differ. Chat formats and padding are out of scope here.
"""

import binascii
import codecs
import json
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

from etils import epath

from llama_jax.errors import UserError

FILES = ("tokenizer.model", "tokenizer.json")  # looked for in a model directory, in this order

# Llama 3's split of text into the pieces that merges may not cross (Meta's tokenizer.py).
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
N_SPECIAL = 256  # special tokens of Llama 3, after the merges
LLAMA3_SPECIAL = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    4: "<|finetune_right_pad_id|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    8: "<|eom_id|>",
    9: "<|eot_id|>",
    10: "<|python_tag|>",
}
# Longest run of white space, or of anything else, given to tiktoken at once: its regex overflows
# its stack on longer ones. Meta's own tokenizer cuts at the same length, so ids agree with it.
MAX_RUN = 25_000


class Tokenizer(Protocol):
    """What every tokenizer offers. Ids are Python ints in [0, vocab_size)."""

    vocab_size: int
    bos_id: int
    eos_id: int
    leading_space: bool  # `encode` puts a space before the text, and decoding takes it off again

    def encode(self, text: str, *, bos: bool = False) -> list[int]:
        """Ids of `text`, all of it plain text, after `bos_id` if `bos`.

        Raises `UserError` where `text` has lone surrogates (bytes that were not UTF-8).
        """
        ...

    def special_id(self, name: str) -> int:
        """The id of a special token such as "<|eot_id|>"; `UserError` if there is none."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes, perhaps part of a character, that one token stands for."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, without special tokens; `UserError` for an id out of range."""
        stream = StreamDecoder(self)
        return "".join(map(stream.push, ids)) + stream.flush()


class StreamDecoder:
    """Decodes ids one at a time into text that is final.

    What `push` and `flush` return, concatenated, is the decoded text of the pushed ids as they
    stand after `prompt_ids`: `decode(prompt_ids + ids)` less what `decode(prompt_ids)` begins it
    with. So SentencePiece's " world" keeps its space after a prompt, and loses it where it is the
    first text. Without `prompt_ids` the result is `decode(ids)`.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Iterable[int] = ()):
        self._tokenizer = tokenizer
        self._drop_space = tokenizer.leading_space
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for token_id in prompt_ids:
            self.push(token_id)

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes, often "" within a character of several tokens."""
        if not 0 <= token_id < self._tokenizer.vocab_size:
            raise UserError(
                f"token id {token_id} is outside the tokenizer's {self._tokenizer.vocab_size} ids: "
                "the checkpoint and the tokenizer differ, take both from the same release"
            )
        piece = self._tokenizer.token_bytes(int(token_id))
        if piece and self._drop_space:
            self._drop_space = False
            piece = piece.removeprefix(b" ")
        return self._utf8.decode(piece)

    def flush(self) -> str:
        """The rest: U+FFFD if the ids end within a character, else ""."""
        return self._utf8.decode(b"", final=True)


def tokenizer_file(directory: epath.PathLike) -> epath.Path:
    """The tokenizer's file in a model directory; `UserError` where there is none."""
    for name in FILES:
        if (file := epath.Path(directory) / name).exists():
            return file
    raise UserError(f"{directory} holds neither {' nor '.join(FILES)}: copy the tokenizer there")


def load_tokenizer(path: epath.PathLike) -> Tokenizer:
    """The tokenizer in a file, or in a model directory as `tokenizer.model` or `tokenizer.json`.

    The format is read off the content. Raises `UserError` for anything that is no tokenizer.
    """
    file = epath.Path(path)
    if file.is_dir():
        file = tokenizer_file(file)
    elif not file.exists():
        raise UserError(f"{file} does not exist, expected a tokenizer file or a model directory")
    with file.open("rb") as stream:
        head = stream.read(1024)  # enough to refuse a checkpoint without reading all of it
        start = head.removeprefix(codecs.BOM_UTF8).lstrip()
        if not start:
            raise _refusal(file, "is empty")
        if start.startswith(b"<"):
            raise _refusal(file, "is an HTML page")
        if start.startswith(b"version https://git-lfs"):
            raise _refusal(file, "is a Git LFS pointer")
        if start.startswith(b"{"):
            kind: Callable[[bytes], Tokenizer] = HuggingFace
        elif re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\s", head):
            kind = Tiktoken
        elif head.startswith(b"\n"):  # the tag of the first piece
            kind = SentencePiece
        else:
            raise _refusal(file, "is no tokenizer")
        data = head + stream.read()
    try:
        return kind(data)
    except _Malformed as error:
        raise _refusal(file, str(error)) from None


class _Malformed(Exception):
    """Says of a file what is wrong with it; `load_tokenizer` adds its name."""


def _refusal(file: epath.Path, fault: str) -> UserError:
    return UserError(
        f"{file} {fault}, expected a SentencePiece model, a tiktoken file (Llama 3) or a "
        "Hugging Face tokenizer.json: download it again from the model's release"
    )


def _no_special(name: str) -> UserError:
    return UserError(
        f"the tokenizer has no special token {name}, which this version of Llama uses: "
        "take config and tokenizer from the same release"
    )


def valid(text: str) -> str:
    """`text`; raises `UserError` where it has lone surrogates, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"the text has a lone surrogate at character {error.start}, expected Unicode text: "
            "convert its source to UTF-8"
        ) from None
    return text


def _piece_bytes(piece: str) -> bytes:
    """SentencePiece's writing: <0x0A> is a byte, U+2581 is a space."""
    if re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", piece):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("\u2581", " ").encode()


class SentencePiece(Tokenizer):
    """Llama 1 and 2. `data` is a serialized SentencePiece model."""

    def __init__(self, data: bytes):
        import sentencepiece

        self._model: Any = sentencepiece.SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(data)
        except RuntimeError:
            raise _Malformed("is a truncated or damaged SentencePiece model") from None
        self.vocab_size = self._model.get_piece_size()
        self.bos_id, self.eos_id = self._model.bos_id(), self._model.eos_id()
        if min(self.bos_id, self.eos_id) < 0:
            raise _Malformed("is a SentencePiece model without <s> and </s>")
        self.leading_space = self._model.decode([self._model.piece_to_id("\u2581")]) == ""

    def encode(self, text: str, *, bos: bool = False) -> list[int]:
        return [self.bos_id] * bos + self._model.encode(valid(text))

    def special_id(self, name: str) -> int:
        token_id = self._model.piece_to_id(name)
        if not self._model.is_control(token_id):
            raise _no_special(name)
        return token_id

    def token_bytes(self, token_id: int) -> bytes:
        if self._model.is_control(token_id):
            return b""
        if self._model.is_unknown(token_id):
            return self._model.decode([token_id]).encode()
        return _piece_bytes(self._model.id_to_piece(token_id))


class Tiktoken(Tokenizer):
    """Llama 3 and later. `data` has a line `base64 rank` a merge; 256 special ids follow them."""

    leading_space = False

    def __init__(self, data: bytes):
        import tiktoken

        words = data.split()
        n_merges = len(words) // 2
        if words[1::2] != [b"%d" % rank for rank in range(n_merges)] or len(words) % 2:
            raise _Malformed("is a truncated or damaged tiktoken file")
        try:
            ranks = {binascii.a2b_base64(word): rank for rank, word in enumerate(words[::2])}
        except binascii.Error:
            raise _Malformed("is a damaged tiktoken file") from None
        if len(ranks) != n_merges or any(bytes([byte]) not in ranks for byte in range(256)):
            raise _Malformed("is a tiktoken file with repeated merges or without all 256 bytes")
        self._special = {name: n_merges + i for i, name in enumerate(_llama3_specials())}
        self._n_merges = n_merges
        self._model = tiktoken.Encoding(
            "llama3",
            pat_str=LLAMA3_PATTERN,
            mergeable_ranks=ranks,
            special_tokens=self._special,
        )
        self.vocab_size = n_merges + N_SPECIAL
        self.bos_id = self._special["<|begin_of_text|>"]
        self.eos_id = self._special["<|end_of_text|>"]

    def encode(self, text: str, *, bos: bool = False) -> list[int]:
        ids = [self.bos_id] * bos
        for chunk in _split_runs(valid(text)):
            ids += self._model.encode_ordinary(chunk)
        return ids

    def special_id(self, name: str) -> int:
        if name not in self._special:
            raise _no_special(name)
        return self._special[name]

    def token_bytes(self, token_id: int) -> bytes:
        if token_id >= self._n_merges:
            return b""
        return self._model.decode_single_token_bytes(token_id)


def _llama3_specials() -> Iterator[str]:
    """The 256 names in order; those without a use are numbered among themselves."""
    reserved = 0
    for i in range(N_SPECIAL):
        if i not in LLAMA3_SPECIAL:
            reserved += 1
        yield LLAMA3_SPECIAL.get(i, f"<|reserved_special_token_{reserved - 1}|>")


def _split_runs(text: str) -> Iterator[str]:
    """Cuts runs of white space, or of anything else, after each `MAX_RUN` characters."""
    start = 0
    if len(text) > MAX_RUN:
        for run in re.finditer(r"\s+|\S+", text):
            for cut in range(run.start() + MAX_RUN, run.end(), MAX_RUN):
                yield text[start:cut]
                start = cut
    yield text[start:]


class HuggingFace(Tokenizer):
    """A `tokenizer.json` of any Llama: byte-level (3 and later) or in SentencePiece's writing."""

    def __init__(self, data: bytes):
        try:
            import tokenizers
        except ImportError:
            raise UserError(
                "tokenizer.json needs the package tokenizers, which is not installed: "
                "pip install 'llama_jax[hf]', or use the release's tokenizer.model"
            ) from None
        try:
            self._model: Any = tokenizers.Tokenizer.from_str(data.decode("utf-8-sig"))
        except UnicodeDecodeError:
            raise _Malformed("is JSON but not UTF-8") from None
        except Exception as error:  # noqa: BLE001  the package raises no narrower type
            raise _Malformed(
                f"is no valid tokenizer.json ({' '.join(str(error).split())})"
            ) from None
        self._model.encode_special_tokens = True  # encode their text as plain text
        self._model.no_truncation()  # a file may ask for these; both would change the text
        self._model.no_padding()
        self._added = self._model.get_added_tokens_decoder()
        self._special = {token.content: i for i, token in self._added.items() if token.special}
        self.vocab_size = self._model.get_vocab_size()
        self.bos_id = self._first_special("<|begin_of_text|>", "<s>")
        self.eos_id = self._first_special("<|end_of_text|>", "</s>")
        steps = _decoder_steps(self._model.decoder)
        self._byte_level = _BYTE_OF if "ByteLevel" in steps else None
        self.leading_space = (
            steps.get("Strip", {}).get("start", 0) > 0
            or steps.get("Metaspace", {}).get("prepend_scheme", "never") != "never"
        )

    def _first_special(self, *names: str) -> int:
        for name in names:
            if name in self._special:
                return self._special[name]
        raise _Malformed(f"has none of the special tokens {', '.join(names)}")

    def encode(self, text: str, *, bos: bool = False) -> list[int]:
        ids = self._model.encode(valid(text), add_special_tokens=False).ids
        return [self.bos_id] * bos + ids

    def special_id(self, name: str) -> int:
        if name not in self._special:
            raise _no_special(name)
        return self._special[name]

    def token_bytes(self, token_id: int) -> bytes:
        if token_id in self._added:
            added = self._added[token_id]
            return b"" if added.special else added.content.encode()
        token = self._model.id_to_token(token_id) or ""  # a vocabulary may have gaps
        if self._byte_level is None:
            return _piece_bytes(token)
        return bytes(self._byte_level[char] for char in token)


def _decoder_steps(decoder: Any) -> dict[str, dict[str, Any]]:
    """Settings of each step of a Hugging Face decoder, by type; refuses unknown ones."""
    state: dict[str, Any] = {"type": "nothing"}
    if decoder:
        state = json.loads(decoder.__getstate__())
    steps = {step["type"]: step for step in state.get("decoders", [state])}
    known = {"ByteLevel"}, {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}
    if not any(steps.keys() <= kind for kind in known):
        raise _Malformed(f"decodes by {', '.join(steps)}, which no Llama does")
    return steps


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable character for each byte: itself where printable, else 256 onwards."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + i): byte for i, byte in enumerate(rest)
    }


_BYTE_OF = _byte_alphabet()

"""Files of text to batches of token ids.

  read, read_preferences   a file to samples: token ids, and which of them are to be learnt
  split                    the last samples for validation
  pack, pack_pairs         samples to rows of one length, several short texts in a row
  batches                  rows, shuffled every epoch, as windows of micro-batches (by Grain);
                           a plain text is cut elsewhere in every epoch
  in_order                 rows once, for an evaluation
  texts                    what a file says, line by line, for a tokenizer to learn from

Four formats, told by suffix and by the keys of the first row:
  Alpaca       JSON or JSONL, `instruction`, `output` and perhaps `input`
  chat         JSON or JSONL, `messages`: a list of `role` and `content`
  preferences  JSON or JSONL, `prompt`, `chosen`, `rejected`: all texts, or all lists of messages
  plain text   .txt, .md or no suffix: one document, BOS in front, cut into windows

Everything is in memory, in every process: rows are packed before they are shuffled, so how many
there are, and with that the number of steps, is known at the start and the same on any number of
processes. Padding is segment 0 with weight 0, never a token of the vocabulary, so EOS is learnt.
"""

import bisect
import contextlib
import hashlib
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from etils import epath

from llama_jax.chat import Message, common_prefix, encode_chat
from llama_jax.config import LlamaConfig
from llama_jax.errors import UserError
from llama_jax.tokenizer import Tokenizer, valid

if TYPE_CHECKING:
    import grain

Batch = dict[str, np.ndarray]  # see `train.losses`
Item = TypeVar("Item")

JSON_SUFFIXES = (".json", ".jsonl")
TEXT_SUFFIXES = (".txt", ".md", "")
FORMATS = {  # keys that a row must have, and those it may have
    "chat": (("messages",), ()),
    "Alpaca": (("instruction", "output"), ("input",)),
    "preferences": (("prompt", "chosen", "rejected"), ()),
}
# The arrays of a batch; `train.losses` says what they are.
BATCH = {"tokens": np.int32, "targets": np.int32, "weights": np.float32, "segments": np.int32}
FIELDS = tuple(BATCH)
MIN_SEQ_LEN = 2
NO_SPACE = re.compile(r"[^ \t\r\n]")  # by JSON
MAX_SEED = 2**32 - 1  # Grain's
FOREVER = 2**31  # epochs: without a number, Grain's own length overflows in batches of one


@dataclass(frozen=True, eq=False)
class Sample:
    """One text to learn from."""

    ids: np.ndarray  # int32 [n], at most seq_len + 1
    counts: np.ndarray  # bool [n]: whether predicting this token counts; nothing predicts the first
    continues: bool = False  # the text of the sample before: its last token is the first of this


Pair = tuple[Sample, Sample]  # chosen, rejected


@dataclass(frozen=True)
class Counts:
    """What became of a file."""

    rows: int  # of the file; windows, of a plain text
    truncated: int  # samples cut to seq_len
    empty: int  # rows left out: without answer, or without any of it within seq_len
    tokens: int  # that are read
    loss_tokens: int  # that are predicted and count

    def __str__(self) -> str:
        line = (
            f"{self.rows - self.empty} samples, {self.tokens} tokens, {self.loss_tokens} to learn"
        )
        if self.truncated:
            line += f"; {self.truncated} cut to the sequence length"
        if self.empty:
            line += f"; {self.empty} left out, nothing in them to learn"
        return line


@dataclass(frozen=True, eq=False)
class Rows:
    """Samples laid out for the model, arrays [R, T] as `train.losses` describes them."""

    tokens: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    segments: np.ndarray
    together: int = 1  # so many rows after each other are one example: 2 for a preference
    one_text: bool = False  # which goes on from row to row

    def __len__(self) -> int:
        """How many examples: what is shuffled, and what a batch size counts."""
        return len(self.tokens) // self.together

    @property
    def waste(self) -> float:
        """The share of all positions that is padding."""
        return float(np.mean(self.segments == 0))

    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with any token, weight or place."""
        digest = hashlib.sha256(str(self.tokens.shape).encode())
        for name in FIELDS:
            digest.update(getattr(self, name).data)
        return digest.hexdigest()[:16]


# Reading


def read(
    path: epath.PathLike,
    tokenizer: Tokenizer,
    config: LlamaConfig,
    *,
    seq_len: int,
    chat: bool = False,
    train_on_prompts: bool = False,
) -> tuple[list[Sample], Counts]:
    """Samples of a file with Alpaca rows, chats or plain text, in its order.

    Args:
      path: local or, with the packages that etils needs for it, gs://.
      seq_len: positions in a row; a longer sample is cut at its end.
      chat: write Alpaca rows as a chat, as `config.version` has it, and not in `alpaca_prompt`.
      train_on_prompts: all tokens but BOS count, and not the answers with their end alone.

    Raises `UserError` for a file that cannot be read as UTF-8 (with the byte), a row that is
    malformed (with the line), nothing to learn, or a `seq_len` that the model cannot have.
    """
    _check_seq_len(seq_len, config)
    if not _is_json(path):
        return _read_plain(_read_text(path), tokenizer, seq_len)
    kind, rows = _read_rows(path, _read_text(path))
    if kind == "preferences":
        raise UserError(f"{path} holds preferences; train on it with train.dpo")
    samples, truncated = [], 0
    for line, row in rows:
        with _at(path, line):
            if kind == "chat":
                ids, counts = _encode_dialog(tokenizer, config, _messages(row, "messages"))
            else:
                ids, counts = _encode_alpaca(tokenizer, config, row, chat)
        if train_on_prompts and any(counts):
            counts = [token_id != tokenizer.bos_id for token_id in ids]
        sample = _sample(ids, counts, seq_len)
        if sample.counts.any():
            samples.append(sample)
            truncated += len(sample.ids) < len(ids)
    _check_any(path, samples, rows, seq_len)
    return samples, _count(samples, len(rows), truncated, len(rows) - len(samples))


def read_preferences(
    path: epath.PathLike,
    tokenizer: Tokenizer,
    config: LlamaConfig,
    *,
    seq_len: int,
    chat: bool = False,
) -> tuple[list[Pair], Counts]:
    """(chosen, rejected) of each row; only the answer counts, never the prompt.

    Texts are joined as they stand, BOS in front and EOS behind; with `chat`, and where prompt and
    answers are lists of messages, they are written as `config.version` chats. A pair is left out
    where an answer is blank, or nothing of it is within `seq_len`. Arguments and errors as in
    `read`; `Counts` counts pairs as rows, and the tokens of both.
    """
    _check_seq_len(seq_len, config)
    expected = "expected JSON or JSONL rows with prompt, chosen and rejected"
    if not _is_json(path):
        raise UserError(f"{path} is a plain text, {expected}")
    kind, rows = _read_rows(path, _read_text(path))
    if kind != "preferences":
        raise UserError(f"{path} holds {kind} rows, {expected}")
    pairs, truncated = [], 0
    for line, row in rows:
        with _at(path, line):
            encoded = _encode_preference(tokenizer, config, row, chat)
        chosen, rejected = (_sample(ids, counts, seq_len) for ids, counts in encoded)
        if chosen.counts.any() and rejected.counts.any():
            pairs.append((chosen, rejected))
            truncated += max(len(ids) for ids, _ in encoded) > seq_len + 1
    _check_any(path, pairs, rows, seq_len)
    samples = [sample for pair in pairs for sample in pair]
    return pairs, _count(samples, len(rows), truncated, len(rows) - len(pairs))


def texts(path: epath.PathLike) -> Iterator[str]:
    """The lines of a plain text, or of every text in rows: of messages the content alone.

    Raises `UserError` for a file that cannot be read, and for rows that are malformed, as `read`.
    """
    is_json, text = _is_json(path), _read_text(path)
    if not is_json:
        yield from text.splitlines()
        return
    for line, row in _read_rows(path, text)[1]:
        for string in _strings(row):
            with _at(path, line):
                valid(string)
            yield from string.splitlines()


def alpaca_prompt(instruction: str, input: str = "") -> str:
    """What stands before the answer, as in the texts of the published Alpaca data set."""
    context, block = "", ""
    if input:
        context = ", paired with an input that provides further context"
        block = f"### Input:\n{input}\n\n"
    return (
        f"Below is an instruction that describes a task{context}. Write a response that "
        f"appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n{block}"
        "### Response:\n"
    )


def split(samples: Sequence[Item], fraction: float) -> tuple[list[Item], list[Item]]:
    """(training, validation): the last `fraction` of the samples or pairs, rounded up, validates.

    Raises `UserError` where one part would be empty.
    """
    held = math.ceil(len(samples) * fraction) if 0 < fraction < 1 else 0
    if not 0 < held < len(samples):
        raise UserError(
            f"a validation share of {fraction:g} of {len(samples)} samples leaves {held} to validate"
            f" and {len(samples) - held} to train on, expected at least one each"
        )
    return list(samples[:-held]), list(samples[-held:])


def _check_seq_len(seq_len: int, config: LlamaConfig) -> None:
    if not MIN_SEQ_LEN <= seq_len <= config.context:
        raise UserError(
            f"the sequence length is {seq_len}, expected {MIN_SEQ_LEN} to {config.context}, "
            "the model's context"
        )


def _check_any(path: Any, samples: Sequence, rows: Sequence, seq_len: int) -> None:
    if not samples:
        raise UserError(
            f"{path} has nothing to learn: none of {len(rows)} rows has an answer that begins within "
            f"{seq_len} tokens; take a greater sequence length or look at its answers"
        )


def _count(samples: Sequence[Sample], rows: int, truncated: int, empty: int) -> Counts:
    tokens = sum(len(sample.ids) - 1 for sample in samples)
    return Counts(rows, truncated, empty, tokens, sum(int(s.counts.sum()) for s in samples))


def _is_json(path: epath.PathLike) -> bool:
    suffix = epath.Path(path).suffix.lower()
    if suffix not in JSON_SUFFIXES + TEXT_SUFFIXES:
        raise UserError(
            f"{path} ends in {suffix}, expected {', '.join(JSON_SUFFIXES)} with rows or .txt"
        )
    return suffix in JSON_SUFFIXES


def _read_text(path: epath.PathLike) -> str:
    try:
        data = epath.Path(path).read_bytes()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise UserError(f"{path} is no file, expected training data") from None
    expected = "expected UTF-8: convert it, with iconv for example"
    if (nul := data.find(b"\0")) >= 0:  # UTF-16 may be UTF-8 but for these
        raise UserError(f"{path} has a NUL at byte {nul}, {expected}")
    try:
        text = data.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 at byte {error.start}, {expected}") from None
    if not text.strip():
        raise UserError(f"{path} is empty, expected training data")
    return text


def _read_plain(text: str, tokenizer: Tokenizer, seq_len: int) -> tuple[list[Sample], Counts]:
    """Windows that share one token, so that each token of the text is predicted once."""
    ids = np.array(tokenizer.encode(text, bos=True), np.int32)
    samples = []
    for begin in range(0, len(ids) - 1, seq_len):
        window = ids[begin : begin + seq_len + 1]
        samples.append(Sample(window, np.arange(len(window)) > 0, continues=begin > 0))
    return samples, _count(samples, len(samples), 0, 0)


# Rows of JSON


@contextlib.contextmanager
def _at(path: Any, line: int) -> Iterator[None]:
    """Puts the line of a file before what a `UserError` says."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path} line {line}: {error}") from None


def _read_rows(path: Any, text: str) -> tuple[str, list[tuple[int, dict[str, Any]]]]:
    """The format of a file, one of `FORMATS`, and its rows with the line where each begins."""
    values = _array(path, text) if text.lstrip().startswith("[") else _lines(path, text)
    kind, rows = None, []
    for line, row in values:
        with _at(path, line):
            if not isinstance(row, dict):
                raise UserError(f"a row is {_kind_of(row)}, expected an object")
            kind = kind or _format(row)
            required, optional = FORMATS[kind]
            _check_keys(row, required, optional)
        rows.append((line, row))
    if kind is None:
        raise UserError(f"{path} has no rows, expected training data")
    return kind, rows


def _lines(path: Any, text: str) -> Iterator[tuple[int, Any]]:
    """(line, value) of JSONL. Lines end with a line feed alone: a string may hold U+2028."""
    for line, row in enumerate(text.split("\n"), 1):
        if row.strip():
            try:
                value = json.loads(row)
            except (ValueError, RecursionError) as error:
                raise _not_json(path, line, error) from None
            yield line, value


def _array(path: Any, text: str) -> Iterator[tuple[int, Any]]:
    """(line, value) of each element of a JSON array."""
    decoder = json.JSONDecoder()

    def after_space(at: int) -> int:
        match = NO_SPACE.search(text, at)
        return match.start() if match else len(text)

    line, counted, separator = 1, 0, ","
    at = after_space(after_space(0) + 1)
    if text[at : at + 1] == "]":
        separator = "]"
    while separator == ",":
        line, counted = line + text.count("\n", counted, at), at
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise _not_json(path, getattr(error, "lineno", line), error) from None
        yield line, value
        at = after_space(at)
        separator = text[at : at + 1]
        if separator == ",":
            at = after_space(at + 1)
    line += text.count("\n", counted, at)
    if separator != "]":
        raise _not_json(path, line, "expected a comma or the end of the array")
    if after_space(at + 1) < len(text):
        raise _not_json(path, line, "more follows the end of the array")


def _not_json(path: Any, line: int, error: object) -> UserError:
    if isinstance(error, json.JSONDecodeError):
        error = f"{error.msg} at column {error.colno}"
    return UserError(
        f"{path} line {line} is not JSON ({error}), expected an object a line, or an array of them"
    )


def _format(row: dict[str, Any]) -> str:
    for kind, (required, _) in FORMATS.items():
        if required[0] in row:
            return kind
    choices = [f"{', '.join(required)} ({kind})" for kind, (required, _) in FORMATS.items()]
    raise UserError(f"the keys are {_names(row)}, expected {' or '.join(choices)}")


def _names(keys: Any) -> str:
    return ", ".join(repr(key) for key in keys) or "none"


def _check_keys(row: dict[str, Any], required: Sequence[str], optional: Sequence[str] = ()) -> None:
    missing = [key for key in required if key not in row]
    unknown = [key for key in row if key not in (*required, *optional)]
    if missing:
        raise UserError(f"missing key {_names(missing)}, the keys are {_names(row)}")
    if unknown:
        known = _names((*required, *optional))
        raise UserError(f"unknown key {_names(unknown)}, expected {known}; remove it")


def _kind_of(value: Any) -> str:
    names = {
        dict: "an object",
        list: "a list",
        str: "a text",
        type(None): "null",
        bool: "a boolean",
    }
    return names.get(type(value), "a number")


def _string(row: dict[str, Any], key: str, default: str | None = None) -> str:
    value = row.get(key, default)
    if not isinstance(value, str):
        raise UserError(f"{key!r} is {_kind_of(value)}, expected a text")
    return value


def _strings(value: Any) -> Iterator[str]:
    """All texts in a row or a part of it, but for roles."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from _strings([value[key] for key in value if key != "role"])
    elif isinstance(value, list):
        for part in value:
            yield from _strings(part)


def _messages(row: dict[str, Any], key: str) -> list[Message]:
    value = row[key]
    if not isinstance(value, list):
        raise UserError(f"{key!r} is {_kind_of(value)}, expected a list of messages")
    messages = []
    for message in value:
        if not isinstance(message, dict):
            raise UserError(f"a message is {_kind_of(message)}, expected an object")
        _check_keys(message, ("role", "content"))
        messages.append(Message(_string(message, "role"), _string(message, "content")))
    return messages


# Rows to ids, and of each whether it counts; none does where the answer is blank

Encoded = tuple[list[int], list[bool]]


def _encode_dialog(
    tokenizer: Tokenizer, config: LlamaConfig, messages: Sequence[Message]
) -> Encoded:
    ids, mask = encode_chat(tokenizer, messages, config.version, add_generation_prompt=False)
    return ids, mask if _answers(messages) else [False] * len(mask)


def _answers(messages: Sequence[Message]) -> bool:
    """Whether the assistant says anything."""
    return any(m.role == "assistant" and m.content.strip() for m in messages)


def _encode_alpaca(
    tokenizer: Tokenizer, config: LlamaConfig, row: dict[str, Any], chat: bool
) -> Encoded:
    instruction, answer = _string(row, "instruction"), _string(row, "output")
    given = _string(row, "input", "")
    if chat:
        question = f"{instruction}\n\n{given}" if given else instruction
        messages = [Message("user", question), Message("assistant", answer)]
        return _encode_dialog(tokenizer, config, messages)
    return _encode_joined(tokenizer, alpaca_prompt(instruction, given), answer)


def _encode_preference(
    tokenizer: Tokenizer, config: LlamaConfig, row: dict[str, Any], chat: bool
) -> list[Encoded]:
    keys = ("chosen", "rejected")
    if isinstance(row["prompt"], str):
        prompt, strings = row["prompt"], [_string(row, key) for key in keys]
        if not chat:
            return [_encode_joined(tokenizer, prompt, string) for string in strings]
        before = [Message("user", prompt)]
        answers = [[Message("assistant", string)] for string in strings]
    else:
        before = _messages(row, "prompt")
        answers = [_messages(row, key) for key in keys]
    prompt_ids, _ = encode_chat(tokenizer, before, config.version)
    encoded = []
    for answer in answers:
        dialog = [*before, *answer]
        if dialog[-1].role != "assistant":
            raise UserError("the last message of an answer is not the assistant's")
        ids, mask = encode_chat(tokenizer, dialog, config.version, add_generation_prompt=False)
        n = common_prefix(prompt_ids, ids)  # the assistant may have spoken before
        if not _answers(answer):
            n = len(ids)
        encoded.append((ids, [False] * n + mask[n:]))
    return encoded


def _encode_joined(tokenizer: Tokenizer, prompt: str, answer: str) -> Encoded:
    """As one text: an answer's first token may depend on the prompt."""
    ids = [*tokenizer.encode(prompt + answer, bos=True), tokenizer.eos_id]
    n = common_prefix(tokenizer.encode(prompt, bos=True), ids)
    return ids, [False] * n + [bool(answer.strip())] * (len(ids) - n)


def _sample(ids: Sequence[int], counts: Sequence[bool], seq_len: int) -> Sample:
    n = seq_len + 1  # the last is predicted, not read
    counts = [False, *counts[1:n]]
    return Sample(np.array(ids[:n], np.int32), np.array(counts, bool))


# Rows of one length


def pack(samples: Sequence[Sample], seq_len: int, *, packing: bool = True) -> Rows:
    """Lays samples of at most `seq_len` + 1 tokens out in rows of `seq_len` positions.

    Best fit, the longest first: a sample goes whole to the fullest row that has room for it, a
    sample of n tokens taking n - 1 positions. `Rows.waste` says what remains unused. Without
    `packing` each has a row of its own, in order.

      abcd, xyz in 5 positions:  tokens    a b c x y
                                 targets   b c d y z
                                 segments  1 1 1 2 2
    """
    if not packing:
        return _lay_out(samples, [[i] for i in range(len(samples))], seq_len)
    sizes = [len(sample.ids) - 1 for sample in samples]
    rows: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # free positions -> rows that have them
    rooms: list[int] = []  # the keys of `with_room`, in order
    for i in sorted(range(len(samples)), key=lambda i: -sizes[i]):
        at = bisect.bisect_left(rooms, sizes[i])
        if at == len(rooms):
            row, room = len(rows), seq_len
            rows.append([])
        else:
            room = rooms[at]
            row = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[at]
        rows[row].append(i)
        room -= sizes[i]
        if room not in with_room:
            bisect.insort(rooms, room)
        with_room.setdefault(room, []).append(row)
    return _lay_out(samples, rows, seq_len)


def pack_pairs(pairs: Sequence[Pair], seq_len: int) -> Rows:
    """Rows 2i and 2i + 1 are the chosen and the rejected answer of pair i, each alone in its row.

    They stay together in every batch; a batch size counts pairs.
    """
    samples = [sample for pair in pairs for sample in pair]
    return _lay_out(samples, [[i] for i in range(len(samples))], seq_len, together=2)


def _lay_out(
    samples: Sequence[Sample], rows: Sequence[Sequence[int]], seq_len: int, together: int = 1
) -> Rows:
    shape = len(rows), seq_len
    arrays = {name: np.zeros(shape, dtype) for name, dtype in BATCH.items()}
    for row, packed in enumerate(rows):
        begin = 0
        for number, i in enumerate(packed, 1):
            ids, counts = samples[i].ids, samples[i].counts
            place = row, slice(begin, begin + len(ids) - 1)
            arrays["tokens"][place], arrays["targets"][place] = ids[:-1], ids[1:]
            arrays["weights"][place], arrays["segments"][place] = counts[1:], number
            begin += len(ids) - 1
    one_text = len(samples) > 1 and all(sample.continues for sample in samples[1:])
    return Rows(**arrays, together=together, one_text=one_text)


# Batches


def batches(
    rows: Rows,
    batch_size: int,
    *,
    seed: int,
    epochs: int | None = None,
    micro: int = 1,
    part: int = 0,
    parts: int = 1,
) -> "grain.DatasetIterator[Batch]":
    """Windows of `micro` micro-batches, arrays [micro, batch_size // parts, T] (pairs: twice that).

    Each epoch has all rows once, in another order, and begins where the last one ended, perhaps
    within a window. The last window of all is filled with rows of weight 0 and segment 0. Rows of
    one text begin elsewhere in every epoch but the first, so that what stands in front of a token
    differs; each token is still seen once.

    The order depends on `seed` alone. Of every micro-batch part i, which is a process, has the
    i-th share, so the parts side by side are what one process would have. `get_state()` of the
    iterator is a small dict for JSON, the same in all parts, of any number of them; `set_state()`
    goes on from there, bit for bit.

    Args:
      batch_size: examples (rows or pairs) in a micro-batch, over all parts.
      epochs: how often all rows are seen; None for ever.

    Raises `UserError` for a batch that does not divide into parts, or a seed that Grain cannot have.
    """
    _check_parts(batch_size, parts)
    if not 0 <= seed <= MAX_SEED:
        raise UserError(f"the seed is {seed}, expected 0 to {MAX_SEED}")
    grain = _import_grain()

    def place(index: int, example: int) -> tuple[int, int]:
        epoch = index // len(rows)
        if epoch == 0 or not rows.one_text:
            return example, 0
        return example, int(np.random.default_rng([seed, epoch]).integers(rows.tokens.shape[1]))

    def window(examples: Sequence[tuple[int, int]]) -> Batch:
        chosen = np.full((micro * batch_size, 2), (-1, 0))
        chosen[: len(examples)] = examples
        own = chosen.reshape(micro, parts, -1, 2)[:, part]
        return _take(rows, own[..., 0], own[..., 1])

    data = (
        grain.MapDataset.range(len(rows))
        .shuffle(seed)
        .repeat(FOREVER if epochs is None else epochs)
        .map_with_index(place)
    )
    data = data.batch(micro * batch_size, batch_fn=window)
    # Rows are in memory: threads would only get in each other's way.
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    return data.to_iter_dataset(options).__iter__()


def n_windows(rows: Rows, batch_size: int, *, epochs: int, micro: int = 1) -> int:
    """How many windows `batches` makes: the number of steps."""
    return -(-len(rows) * epochs // (micro * batch_size))


def in_order(rows: Rows, batch_size: int, *, part: int = 0, parts: int = 1) -> Iterator[Batch]:
    """All rows once, in order: batches [batch_size // parts, T] (pairs: twice that).

    The last one is filled as in `batches`, whose arguments and errors these are.
    """
    _check_parts(batch_size, parts)
    examples = np.full((-(-len(rows) // batch_size), parts, batch_size // parts), -1)
    examples.flat[: len(rows)] = np.arange(len(rows))
    return (_take(rows, chosen[part], np.zeros_like(chosen[part])) for chosen in examples)


def _check_parts(batch_size: int, parts: int) -> None:
    if batch_size % parts:
        raise UserError(
            f"a batch of {batch_size} rows does not divide among {parts} processes: take a multiple"
        )


def _take(rows: Rows, examples: np.ndarray, shifts: np.ndarray) -> Batch:
    """Rows of these examples [..., n], -1 standing for filler, as arrays [..., n * together, T].

    A row with a shift [..., n] begins so many positions later, and the last one goes on with the
    beginning of all, as a text of its own.
    """
    index, shifts = (np.repeat(x, rows.together, axis=-1)[..., None] for x in (examples, shifts))
    R, T = rows.tokens.shape
    row = index * rows.together + np.arange(index.shape[-2])[:, None] % rows.together
    place = row * T + shifts + np.arange(T)
    begins_anew = place >= R * T
    batch = {name: getattr(rows, name).ravel()[place % (R * T)] for name in FIELDS}
    batch["segments"] += begins_anew * (batch["segments"] > 0)
    for values in batch.values():
        values[index[..., 0] < 0] = 0
    return batch


def _import_grain() -> Any:
    try:
        import grain
    except ImportError:
        raise UserError(
            "training needs the package grain, which is not installed: pip install 'llama_jax[train]'"
        ) from None
    return grain

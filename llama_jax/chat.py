"""Chat formats of Llama 2 and Llama 3: messages to token ids and a training mask.

The ids are those of Meta's reference code (llama `generation.py`, llama3 `ChatFormat`), and
begin with BOS: do not add another. Special tokens are written here and nowhere else; their text
inside a message stays text. System prompts that Hugging Face's templates add on their own (the
date, in Llama 3.1 and later) are not added. Tool definitions are out of scope.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from llama_jax.config import VERSIONS
from llama_jax.errors import UserError
from llama_jax.tokenizer import Tokenizer

LLAMA2_TAGS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")
# Role of a message -> the role that Llama 3 reads in its header.
LLAMA3_ROLES = {
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    "ipython": "ipython",
    "tool": "ipython",
}


@dataclass(frozen=True)
class Message:
    role: str  # "system", "user" or "assistant"; from Llama 3 also "ipython", alias "tool"
    content: str


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    version: str,
    *,
    add_generation_prompt: bool = True,
) -> tuple[list[int], list[bool]]:
    """Token ids of a dialog, and of each id whether the assistant is to learn it.

    `version` is `LlamaConfig.version`. The mask is True on what the assistant says, the token
    that ends its turn included. With `add_generation_prompt` the ids end where the assistant's
    answer begins; leave it off to train on a dialog that ends with an answer.

    Raises `UserError` for a version without chat format, an unknown role, roles in an order
    that the format cannot write, Llama 2's tags in a message, or a tokenizer of another version.
    """
    if not messages:
        raise UserError("the chat has no messages, expected at least one of the user")
    if _generation(version) == 1:
        raise UserError("Llama 1 has no chat format: use a Llama 2 or later chat model")
    if _generation(version) == 2:
        return _encode_llama2(tokenizer, messages, add_generation_prompt)
    return _encode_llama3(tokenizer, messages, add_generation_prompt)


def stop_ids(tokenizer: Tokenizer, version: str) -> frozenset[int]:
    """Ids that end an answer: EOS, and from Llama 3 the end of turn, from 3.1 also of message.

    Raises `UserError` where the tokenizer lacks those of its version.
    """
    ids = {tokenizer.eos_id}
    if _generation(version) == 3:
        ids |= {tokenizer.special_id("<|end_of_text|>"), tokenizer.special_id("<|eot_id|>")}
        if version != "3":
            ids.add(tokenizer.special_id("<|eom_id|>"))
    return frozenset(ids)


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens `a` and `b` begin with in common."""
    n = min(len(a), len(b))
    return next((i for i in range(n) if a[i] != b[i]), n)


def _generation(version: str) -> int:
    if version not in VERSIONS:
        raise UserError(f"version is {version!r}, expected one of {', '.join(VERSIONS)}")
    return int(version[0])


def _check_roles(messages: Sequence[Message], known: Sequence[str]) -> None:
    for message in messages:
        if message.role not in known:
            raise UserError(f"unknown role {message.role!r}, expected one of {', '.join(known)}")


def _encode_llama2(
    tokenizer: Tokenizer, messages: Sequence[Message], add_generation_prompt: bool
) -> tuple[list[int], list[bool]]:
    """BOS [INST] <<SYS>>\\nsystem\\n<</SYS>>\\n\\nuser [/INST] answer EOS, again for each pair."""
    _check_roles(messages, ("system", "user", "assistant"))
    for message in messages:
        for tag in LLAMA2_TAGS:
            if tag in message.content:
                raise UserError(
                    f"a {message.role} message contains {tag}, which Llama 2 reads as the frame "
                    "of a chat: remove it"
                )
    turns = [message.content for message in messages if message.role != "system"]
    system = len(messages) - len(turns)
    expected = ["system"] * min(system, 1) + ["user", "assistant"] * len(turns)
    roles = [message.role for message in messages]
    if not turns or roles != expected[: len(roles)]:
        raise UserError(
            f"the roles are {', '.join(roles)}; Llama 2 expects at most one system message, then "
            "user and assistant by turns, the user first"
        )
    if add_generation_prompt and len(turns) % 2 == 0:
        raise UserError("the last message is the assistant's: add one of the user for it to answer")
    if system:
        turns[0] = f"<<SYS>>\n{messages[0].content}\n<</SYS>>\n\n{turns[0]}"

    ids: list[int] = []
    mask: list[bool] = []
    for i in range(0, len(turns), 2):
        framed = f"[INST] {turns[i].strip()} [/INST]"
        prompt = tokenizer.encode(framed, bos=True)
        pair = prompt
        if i + 1 < len(turns):  # as one text: the answer's first token depends on the prompt
            pair = tokenizer.encode(f"{framed} {turns[i + 1].strip()} ", bos=True)
            pair = [*pair, tokenizer.eos_id]
        n_prompt = common_prefix(prompt, pair)
        ids += pair
        mask += [False] * n_prompt + [True] * (len(pair) - n_prompt)
    return ids, mask


def _encode_llama3(
    tokenizer: Tokenizer, messages: Sequence[Message], add_generation_prompt: bool
) -> tuple[list[int], list[bool]]:
    """BOS, then a message: <|start_header_id|>role<|end_header_id|>\\n\\ncontent<|eot_id|>."""
    _check_roles(messages, tuple(LLAMA3_ROLES))
    start, end, eot = map(
        tokenizer.special_id, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    )

    def header(role: str) -> list[int]:
        return [start, *tokenizer.encode(LLAMA3_ROLES[role]), end, *tokenizer.encode("\n\n")]

    ids = [tokenizer.bos_id]
    mask = [False]
    for message in messages:
        head = header(message.role)
        body = [*tokenizer.encode(message.content.strip()), eot]
        ids += head + body
        mask += [False] * len(head) + [message.role == "assistant"] * len(body)
    if add_generation_prompt:
        head = header("assistant")
        ids += head
        mask += [False] * len(head)
    return ids, mask

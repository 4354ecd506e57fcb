"""python -m infer.sample: text from a model directory, streamed as it is made.

Several prompts make one batch; `--chat` formats prompts, or opens a conversation when there is
none. Generated text goes to standard output (to a pipe exactly, with nothing added; JSON with
`--json`), timings and errors to standard error.
"""

import argparse
import json
import math
import secrets
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_jax
from infer.generate import Progress, compile_programs, request_shapes, stream
from infer.sampling import row_seeds, settings
from infer.text import TextStream
from llama_jax.chat import Message, encode_chat, stop_ids
from llama_jax.checkpoint import DEMO
from llama_jax.command import (
    ArgumentParser,
    agreed,
    default_dtype,
    is_first_process,
    join_processes,
    keep_compilations,
    report,
    run,
)
from llama_jax.errors import UserError
from llama_jax.quant import KINDS, Quantization
from llama_jax.tokenizer import Tokenizer

PROG = "infer.sample"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; exits with status 2 and one line on a mistake."""
    parser = ArgumentParser(prog=PROG, description="Generate text from a model directory.")
    add = parser.add_argument
    add("--checkpoint", metavar="DIR", help="that a converter wrote (the demo model)")
    add("--prompt", metavar="TEXT", action="append", help="repeat it for a batch")
    add("--prompt-file", metavar="FILE", help="UTF-8 text, each line a prompt of one batch")
    add("--chat", action="store_true", help="chat format; a conversation if there is no prompt")
    add("--system", metavar="TEXT", help="system message, with --chat")
    add("--max-new-tokens", type=int, default=256, metavar="N", help="(256)")
    add("--temperature", type=float, default=0.6, metavar="T", help="0 is greedy (0.6)")
    add("--top-k", type=int, default=0, metavar="K", help="0 is off (0)")
    add("--top-p", type=float, default=0.9, metavar="P", help="1 is off (0.9)")
    add("--min-p", type=float, default=0.0, metavar="P", help="0 is off (0)")
    add("--repetition-penalty", type=float, default=1.0, metavar="F", help="1 is off (1)")
    add("--seed", type=int, metavar="N", help="makes a run repeatable (random)")
    add("--stop", metavar="TEXT", action="append", default=[], help="end at this text; repeatable")
    add("--ignore-eos", action="store_true", help="go on behind the end of the text")
    add("--echo", action="store_true", help="show the prompt before its completion")
    add("--logprobs", type=int, metavar="N", help="with --json: the N likeliest tokens at each")
    add("--json", action="store_true", help="one JSON object a prompt instead of text")
    add(
        "--quantize", choices=("none", *KINDS), default="none", help="weights, while loading (none)"
    )
    parser.add_shared("--quantize-embeddings", "--kv-cache", "--dtype", "--lora", "--mesh")
    args = parser.parse_args(arguments)
    for name, valid, expected in (
        ("max_new_tokens", args.max_new_tokens >= 1, "at least 1"),
        ("temperature", 0 <= args.temperature < math.inf, "0 or more"),
        ("top_k", 0 <= args.top_k < 2**31, "from 0 to 2147483647"),
        ("top_p", 0 < args.top_p <= 1, "more than 0 and at most 1"),
        ("min_p", 0 <= args.min_p <= 1, "from 0 to 1"),
        ("repetition_penalty", 0 < args.repetition_penalty < math.inf, "more than 0"),
        ("seed", args.seed is None or 0 <= args.seed < 2**32, "from 0 to 4294967295"),
        ("logprobs", args.logprobs is None or 1 <= args.logprobs <= 100, "from 1 to 100"),
        ("stop", "" not in args.stop, "a text that is not empty"),
    ):
        if not valid:
            flag = "--" + name.replace("_", "-")
            parser.error(f"{flag} is {getattr(args, name)!r}, expected {expected}")
    if args.checkpoint is None:
        if args.chat:
            parser.error(
                "--chat is for a model that was trained to chat; add --checkpoint DIR, made with "
                "python -m convert.meta_to_orbax --input DIR --output DIR"
            )
        args.checkpoint = str(DEMO)
    if args.system is not None and not args.chat:
        parser.error("--system is for chat; add --chat")
    if args.logprobs is not None and not args.json:
        parser.error("--logprobs goes into the JSON output; add --json")
    if args.prompt and args.prompt_file:
        parser.error("both --prompt and --prompt-file given, expected one of them")
    if not (args.prompt or args.prompt_file or args.chat):
        parser.error("no prompt given; add --prompt TEXT, --prompt-file FILE, or --chat")
    if args.json and not (args.prompt or args.prompt_file):
        parser.error("--json is for prompts, not for a conversation; add --prompt TEXT")
    if args.quantize_embeddings and args.quantize == "none":
        parser.error("--quantize-embeddings is for --quantize; add a kind")
    return args


def read_prompts(args: argparse.Namespace) -> list[str]:
    """The texts of `--prompt` or of the lines of `--prompt-file` that are not empty."""
    if not args.prompt_file:
        return args.prompt or []
    try:
        text = Path(args.prompt_file).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{args.prompt_file} is not UTF-8 text (byte {error.start}); save it as UTF-8"
        ) from None
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise UserError(f"{args.prompt_file} is not a file, expected one prompt a line") from None
    if "\0" in text:
        raise UserError(f"{args.prompt_file} holds NUL bytes, as UTF-16 does; save it as UTF-8")
    if prompts := [line for line in text.split("\n") if line.strip()]:
        return prompts
    raise UserError(f"{args.prompt_file} holds no text, expected one prompt a line")


@dataclass
class Completion:
    """One row of a batch, finished. Times are seconds and leave compilation out."""

    text: str
    tokens: list[int]
    finish_reason: str  # "stop" or "length"
    ttft_s: float  # from the start of the batch to its first token
    tokens_per_s: float | None  # after the first token; None if there is only one
    logprobs: list[dict[str, Any]]  # with --logprobs, one entry a token


def complete(
    model: llama_jax.Model,
    prompts: Sequence[list[int]],
    args: argparse.Namespace,
    show: Callable[[int, str, bool], None],
) -> list[Completion]:
    """Completes a batch of token ids; reports compilation and speed on standard error.

    `show(row, text, finished)` is called as text becomes final.
    """
    config, params, tokenizer = model.config, model.params, model.tokenizer
    n_logprobs = args.logprobs or 0
    sampling = settings(
        row_seeds(args.seed, prompts),
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
    )
    stops = () if args.ignore_eos else stop_ids(tokenizer, config.version)
    began = time.perf_counter()
    int8_cache = args.kv_cache == "int8"
    shapes = request_shapes(
        config, prompts, args.max_new_tokens, n_logprobs=n_logprobs, int8_cache=int8_cache
    )
    compile_programs(config, params, shapes)
    compiled = time.perf_counter()
    rows = [TextStream(tokenizer, [] if args.chat else ids, args.stop) for ids in prompts]
    finished: dict[int, Completion] = {}
    first = 0.0
    for progress in stream(
        config,
        params,
        prompts,
        sampling,
        max_new_tokens=args.max_new_tokens,
        stop_ids=stops,
        n_logprobs=n_logprobs,
        int8_cache=int8_cache,
    ):
        now = time.perf_counter() - compiled
        first = first or now
        for row, text in enumerate(rows):
            if row in finished:
                continue
            new = text.push(progress.completion(row)[len(text.tokens) :])
            ended = progress.done[row] or text.stopped
            show(row, new + text.flush() if ended else new, ended)
            if ended:
                stopped = text.stopped or progress.stopped[row]
                n = len(text.tokens)
                finished[row] = Completion(
                    text=text.text,
                    tokens=text.tokens,
                    finish_reason="stop" if stopped else "length",
                    ttft_s=first,
                    tokens_per_s=(n - 1) / (now - first) if n > 1 and now > first else None,
                    logprobs=_logprobs(progress, row, n, tokenizer) if n_logprobs else [],
                )
        if len(finished) == len(rows):
            break
    total = sum(len(completion.tokens) for completion in finished.values())
    seconds = time.perf_counter() - compiled
    report(
        f"compiled in {compiled - began:.2f} s; first token after {first:.3f} s; "
        f"{total} tokens in {seconds:.2f} s"
        + (f", {(total - len(rows)) / (seconds - first):.1f} tokens/s" if total > len(rows) else "")
    )
    return [finished[row] for row in range(len(rows))]


def _logprobs(progress: Progress, row: int, n: int, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    def entry(token: Any, logprob: Any) -> dict[str, Any]:
        text = tokenizer.token_bytes(int(token)).decode("utf-8", "replace")
        return {"id": int(token), "token": text, "logprob": float(logprob)}

    return [
        {
            **entry(progress.tokens[row, i], progress.logprobs[row, i]),
            "top": [
                entry(*pair)
                for pair in zip(
                    progress.top_ids[row, i], progress.top_logprobs[row, i], strict=True
                )
            ],
        }
        for i in range(n)
    ]


class Printer:
    """Shows the rows of a batch in order: the first unfinished one live, later ones held back."""

    def __init__(self, prompts: Sequence[str], echo: bool):
        n = len(prompts)
        self._held = [f"=== {i}/{n}\n" if n > 1 else "" for i in range(1, n + 1)]
        if echo:
            self._held = [held + text for held, text in zip(self._held, prompts, strict=True)]
        self._finished = [False] * n
        self._row = 0

    def __call__(self, row: int, text: str, finished: bool) -> None:
        self._held[row] += text
        self._finished[row] = finished
        while self._row < len(self._held):
            sys.stdout.write(self._held[self._row])
            self._held[self._row] = ""
            if not self._finished[self._row]:
                break
            self._row += 1
            if self._row < len(self._held) or sys.stdout.isatty():
                sys.stdout.write("\n")
        sys.stdout.flush()


def chat_ids(
    model: llama_jax.Model, args: argparse.Namespace, turns: Sequence[Message]
) -> list[int]:
    """The ids of a conversation up to the assistant's answer."""
    system = [Message("system", args.system)] if args.system is not None else []
    return encode_chat(model.tokenizer, [*system, *turns], model.config.version)[0]


def converse(model: llama_jax.Model, args: argparse.Namespace) -> None:
    """A conversation over standard input, until its end (Ctrl-D). Ctrl-C ends an answer."""
    turns: list[Message] = []
    report("Type a message and Enter; Ctrl-C ends an answer, Ctrl-D the conversation.")
    while (said := _read_line()) is not None:
        if not said.strip():
            continue
        asked = [*turns, Message("user", said)]
        heard: list[str] = []

        def show(row: int, text: str, finished: bool, heard: list[str] = heard) -> None:
            heard.append(text)
            print(text, end="", flush=True)

        try:
            complete(model, [chat_ids(model, args, asked)], args, show)
        except KeyboardInterrupt:
            pass  # what was said so far stays in the conversation
        except UserError as error:  # too long, or a tag of the format: this message is left out
            report(f"{PROG}: {error}")
            continue
        print(flush=True)
        turns = [*asked, Message("assistant", "".join(heard))]


def _read_line() -> str | None:
    if sys.stdin.isatty():
        print("> ", end="", file=sys.stderr, flush=True)
    try:
        line = sys.stdin.readline()
    except UnicodeDecodeError:
        raise UserError("standard input is not UTF-8 text; convert it first") from None
    return line.rstrip("\n") if line else None


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; raises `UserError` for what the user can mend."""
    args = parse(arguments)
    keep_compilations()
    join_processes()
    texts = read_prompts(args)
    if args.seed is None:
        args.seed = agreed(secrets.randbits(32))
    began = time.perf_counter()
    quantization = None
    if args.quantize != "none":
        quantization = Quantization(args.quantize, embeddings=args.quantize_embeddings)
    model = llama_jax.load(
        args.checkpoint,
        dtype=default_dtype(args.dtype),
        quantize=quantization,
        mesh=args.mesh,
        lora=args.lora,
    )
    what = args.checkpoint if args.lora is None else f"{args.checkpoint} with {args.lora}"
    loaded = f"loaded {what} in {time.perf_counter() - began:.2f} s"
    if not texts:
        report(loaded)
        return converse(model, args)

    if args.chat:
        prompts = [chat_ids(model, args, [Message("user", text)]) for text in texts]
    else:
        prompts = [model.tokenizer.encode(text, bos=True) for text in texts]
    request_shapes(model.config, prompts, args.max_new_tokens)  # a mistake's line stands alone
    report(loaded)
    silent = args.json or not is_first_process()
    show = (lambda *_: None) if silent else Printer(texts, args.echo)
    completions = complete(model, prompts, args, show)
    if args.json and is_first_process():
        for text, ids, completion in zip(texts, prompts, completions, strict=True):
            print(json.dumps(to_json(text, ids, completion, args), ensure_ascii=False))


def to_json(
    prompt: str, prompt_ids: list[int], completion: Completion, args: argparse.Namespace
) -> dict[str, Any]:
    """What `--json` prints for one prompt."""
    fields: dict[str, Any] = {
        "prompt": prompt,
        "text": (prompt if args.echo else "") + completion.text,
        "tokens": completion.tokens,
        "finish_reason": completion.finish_reason,
        "prompt_tokens": len(prompt_ids),
        "completion_tokens": len(completion.tokens),
        "ttft_s": completion.ttft_s,
        "tokens_per_s": completion.tokens_per_s,
    }
    if args.logprobs:
        fields["logprobs"] = completion.logprobs
    return fields


if __name__ == "__main__":
    run(main, PROG)

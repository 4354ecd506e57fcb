"""The command `infer.sample`: what it prints, its JSON, chats, and each mistake by its one line."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import jax.monitoring
import numpy as np
import pytest
import sentencepiece
from oracle import random_params

from infer import sample
from llama_jax import adapter, lora
from llama_jax.checkpoint import load_params, save_model
from llama_jax.config import LlamaConfig
from llama_jax.errors import UserError
from llama_jax.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[1]
CONFIG = LlamaConfig(
    vocab_size=300,
    dim=32,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=8,
    mlp_dim=64,
    norm_eps=1e-5,
    rope_theta=1e4,
    rope_scaling=None,
    context=64,
    tie_embeddings=True,
    version="2",
)
GREEDY = ["--temperature", "0", "--max-new-tokens", "12", "--ignore-eos"]


@pytest.fixture(scope="module", autouse=True)
def no_compilations_on_disk():
    """The command turns JAX's cache on disk on; other tests must not see it."""
    before = jax.config.values["jax_compilation_cache_dir"]
    yield
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """A model directory with random weights and a SentencePiece tokenizer of its own."""
    folder = tmp_path_factory.mktemp("sample")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the quick brown fox jumps over the lazy dog"] * 4),
        model_writer=model,
        vocab_size=CONFIG.vocab_size,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    tokenizer = folder / "tokenizer.model"
    tokenizer.write_bytes(model.getvalue())
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / "cache")
    jax.config.update("jax_compilation_cache_dir", str(folder / "cache"))
    path = folder / "model"
    save_model(path, CONFIG, random_params(CONFIG), tokenizer=tokenizer, provenance={})
    yield path
    del os.environ["JAX_COMPILATION_CACHE_DIR"]


@pytest.fixture
def run(model_dir, capsys):
    """`run(*flags)` runs the command in this process and returns what it printed."""

    def run(*flags):
        sample.main(["--checkpoint", str(model_dir), *flags])
        return capsys.readouterr().out

    return run


@pytest.fixture(scope="module")
def adapted(model_dir):
    """An adapter directory, and the model directory into which it is merged."""
    config = lora.LoraConfig.of("all", rank=4)
    params = lora.add(load_params(model_dir), config, jax.random.key(0))
    rng = np.random.default_rng(0)
    params = jax.tree.map_with_path(
        lambda path, x: rng.normal(0, 0.1, x.shape).astype("f4") if lora.is_adapter(path) else x,
        params,
    )
    path, merged = model_dir.parent / "adapter", model_dir.parent / "merged"
    adapter.save_adapter(path, params, config, adapter.fingerprint(model_dir), {})
    tokenizer = model_dir / "tokenizer.model"
    save_model(merged, CONFIG, lora.merge(params), tokenizer=tokenizer, provenance={})
    return path, merged


def test_json_has_all_that_a_program_needs(run, model_dir):
    (line,) = run("--prompt", "the fox", "--json", "--logprobs", "3", *GREEDY).splitlines()
    result = json.loads(line)
    assert list(result) == [
        "prompt",
        "text",
        "tokens",
        "finish_reason",
        "prompt_tokens",
        "completion_tokens",
        "ttft_s",
        "tokens_per_s",
        "logprobs",
    ]
    tokenizer = load_tokenizer(model_dir)
    assert result["prompt"] == "the fox"
    assert result["prompt_tokens"] == len(tokenizer.encode("the fox", bos=True))
    assert result["completion_tokens"] == len(result["tokens"]) == len(result["logprobs"]) == 12
    assert result["finish_reason"] == "length"
    assert result["ttft_s"] > 0
    assert result["tokens_per_s"] > 0
    for token, entry in zip(result["tokens"], result["logprobs"], strict=True):
        assert entry["id"] == token == entry["top"][0]["id"]
        assert entry["logprob"] == entry["top"][0]["logprob"]
        assert len(entry["top"]) == 3


def test_text_to_a_pipe_is_the_completion_and_nothing_else(run):
    text = json.loads(run("--prompt", "the fox", "--json", *GREEDY))["text"]
    assert run("--prompt", "the fox", *GREEDY) == text
    assert run("--prompt", "the fox", "--echo", *GREEDY) == "the fox" + text


def test_a_batch_prints_each_prompt_as_alone(run, tmp_path):
    prompts = ["the fox", "dog", "quick brown fox jumps"]
    alone = [run("--prompt", prompt, *GREEDY) for prompt in prompts]
    flags = [flag for prompt in prompts for flag in ("--prompt", prompt)]
    expected = "\n".join(f"=== {i}/3\n{text}" for i, text in enumerate(alone, 1))
    assert run(*flags, *GREEDY) == expected
    file = tmp_path / "prompts.txt"
    lines = ["\N{BYTE ORDER MARK}the fox", "", *prompts[1:]]
    file.write_bytes("\r\n".join(lines).encode())
    assert run("--prompt-file", str(file), *GREEDY) == expected
    lines = run("--prompt-file", str(file), "--json", *GREEDY).splitlines()
    assert [json.loads(line)["text"] for line in lines] == alone


def test_a_seed_repeats_a_run_whatever_the_batch(run):
    drawn = ["--temperature", "1", "--top-p", "1", "--max-new-tokens", "12", "--ignore-eos"]
    alone = run("--prompt", "fox", "--seed", "7", *drawn)
    assert alone == run("--prompt", "fox", "--seed", "7", *drawn)
    assert alone != run("--prompt", "fox", "--seed", "8", *drawn)
    batch = run("--prompt", "dog", "--prompt", "fox", "--seed", "7", *drawn)
    assert batch.endswith(f"=== 2/2\n{alone}")


def test_a_stop_text_ends_the_completion(run):
    whole = run("--prompt", "the fox", *GREEDY)
    stop = whole[3:5]
    result = json.loads(run("--prompt", "the fox", "--stop", stop, "--json", *GREEDY))
    assert result["text"] == whole[: whole.index(stop)]
    assert result["finish_reason"] == "stop"
    assert result["completion_tokens"] < 12


def test_chat_with_a_prompt_frames_it(run, model_dir):
    flags = ("--chat", "--system", "be brief", "--prompt", "the fox", "--json", *GREEDY)
    result = json.loads(run(*flags))
    framed = "[INST] <<SYS>>\nbe brief\n<</SYS>>\n\nthe fox [/INST]"
    expected = len(load_tokenizer(model_dir).encode(framed, bos=True))
    assert result["prompt_tokens"] == expected


def test_chat_without_a_prompt_is_a_conversation(run, monkeypatch, capsys):
    asked = []
    encode = sample.chat_ids

    def chat_ids(model, args, turns):
        asked.append([turn.content for turn in turns])
        return encode(model, args, turns)

    monkeypatch.setattr(sample, "chat_ids", chat_ids)
    monkeypatch.setattr(sys, "stdin", io.StringIO("fox\n\n[INST] no\ndog\n"))
    few = ["--temperature", "0", "--max-new-tokens", "3", "--ignore-eos"]
    first, second, end = run("--chat", *few).split("\n")
    assert end == ""
    assert asked == [["fox"], ["fox", first, "[INST] no"], ["fox", first, "dog"]]
    assert second


def test_an_adapter_says_what_the_merged_model_does(run, adapted, capsys):
    path, merged = map(str, adapted)
    plain = run("--prompt", "the fox", *GREEDY)
    text = run("--prompt", "the fox", "--lora", path, *GREEDY)
    assert text != plain
    assert text == run("--prompt", "the fox", "--checkpoint", merged, *GREEDY)
    flags = ["--quantize", "int8", "--mesh", "fsdp=2,tensor=2"]
    split = run("--prompt", "the fox", "--lora", path, *flags, *GREEDY)
    assert split == run("--prompt", "the fox", "--lora", path, *flags[:2], *GREEDY) != plain
    with pytest.raises(UserError, match="belongs to a model with the fingerprint"):
        run("--prompt", "the fox", "--checkpoint", merged, "--lora", path)
    assert capsys.readouterr().err.count("\n") == 0


def test_a_pipe_closed_early_is_no_error(model_dir):
    command = f"{sys.executable} -m infer.sample --checkpoint {model_dir} --prompt fox"
    result = subprocess.run(
        f"{command} --temperature 0 | head -c 1; exit ${{PIPESTATUS[0]}}",
        shell=True,
        executable="/bin/bash",
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0
    assert len(result.stdout) <= 1
    assert "Error" not in result.stderr


def test_a_second_process_does_not_compile(model_dir):
    code = (
        "import jax, sys; from infer import sample; hits = [];"
        "jax.monitoring.register_event_listener(lambda name, **kw: hits.append(name));"
        "sample.main(sys.argv[1:]);"
        "print(hits.count('/jax/compilation_cache/cache_misses'),"
        " hits.count('/jax/compilation_cache/cache_hits'), file=sys.stderr)"
    )
    arguments = ["--checkpoint", str(model_dir), "--prompt", "a fox", *GREEDY]
    counts = []
    for _ in range(2):
        result = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        counts.append([int(n) for n in result.stderr.splitlines()[-1].split()])
    (first_misses, _), (misses, hits) = counts
    assert first_misses + counts[0][1] == hits
    assert misses == 0
    assert hits >= 3


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "no prompt given"),
        (["--prompt", "a", "--temperature", "-1"], "--temperature is -1.0, expected 0 or more"),
        (["--prompt", "a", "--temperature", "nan"], "--temperature is nan"),
        (["--prompt", "a", "--top-p", "0"], "--top-p is 0.0, expected more than 0"),
        (["--prompt", "a", "--temperature", "inf"], "--temperature is inf"),
        (["--prompt", "a", "--top-k", "-1"], "--top-k is -1"),
        (["--prompt", "a", "--top-k", "3000000000"], "--top-k is 3000000000"),
        (["--chat", "--json"], "add --prompt TEXT"),
        (["--prompt", "a", "--min-p", "2"], "--min-p is 2.0"),
        (["--prompt", "a", "--repetition-penalty", "0"], "--repetition-penalty is 0.0"),
        (["--prompt", "a", "--max-new-tokens", "0"], "--max-new-tokens is 0"),
        (["--prompt", "a", "--max-new-tokens", "x"], "invalid int value: 'x'"),
        (["--prompt", "a", "--seed", "-1"], "--seed is -1"),
        (["--prompt", "a", "--stop", ""], "--stop is ['']"),
        (["--prompt", "a", "--logprobs", "3"], "add --json"),
        (["--prompt", "a", "--logprobs", "0", "--json"], "--logprobs is 0"),
        (["--prompt", "a", "--system", "b"], "add --chat"),
        (["--prompt", "a", "--prompt-file", "b"], "both --prompt and --prompt-file"),
        (["--prompt", "a", "--repetition-penalty", "inf"], "--repetition-penalty is inf"),
        (["--prompt", "a", "--frobnicate"], "--frobnicate"),
        (["--prompt", "a", "--temp", "1"], "--temp"),
    ],
)
def test_flags_that_cannot_work_are_one_line_and_status_2(run, capsys, flags, words):
    with pytest.raises(SystemExit) as exit:
        run(*flags)
    assert exit.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


def test_files_that_cannot_be_prompts_say_so(run, tmp_path):
    file = tmp_path / "prompts.txt"
    with pytest.raises(UserError, match="is not a file, expected one prompt a line"):
        run("--prompt-file", str(file))
    file.write_bytes("caf\xe9\n".encode("latin-1"))
    with pytest.raises(UserError, match="is not a file, expected one prompt a line"):
        run("--prompt-file", str(file / "below"))
    with pytest.raises(UserError, match=r"is not UTF-8 text \(byte 3\); save it as UTF-8"):
        run("--prompt-file", str(file))
    file.write_text("fox", encoding="utf-16-le")
    with pytest.raises(UserError, match="holds NUL bytes, as UTF-16 does; save it as UTF-8"):
        run("--prompt-file", str(file))
    file.write_text(" \n\n")
    with pytest.raises(UserError, match="holds no text"):
        run("--prompt-file", str(file))


def test_a_prompt_longer_than_the_context_says_both_lengths(run, capsys):
    with pytest.raises(UserError, match=r"has \d+ tokens, but the model's context ends at 64"):
        run("--prompt", "fox " * 100)
    assert capsys.readouterr().err == ""


def test_a_conversation_that_is_not_utf8_says_so(run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"fox \xff\n"), "utf-8"))
    with pytest.raises(UserError, match="standard input is not UTF-8 text"):
        run("--chat")


def test_nothing_is_kept_where_nothing_can_be_written(model_dir):
    command = [sys.executable, "-m", "infer.sample", "--checkpoint", str(model_dir)]
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": "/dev/null/cache"}
    result = subprocess.run(
        [*command, "--prompt", "fox", *GREEDY],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    assert result.stdout
    assert len(result.stderr.splitlines()) == 2  # loaded, compiled


def test_no_checkpoint_and_no_model_directory_are_one_line_and_status_2(tmp_path):
    (tmp_path / "consolidated.00.pth").touch()
    for flags, words in (
        ([], "no prompt given"),
        (["--chat"], "python -m convert.meta_to_orbax --input DIR --output DIR"),
        (["--checkpoint", str(tmp_path / "none"), "--prompt", "a"], "does not exist"),
        (["--checkpoint", str(tmp_path), "--prompt", "a"], "run python -m convert.meta_to_orbax"),
    ):
        result = subprocess.run(
            [sys.executable, "-m", "infer.sample", *flags],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 2
        assert result.stdout == ""
        (line,) = result.stderr.splitlines()
        assert line.startswith("infer.sample: error: ")
        assert words in line

"""Two processes with four devices each are one device: the same text, said once."""

import dataclasses
import io
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from oracle import random_params
from test_sharding import CONFIG as TWO_LAYERS
from test_sharding import save_tokenizer

from infer import evaluate, sample
from llama_jax.checkpoint import save_model

ROOT = Path(__file__).parents[1]
CONFIG = dataclasses.replace(TWO_LAYERS, n_layers=1)
SECONDS = 400  # for both processes, with all they compile
DATA, TENSOR = ["--mesh", "data=2,tensor=4"], ["--mesh", "tensor=8"]
GREEDY = ["--temperature", "0"]
COMMON = ["--prompt", "the fox", "--prompt", "dog", "--max-new-tokens", "20", "--ignore-eos"]
CASES = {  # of infer.sample
    "float32, data=2,tensor=4": [*DATA, *GREEDY],
    "float32, tensor=8": [*TENSOR, *GREEDY],
    "int8, tensor=8": [*TENSOR, "--quantize", "int8", *GREEDY],
    "drawn": [*DATA, "--temperature", "1"],
    "too small": ["--mesh", "tensor=4", *GREEDY],
}
TEXT = "the fox and the dog\n" * 4
EVALUATE = ["--quantize", "none", "--kv-cache", "int8", "--window", "16", "--json"]
BENCH = ["--cache", "on,off", "--batch", "2", "--prompt-tokens", "5", "--new-tokens", "3"]

# Runs the commands that one file names with their arguments, and writes to another whether each
# joined the processes, what it printed, the tokens that it drew, and what it raised.
DRIVER = """
import contextlib, io, json, sys
import jax

address, process, cases, results = sys.argv[1:]
jax.distributed.initialize(
    coordinator_address=address, num_processes=2, process_id=int(process)
)
assert (jax.device_count(), jax.local_device_count()) == (8, 4)
from infer import bench, evaluate, machine, sample
from llama_jax.errors import UserError

tokens = []
complete = sample.complete


def recorded(*arguments):
    completions = complete(*arguments)
    tokens.append([completion.tokens for completion in completions])
    return completions


sample.complete = recorded
machine.COPY_BYTES = 1 << 16  # a copy that takes no time
joined = []
for command in (bench, evaluate, sample):
    command.join_processes = lambda: joined.append(jax.distributed.is_initialized())
said = {}
for name, (command, arguments) in json.load(open(cases)).items():
    tokens.clear()
    joined.clear()
    error = None
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            {"bench": bench, "evaluate": evaluate, "sample": sample}[command].main(arguments)
        except UserError as raised:
            error = str(raised)
    said[name] = {
        "joined": list(joined), "out": out.getvalue(), "tokens": list(tokens), "error": error
    }
json.dump(said, open(results, "w"))
"""


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    tokenizer = save_tokenizer(folder, CONFIG.vocab_size)
    path = folder / "model"
    save_model(path, CONFIG, random_params(CONFIG), tokenizer=tokenizer, provenance={})
    return path


def data(model_dir):
    """`--data` with a text beside the model."""
    text = model_dir.parent / "text.txt"
    text.write_text(TEXT)
    return ["--data", str(text)]


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def said(model_dir, tmp_path_factory):
    """What each process printed and drew in each case; all of them run in one start of the two."""
    folder = tmp_path_factory.mktemp("runs")
    cases = folder / "cases.json"
    checkpoint = ["--checkpoint", str(model_dir)]
    listed = {name: ("sample", [*checkpoint, *COMMON, *flags]) for name, flags in CASES.items()}
    listed["evaluate"] = "evaluate", [*checkpoint, *data(model_dir), *EVALUATE, *DATA]
    listed["bench"] = "bench", [*checkpoint, *BENCH, *DATA, "--plot", str(folder / "bench.svg")]
    cases.write_text(json.dumps(listed))
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
    }
    address = f"127.0.0.1:{free_port()}"
    outputs = [folder / str(process) for process in range(2)]
    started = []
    try:
        for process, output in enumerate(outputs):
            command = [sys.executable, "-c", DRIVER, address, str(process), str(cases)]
            with open(f"{output}.err", "w") as err:
                started.append(
                    subprocess.Popen(
                        [*command, f"{output}.json"],
                        cwd=ROOT,
                        env=environment,
                        stdin=subprocess.DEVNULL,
                        stdout=subprocess.DEVNULL,  # Gloo, which connects the two, prints there
                        stderr=err,
                    )
                )
        end = time.monotonic() + SECONDS
        # A process that fails leaves the other one waiting.
        while any(process.poll() is None for process in started) and time.monotonic() < end:
            if any(process.poll() for process in started):
                break
            time.sleep(0.1)
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()
            process.wait()
    errors = [Path(f"{output}.err").read_text() for output in outputs]
    assert [process.returncode for process in started] == [0, 0], "\n---\n".join(errors)
    return [json.loads(Path(f"{output}.json").read_text()) for output in outputs]


@pytest.fixture(scope="module")
def alone(model_dir):
    """`alone(*flags)`: what the command prints in this process, on one device."""

    def alone(*flags):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sample, "keep_compilations", lambda: None)
            patch.setattr(sys, "stdout", io.StringIO())
            sample.main(["--checkpoint", str(model_dir), *COMMON, *flags])
            return sys.stdout.getvalue()

    return alone


@pytest.mark.parametrize("name", list(CASES)[:3])
def test_the_first_process_prints_what_one_device_does(said, alone, name):
    """And the second one nothing, though it draws the same tokens."""
    first, second = (results[name] for results in said)
    expected = alone(*CASES[name][2:])
    assert expected.startswith("=== 1/2\n")
    assert first["out"] == expected
    assert second["out"] == ""
    assert first["tokens"] == second["tokens"]
    assert (first["error"], second["error"]) == (None, None)


def test_processes_agree_on_what_is_drawn_without_a_seed(said):
    first, second = (results["drawn"] for results in said)
    assert [len(row) for row in first["tokens"][0]] == [20, 20]
    assert first["tokens"] == second["tokens"]
    assert first["out"]
    assert second["out"] == ""


def test_the_first_process_evaluates_as_one_device_does(said, model_dir, monkeypatch, capsys):
    first, second = (results["evaluate"] for results in said)
    assert (first["error"], second["error"], second["out"]) == (None, None, "")
    monkeypatch.setattr(evaluate, "keep_compilations", lambda: None)
    evaluate.main(["--checkpoint", str(model_dir), *data(model_dir), *EVALUATE])
    *table, last = first["out"].splitlines()
    *_, expected = capsys.readouterr().out.splitlines()
    assert len(table) == 2 + 2
    rows, alone = (json.loads(line)["rows"] for line in (last, expected))
    assert [row["int8_cache"] for row in rows] == [False, True]
    for row, other in zip(rows, alone, strict=True):  # a key may round the other way
        assert row["tokens"] == other["tokens"] > 32
        assert row["bytes"] == other["bytes"]
        assert row["nats"] == pytest.approx(other["nats"], rel=1e-5)
        assert row["kl"] == pytest.approx(other["kl"], rel=0.1, abs=1e-6)


def test_the_first_process_tells_what_both_measured(said):
    first, second = (results["bench"] for results in said)
    assert (first["error"], second["error"], second["out"]) == (None, None, "")
    result = json.loads(first["out"].splitlines()[-1])
    assert (result["devices"], result["mesh"]["data"], result["mesh"]["tensor"]) == (8, 2, 4)
    assert [row["cache"] for row in result["rows"]] == [True, False]
    for row in result["rows"]:
        assert row["peak_bytes"] > row["program_bytes"] > 0


def test_every_command_joins_the_processes_once(said):
    for results in said:
        assert {name: result["joined"] for name, result in results.items()} == {
            name: [True] for name in (*CASES, "evaluate", "bench")
        }


def test_a_mesh_without_all_devices_is_refused_by_every_process(said):
    line = "--mesh tensor=4 needs 4 devices, but there are 8"
    for results in said:
        assert results["too small"]["error"].startswith(line)
        assert results["too small"]["out"] == ""

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

from infer import sample
from llama_jax.checkpoint import save_model

ROOT = Path(__file__).parents[1]
CONFIG = dataclasses.replace(TWO_LAYERS, n_layers=1)
SECONDS = 240  # for both processes, with all they compile
DATA, TENSOR = ["--mesh", "data=2,tensor=4"], ["--mesh", "tensor=8"]
GREEDY = ["--temperature", "0"]
COMMON = ["--prompt", "the fox", "--prompt", "dog", "--max-new-tokens", "20", "--ignore-eos"]
CASES = {
    "float32, data=2,tensor=4": [*DATA, *GREEDY],
    "float32, tensor=8": [*TENSOR, *GREEDY],
    "int8, tensor=8": [*TENSOR, "--quantize", "int8", *GREEDY],
    "drawn": [*DATA, "--temperature", "1"],
    "too small": ["--mesh", "tensor=4", *GREEDY],
}

# Runs the command for each list of arguments in one file, and writes to another what it printed,
# the tokens that it drew, and what it raised.
DRIVER = """
import contextlib, io, json, sys
import jax

address, process, cases, results = sys.argv[1:]
jax.distributed.initialize(
    coordinator_address=address, num_processes=2, process_id=int(process)
)
assert (jax.device_count(), jax.local_device_count()) == (8, 4)
from infer import sample
from llama_jax.errors import UserError

tokens = []
complete = sample.complete


def recorded(*arguments):
    completions = complete(*arguments)
    tokens.append([completion.tokens for completion in completions])
    return completions


sample.complete = recorded
said = {}
for name, arguments in json.load(open(cases)).items():
    tokens.clear()
    error = None
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            sample.main(arguments)
        except UserError as raised:
            error = str(raised)
    said[name] = {"out": out.getvalue(), "tokens": list(tokens), "error": error}
json.dump(said, open(results, "w"))
"""


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    tokenizer = save_tokenizer(folder, CONFIG.vocab_size)
    path = folder / "model"
    save_model(path, CONFIG, random_params(CONFIG), tokenizer=tokenizer, provenance={})
    return path


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
    cases.write_text(
        json.dumps({name: [*checkpoint, *COMMON, *flags] for name, flags in CASES.items()})
    )
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


def test_a_mesh_without_all_devices_is_refused_by_every_process(said):
    line = "--mesh tensor=4 needs 4 devices, but there are 8"
    for results in said:
        assert results["too small"]["error"].startswith(line)
        assert results["too small"]["out"] == ""

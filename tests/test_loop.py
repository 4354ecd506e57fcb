"""The loop of all training: killed, stopped, gone on with, out of disk, out of numbers."""

import dataclasses
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from oracle import tiny
from test_processes import free_port
from test_train_lora import LOSS_RTOL, losses, metrics, write_model, write_text

from convert import quantize
from llama_jax import sharding
from llama_jax.checkpoint import abstract, load_params
from llama_jax.errors import UserError
from llama_jax.lora import everything
from train import checkpoints, full, loop, lora, placement, progress
from train.optimizer import OptimizerConfig, make_optimizer
from train.step import init_state

ROOT = Path(__file__).parents[1]
CONFIG = dataclasses.replace(
    tiny(2, 1, dim=16, head_dim=8), n_layers=1, vocab_size=304, mlp_dim=16, context=16
)
SECONDS = 120  # for a process to get somewhere
KILLS = 6
TERMINATED = 128 + signal.SIGTERM
STEPS = 60
RUN = ["--seq-len", "16", "--batch", "2", "--accumulate", "2", "--dropout", "0.1"]
LONG = ["--steps", str(STEPS), "--save-every", "3", "--validation", "0.2", "--eval-every", "5"]


@pytest.fixture(autouse=True)
def no_compilations_on_disk(monkeypatch):
    """Other tests must not see JAX's cache on disk."""
    monkeypatch.setattr(lora, "keep_compilations", lambda: None)
    monkeypatch.setattr(full, "keep_compilations", lambda: None)


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loop")
    model, text = write_model(folder, CONFIG), write_text(folder / "text.txt")
    return ["--checkpoint", str(model), "--data", str(text), *RUN]


@pytest.fixture(scope="module")
def start(given, tmp_path_factory):
    """`start(output, *flags)`: the command in a process of its own, with one device."""
    cache = tmp_path_factory.mktemp("cache")
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
    }

    def start(output, *flags):
        command = [sys.executable, "-m", "train.lora", *given, "--output", str(output), *flags]
        with open(said(output), "w") as err:
            return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=err)

    return start


def said(output):
    """The file of what the last process wrote to standard error."""
    return output.with_suffix(".err")


def wait_for_step(process, output, step):
    """Until `metrics.jsonl` tells of it, or the process is over."""
    end, file = time.monotonic() + SECONDS, output / "metrics.jsonl"
    while time.monotonic() < end and process.poll() is None:
        if file.exists() and f'"step": {step},' in file.read_text():
            return
        time.sleep(0.002)
    assert process.poll() is not None, "the process has made no step"


def without_times(output):
    steps, validations = metrics(output)
    lines = [*steps, *validations]
    return [{k: v for k, v in line.items() if k != "tokens_per_s"} for line in lines]


def files(folder):
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and "array_metadatas" not in str(file)
    }


@pytest.fixture(scope="module")
def uninterrupted(start, tmp_path_factory):
    output = tmp_path_factory.mktemp("whole") / "out"
    process = start(output, *LONG)
    assert process.wait(SECONDS) == 0, said(output).read_text()
    return output


def test_killed_at_any_moment_it_goes_on_bit_for_bit(start, uninterrupted, tmp_path):
    """Every line of the metrics and every bit of the adapter."""
    output, rng = tmp_path / "out", random.Random(0)
    for kill in range(KILLS):
        process = start(output, *LONG, "--resume")
        wait_for_step(process, output, (kill + 1) * STEPS // (KILLS + 2))
        time.sleep(rng.uniform(0, 0.05))
        assert process.poll() is None, "it was over before it could be killed"
        process.kill()
        process.wait()
        assert not (output / "adapter").exists()
    process = start(output, *LONG, "--resume")
    assert process.wait(SECONDS) == 0, said(output).read_text()
    assert without_times(output) == without_times(uninterrupted)
    assert [line["step"] for line in metrics(output)[0]] == list(range(1, STEPS + 1))
    params = "adapter/params"
    found, expected = files(output / params), files(uninterrupted / params)
    values = [name for name in expected if name.split("/")[-1][0].isdigit()]
    assert len(values) == 2 * 2
    for name in values:
        assert found[name] == expected[name]


@pytest.mark.parametrize("ends", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_first(start, uninterrupted, tmp_path, ends):
    output = tmp_path / "out"
    flags = [*LONG[:2], "--save-every", "1000", *LONG[4:]]
    process = start(output, *flags)
    wait_for_step(process, output, 7)
    process.send_signal(ends)
    assert process.wait(SECONDS) == 128 + ends
    *_, last = said(output).read_text().splitlines()
    step = int(last.split()[3])
    assert last == f"{ends.name}: saved step {step} of {STEPS}; go on with --resume"
    assert [path.name for path in (output / "checkpoints").iterdir()] == [str(step)]
    process = start(output, *flags, "--resume")
    assert process.wait(SECONDS) == 0, said(output).read_text()
    assert without_times(output) == without_times(uninterrupted)


def run(given, output, *flags):
    lora.main([*given, "--output", str(output), *flags])


@pytest.fixture(scope="module")
def stopped(given, tmp_path_factory):
    """The output of a run that has come to step 4 of 6, and to no further."""
    output = tmp_path_factory.mktemp("stopped") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lora, "keep_compilations", lambda: None)
        patch.setattr(lora, "save_adapter", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(given, output, "--steps", "6", "--save-every", "2")
    return output


def test_an_output_that_is_there_is_not_overwritten(given, stopped):
    with pytest.raises(UserError, match="exists already; add --resume to go on with that run"):
        run(given, stopped, "--steps", "6")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--steps", "7"], "--steps was 6, is 7"),
        (["--rank", "2"], "--rank was 16, is 2"),
        (["--seed", "1"], "--seed was 0, is 1"),
        (["--scan"], "--scan was None, is True"),
        (["--dtype", "bfloat16"], "--dtype was float32, is bfloat16"),
        (["--validation", "0.5"], "the data was "),
    ],
)
def test_other_settings_are_told(given, stopped, flags, words):
    before = files(stopped)
    with pytest.raises(UserError, match="was begun with other settings: ") as raised:
        run(given, stopped, "--steps", "6", "--resume", *flags)
    assert words in str(raised.value)
    assert files(stopped) == before


def test_other_data_are_told(given, stopped, tmp_path):
    other = write_text(tmp_path / "other.txt", 300)
    with pytest.raises(UserError, match=r"with other settings: the data was [0-9a-f]+, is "):
        run([*given, "--data", str(other)], stopped, "--steps", "6", "--resume")


def test_what_changes_no_number_may_differ(given, stopped, tmp_path, capsys):
    """Another mesh too: the state is read onto it. A finished run is not run again."""
    pytest.importorskip("tensorboardX")
    flags = ["--steps", "6", "--resume", "--save-every", "5", "--keep", "3", "--tensorboard"]
    flags += ["--plot", str(tmp_path / "curve.png"), "--mesh", "data=2"]
    run(given, stopped, *flags)
    assert [line["step"] for line in metrics(stopped)[0]] == [1, 2, 3, 4, 5, 6]
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    (events,) = (stopped / "tensorboard").iterdir()
    assert b"grad_norm" in events.read_bytes()
    capsys.readouterr()
    run(given, stopped, *flags)
    assert capsys.readouterr().err.endswith("adapter is there: this run is finished\n")


def test_a_base_quantized_otherwise_is_told(given, stopped, tmp_path):
    """Its fingerprint is that of the model that it was made of."""
    flags = ["--output", str(tmp_path / "nf4"), "--quantize", "nf4", "--group-size", "16"]
    quantize.main(["--checkpoint", given[1], *flags])
    with pytest.raises(UserError, match=r"the model was ([0-9a-f]+), is \1 as .*nf4"):
        run([given[0], str(tmp_path / "nf4"), *given[2:]], stopped, "--steps", "6", "--resume")


def test_a_damaged_checkpoint_is_told(given, tmp_path, monkeypatch):
    """The run goes on from the one before it is deleted."""
    monkeypatch.setattr(lora, "save_adapter", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    flags, last = ["--steps", "6", "--save-every", "2"], tmp_path / "out/checkpoints/4"
    with pytest.raises(KeyboardInterrupt):
        run(given, tmp_path / "out", *flags)
    shutil.rmtree(last / "state")
    with pytest.raises(UserError, match="delete it to go on from the one before") as raised:
        run(given, tmp_path / "out", *flags, "--resume")
    assert str(last) in str(raised.value)
    shutil.rmtree(last)
    with pytest.raises(KeyboardInterrupt):
        run(given, tmp_path / "out", *flags, "--resume")
    assert [line["step"] for line in metrics(tmp_path / "out")[0]] == [1, 2, 3, 4, 5, 6]


def test_a_line_of_metrics_is_json_whatever_overflows(tmp_path):
    with progress._Lines(epath.Path(tmp_path) / "metrics.jsonl", 0) as lines:
        lines.add({"step": 1, "loss": 2.5, "grad_norm": float("inf"), "margin": float("nan")})
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=pytest.fail) == {
        "step": 1,
        "loss": 2.5,
        "grad_norm": None,
        "margin": None,
    }


@pytest.mark.parametrize("parts", [("file", "x"), ("file", "x", "y")])
def test_an_output_that_cannot_be_made_is_told(given, tmp_path, parts, capsys):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=r"cannot be made: .*file is no directory"):
        run(given, tmp_path.joinpath(*parts), "--steps", "2")
    assert capsys.readouterr().err == ""


def test_parameters_that_are_no_numbers_are_not_written(given, tmp_path, monkeypatch):
    """The last update is in no loss."""
    assert loop._all_finite({"a": jnp.array([1.0, 2.0]), "b": None})
    assert not loop._all_finite({"a": jnp.array([1.0, jnp.inf]), "b": None})
    monkeypatch.setattr(loop, "_all_finite", lambda _: jnp.array(False))
    with pytest.raises(UserError, match="after step 2 parameters are no finite numbers"):
        run(given, tmp_path / "out", "--steps", "2")
    assert not (tmp_path / "out/adapter").exists()


def test_something_else_is_not_gone_on_with(given, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"has no readable settings\.json, so it is not the output"):
        run(given, tmp_path, "--steps", "2", "--resume")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_loss_that_is_no_number_ends_the_run(given, tmp_path, monkeypatch):
    """At its step, with the texts of its batch; the checkpoint before it is whole."""
    inner = lora.next_token

    def next_token(config, **options):
        loss = inner(config, **options)

        def poisoned(params, batch, key):
            total, weight, seen = loss(params, batch, key)
            adapter = params["layers_0"]["attention"]["q"]["lora"]
            # b has moved further than in the first four steps
            moved = jnp.max(jnp.abs(adapter.b)) > 3.5 * 1e-3
            return jnp.where(moved, jnp.nan, total), weight, seen

        return poisoned

    monkeypatch.setattr(lora, "next_token", next_token)
    flags = ["--steps", "9", "--save-every", "2", "--learning-rate", "0.001"]
    flags += ["--schedule", "constant"]
    with pytest.raises(UserError, match=r"^step 5: the loss is nan, the norm") as raised:
        run(given, tmp_path / "out", *flags)
    file = tmp_path / "out/step-5.jsonl"
    assert f"the texts of its batch are in {file}; " in str(raised.value)
    texts = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(texts) == 2 * 2
    text = Path(given[3]).read_text()
    assert all(part.strip() in text for part in texts)
    assert len(losses(tmp_path / "out")) == 4
    assert {path.name for path in (tmp_path / "out/checkpoints").iterdir()} == {"2", "4"}


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), ValueError("UNKNOWN: write: No space left on device")],
)
def test_a_full_disk_is_told_and_the_last_checkpoint_is_intact(given, tmp_path, monkeypatch, error):
    import orbax.checkpoint as ocp

    inner = ocp.CheckpointManager.save

    def save(manager, step, *arguments, **options):
        if step == 4:
            raise error
        return inner(manager, step, *arguments, **options)

    monkeypatch.setattr(ocp.CheckpointManager, "save", save)
    with pytest.raises(UserError, match="the disk is full; the last checkpoint is intact"):
        run(given, tmp_path / "out", "--steps", "6", "--save-every", "2")
    monkeypatch.undo()
    monkeypatch.setattr(lora, "keep_compilations", lambda: None)
    run(given, tmp_path / "out", "--steps", "6", "--save-every", "2", "--resume")
    assert [line["step"] for line in metrics(tmp_path / "out")[0]] == [1, 2, 3, 4, 5, 6]


def test_a_disk_that_is_too_small_is_told_before_it_is_written(given, tmp_path, monkeypatch):
    usage = checkpoints.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda _: usage._replace(free=5000))
    with pytest.raises(UserError, match="the disk is full; the last checkpoint is intact"):
        run(given, tmp_path / "out", "--steps", "6", "--save-every", "2")
    assert list((tmp_path / "out/checkpoints").iterdir()) == []


def test_an_optimizers_arrays_lie_where_their_parameters_do():
    """8 devices hold an eighth of each moment; what has another shape is on all."""
    config = tiny(4, 4, dim=64, head_dim=16)
    mesh = sharding.make_mesh("fsdp=8", config)
    params = abstract(config)
    for name, moments in (("adamw", 2), ("lion", 1), ("sgd", 1), ("adafactor", 0)):
        optimizer = make_optimizer(OptimizerConfig(name=name), 10, everything)
        state = jax.eval_shape(lambda p, o=optimizer: init_state(p, o, jnp.float32), params)
        places = placement.state_shardings(state, params, mesh)
        kernel = params["layers_0"]["mlp"]["up"]["kernel"]
        split = [
            place.shard_shape(leaf.shape)
            for leaf, place in zip(*map(jax.tree.leaves, (state, places)), strict=True)
            if leaf.shape == kernel.shape
        ]
        assert split
        assert all(np.prod(shape) == kernel.size // 8 for shape in split)
        per_layer = sum(leaf.shape == kernel.shape for leaf in jax.tree.leaves(params))
        assert len(split) >= (1 + moments) * per_layer


# Two processes with four devices each

DRIVER = """
import json, sys
import jax

address, process, cases = sys.argv[1:]
jax.distributed.initialize(
    coordinator_address=address, num_processes=2, process_id=int(process)
)
from train import full, lora

for command, arguments in json.loads(cases):
    {"full": full, "lora": lora}[command].main(arguments)
"""


def start_two(folder, cases):
    """Both processes, each running the commands one after the other."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
    }
    address, started = f"127.0.0.1:{free_port()}", []
    for process in range(2):
        command = [sys.executable, "-c", DRIVER, address, str(process), json.dumps(cases)]
        with open(folder / f"{process}.err", "w") as err:
            started.append(
                subprocess.Popen(
                    command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=err
                )
            )
    return started


def join_two(folder, started, status=0):
    """What both wrote to standard error; fails unless both end with this status."""
    end = time.monotonic() + 2 * SECONDS
    # A process that fails leaves the other one waiting.
    while any(process.poll() is None for process in started) and time.monotonic() < end:
        if any(process.poll() not in (None, status) for process in started):
            break
        time.sleep(0.05)
    for process in started:
        if process.poll() is None:
            process.kill()
        process.wait()
    errors = [(folder / f"{process}.err").read_text() for process in range(2)]
    assert [process.returncode for process in started] == [status] * 2, "\n---\n".join(errors)
    return errors


def test_two_processes_have_the_losses_of_one(given, tmp_path):
    """SIGTERM for one of them stops both at the same step; they go on from there."""
    flags = ["--batch", "8", "--dropout", "0", "--accumulate", "1", "--steps", "40"]
    flags += ["--validation", "0.2", "--eval-every", "20"]
    adapters = [*given, *flags, "--mesh", "fsdp=8", "--output", str(tmp_path / "lora")]
    whole = [*given, *flags, "--steps", "3", "--mesh", "data=2,fsdp=4"]
    whole += ["--output", str(tmp_path / "full"), "--save-every", "2"]
    started = start_two(tmp_path, [("full", whole), ("lora", adapters)])
    wait_for_step(started[0], tmp_path / "lora", 3)
    started[1].send_signal(signal.SIGTERM)
    first, second = join_two(tmp_path, started, TERMINATED)
    # XLA notes that the signal came, and what it thinks of so small a model
    assert [line for line in second.splitlines() if not re.match(r"W\d{4} ", line)] == []
    step = int(first.splitlines()[-1].split()[3])
    assert f"SIGTERM: saved step {step} of 40; go on with --resume" in first
    assert (tmp_path / "lora/checkpoints" / str(step)).is_dir()
    join_two(tmp_path, start_two(tmp_path, [("lora", [*adapters, "--resume"])]))

    lora.main([*given, *flags, "--output", str(tmp_path / "lora alone")])
    full.main([*given, *flags, "--steps", "3", "--output", str(tmp_path / "full alone")])
    for name in ("lora", "full"):
        together, alone = (metrics(tmp_path / folder) for folder in (name, f"{name} alone"))
        for ours, theirs, key in zip(together, alone, ("loss", "validation_loss"), strict=True):
            assert [line["step"] for line in ours] == [line["step"] for line in theirs]
            np.testing.assert_allclose(
                [line[key] for line in ours], [line[key] for line in theirs], rtol=LOSS_RTOL
            )
    models = [load_params(tmp_path / name / "model") for name in ("full", "full alone")]
    for ours, theirs in zip(*map(jax.tree.leaves, models), strict=True):
        assert np.mean(np.abs(np.asarray(ours) - np.asarray(theirs)) > 1e-5) < 0.01

"""Commands on machines with and without accelerators."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from llama_jax import command

ROOT = Path(__file__).parents[1]


@pytest.fixture
def bare(monkeypatch):
    """No variable that speaks of accelerators; JAX as it was, afterwards."""
    for name in ("JAX_PLATFORMS", "TPU_NAME", "TPU_WORKER_ID", "TPU_ACCELERATOR_TYPE"):
        monkeypatch.setenv(name, "")  # restores it afterwards, and what the test sets
        monkeypatch.delenv(name)
    kept = jax.config.values["jax_platforms"]
    yield
    jax.config.update("jax_platforms", kept)


def pci(root, vendor, kind):
    device = root / "sys/bus/pci/devices/0000:00:04.0"
    device.mkdir(parents=True)
    (device / "vendor").write_text(vendor + "\n")
    (device / "class").write_text(kind + "\n")


@pytest.mark.parametrize(
    "node", ["nvidia0", "nvidiactl", "accel0", "vfio/0", "accel/accel0", "dxg", "kfd"]
)
def test_a_driver_is_an_accelerator(bare, tmp_path, node):
    assert not command.has_accelerator(tmp_path)
    path = tmp_path / "dev" / node
    path.parent.mkdir(parents=True)
    path.touch()
    assert command.has_accelerator(tmp_path)


@pytest.mark.parametrize(
    ("vendor", "kind", "expected"),
    [
        ("0x10de", "0x030200", True),  # an NVIDIA GPU, its driver perhaps missing
        ("0x1ae0", "0xff0000", True),  # a TPU
        ("0x1ae0", "0x020000", False),  # the network card of a Google machine
        ("0x1ae0", "0x010802", False),  # its disk
        ("0x1af4", "0x020000", False),
        ("0x1234", "0x030000", False),  # the screen of a virtual machine
    ],
)
def test_a_card_is_known_by_its_maker_and_class(bare, tmp_path, vendor, kind, expected):
    pci(tmp_path, vendor, kind)
    assert command.has_accelerator(tmp_path) is expected


def test_the_environment_of_a_tpu_is_an_accelerator(bare, tmp_path, monkeypatch):
    monkeypatch.setenv("TPU_WORKER_ID", "0")
    assert command.has_accelerator(tmp_path)


@pytest.mark.parametrize(
    ("present", "asked", "expected"),
    [(False, None, "cpu"), (True, None, None), (False, "cuda", "cuda"), (False, "", "")],
)
def test_the_cpu_is_chosen_only_where_nothing_else_can_be(
    bare, monkeypatch, present, asked, expected
):
    monkeypatch.setattr(command, "has_accelerator", lambda: present)
    monkeypatch.setattr(sys, "platform", "linux")
    if asked is not None:
        monkeypatch.setenv("JAX_PLATFORMS", asked)
    jax.config.update("jax_platforms", None)
    command.use_present_hardware()
    assert os.environ.get("JAX_PLATFORMS") == expected
    assert jax.config.values["jax_platforms"] == ("cpu" if expected == "cpu" else None)


@pytest.mark.parametrize("early", ["import jax", "pass"], ids=["jax_imported", "jax_not_imported"])
def test_standard_error_is_clean_without_an_accelerator(early):
    if command.has_accelerator():
        pytest.skip("this machine has an accelerator")
    code = (
        f"{early}\nfrom llama_jax.command import run\n"
        "def main(arguments):\n  import jax\n  print(jax.default_backend())\n"
        "run(main, 'test')"
    )
    environment = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert (result.stdout, result.stderr, result.returncode) == ("cpu\n", "", 0)


@pytest.mark.parametrize("node", ["accel/accel0", "vfio/1"])
def test_only_a_tpu_joins_processes_by_itself(bare, monkeypatch, tmp_path, node):
    """An NPU, or a card given to a virtual machine, has such nodes too."""
    joined = []
    monkeypatch.delenv("JAX_COORDINATOR_ADDRESS", raising=False)
    monkeypatch.setattr(command, "Path", lambda _: tmp_path)
    monkeypatch.setattr(jax.distributed, "initialize", lambda **_: joined.append(True))
    path = tmp_path / "dev" / node
    path.parent.mkdir(parents=True)
    path.touch()
    command.join_processes()
    assert not joined
    pci(tmp_path, "0x1ae0", "0x120000")
    command.join_processes()
    assert joined


def test_a_coordinator_without_a_launcher_is_one_line():
    """In a process of its own: processes join before JAX computes anything."""
    code = (
        "from llama_jax import command\n"
        "command.run(lambda arguments: command.join_processes(), 'test')"
    )
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_COORDINATOR_ADDRESS": "127.0.0.1:1"}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "but not which process this is" in result.stderr


def test_a_host_that_waits_for_others_in_vain_is_one_line():
    """What waits is out of reach of exceptions, so this is a process of its own."""
    code = (
        "import time, jax\n"
        "from llama_jax import command\n"
        "command.JOIN_SECONDS = 0.2\n"
        "jax.distributed.initialize = lambda **_: time.sleep(60)\n"
        "command.run(lambda arguments: command.join_processes(), 'test')"
    )
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_COORDINATOR_ADDRESS": "127.0.0.1:1"}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "the other hosts of this run have not joined within 0.2 s" in result.stderr

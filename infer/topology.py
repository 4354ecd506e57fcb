"""The chips that the planner knows, and devices of theirs that need not exist.

Slices go by the names under which they are rented. Google counts chips of v5e and v6e, and
TensorCores, two a chip, of v4 and v5p: v5p-8 has 4 chips. GPUs are counted: h100-8.

`devices` gives what a mesh is made of: programs lowered for it are compiled by the real compiler,
which comes with libtpu (TPU) and with JAX's CUDA plug-in (GPU); neither needs its hardware.

Figures are those of the makers for dense products: cloud.google.com/tpu/docs and NVIDIA's data
sheets of H100 SXM and A100 SXM. Memory is what a program may use: of TPUs what their compiler
allows, of GPUs 95% of what the driver reports, if XLA_PYTHON_CLIENT_MEM_FRACTION=.95 says so; left
alone JAX takes 75%. The clock is the one that `estimated_cycles` count: the peak divided by the
operations of all matrix units in a cycle.
"""

import contextlib
import difflib
import importlib.util
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from llama_jax.errors import UserError

GIB = 2**30
GPU_FRACTION = 0.95


@dataclass(frozen=True)
class Chip:
    """What one chip has. Rates are for a second."""

    name: str
    memory: int  # bytes for a program
    bandwidth: float  # bytes to and from that memory
    bf16_flops: float
    int8_flops: float
    clock: float | None  # Hz of the estimated cycles; None where a compiler makes no estimates
    cores: int = 1  # how much a chip counts in the name of a slice

    @property
    def platform(self) -> str:
        return "tpu" if self.name.startswith("v") else "cuda"


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", int(30.75 * GIB), 1.2e12, 275e12, 275e12, 1.05e9, cores=2),
        Chip("v5e", int(15.75 * GIB), 819e9, 197e12, 393e12, 1.5e9),
        Chip("v5p", int(95.74 * GIB), 2.765e12, 459e12, 918e12, 1.75e9, cores=2),
        Chip("v6e", int(31.25 * GIB), 1.638e12, 918e12, 1836e12, 1.75e9),
        Chip("a100-40g", int(GPU_FRACTION * 42_298_834_944), 1.555e12, 312e12, 624e12, None),
        Chip("a100", int(GPU_FRACTION * 85_100_068_864), 2.039e12, 312e12, 624e12, None),
        Chip("h100", int(GPU_FRACTION * 84_942_979_072), 3.352e12, 989e12, 1979e12, None),
    )
}

_FLAT = {  # 2D: v5e, v6e
    1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16",
}  # fmt: skip
_CUBE = {  # 3D: v4, v5p
    4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8",
}  # fmt: skip
_GPUS = {n: f"1x1x{n}" for n in range(1, 9)}  # of one machine: slices, hosts, GPUs of a host
_LAYOUTS = {"v4": _CUBE, "v5e": _FLAT, "v5p": _CUBE, "v6e": _FLAT}


@dataclass(frozen=True)
class Slice:
    """Some chips that work together."""

    name: str
    chip: Chip
    count: int  # chips
    topology: str  # how they are joined, 4x4


SLICES = {
    part.name: part
    for chip in CHIPS.values()
    for n, topology in _LAYOUTS.get(chip.name, _GPUS).items()
    for part in [Slice(f"{chip.name}-{n * chip.cores}", chip, n, topology)]
}


def find_slice(name: str) -> Slice:
    """The slice of this name; Google's v5litepod-8 is v5e-8.

    Raises `UserError` for an unknown one, with the names that are nearest.
    """
    wanted = name.strip().lower().replace("v5litepod-", "v5e-")
    if wanted in SLICES:
        return SLICES[wanted]
    if wanted in CHIPS:
        names = [part.name for part in SLICES.values() if part.chip.name == wanted]
        raise UserError(f"--chips {name} does not say how many; choose from {', '.join(names)}")
    kind = wanted.rpartition("-")[0]
    near = [part.name for part in SLICES.values() if part.chip.name == kind]
    near = near or difflib.get_close_matches(wanted, SLICES, n=3, cutoff=0.4)
    hint = f"did you mean {', '.join(near)}?" if near else f"known are {', '.join(CHIPS)};"
    raise UserError(f"--chips {name} is unknown; {hint} without --chips all are listed")


def installed(chip: Chip) -> bool:
    """Whether the compiler for this chip is there."""
    module = "libtpu" if chip.platform == "tpu" else "jax_plugins.xla_cuda13"
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package around it
        return False


def devices(part: Slice) -> Sequence[Any]:
    """The devices of a slice, to make a mesh of. Nothing can run on them.

    Raises `UserError` where the compiler is not installed.
    """
    chip = part.chip
    if not installed(chip):
        library = "libtpu" if chip.platform == "tpu" else "the CUDA plug-in of JAX"
        raise UserError(
            f"compiling for {chip.name} needs {library}; run: pip install 'llama-jax[plan]'"
        )
    variables: dict[str, str] = {}
    if chip.platform == "tpu":
        # libtpu asks the metadata server of a TPU VM who it is, and serves one process at a time.
        variables = {
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "TPU_ACCELERATOR_TYPE": part.name.replace("v5e", "v5litepod"),
        }
        options: dict[str, Any] = {}
        if chip.name == "v4":
            options["chip_config_name"] = "megacore"  # both cores of a chip are one device
        if part.count == 1:
            options["chips_per_host_bounds"] = (1, 1, 1)
        name = f"{chip.name}:{part.topology}"
    else:
        options = {"target_config": _gpu(chip), "topology": part.topology}
        name = chip.name
    from jax.experimental import topologies

    with quiet(), _environment(variables):
        return topologies.get_topology_desc(name, chip.platform, **options).devices


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Sets variables that are not set, and takes them away again."""
    added = {key: value for key, value in variables.items() if key not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for key in added:
            del os.environ[key]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps what C++ libraries write to standard error from the user.

    Compilers log to the file descriptor that there is no hardware. What Python writes in the
    meantime comes through, and errors still come as exceptions.
    """
    sys.stderr.flush()
    with (
        tempfile.TemporaryFile() as log,
        os.fdopen(os.dup(2), "w", buffering=1, errors="backslashreplace") as kept,
        contextlib.redirect_stderr(kept),
    ):
        os.dup2(log.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept.fileno(), 2)


def _gpu(chip: Chip) -> str:
    """A GPU as its compiler wants it described: text of a GpuTargetConfigProto."""
    hopper = chip.name == "h100"
    info = {
        "device_memory_size": round(chip.memory / GPU_FRACTION),
        "memory_bandwidth": int(chip.bandwidth),
        "core_count": 132 if hopper else 108,
        "clock_rate_ghz": 1.98 if hopper else 1.41,
        "fpus_per_core": 128 if hopper else 64,
        "l2_cache_size": (50 if hopper else 40) * 2**20,
        "shared_memory_per_core": (228 if hopper else 164) * 2**10,
        "shared_memory_per_block": 48 * 2**10,
        "shared_memory_per_block_optin": (227 if hopper else 163) * 2**10,
        "registers_per_core_limit": 65536,
        "registers_per_block_limit": 65536,
        "threads_per_warp": 32,
        "threads_per_block_limit": 1024,
        "threads_per_core_limit": 2048,
        "thread_dim_limit_x": 1024,
        "thread_dim_limit_y": 1024,
        "thread_dim_limit_z": 64,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 65535,
        "block_dim_limit_z": 65535,
    }
    fields = "\n".join(f"  {key}: {value}" for key, value in info.items())
    capability = "major: 9 feature_extension: ACCELERATED_FEATURES" if hopper else "major: 8"
    return (
        'platform_name: "CUDA"\n'
        f"gpu_device_info {{\n{fields}\n  cuda_compute_capability {{ {capability} }}\n}}\n"
        "dnn_version_info { major: 9 minor: 10 }\n"
    )

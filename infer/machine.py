"""What these devices are, how fast their memory is, and how much of it was in use at most."""

import contextlib
import math
import os
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

COPY_BYTES = 256 << 20  # of each device, or of all if they are CPUs: more than any cache holds
COPY_PASSES = 8  # timed as one


def device_name(device: Any) -> str:
    """What the device is called; of a CPU also what Linux knows of it."""
    if device.platform != "cpu":
        return device.device_kind
    name = "CPU"
    with contextlib.suppress(OSError, StopIteration):
        name = _field("/proc/cpuinfo", "model name")
    return f"{name} with {os.cpu_count()} cores"


def _field(file: str, key: str) -> str:
    """What the first line of `key: value` says."""
    lines = Path(file).read_text().splitlines()
    return next(line for line in lines if line.startswith(key)).partition(":")[2].strip()


def copy_bytes(devices: Sequence[Any]) -> int:
    """Size of the array on each device that `copy_gb_s` goes over."""
    return COPY_BYTES // (len(devices) if devices[0].platform == "cpu" else 1)


def copy_gb_s(devices: Sequence[Any]) -> float:
    """What the devices together read and write when they add 1 to a large array, in place."""
    shape = len(devices), copy_bytes(devices) // 4
    mesh = Mesh(np.array(devices), ("all",))
    place = NamedSharding(mesh, PartitionSpec("all"))
    x = jax.jit(lambda: jnp.zeros(shape), out_shardings=place)()
    add = jax.jit(lambda x: x + 1, donate_argnums=0, out_shardings=place)
    x = jax.block_until_ready(add(x))
    best = math.inf
    for _ in range(3):
        began = time.perf_counter()
        for _ in range(COPY_PASSES):
            x = add(x)
        jax.block_until_ready(x)
        best = min(best, time.perf_counter() - began)
    return 2 * COPY_PASSES * x.nbytes / best / 1e9


def peak_source(devices: Sequence[Any]) -> str:
    """Who tells the largest amount of memory that was in use: "device" or "process"."""
    stats = [device.memory_stats() or {} for device in devices]
    return "device" if all("peak_bytes_in_use" in one for one in stats) else "process"


def peak_bytes(devices: Sequence[Any]) -> int:
    """That amount, of the fullest device."""
    if peak_source(devices) == "device":
        return max(device.memory_stats()["peak_bytes_in_use"] for device in devices)
    with contextlib.suppress(OSError, StopIteration):
        return int(_field("/proc/self/status", "VmHWM").split()[0]) << 10
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used << 10


def forget_peak() -> bool:
    """Whether the process could be made to forget its peak, as Linux can; devices cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True

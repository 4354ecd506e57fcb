"""What all commands share: one-line errors and exit status 2 for a user's mistake."""

import argparse
import contextlib
import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from llama_jax.errors import UserError

NVIDIA, GOOGLE = "0x10de", "0x1ae0"  # as vendors of PCI cards
USERS_ERRNO = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.ENAMETOOLONG)


class ArgumentParser(argparse.ArgumentParser):
    """An `argparse` parser of whole flags, whose errors are one line on standard error."""

    def __init__(self, **options: Any):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def keep_compilations() -> None:
    """Lets JAX keep compiled programs on disk, so that a second run does not compile.

    They lie in `~/.cache/llama_jax`, or where JAX_COMPILATION_CACHE_DIR points. Where nothing can
    be written, nothing is kept.
    """
    import jax

    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    directory = jax.config.values["jax_compilation_cache_dir"] or os.path.join(base, "llama_jax")
    if "://" not in directory:
        with contextlib.suppress(OSError):
            os.makedirs(directory, exist_ok=True)
        if not os.access(directory, os.W_OK):
            jax.config.update("jax_enable_compilation_cache", False)
            return
    jax.config.update("jax_compilation_cache_dir", directory)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def join_processes() -> None:
    """Makes one of all processes of a run on several hosts, by `jax.distributed`.

    Where the environment tells of one: a TPU, whose hosts know each other, or
    JAX_COORDINATOR_ADDRESS beside a launcher that JAX knows, such as Slurm or Open MPI.
    """
    import jax

    several = "JAX_COORDINATOR_ADDRESS" in os.environ or has_accelerator(vendors=(GOOGLE,))
    if several and not jax.distributed.is_initialized():
        jax.distributed.initialize()


def is_first_process() -> bool:
    """Whether this process is the one that speaks."""
    import jax

    return jax.process_index() == 0


def agreed(number: int) -> int:
    """The number that the first process gives, in all processes."""
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return number
    return int(multihost_utils.broadcast_one_to_all(np.uint32(number)))


def use_present_hardware() -> None:
    """Keeps JAX to the CPU on a Linux machine that has no accelerator.

    Where libtpu or the CUDA plug-in is installed all the same, as the planner needs them, JAX
    would try them and print pages of errors. With JAX_PLATFORMS, or any trace of an accelerator,
    all is left to JAX, and its errors are shown.
    """
    if sys.platform != "linux" or "JAX_PLATFORMS" in os.environ or has_accelerator():
        return
    os.environ["JAX_PLATFORMS"] = "cpu"
    if "jax" in sys.modules:  # it has read the environment already
        sys.modules["jax"].config.update("jax_platforms", "cpu")


def has_accelerator(root: Path = Path("/"), vendors: tuple[str, ...] = (NVIDIA, GOOGLE)) -> bool:
    """Whether a GPU or TPU of these vendors, its driver, or its environment is seen. Linux only."""
    variables = ("TPU_NAME", "TPU_WORKER_ID", "TPU_ACCELERATOR_TYPE")
    if GOOGLE in vendors and any(name in os.environ for name in variables):
        return True
    nodes = ("nvidia*", "dxg", "kfd") if NVIDIA in vendors else ()
    nodes += ("accel*", "vfio/[0-9]*") if GOOGLE in vendors else ()
    if any(any((root / "dev").glob(node)) for node in nodes):
        return True
    cards = map(_accelerator_vendor, (root / "sys/bus/pci/devices").glob("*"))
    return any(vendor in vendors for vendor in cards)


def _accelerator_vendor(pci: Path) -> str | None:
    """Of this PCI card, unless it is a disk (class 1) or network card (class 2), as clouds have."""
    try:
        vendor, kind = ((pci / name).read_text().strip() for name in ("vendor", "class"))
    except OSError:
        return None
    return None if kind[:4] in ("0x01", "0x02") else vendor


def run(main: Callable[[list[str]], None], prog: str) -> NoReturn:
    """Calls `main(arguments)` and exits: 0 when it returns, 2 on a user's mistake.

    A full disk and a missing permission are the user's to mend as well; any other
    exception is a defect and keeps its traceback.
    """
    if sys.stdout is None:  # closed by the caller
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  for as long as the process lives
    use_present_hardware()
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
    except UserError as error:
        _exit_2(prog, str(error))
    except BrokenPipeError:  # the reader of our output went away, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if error.errno not in USERS_ERRNO:
            raise
        _exit_2(prog, f"{error.filename or 'writing'}: {os.strerror(error.errno)}")
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)


def _exit_2(prog: str, message: str) -> NoReturn:
    print(f"{prog}: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)

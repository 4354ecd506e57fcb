"""What all commands share: flags, one-line errors and exit status 2 for a user's mistake."""

import argparse
import contextlib
import errno
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from llama_jax.errors import UserError

JOIN_SECONDS = 120  # hosts are started at about the same time
NVIDIA, GOOGLE = "0x10de", "0x1ae0"  # as vendors of PCI cards
FLAGS: dict[str, dict[str, Any]] = {  # that mean the same in several commands
    "--quantize-embeddings": {"action": "store_true", "help": "the embedding and the head as well"},
    "--group-size": {"type": int, "metavar": "N", "help": "weights to a scale, int4 and nf4 (64)"},
    "--double-quantization": {"action": "store_true", "help": "of nf4: its scales as int8"},
    "--kv-cache": {"choices": ("int8",), "help": "keep keys and values as int8 (as --dtype)"},
    "--dtype": {
        "choices": ("float32", "bfloat16", "float16"),
        "help": "(as stored; float32 on CPU)",
    },
    "--lora": {"metavar": "DIR", "help": "adapter directory to use with the model (none)"},
    "--mesh": {"metavar": "SIZES", "help": "devices to split over, data=2,tensor=4 (one)"},
}
QUANTIZATION_FLAGS = ("--quantize-embeddings", "--group-size", "--double-quantization")
USERS_ERRNO = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENAMETOOLONG,
    errno.ENOTDIR,
)


class ArgumentParser(argparse.ArgumentParser):
    """An `argparse` parser of whole flags, whose errors are one line on standard error."""

    def __init__(self, **options: Any):
        super().__init__(allow_abbrev=False, **options)

    def add_shared(self, *flags: str) -> None:
        """Adds some of `FLAGS`."""
        for flag in flags:
            self.add_argument(flag, **FLAGS[flag])

    def refuse_below(self, args: argparse.Namespace, **least: int) -> None:
        """Exits where one of these numbers is given and is less."""
        for name, number in least.items():
            given = getattr(args, name)
            if given is not None and given < number:
                flag = "--" + name.replace("_", "-")
                self.error(f"{flag} is {given}, expected at least {number}")

    def split_list(
        self, args: argparse.Namespace, name: str, valid: Callable[[str], bool], expected: str
    ) -> None:
        """Makes a list of the words between commas; exits where one is not valid, or there twice."""
        given = getattr(args, name).split(",")
        for word in given:
            if not valid(word) or given.count(word) > 1:
                what = "twice " * (given.count(word) > 1)
                self.error(f"--{name} has {what}{word!r}, expected {expected}")
        setattr(args, name, given)

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

    asked = "JAX_COORDINATOR_ADDRESS" in os.environ
    if not (asked or GOOGLE in _cards(Path("/"))) or jax.distributed.is_initialized():
        return
    try:
        with _deadline(
            JOIN_SECONDS,
            f"the other hosts of this run have not joined within {JOIN_SECONDS} s; start the same "
            "command on every one of them (gcloud ... tpu-vm ssh NAME --worker=all), all at once",
        ):
            jax.distributed.initialize(initialization_timeout=2 * JOIN_SECONDS)
    except ValueError as error:  # what it needs to know and does not find
        if not asked:
            raise
        raise UserError(
            f"JAX_COORDINATOR_ADDRESS is set, but not which process this is ({error}); start it by a "
            "launcher such as Slurm or Open MPI, or unset it"
        ) from None


@contextlib.contextmanager
def _deadline(seconds: float, message: str) -> Iterator[None]:
    """Ends the process with one line and status 2 if what is within takes longer.

    `jax.distributed` waits where no exception reaches it, and then aborts with a trace of its C++.
    """

    def end() -> None:
        print(f"error: {message}", file=sys.stderr, flush=True)
        os._exit(2)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def default_dtype(given: str | None) -> str | None:
    """`--dtype`: where it is not given float32 on a CPU, elsewhere None, which is as stored.

    XLA on CPU multiplies 16-bit weights many times slower.
    """
    import jax

    return "float32" if given is None and jax.default_backend() == "cpu" else given


def report(line: str) -> None:
    """A line on standard error, by the first process alone."""
    if is_first_process():
        print(line, file=sys.stderr, flush=True)


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


def has_accelerator(root: Path = Path("/")) -> bool:
    """Whether a GPU or TPU, its driver, or the environment of a TPU is seen. Linux only."""
    variables = ("TPU_NAME", "TPU_WORKER_ID", "TPU_ACCELERATOR_TYPE")
    values = [os.environ.get(name, "") for name in variables]
    # jax puts "WARNING: …" there where libtpu is and no TPU, and child processes inherit it
    if any(value and not value.startswith("WARNING") for value in values):
        return True
    nodes = ("accel*", "vfio/[0-9]*", "nvidia*", "dxg", "kfd")
    if any(any((root / "dev").glob(node)) for node in nodes):
        return True
    return bool({NVIDIA, GOOGLE} & _cards(root))


def _cards(root: Path) -> set[str | None]:
    """The vendors of the PCI cards that may be accelerators."""
    return set(map(_accelerator_vendor, (root / "sys/bus/pci/devices").glob("*")))


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

"""What all commands share: one-line errors and exit status 2 for a user's mistake."""

import argparse
import contextlib
import errno
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from llama_jax.errors import UserError

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


def run(main: Callable[[list[str]], None], prog: str) -> NoReturn:
    """Calls `main(arguments)` and exits: 0 when it returns, 2 on a user's mistake.

    A full disk and a missing permission are the user's to mend as well; any other
    exception is a defect and keeps its traceback.
    """
    if sys.stdout is None:  # closed by the caller
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  for as long as the process lives
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

"""What all commands share: one-line errors and exit status 2 for a user's mistake."""

import argparse
import errno
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from llama_jax.errors import UserError


class ArgumentParser(argparse.ArgumentParser):
    """An `argparse` parser whose errors are one line on standard error."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def keep_compilations() -> None:
    """Lets JAX keep compiled programs on disk, so that a second run does not compile.

    They lie in `~/.cache/llama_jax`, or where JAX_COMPILATION_CACHE_DIR points.
    """
    import jax

    if jax.config.values["jax_compilation_cache_dir"] is None:
        base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        jax.config.update("jax_compilation_cache_dir", os.path.join(base, "llama_jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def run(main: Callable[[list[str]], None], prog: str) -> NoReturn:
    """Calls `main(arguments)` and exits: 0 when it returns, 2 on a user's mistake.

    A full disk and a missing permission are the user's to mend as well; any other
    exception is a defect and keeps its traceback.
    """
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
    except UserError as error:
        _exit_2(prog, str(error))
    except BrokenPipeError:  # the reader of our output went away, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        _exit_2(prog, f"{error.filename or 'writing'}: {os.strerror(error.errno)}")
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)


def _exit_2(prog: str, message: str) -> NoReturn:
    print(f"{prog}: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)

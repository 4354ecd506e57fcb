"""How far a conversion is, on standard error: a bar on a terminal, plain lines elsewhere."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from llama_jax.config import LlamaConfig

LINE_EVERY = 10.0  # seconds between plain lines; a shorter conversion prints none


@contextlib.contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[str, int], None]]:
    """Yields `advance(name, bytes)`, to be called after each tensor; `total` is in bytes."""
    if sys.stderr.isatty():
        with _bar(what, total) as advance:
            yield advance
    else:
        yield _lines(what, total)


@contextlib.contextmanager
def _bar(what: str, total: int) -> Iterator[Callable[[str, int], None]]:
    from rich import progress as rich_progress
    from rich.console import Console

    columns = (
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(),
        rich_progress.DownloadColumn(),
        rich_progress.TransferSpeedColumn(),
        rich_progress.TimeRemainingColumn(),
    )
    with rich_progress.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda name, size: bar.advance(task, size)


def _lines(what: str, total: int) -> Callable[[str, int], None]:
    done, start = 0, time.monotonic()
    printed = start

    def advance(name: str, size: int) -> None:
        nonlocal done, printed
        done += size
        now = time.monotonic()
        if now - printed < LINE_EVERY:
            return
        printed = now
        rate = done / (now - start)
        left = (total - done) / rate
        say(
            f"{what}: {done / 1e9:.2f} of {total / 1e9:.2f} GB, {rate / 1e6:.0f} MB/s, {left:.0f} s left"
        )

    return advance


def summary(config: LlamaConfig, dtype: str, size: int, seconds: float) -> str:
    """One line about a converted model: what it is, how large, how fast it went."""
    return (
        f"Llama {config.version}, {config.count_parameters():,} parameters, {dtype}, "
        f"{size / 1e9:.3f} GB in {seconds:.1f} s ({size / 1e6 / seconds:.0f} MB/s)"
    )


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)

"""What is seen of a run: `metrics.jsonl`, a bar or lines on standard error, TensorBoard.

All of it by the first process alone. Tokens are those that are read, padding left out; the time
of a step is from the end of the one before, validation and checkpoints left out.
"""

import contextlib
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath

from infer.topology import CHIPS, Chip
from llama_jax.command import is_first_process, report
from llama_jax.errors import UserError

METRICS = "metrics.jsonl"
LINE_EVERY = 10.0  # seconds between plain lines
SMOOTHING = 0.9  # of the speed that is shown
# What JAX calls the chips of `infer.topology`: the longest name that a device's begins with counts.
DEVICE_KINDS = {
    "TPU v4": "v4",
    "TPU v5": "v5p",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "NVIDIA A100-SXM4-40GB": "a100-40g",
    "NVIDIA A100": "a100",
    "NVIDIA H100": "h100",
}


def chip_of(device_kind: str) -> Chip | None:
    """The chip that a device is; None where it is not known."""
    names = [name for name in DEVICE_KINDS if device_kind.startswith(name)]
    return CHIPS[DEVICE_KINDS[max(names, key=len)]] if names else None


class Sight:
    """Says of each step and validation what came out, in all places where it is said."""

    def __init__(
        self,
        directory: epath.Path,
        steps: int,
        flops: float,
        devices: Sequence[Any],
        tensorboard: bool,
    ):
        chip = chip_of(devices[0].device_kind)
        self._peak = None if chip is None else chip.bf16_flops * len(devices)
        self._directory = directory
        self._steps = steps
        self._flops = flops
        self._tensorboard = tensorboard
        self._speaks = is_first_process()
        self._on_exit = contextlib.ExitStack()
        self._speed = self._step_s = 0.0  # tokens/s and seconds of a step, smoothed
        self._steady = False
        self._printed = self._since = time.perf_counter()

    def __enter__(self) -> "Sight":
        return self

    def __exit__(self, *exception: Any) -> None:
        self._on_exit.close()

    def begin(self, done: int) -> None:
        """Opens everything; of an earlier life of the run what came after step `done` goes."""
        self._done = done
        if not self._speaks:
            return
        self._lines = self._on_exit.enter_context(_Lines(self._directory / METRICS, done))
        self._board: Any = None
        if self._tensorboard:
            from tensorboardX import SummaryWriter

            folder = str(self._directory / "tensorboard")
            self._board = SummaryWriter(folder, purge_step=done + 1, flush_secs=10)
            self._on_exit.callback(self._board.close)
        self._bar: Any = None
        if sys.stderr.isatty():
            self._bar = self._on_exit.enter_context(_bar(self._steps, done))
        self._printed = self._since = time.perf_counter()

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """The time of what is done within is no step's."""
        began = time.perf_counter()
        yield
        self._since += time.perf_counter() - began

    def step(self, step: int, values: dict[str, float]) -> None:
        """`values` of `train.loop.Programs.step`."""
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        values = dict(values)
        speed = values["tokens"] / max(seconds, 1e-9)
        share = 1 - SMOOTHING if self._steady else 1.0  # the first step takes longer than others
        self._speed += share * (speed - self._speed)
        self._step_s += share * (seconds - self._step_s)
        self._steady = step > self._done + 1
        if not self._speaks:
            return
        line = {
            "step": step,
            "loss": values.pop("loss"),
            "weight": int(values.pop("weight")),
            "tokens_per_s": round(speed, 1),
            "learning_rate": values.pop("learning_rate"),
            **values,
        }
        self._lines.add(line)
        self._to_board(step, line)
        text = self._text(line["loss"])
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step, what=text)
        elif now - self._printed >= LINE_EVERY or step in (self._done + 1, self._steps):
            self._printed = now
            left = (self._steps - step) * self._step_s
            report(f"step {step} of {self._steps}, {text}, {_duration(left)} left")

    def validation(self, step: int, values: dict[str, float], perplexity: bool) -> None:
        """`values` of `train.loop.evaluate`; `perplexity` says whether the loss is of tokens."""
        if not self._speaks:
            return
        line = {"step": step, "validation_loss": values["loss"]}
        text = f"step {step}: validation loss {values['loss']:.4f}"
        if perplexity:
            line["perplexity"] = math.exp(min(values["loss"], 700.0))
            text += f", perplexity {line['perplexity']:.4g}"
        line |= {f"validation_{name}": value for name, value in values.items() if name != "loss"}
        self._lines.add(line)
        self._to_board(step, line)
        if self._bar is not None:
            self._bar.console.print(text, highlight=False)
        else:
            report(text)

    def _text(self, loss: float) -> str:
        text = f"loss {loss:.4f}, {self._speed:,.0f} tokens/s"
        if self._peak is not None:
            text += f", {100 * self._speed * self._flops / self._peak:.1f}% of peak"
        return text

    def _to_board(self, step: int, line: dict[str, Any]) -> None:
        if self._board is not None:
            for name, value in line.items():
                if name != "step":
                    self._board.add_scalar(name, value, step)


class _Lines:
    """A file of JSON lines, on disk after each; on an object store at the end of every minute."""

    def __init__(self, file: epath.Path, done: int):
        self._remote = "://" in str(file)
        self._text = ""
        if file.exists():
            whole = file.read_text().split("\n")[:-1]  # a line that was being written is none
            kept = [line for line in whole if json.loads(line)["step"] <= done]
            self._text = "".join(f"{line}\n" for line in kept)
        self._file = file
        self._written = time.monotonic()
        if not self._remote:
            beside = file.parent / f".{file.name}"
            beside.write_text(self._text)
            beside.replace(file)
            self._stream = open(file, "a")  # noqa: SIM115  closed in __exit__

    def __enter__(self) -> "_Lines":
        return self

    def __exit__(self, *_: Any) -> None:
        if self._remote:
            self._file.write_text(self._text)
        else:
            self._stream.close()

    def add(self, fields: dict[str, Any]) -> None:
        """Adds a line; JSON has null for what is no finite number."""
        fields = {name: x if math.isfinite(x) else None for name, x in fields.items()}
        line = json.dumps(fields) + "\n"
        if not self._remote:
            self._stream.write(line)
            self._stream.flush()
            return
        self._text += line
        if time.monotonic() - self._written > 60:
            self._file.write_text(self._text)
            self._written = time.monotonic()


@contextlib.contextmanager
def _bar(steps: int, done: int) -> Iterator[Any]:
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("step {task.completed} of {task.total}"),
        progress.BarColumn(),
        progress.TextColumn("{task.fields[what]}"),
        progress.TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with progress.Progress(*columns, console=console) as bar:
        bar.add_task("train", total=steps, completed=done, what="")
        yield bar


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def refuse_missing_board() -> None:
    """Raises `UserError` where TensorBoard's files cannot be written."""
    import importlib.util

    if importlib.util.find_spec("tensorboardX") is None:
        raise UserError(
            "--tensorboard needs tensorboardX; install it with python -m pip install "
            "'llama-jax[train]'"
        )

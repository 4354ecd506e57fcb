"""The one training loop: of adapters, of whole models, and whatever else a `Loss` describes.

What a run leaves in its output directory:

  adapter/ or model/   the result, written at the end
  checkpoints/         the last states, from which `resume` goes on, by Orbax
  best/                with validation, the parameters that were best so far; gone at the end
  metrics.jsonl        a line for every step and every validation
  settings.json        what `resume` compares

With validation the result has the parameters with the lowest validation loss, otherwise the last
ones. SIGTERM saves a checkpoint and ends the run with status 143, in all processes at the same
step; in a single process Ctrl-C does (130), and a second one ends it at once. A run that goes on, on one CPU or on devices whose sums have one order, computes the same
numbers as one that was never interrupted.
"""

import contextlib
import errno
import json
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from llama_jax import lora, sharding
from llama_jax.checkpoint import absolute, format_bytes, quiet, refuse_small_memory
from llama_jax.command import is_first_process, report
from llama_jax.errors import UserError
from llama_jax.model import Params
from llama_jax.quant import Quantized
from train.checkpoints import Checkpoints
from train.data import Rows, batches, in_order
from train.losses import Batch, Loss
from train.optimizer import OptimizerConfig, learning_rate, make_optimizer
from train.placement import (
    Part,
    abstract_batch,
    batch_sharding,
    everywhere,
    global_shape,
    lower_step,
    own_part,
    state_shardings,
)
from train.progress import METRICS, Sight
from train.step import LossScale, State, cast, init_state, make_step

SETTINGS = "settings.json"
ENDS = (signal.SIGTERM, signal.SIGINT)  # after which a run saves and ends


@dataclass(frozen=True)
class Task:
    """What is trained, on what, and how.

    `trained` and `frozen` are the two parts that `llama_jax.lora.split` makes by `learns`, on their
    devices. The arrays of `trained` are gone after the first step.
    """

    loss: Loss
    learns: Callable[[tuple], bool]  # whether the leaf of a path does
    trained: Params
    frozen: Params
    optimizer: OptimizerConfig
    rows: Rows
    validation: Rows | None
    batch: int  # examples of a micro-batch, over all devices
    accumulate: int  # micro-batches of a step
    steps: int
    epochs: int | None  # how often the rows are seen; None for as long as `steps` lasts
    dtype: Any  # to compute in
    seed: int
    dropout: bool  # whether the loss takes a key
    mesh: Mesh | None
    flops: float  # that the model needs for one token of a step, without what is computed twice
    perplexity: bool = True  # whether the loss is the logarithm of one


@dataclass(frozen=True)
class Run:
    """Where a run leaves what, and how often.

    `settings` is what must be the same when it goes on, in words of the command line.
    """

    output: str
    result: str  # name of the directory of the result
    settings: dict[str, Any]
    resume: bool = False
    save_every: int = 100  # steps
    keep: int = 2  # checkpoints
    eval_every: int = 100
    tensorboard: bool = False
    plot: str | None = None

    @property
    def directory(self) -> epath.Path:
        return absolute(self.output)

    def is_finished(self) -> bool:
        """Whether nothing is left to do, which it says.

        Raises `UserError` where `output` is not free, or not of the run that is to go on.
        """
        if not self.resume or is_free(self.output):
            refuse_taken(self.output)
            if self.resume:
                report(f"--resume: nothing is in {self.output} yet, the run begins")
            return False
        try:
            before = json.loads((self.directory / SETTINGS).read_text())
        except (OSError, ValueError):
            raise UserError(
                f"--resume: {self.output} has no readable {SETTINGS}, so it is not the output of a "
                "run that began; name another directory"
            ) from None
        now = json.loads(json.dumps(self.settings))
        differ = [
            f"{name} was {before.get(name)}, is {now.get(name)}"
            for name in sorted(before.keys() | now.keys())
            if before.get(name) != now.get(name)
        ]
        if differ:
            raise UserError(
                f"--resume: {self.output} was begun with other settings: {'; '.join(differ)}; give "
                "the same, or another --output"
            )
        result = self.directory / self.result
        if result.exists():
            report(f"{result} is there: this run is finished")
            self.draw()
        return result.exists()

    def draw(self) -> None:
        """Writes the picture that was asked for."""
        if self.plot and is_first_process():
            from train.plot import draw

            draw(self.directory / METRICS, self.plot)


def is_free(output: str) -> bool:
    """Whether there is nothing in the way of a new run; raises `UserError` for a file."""
    there = absolute(output)
    if there.exists() and not there.is_dir():
        raise UserError(f"--output {output} is a file, expected a new directory")
    return not there.exists() or all(path.name.startswith(".") for path in there.iterdir())


def refuse_taken(output: str) -> None:
    """Raises `UserError` where a new run cannot have `output`."""
    parent = absolute(output)
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    if not (parent.is_dir() or "://" in output):
        raise UserError(f"--output {output} cannot be made: {parent} is no directory; name another")
    if not is_free(output):
        raise UserError(
            f"--output {output} exists already; add --resume to go on with that run, or name a new "
            "directory"
        )


def fit(
    task: Task,
    run: Run,
    save: Callable[[epath.Path, Params], None],
    texts: Callable[[dict[str, np.ndarray]], list[str]],
) -> None:
    """Trains, and leaves in `run.output` what the module says.

    Args:
      save: writes the result directory from the parameters that learn, called in all processes.
      texts: what the examples of a batch say, to be written down where a loss is no number.

    Raises `UserError` where the disk fills up, memory is too small, or a loss is no number. That
    `run` can begin was asked before (`Run.is_finished`).
    """
    part = own_part(task.batch, task.mesh)
    program = compile_programs(task)
    report(describe(task, program))
    directory = run.directory
    _begin(run)
    with (
        quiet(),
        _full_disk(directory),
        _too_large(),
        Checkpoints(directory, run.keep) as checkpoints,
        Sight(directory, task.steps, task.flops, program.devices, run.tensorboard) as sight,
        terminated() as stop,
    ):
        state, position, best = checkpoints.restore(program.state())
        windows = batches(
            task.rows,
            task.batch,
            seed=task.seed,
            epochs=task.epochs,
            micro=task.accumulate,
            part=part.index,
            parts=part.count,
        )
        if position is not None:
            windows.set_state(position)
        done = int(state.step)
        ahead = program.devices[0].platform != "cpu"  # which computes before it returns
        sight.begin(done)
        pending: tuple[int, Any, Any] | None = None

        def settle() -> None:
            """Waits for the last step, and looks at what it gave."""
            nonlocal pending
            if pending is None:
                return
            step, metrics, before = pending
            pending = None
            values = {name: value.item() for name, value in jax.device_get(metrics).items()}
            if not _sound(values):
                _give_up(task, run, step, values, before, texts)
            sight.step(step, values)

        while done < task.steps:
            before = windows.get_state()
            window = program.place(next(windows))
            state, metrics = program.step(state, task.frozen, window)
            settle()  # of the step before, while this one is computed
            done += 1
            pending = done, metrics, before
            if not ahead:
                settle()
            last = done == task.steps
            stopped = None if last else stop(done)
            if last or stopped or done % run.save_every == 0 or _due(task, run, done):
                settle()
            if task.validation is not None and (last or _due(task, run, done)):
                with sight.pause():
                    values = evaluate(task, program, state.trained, part)
                    loss = values["loss"]
                    if math.isfinite(loss) and (best is None or loss < best[0]):
                        best = loss, done
                        checkpoints.save_best(done, state.trained)
                    sight.validation(done, values, task.perplexity)
            if not last and (stopped or done % run.save_every == 0):
                with sight.pause():
                    checkpoints.save(done, state, windows.get_state(), best)
            if stopped:
                checkpoints.wait()
                report(f"{stopped.name}: saved step {done} of {task.steps}; go on with --resume")
                sys.exit(128 + stopped)
        trained, chosen = state.trained, ""
        if best is not None and best[1] != done:
            trained = checkpoints.restore_best(best[1], trained)
            chosen = f", of step {best[1]} with the lowest validation loss"
        if not jax.jit(_all_finite)(trained):
            raise UserError(
                f"after step {done} parameters are no finite numbers; take a smaller --learning-rate"
            )
        try:
            save(directory / run.result, trained)
        finally:
            _wait_for_all("saved")  # an end of the others would be the end of the one that writes
        checkpoints.forget_best()
    run.draw()
    report(f"wrote {directory / run.result}{chosen}")


def _all_finite(tree: Params) -> jax.Array:
    return jax.numpy.all(
        jax.numpy.stack([jax.numpy.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)])
    )


def _due(task: Task, run: Run, done: int) -> bool:
    """Whether there is a validation after so many steps."""
    return task.validation is not None and done % run.eval_every == 0


def _begin(run: Run) -> None:
    """Makes the output directory of all processes."""
    directory = run.directory
    _wait_for_all("free")  # all have seen that it is
    if is_first_process():
        with _full_disk(directory):
            try:
                directory.mkdir(parents=True, exist_ok=True)
            except FileNotFoundError:  # of /proc and the like
                raise UserError(f"--output {run.output} cannot be made; name another") from None
            file = directory / f".{SETTINGS}"
            file.write_text(json.dumps(run.settings, indent=2) + "\n")
            file.replace(directory / SETTINGS)
    _wait_for_all("begun")
    if not (directory / SETTINGS).exists():
        raise UserError(
            f"--output {run.output} is not the same directory on all hosts; name one that they "
            "share, such as gs://BUCKET/NAME"
        )


def _wait_for_all(what: str) -> None:
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(what)


# Programs


@dataclass(frozen=True)
class Programs:
    """What is compiled for a task."""

    step: Any  # `train.step.make_step`'s, with "tokens" and "learning_rate" among the metrics
    evaluate: Any  # (trained, frozen, batch) -> `train.losses.Sums`
    state: Callable[[], State]  # before the first step
    mesh: Mesh | None
    devices: list[Any]
    needed: int  # bytes on a device

    def place(self, batch: dict[str, np.ndarray]) -> Batch:
        """This process's part of a batch or window, as arrays over all devices."""
        return {
            name: jax.make_array_from_process_local_data(
                batch_sharding(array.ndim, self.mesh),
                array,
                global_shape(array.shape, self.mesh),
            )
            for name, array in batch.items()
        }


def compile_programs(task: Task) -> Programs:
    """The programs of a task.

    Raises `UserError` where the devices have too little memory for them.
    """
    first = jax.local_devices()[0]
    rate = learning_rate(task.optimizer, task.steps)
    optimizer = make_optimizer(task.optimizer, task.steps, task.learns)
    abstract = jax.eval_shape(lambda p: init_state(p, optimizer, task.dtype), task.trained)
    places = state_shardings(abstract, task.trained, task.mesh)

    def state() -> State:
        make = jax.jit(
            lambda trained: init_state(trained, optimizer, task.dtype).replace(trained=None),
            out_shardings=places.replace(trained=None),
        )
        return make(task.trained).replace(trained=task.trained)

    plain = make_step(
        task.loss, optimizer, dtype=task.dtype, seed=task.seed if task.dropout else None
    )

    def step(state: State, frozen: Params, window: Batch) -> Any:
        new, metrics = plain(state, frozen, window)
        tokens = jax.numpy.sum(window["segments"] != 0)
        return new, metrics | {"tokens": tokens, "learning_rate": rate(state.step)}

    def evaluate(trained: Params, frozen: Params, batch: Batch) -> Any:
        return task.loss(cast(lora.join(trained, frozen), task.dtype), batch, None)

    rows = task.batch * task.rows.together, task.rows.tokens.shape[1]
    window = abstract_batch(task.rows, (task.accumulate, *rows), task.mesh)
    placed = sharding.placed(abstract, places)
    with _too_large():
        compiled = lower_step(step, placed, task.frozen, window, task.mesh).compile()
    evaluated = None
    if task.validation is not None:
        batch = abstract_batch(task.validation, rows, task.mesh)
        with sharding.use(task.mesh), _too_large():
            program = jax.jit(evaluate, out_shardings=everywhere(task.mesh))
            evaluated = program.lower(placed.trained, task.frozen, batch).compile()
    memory = compiled.memory_analysis()
    temporary = needed = 0
    if memory is not None:
        temporary = memory.temp_size_in_bytes
        kept = memory.output_size_in_bytes - memory.alias_size_in_bytes
        needed = memory.argument_size_in_bytes + kept + temporary
    devices = [first] if task.mesh is None else list(task.mesh.devices.flat)
    fresh = temporary + sharding.device_bytes(placed.replace(trained=None))
    refuse_small_memory(
        dict.fromkeys(filter(_is_own, devices), fresh),
        f"a step of {task.accumulate} x {rows[0]} rows of {rows[1]} (--batch, --seq-len, --remat full)",
    )
    return Programs(compiled, evaluated, state, task.mesh, devices, needed)


@contextlib.contextmanager
def _too_large() -> Iterator[None]:
    """Makes one line of what a compiler says that has no memory left."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"the device has too little memory for a training step ({reason}); take a smaller "
            "--batch or --seq-len, --remat full, or more devices with --mesh"
        ) from None


def describe(task: Task, programs: Programs) -> str:
    """One line: what learns, on how much, in which memory."""
    learns = sum(leaf.size for leaf in jax.tree.leaves(task.trained))
    others = jax.tree.leaves(task.frozen, is_leaf=lambda x: isinstance(x, Quantized))
    total = learns + sum(math.prod(leaf.shape) for leaf in others)
    rows = task.rows
    T = rows.tokens.shape[1]
    accumulated = f"{task.accumulate} x " if task.accumulate > 1 else ""
    memory = f"{format_bytes(programs.needed)} a device"
    stats = programs.devices[0].memory_stats() if _is_own(programs.devices[0]) else None
    if stats and "bytes_limit" in stats:
        memory += f" of {format_bytes(stats['bytes_limit'])}"
    return (
        f"{learns:,} of {total:,} parameters learn; {int(np.sum(rows.segments != 0)):,} tokens in "
        f"{len(rows):,} examples, {100 * rows.waste:.1f}% padding; {task.steps:,} steps of "
        f"{accumulated}{task.batch} x {T}; memory {memory}"
    )


def _is_own(device: Any) -> bool:
    return device.process_index == jax.process_index()


def evaluate(task: Task, programs: Programs, trained: Params, part: Part) -> dict[str, float]:
    """Of the validation examples the mean loss, what else it sums up, and the weight of it all."""
    assert task.validation is not None
    sums: Any = None
    for batch in in_order(task.validation, task.batch, part=part.index, parts=part.count):
        found = programs.evaluate(trained, task.frozen, programs.place(batch))
        found = jax.tree.map(lambda x: x.item(), jax.device_get(found))  # added up in float64
        sums = found if sums is None else jax.tree.map(lambda a, b: a + b, sums, found)
    loss, weight, seen = sums
    means = {name: total / max(weight, 1.0) for name, total in {"loss": loss, **seen}.items()}
    return means | {"weight": weight}


# What goes wrong, or ends a run


def _sound(values: dict[str, float]) -> bool:
    """Whether a step's numbers are numbers; float16 may overflow as long as its scale can fall."""
    if "loss_scale" in values:
        return not values["skipped"] or values["loss_scale"] > LossScale.SMALLEST
    return math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])


def _give_up(
    task: Task,
    run: Run,
    step: int,
    values: dict[str, float],
    position: Any,
    texts: Callable[[dict[str, np.ndarray]], list[str]],
) -> None:
    """Raises `UserError` that names the step, and the file with the texts of its batch."""
    windows = batches(
        task.rows, task.batch, seed=task.seed, epochs=task.epochs, micro=task.accumulate
    )
    windows.set_state(position)
    file = run.directory / f"step-{step}.jsonl"
    if is_first_process():
        lines = [json.dumps(text, ensure_ascii=False) for text in texts(next(windows))]
        file.write_text("\n".join(lines) + "\n")
    raise UserError(
        f"step {step}: the loss is {values['loss']:g}, the norm of the gradient "
        f"{values['grad_norm']:g}; the texts of its batch are in {file}; look at them, or take a "
        "smaller --learning-rate; checkpoints are intact"
    )


@contextlib.contextmanager
def terminated() -> Iterator[Callable[[int], signal.Signals | None]]:
    """Yields `stop(step)`: which signal came to end the run, the same in all processes.

    It is to be called after every step. Several processes agree on a step, which may be a few
    steps later, by the service of `jax.distributed` that catches the signal.
    """
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        reached = multihost_utils.reached_preemption_sync_point
        yield lambda step: signal.SIGTERM if reached(step) else None
        return
    came = None

    def note(number: int, _: Any) -> None:
        nonlocal came
        came = signal.Signals(number)
        signal.signal(came, before[came])

    before = {number: signal.signal(number, note) for number in ENDS}
    try:
        yield lambda step: came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _full_disk(path: epath.Path) -> Iterator[None]:
    """Makes one line of a disk that fills up."""
    full = [os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT)]
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        # Orbax and tensorstore wrap the reason, or say it in their text alone
        if not any(reason in text for reason in full for text in _said(error)):
            raise
        raise UserError(
            f"{path}: the disk is full; the last checkpoint is intact, make room and go on with "
            "--resume"
        ) from None


def _said(error: BaseException | None) -> Iterator[str]:
    while error is not None:
        yield str(error)
        error = error.__cause__ or error.__context__

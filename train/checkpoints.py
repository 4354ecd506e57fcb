"""The states of a run on disk, by Orbax."""

import contextlib
import errno
import os
import shutil
from typing import Any

import jax
from etils import epath

from llama_jax.checkpoint import damage_is_user_error
from llama_jax.command import is_first_process
from llama_jax.model import Params
from train.step import State


class Checkpoints:
    """The states of a run on disk, written while it goes on."""

    def __init__(self, directory: epath.Path, keep: int):
        import orbax.checkpoint as ocp

        self._ocp = ocp

        def manager(name: str, keep: int | None) -> Any:
            options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
            return ocp.CheckpointManager(directory / name, options=options)

        self._directory = directory
        self._states = manager("checkpoints", keep)
        self._best = manager("best", None)
        self._needed = 0  # the step of the best parameters that the last state on disk knows of

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        for manager in (self._states, self._best):
            if kind is None:
                manager.close()
            else:  # what went wrong is on its way already
                with contextlib.suppress(Exception):
                    manager.close()

    def wait(self) -> None:
        """Until all that was saved is on disk."""
        self._best.wait_until_finished()
        self._states.wait_until_finished()

    def save(self, step: int, state: State, position: Any, best: tuple[float, int] | None) -> None:
        """Begins to write a state. Raises what went wrong with the one before."""
        self.wait()  # the best parameters of which this state knows are there before it is
        self._refuse_small_disk(state)
        for older in self._best.all_steps():
            if older < self._needed:
                self._best.delete(older)
        self._needed = 0 if best is None else best[1]
        args = self._ocp.args
        rest = {"position": position, "best": best}
        self._states.save(
            step,
            args=args.Composite(state=args.PyTreeSave(state), rest=args.JsonSave(rest)),
            force=True,
        )

    def _refuse_small_disk(self, tree: Any) -> None:
        """Raises what a disk that is full raises, before anything is written to it."""
        if "://" in str(self._directory):
            return
        needed = sum(x.nbytes for x in jax.tree.leaves(tree)) // jax.process_count()
        if needed > shutil.disk_usage(self._directory).free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def restore(self, state: State) -> tuple[State, Any, tuple[float, int] | None]:
        """The last state, the position of the data, the best validation loss and its step.

        `state` itself, which says where arrays lie, and None where nothing is saved; otherwise its
        arrays are gone, as two states may not fit. Raises `UserError` where one is damaged.
        """
        step = self._states.latest_step()
        for later in self._best.all_steps():
            if step is None or later > step:  # they come again
                self._best.delete(later)
        if step is None:
            return state, None, None
        args, abstract = self._ocp.args, _abstract(state)
        for leaf in jax.tree.leaves(state):
            leaf.delete()
        how = self._ocp.checkpoint_utils.construct_restore_args(abstract)
        saved = self._directory / "checkpoints" / str(step)
        with damage_is_user_error(saved, "delete it to go on from the one before"):
            found = self._states.restore(
                step,
                args=args.Composite(
                    state=args.PyTreeRestore(abstract, restore_args=how), rest=args.JsonRestore()
                ),
            )
        best = found.rest["best"] and tuple(found.rest["best"])
        self._needed = best[1] if best else 0
        return found.state, found.rest["position"], best

    def save_best(self, step: int, trained: Params) -> None:
        """Begins to write the parameters that are best so far."""
        self.wait()
        self._refuse_small_disk(trained)
        self._best.save(step, args=self._ocp.args.PyTreeSave(trained), force=True)

    def restore_best(self, step: int, trained: Params) -> Params:
        """The parameters that `save_best` wrote, where those of `trained` lie."""
        self._best.wait_until_finished()
        abstract = _abstract(trained)
        how = self._ocp.checkpoint_utils.construct_restore_args(abstract)
        args = self._ocp.args.PyTreeRestore(abstract, restore_args=how)
        with damage_is_user_error(self._directory / "best" / str(step)):
            return self._best.restore(step, args=args)

    def forget_best(self) -> None:
        self._best.close()
        if is_first_process():
            (self._directory / "best").rmtree(missing_ok=True)


def _abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)

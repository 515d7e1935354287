"""Checkpoints of a stage: asynchronous, restored exactly, refused for another configuration."""

import contextlib
import logging
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from e3jax import files
from e3jax.errors import UserError

log = logging.getLogger(__name__)

INPUTS = "inputs.json"


class Checkpoints:
    """The checkpoints of one stage, in one folder, one a step.

    inputs: everything that decides the stage's result, as JSON; it is kept beside the checkpoints,
    and opening the folder with other inputs is a UserError that names what differs.
    """

    def __init__(self, folder: pathlib.Path, inputs: Mapping[str, Any], keep: int = 2) -> None:
        self.folder = folder
        claim(folder, inputs)
        self._orbax = ocp.training.Checkpointer(
            (folder / "steps").absolute(),
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=True,  # what a killed save left
        )

    def save(self, step: int, state: Any) -> None:
        """Starts saving; returns when the arrays are copied. Raises what the save before met with.

        Waiting for the one before keeps saves in order and lets none fail unseen.
        """
        self._orbax.wait()
        self._orbax.save_async(step, state, force=True, overwrite=True)

    def restore(self, abstract_state: Any) -> tuple[int, Any] | None:
        """The newest checkpoint that can be read, as (step, state), or None where there is none.

        abstract_state: ShapeDtypeStructs with the shardings the state is to have.
        """
        for checkpoint in sorted(self._orbax.checkpoints, key=lambda c: c.step, reverse=True):
            try:
                return checkpoint.step, self._orbax.load(checkpoint.step, abstract_state)
            except Exception as error:  # noqa: BLE001  whatever a torn file makes Orbax raise
                log.warning(
                    "checkpoint %s of step %d cannot be read (%s: %s); trying the one before",
                    self.folder,
                    checkpoint.step,
                    type(error).__name__,
                    str(error).splitlines()[0] if str(error) else "no message",
                )
                self._orbax.delete(checkpoint.step)
        return None

    def close(self) -> None:
        """Waits for the last save and raises what it met with."""
        self._orbax.wait()
        self._orbax.close()


@contextlib.contextmanager
def open_checkpoints(
    folder: pathlib.Path, inputs: Mapping[str, Any], keep: int = 2
) -> Iterator[Checkpoints]:
    """Checkpoints that are closed, and so complete, when the block ends without an error."""
    checkpoints = Checkpoints(folder, inputs, keep)
    yield checkpoints
    checkpoints.close()


def claim(folder: pathlib.Path, inputs: Mapping[str, Any]) -> None:
    """Marks a stage's folder as made from `inputs`. Raises UserError when it is of others."""
    path = folder / INPUTS
    if path.exists():
        check_inputs(folder, inputs)
    elif jax.process_index() == 0:
        files.write_json(path, inputs)


def check_inputs(folder: pathlib.Path, inputs: Mapping[str, Any]) -> None:
    """Raises UserError, naming every difference, unless the folder was made from `inputs`."""
    old = files.read_json(folder / INPUTS)
    if changed := files.differences(old, inputs):
        listed = "\n  ".join(changed[:12])
        raise UserError(
            f"{folder}: holds the work of another configuration:\n  {listed}\n"
            "choose another `out`, undo the change, or remove that folder to start it anew"
        )


def abstract(state: Any) -> Any:
    """ShapeDtypeStructs of a state's arrays, with their shardings."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )

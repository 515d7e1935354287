"""Checkpoints of a stage: asynchronous, restored exactly, refused for another configuration."""

import contextlib
import logging
import math
import pathlib
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from e3jax import files, mesh, processes
from e3jax.errors import UserError

log = logging.getLogger(__name__)

INPUTS = "inputs.json"
STEPS = "steps"  # the folder with one folder a checkpoint
TORN = "torn"  # the folder of those that could not be read
LOOK_S = 0.5  # between looks at how a save fares in the other processes
HOST_BYTES = 8 * 10**9  # enough to keep a disk busy, and a small part of any host's memory
PATIENCE_S = 7 * 24 * 3600  # for a save; a jump is taken off it at each of several levels


class Checkpoints:
    """The checkpoints of one stage, in one folder, one a step.

    inputs: everything that decides the stage's result, as JSON; it is kept beside the checkpoints,
    and opening the folder with other inputs is a UserError that names what differs.
    keep: how many of the latest stay; best: the figure (lower is better) whose best one stays too.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        inputs: Mapping[str, Any],
        keep: int = 2,
        best: str | None = None,
    ) -> None:
        self.folder, self._best, self._keep = folder, best, keep
        processes.from_first(lambda: claim(folder, inputs))
        self._failures, self._stuck = _Failures(), False
        self._orbax = self._open()

    def _open(self) -> ocp.training.Checkpointer:
        best, keep = self._best, self._keep
        policies = ocp.training.preservation_policies
        stay: list[Any] = [policies.LatestN(keep)]
        if best is not None:
            # It keeps the greatest, and of checkpoints without the figure none.
            stay.append(
                policies.BestN(
                    get_metric_fn=lambda figures: -figures[best],
                    n=1,
                    keep_checkpoints_without_metrics=False,
                )
            )
        return ocp.training.Checkpointer(
            (self.folder / STEPS).absolute(),
            preservation_policy=policies.AnyPreservationPolicy(stay),
            cleanup_tmp_directories=True,  # what a killed save left
            context=_context(),
        )

    def save(self, step: int, state: Any, figures: Mapping[str, Any] | None = None) -> None:
        """Starts saving; returns when the arrays are copied. Raises what the save before met with.

        Waiting for the one before keeps saves in order and lets none fail unseen.
        figures: those measured of this very state, if any were.
        """
        signed = {"state": state, "checksum": checksum(state)}
        figure = None if figures is None else figures.get(self._best)
        # One that is not a number would be the best for Orbax.
        known = {self._best: figure} if figure is not None and math.isfinite(figure) else None
        with self._saving():
            self._wait()
            self._failures.first = None  # what a damaged checkpoint made it log is none of a save
            with _context(signed):
                self._orbax.save_async(step, signed, force=True, overwrite=True, metrics=known)

    def restore(self, abstract_state: Any) -> tuple[int, Any] | None:
        """The newest checkpoint that can be read, as (step, state), or None where there is none.

        abstract_state: ShapeDtypeStructs with the shardings the state is to have.
        Raises UserError when there are checkpoints and none of them can be read.
        """
        torn: list[int] = []
        steps = processes.from_first(lambda: [c.step for c in self._orbax.checkpoints])
        for step in sorted(steps, reverse=True):
            state = self._load(step, abstract_state)
            if state is None:
                torn.append(step)
                continue
            if torn:
                self._set_aside(torn)
            return step, state
        if torn:
            raise UserError(
                f"{self.folder}: none of its checkpoints (steps {torn}) can be read; "
                "see the reasons above, or remove that folder to start it anew"
            )
        return None

    def _set_aside(self, steps: list[int]) -> None:
        """What could not be read may have been whole (a host that lost the disk): it stays."""

        def move() -> None:
            try:
                (self.folder / TORN).mkdir(exist_ok=True)
                for step in steps:
                    shutil.rmtree(self.folder / TORN / str(step), ignore_errors=True)
                    (self.folder / STEPS / str(step)).rename(self.folder / TORN / str(step))
            except OSError as error:
                raise UserError(f"{self.folder}: cannot be written: {error}") from error

        self._orbax.close()
        processes.from_first(move)
        log.warning(
            "%s: steps %s are set aside in %s; remove them once they are of no use",
            self.folder,
            steps,
            self.folder / TORN,
        )
        self._orbax = self._open()

    def _load(self, step: int, abstract_state: Any) -> Any:
        """The state of a checkpoint, or None where one of the processes cannot read its part.

        Each reads alone, and then hears of the others: one that fails comes to no barrier of
        Orbax's, where they would wait for it for five minutes.
        """
        place = (self.folder / STEPS / str(step)).absolute()
        number = jax.ShapeDtypeStruct((), jnp.uint32, sharding=mesh.sharding(()))
        wanted = {"state": {"state": abstract_state, "checksum": number}}  # "state": Orbax's name
        context = _context(wanted)
        context.multiprocessing.primary_host = jax.process_index()
        context.multiprocessing.active_processes = {jax.process_index()}
        with context:
            # Orbax numbers its loads and names later barriers by it: all begin one, or none does.
            if self._everywhere(step, lambda: ocp.checkpointables_metadata(place)) is None:
                return None
            signed = self._everywhere(
                step, lambda: ocp.load_checkpointables(place, wanted)["state"]
            )
        return signed and self._everywhere(step, lambda: _verified(signed))

    def _everywhere(self, step: int, read: Callable[[], Any]) -> Any:
        """What `read` gives, or None where it fails in any process: of one of them all say why."""
        found, reason = None, None
        try:
            found = read()
        except Exception as error:
            if "RESOURCE_EXHAUSTED" in str(error):  # not the checkpoint's fault
                raise
            reason = _reason(error)
        reasons = processes.gather(reason)
        for number, told in enumerate(reasons):
            if told is not None:
                who = "" if len(reasons) == 1 else f" by process {number}"
                log.warning("%s: step %d cannot be read%s: %s", self.folder, step, who, told)
                return None
        return found

    def close(self) -> None:
        """Waits for the last save and raises what it met with."""
        with self._saving():
            try:
                self._wait()
            finally:
                if not self._stuck:
                    self._orbax.close()  # meets the same lost folder again
                self._failures.remove()

    def _wait(self) -> None:
        """Returns when the save before is whole; raises what it met with.

        With several processes Orbax's own wait would not end where one of them fails: that one's
        threads then wait for the others, and those for its part.
        """
        if jax.process_count() == 1:
            return self._orbax.wait()
        found: list[BaseException] = []

        def wait() -> None:
            try:
                self._orbax.wait()
            except Exception as error:
                found.append(error)

        waiting = threading.Thread(target=wait, daemon=True)
        waiting.start()
        looks = 0  # since another began to leave: it may have done its part, and ours be at its end
        while waiting.is_alive():
            waiting.join(LOOK_S)
            ours, gone = self._failures.first, processes.leaving()
            looks += bool(gone)
            self._stuck = waiting.is_alive() and (ours is not None or looks > 4)
            if self._stuck:
                raise ours or UserError(
                    f"{self.folder}: process {gone[0]} ended while a checkpoint was saved; its own "
                    "log says why"
                )
        if found:
            raise found[0]

    @contextlib.contextmanager
    def _saving(self) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # a full disk or a lost mount comes as any of many types
            raise UserError(
                f"{self.folder}: a checkpoint could not be saved: {_reason(error)}. The one before "
                "is whole: once the disk has room and can be written, the same command goes on"
            ) from error


class _Failures(logging.Handler):
    """The first error that Orbax logs from its threads: the only sign of a failed save there is
    while these wait for other processes."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.first: BaseException | None = None
        logging.getLogger("absl").addHandler(self)

    def remove(self) -> None:
        logging.getLogger("absl").removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        background = record.thread != threading.main_thread().ident
        if error is not None and background and "orbax" in record.pathname:
            self.first = self.first or error


@contextlib.contextmanager
def open_checkpoints(
    folder: pathlib.Path, inputs: Mapping[str, Any], keep: int = 2, best: str | None = None
) -> Iterator[Checkpoints]:
    """Checkpoints that are closed, and so complete, however the block ends."""
    checkpoints = Checkpoints(folder, inputs, keep, best)
    try:
        yield checkpoints
    finally:
        checkpoints.close()


def claim(folder: pathlib.Path, inputs: Mapping[str, Any]) -> None:
    """Marks a stage's folder as made from `inputs`. Raises UserError when it is of others."""
    path = folder / INPUTS
    if path.exists():
        check_inputs(folder, inputs)
    else:
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


def _verified(signed: dict[str, Any]) -> Any:
    if int(checksum(signed["state"])) != int(signed["checksum"]):
        raise ValueError("the arrays are not those that were saved")
    return signed["state"]


@jax.jit
def checksum(state: Any) -> jax.Array:
    """uint32 of all bits of a state: the same on every mesh, another when any one word is.

    Orbax keeps none of its own: with a flipped bit in an array's file, the file is still read.
    """
    total = jnp.uint32(0)
    for x in jax.tree.leaves(state):
        x = x.astype(jnp.uint8) if x.dtype == bool else x  # booleans cannot be cast bit by bit
        words = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
        total = 31 * total + jnp.sum(words, dtype=jnp.uint32)  # modulo 2**32: in any order
    return total


def _context(arrays: Any = None) -> ocp.Context:
    """Orbax measures its timeouts by the wall clock: one that jumps must not fail a save.

    Waiting for directories that are made in the background has one that cannot be set.
    arrays: what is written or read. Of what it writes or reads a process has at most HOST_BYTES on
    its way to or from the disk, or the largest array, since Orbax refuses one above its bound.
    Without a bound, what is written is held twice: compressed too, until the last of it is written;
    and all that is read at once. A save from accelerators still begins with a copy of this
    process's part in host memory: the steps that follow change the arrays.
    """
    context = ocp.Context()
    most = max([HOST_BYTES, *(1 + x.size * x.dtype.itemsize for x in jax.tree.leaves(arrays))])
    context.memory.write_concurrent_bytes = context.memory.read_concurrent_bytes = most
    context.asynchronous.timeout_secs = PATIENCE_S
    context.asynchronous.create_directories_asynchronously = False
    return context


def _reason(error: BaseException) -> str:
    """The first line of an error and of what caused it."""
    chain = [error, *filter(None, [error.__cause__])]
    return "; ".join(f"{type(e).__name__}: {(str(e).splitlines() or [''])[0]}" for e in chain)

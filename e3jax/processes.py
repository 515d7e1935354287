"""One run in several processes: how it starts, who decides, and how it ends in all of them.

Every process runs the same program on its own devices. What may differ between them (what a folder
holds, a signal, an error) is decided by process 0 or by a vote, since two processes that take
different ways wait for each other for ever. Shared files are written by process 0 alone.
"""

import json
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from e3jax import mesh
from e3jax.errors import UserError

HEARTBEAT_S = 60  # a process that is silent for so long is dead, and ends all others
JOIN_S = 300  # for the last process to start


def start(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None
) -> None:
    """Joins this process to the others of the run; before anything touches a device.

    With no arguments the surroundings tell (TPU pod, Slurm, Open MPI, Kubernetes), else
    coordinator is host:port of process 0. Raises UserError when they tell nothing, or when not all
    processes are there within JOIN_S.
    """
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process,
            initialization_timeout=JOIN_S,
            heartbeat_timeout_seconds=HEARTBEAT_S,
            shutdown_timeout_seconds=HEARTBEAT_S,
        )
    except (ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"--distributed: the processes could not find each other ({reason}); outside a TPU "
            "pod, Slurm or Kubernetes give --coordinator HOST:PORT --processes N --process I"
        ) from error


def is_first() -> bool:
    """Whether this process is the one that decides and writes."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Returns when every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def from_first(make: Callable[[], Any]) -> Any:
    """The JSON value of `make()` in process 0, in every process; a UserError there is one in all.

    For decisions that rest on files: one process may see a file that another does not see yet.
    """
    if jax.process_count() == 1:
        return make()
    said: dict[str, Any] = {}
    if is_first():
        try:
            said = {"value": make()}
        except UserError as error:
            said = {"error": str(error)}
    data = np.frombuffer(json.dumps(said).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    padded = np.zeros(size, np.uint8)
    padded[: len(data) if is_first() else 0] = data if is_first() else 0
    said = json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(padded), np.uint8)))
    if "error" in said:
        raise UserError(said["error"])
    return said["value"]


def everywhere(fact: bool) -> bool:
    """Whether a fact holds in every process."""
    if jax.process_count() == 1:
        return fact
    return bool(np.all(multihost_utils.process_allgather(np.array(fact))))


def vote(fact: bool) -> Any:
    """Whether a fact holds in any process: something to call `bool` on later, so nothing waits."""
    if jax.process_count() == 1:
        return fact
    count = jax.device_count()
    place = mesh.sharding(("device",), (count,))
    votes = jax.make_array_from_callback((count,), place, lambda _: np.full(1, fact))
    return _any(votes)


@jax.jit
def _any(votes: jax.Array) -> jax.Array:
    return votes.any()


def whole(x: jax.Array) -> np.ndarray:
    """A global array on this host, whole."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def leave(code: int) -> NoReturn:
    """Ends this process of several at once.

    An ordinary exit waits for the others, and they may be waiting for this one in a collective.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

"""One run in several processes: how it starts, who decides, and how it ends in all of them.

Every process runs the same program on its own devices. What may differ between them (what a folder
holds, a signal, an error) is decided by process 0 or by a vote, since two processes that take
different ways wait for each other for ever. Shared files are written by process 0 alone.
"""

import contextlib
import itertools
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax._src import distributed
from jax.experimental import multihost_utils

from e3jax import mesh
from e3jax.errors import UserError

HEARTBEAT_S = 60  # a process that is silent for so long is dead, and ends all others
LAST_WORDS_S = 5
JOIN_S = 300  # for the last process to start
WAIT_MS = 7 * 24 * 3600 * 1000  # for work that one does alone; that it died is known much sooner

LEAVING = "e3jax/leaving/"  # in the key-value store

T = TypeVar("T")

_calls = itertools.count()


def start(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None
) -> None:
    """Joins this process to the others of the run; before anything touches a device.

    With no arguments the surroundings tell (TPU pod, Slurm, Open MPI, Kubernetes), else
    coordinator is host:port of process 0. Raises UserError when they tell nothing, when not all
    processes are there within JOIN_S, and when two that were given a coordinator have one GPU.
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
    # Elsewhere the surroundings give each process its own, as jax does by Slurm's local number.
    if coordinator is not None and jax.default_backend() == "gpu":
        ours = [d.local_hardware_id for d in jax.local_devices()]
        _check_shared(
            gather([socket.gethostname(), os.environ.get("CUDA_VISIBLE_DEVICES", ""), ours])
        )


def _check_shared(places: list[tuple[str, str, list[int]]]) -> None:
    """Raises UserError where two processes of a host have one GPU; NCCL's own word is no help."""
    for (one, a), (other, b) in itertools.combinations(enumerate(places), 2):
        if a[:2] == b[:2] and set(a[2]) & set(b[2]):
            raise UserError(
                f"--coordinator: processes {one} and {other} on {a[0]} use the same GPUs; start "
                f"process {one} with CUDA_VISIBLE_DEVICES={one} and so on, or one process for all"
            )


def client() -> Any:
    """The client of jax's coordination service, a key-value store; multihost_utils uses it too."""
    return distributed.global_state.client


def _next(name: str) -> str:
    """A name that no call had before: all processes make the same calls in the same order."""
    return f"e3jax/{next(_calls)}/{name}"


def is_first() -> bool:
    """Whether this process is the one that decides and writes."""
    return jax.process_index() == 0


def _attended(wait: Callable[[], T]) -> T:
    """What `wait()` gives; Python handles signals meanwhile, as it does not in compiled code."""
    found: Future[T] = Future()

    def run() -> None:
        try:
            found.set_result(wait())
        except Exception as error:
            found.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return found.result()


def barrier(name: str) -> None:
    """Returns when every process has come here."""
    if jax.process_count() > 1:
        key = _next(name)
        _attended(lambda: client().wait_at_barrier(key, WAIT_MS))


def from_first(make: Callable[[], Any]) -> Any:
    """The JSON value of `make()` in process 0, in every process; a UserError there is one in all.

    For decisions that rest on files: one process may see a file that another does not see yet; and
    for work that one does alone. The others wait on the host, no device is held by a collective.
    """
    if jax.process_count() == 1:
        return make()
    key = _next("from first")
    if is_first():
        try:
            said = {"value": make()}
        except UserError as error:
            said = {"error": str(error)}
        client().key_value_set(key, json.dumps(said))
    said = json.loads(_attended(lambda: client().blocking_key_value_get(key, WAIT_MS)))
    if "error" in said:
        raise UserError(said["error"])
    return said["value"]


def array_from_first(x: np.ndarray) -> np.ndarray:
    """Process 0's array, in every process; all give one of the same shape and dtype."""
    return x if jax.process_count() == 1 else np.asarray(multihost_utils.broadcast_one_to_all(x))


def gather(value: Any) -> list[Any]:
    """The JSON values of all processes, by their numbers, in every process."""
    if jax.process_count() == 1:
        return [value]
    key = _next("gather")
    client().key_value_set(f"{key}/{jax.process_index()}", json.dumps(value))
    _attended(lambda: client().wait_at_barrier(key, WAIT_MS))
    said = {name.rsplit("/", 1)[-1]: text for name, text in client().key_value_dir_get(f"{key}/")}
    return [json.loads(said[str(number)]) for number in range(jax.process_count())]


def everywhere(fact: bool) -> bool:
    """Whether a fact holds in every process."""
    return all(gather(fact))


def same(what: str, value: str) -> None:
    """Raises UserError in all processes unless all of them have the same value."""
    values = gather(value)
    for number, other in enumerate(values):
        if other != values[0]:
            raise UserError(
                f"{what}: process {number} has another one than process 0 ({other} and "
                f"{values[0]}); every process needs the same command and the same files"
            )


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


def leaving() -> list[int]:
    """The processes that have begun to leave, by their numbers."""
    said = client().key_value_dir_get(LEAVING)
    return sorted(int(name.rsplit("/", 1)[-1]) for name, _ in said)


def leave(code: int, patience_s: float = LAST_WORDS_S) -> NoReturn:
    """Ends this process of several at once.

    An ordinary exit waits for the others, and they may be waiting for this one in a collective.
    The coordination service ends with process 0, and so do all others, with an abort: so it gives
    those that have met the same error, or were told the same, `patience_s` to leave before it.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    with contextlib.suppress(Exception):  # the service may be gone, or never have been
        client().key_value_set(f"{LEAVING}{jax.process_index()}", "")
        end = time.monotonic() + patience_s
        while is_first() and time.monotonic() < end:
            if len(leaving()) == jax.process_count():
                break
            time.sleep(0.05)
    os._exit(code)

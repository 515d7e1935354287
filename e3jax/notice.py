"""Being told to stop: SIGTERM, by which TPU VMs, Kubernetes and Slurm also announce a preemption.

A notice to one process is one to all. Where there is nothing to save (loading, tokenising,
compiling, evaluating) it raises SystemExit there and then. Within `held` somebody else looks at
`told()` and leaves at a moment of his own: the training loop, once its state is saved.
"""

import contextlib
import functools
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn, TypeVar

import jax
from jax._src import distributed
from jax.experimental import multihost_utils

from e3jax import processes

T = TypeVar("T")

CODE = 128 + signal.SIGTERM
LOOK_S = 1.0  # between looks at what another process was told
GRACE_S = 10.0  # for a compilation or a read to come to an end; platforms give 30 s in all
OTHERS_S = 20.0  # for the others to leave before process 0 does: more than the grace of each
TOLD = "e3jax/told to stop"  # in the key-value store of several processes

_told = threading.Event()
_lost = threading.Event()  # SystemExit was raised where Python cannot pass it on
_held = 0


@contextlib.contextmanager
def listen() -> Iterator[None]:
    """Handles SIGTERM while open. After `jax.distributed` is up, whose own handler it replaces."""
    if threading.current_thread() is not threading.main_thread():  # only that one gets signals
        yield
        return
    # Python runs a handler when the main thread comes back from compiled code, which may be
    # minutes away; through the socket a thread hears of the signal at once.
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    closed = threading.Event()
    old_fd = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    old = signal.signal(signal.SIGTERM, _handle)
    old_hook = sys.unraisablehook
    sys.unraisablehook = functools.partial(_unraisable, old_hook)
    threads = [threading.Thread(target=_act, args=(ours, closed), daemon=True)]
    if jax.process_count() > 1:
        threads.append(threading.Thread(target=_look, args=(closed,), daemon=True))
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        closed.set()
        signal.signal(signal.SIGTERM, old)
        signal.set_wakeup_fd(old_fd)
        sys.unraisablehook = old_hook
        theirs.close()
        for thread in threads:
            thread.join()
        ours.close()
        _told.clear()
        _lost.clear()


def told() -> bool:
    """Whether this process was told to stop."""
    return _told.is_set()


def vote(step: int) -> object:
    """Whether any process was told: something to call `bool` on later, so nothing waits.

    All processes call it at every step. step: as Orbax counts them, who asks the platform too.
    """
    platform = False
    if distributed.global_state.preemption_sync_manager is not None:
        platform = multihost_utils.reached_preemption_sync_point(step)
    return processes.vote(told() or platform)


@contextlib.contextmanager
def held() -> Iterator[None]:
    """A notice only sets `told()` while this is open, and raises SystemExit at its end."""
    global _held
    _held += 1
    try:
        yield
    finally:
        _held -= 1
    if told():
        raise SystemExit(CODE)


@contextlib.contextmanager
def released() -> Iterator[None]:
    """A stretch within `held` that a notice breaks off at any place, for nothing is to be saved."""
    global _held
    kept, _held = _held, 0
    try:
        if told():
            raise SystemExit(CODE)
        yield
    finally:
        _held = kept


def breakable() -> contextlib.AbstractContextManager[None]:
    """A stretch within `held` that a notice breaks off, and after which all processes save.

    So in several processes it is broken off at the same place in all: where `interruptible` is.
    """
    return released() if jax.process_count() == 1 else contextlib.nullcontext()


def interruptible(items: Iterable[T]) -> Iterator[T]:
    """The items of a long loop that all processes go through together; SystemExit ends it."""
    asked: object = False
    for item in items:
        if bool(asked):  # of the item before: its answer is there
            raise SystemExit(CODE)
        if _held and jax.process_count() > 1:
            asked = processes.vote(told())
        yield item


def _handle(*_: object) -> None:
    _told.set()
    if not _held:
        print("told to stop; the same command goes on from here", file=sys.stderr)
        raise SystemExit(CODE)


def _unraisable(otherwise: Callable[[Any], Any], lost: Any) -> None:
    """Notes that a destructor or a callback of the collector swallowed the SystemExit."""
    if issubclass(lost.exc_type, SystemExit) and told():
        _lost.set()
    else:
        otherwise(lost)


def _act(ours: socket.socket, closed: threading.Event) -> None:
    """On SIGTERM: tells the other processes; ends this one if its main thread doesn't in time."""
    while heard := ours.recv(1):
        if heard[0] == signal.SIGTERM:
            break
    else:
        return
    _told.set()
    if jax.process_count() > 1:
        with contextlib.suppress(Exception):  # it was said before, or the others are gone
            processes.client().key_value_set(TOLD, "")
    begun = time.monotonic()
    while time.monotonic() < begun + GRACE_S and not closed.wait(LOOK_S):
        if _held:
            begun = time.monotonic()
        if _lost.is_set() and not _held:
            _lost.clear()
            os.kill(os.getpid(), signal.SIGTERM)
    if not closed.is_set():
        leave()  # what is half written the next run clears away


def _look(closed: threading.Event) -> None:
    """Makes a notice to another process one to this process."""
    while not closed.wait(LOOK_S) and not told():
        try:
            processes.client().key_value_try_get(TOLD)
        except Exception:  # not there
            continue
        os.kill(os.getpid(), signal.SIGTERM)


def leave() -> NoReturn:
    """Ends this process at once; one of several once the others have heard of the notice.

    What they wait for fails when this one ends, and the store they hear from ends with process 0.
    """
    if jax.process_count() > 1:
        time.sleep(2 * LOOK_S)
    processes.leave(CODE, OTHERS_S)

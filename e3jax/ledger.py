"""ledger.jsonl: what each stage of a run cost, and on what it ran. A line a piece of work.

One that was killed without notice leaves no line.
"""

import contextlib
import datetime
import functools
import json
import os
import pathlib
import re
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax

from e3jax import __version__, files, processes

FROM_S = 1.0  # what was finished before and only read back takes less, and is no cost


@contextlib.contextmanager
def stage(out: pathlib.Path, name: str) -> Iterator[None]:
    """Adds what the block took to the ledger in `out`, however it ends. A full disk stops nothing.

    seconds are of wall time; memory, in bytes, is the most that process 0 has had so far: on the
    fullest of its devices, where they tell, and on the host.
    """
    begun, at, ended = time.monotonic(), datetime.datetime.now(datetime.UTC), "done"
    try:
        yield
    except BaseException as error:
        ended = type(error).__name__
        raise
    finally:
        seconds = time.monotonic() - begun
        if seconds >= FROM_S and processes.is_first():
            line = {"stage": name, "begun": at.isoformat(timespec="seconds"), "ended": ended}
            line |= {"seconds": round(seconds, 1), **_memory(), **_where()}
            with (
                contextlib.suppress(OSError),
                open(out / files.LEDGER, "a", encoding="utf-8") as file,
            ):
                file.write(json.dumps(line) + "\n")


def _memory() -> dict[str, Any]:
    told = [device.memory_stats() or {} for device in jax.local_devices()]
    most = [stats["peak_bytes_in_use"] for stats in told if "peak_bytes_in_use" in stats]
    return {"device_bytes": max(most, default=None), "host_bytes": host_bytes()}


def host_bytes() -> int:
    """The most memory that this process had resident so far."""
    with contextlib.suppress(OSError):  # no Linux
        status = pathlib.Path("/proc/self/status").read_text(encoding="utf-8")
        # What getrusage tells begins with that of the process that started this one.
        if found := re.search(r"VmHWM:\s*(\d+) kB", status):
            return 1024 * int(found[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _where() -> dict[str, Any]:
    return {
        "devices": jax.device_count(),
        "kind": jax.devices()[0].device_kind,
        "processes": jax.process_count(),
        "e3jax": __version__,
        "commit": _commit(),
        "jax": jax.__version__,
        "python": ".".join(map(str, sys.version_info[:3])),
    }


@functools.cache
def _commit() -> str | None:
    """Of the clone that this runs from, `-dirty` where files differ from it; None of a wheel."""
    root = pathlib.Path(__file__).parent.parent
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    command += ["--exclude=*"]
    # Else a hook or a parent's repository may be meant.
    clean = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, env=clean)
    except (OSError, subprocess.SubprocessError):  # no git here
        return None
    return done.stdout.strip() or None

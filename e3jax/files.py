"""Small files written whole, and the identity of what a stage was given."""

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import importlib.resources
import json
import logging
import os
import pathlib
import secrets
import socket
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from e3jax.errors import UserError

log = logging.getLogger(__name__)

SAMPLED_ABOVE = 256 * 2**20  # bytes; larger weight files are hashed by samples
SAMPLE = 2**20
LEDGER = "ledger.jsonl"  # of a run folder: what each stage took


def bundled(path: str) -> pathlib.Path:
    """A path as given; but if nothing of that name is here, `demo`, `demo/...` and `configs/...`
    are what the package ships. (A wheel holds configs/ inside the package, a clone beside it.)"""
    here = pathlib.Path(path).expanduser()
    if here.exists() or here.parts[:1] not in (("demo",), ("configs",)):
        return here
    package = pathlib.Path(str(importlib.resources.files("e3jax")))
    shipped = (root / path for root in (package, package.parent))
    return next((found for found in shipped if found.exists()), here)


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes JSON aside, syncs it to disk and renames it: the file is whole or not there."""
    write_text(path, json.dumps(value, indent=2, default=plain) + "\n")


def write_text(path: pathlib.Path, text: str | Iterable[str]) -> None:
    """Writes text, or its parts as they come, aside, syncs it to disk and renames it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Processes of several hosts may share the folder, and their numbers.
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with open(aside, "w", encoding="utf-8") as file:
            file.writelines([text] if isinstance(text, str) else text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def read_json(path: pathlib.Path) -> Any:
    """The JSON value of a file this program wrote."""
    return json.loads(path.read_text(encoding="utf-8"))


def read_lines(path: pathlib.Path) -> Iterator[Any]:
    """The values of a file of JSON lines, in order; none where there is no file, and a torn last
    line is left out."""
    if not path.exists():
        return
    with open(path, encoding="utf-8") as file:
        for line in file:
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                return


def plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, pathlib.Path):
        return str(value)
    if hasattr(value, "tolist"):  # numpy and jax arrays
        return value.tolist()
    raise TypeError(f"not JSON: {type(value).__name__}")


@contextlib.contextmanager
def locked(path: pathlib.Path, place: str) -> Iterator[str]:
    """Nobody else is at work in a place while this is open, and so holds its lock file `path`.

    Yields what the file says of its holder. The file goes at the end; the lock itself when the
    process does, however it ends. Raises UserError, which begins with `place`, where another has
    it (naming that one) and where the file cannot be written.
    """
    token = f"process {os.getpid()} of {socket.gethostname()}, {secrets.token_hex(4)}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = _lock(path, place)
        os.pwrite(handle, token.ljust(os.fstat(handle).st_size).encode(), 0)
        os.fsync(handle)  # NFS shows it to other hosts only then
    except OSError as error:
        raise UserError(f"{place}: cannot be written: {error.strerror}") from error
    try:
        yield token
    finally:
        if _is(handle, path):
            path.unlink(missing_ok=True)
        os.close(handle)


def _lock(path: pathlib.Path, place: str) -> int:
    """A handle of the file, which has its lock. Raises UserError where another process has it."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            who = os.pread(handle, 200, 0).decode().strip() or "an unknown process"
            os.close(handle)
            raise UserError(
                f"{place}: another run is at work there ({who}); wait, or stop it (where a lost "
                f"host's lock stays with the file server, remove {path})"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                os.close(handle)
                raise
            log.warning(
                "%s: the file system has no locks (%s): let one run at a time use it", place, error
            )
        if _is(handle, path):
            return handle
        os.close(handle)  # of a file that its holder has just removed


def _is(handle: int, path: pathlib.Path) -> bool:
    """Whether an open file still has this name."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def fingerprint(value: Any) -> str:
    """sha256 of the canonical JSON of dataclasses, mappings, lists and plain values; 16 digits."""
    text = json.dumps(value, sort_keys=True, default=plain, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """`key: old -> new` for every leaf in which two nested mappings differ."""
    found = []
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key}: {a!r} -> {b!r}")
    return found


def checkpoint_hash(folder: pathlib.Path) -> str:
    """Identity of a Hugging Face checkpoint: config.json and every safetensors file.

    Files up to 256 MiB are hashed whole; of larger ones the size and 64 evenly spaced samples of
    1 MiB, the first of which holds the header. 16 digits.
    """
    total = hashlib.sha256()
    paths = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
    for path in paths:
        size = path.stat().st_size
        total.update(f"{path.name}:{size};".encode())
        with open(path, "rb") as file:
            if size <= SAMPLED_ABOVE:
                total.update(hashlib.file_digest(file, "sha256").digest())
                continue
            for number in range(64):
                file.seek(number * (size - SAMPLE) // 63)
                total.update(file.read(SAMPLE))
    return total.hexdigest()[:16]


def plain_tree(value: Any) -> Any:
    """What `value` is after a round trip through JSON, so that it compares with what was read."""
    return json.loads(json.dumps(value, default=plain))

"""An exported folder: planned, written aside, and renamed when it is whole. Without jax."""

import contextlib
import errno
import glob
import json
import os
import pathlib
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from e3jax.errors import UserError
from e3jax.files import locked
from e3jax.hf.folders import INDEX, SINGLE, inside

T = TypeVar("T")

SHARD_BYTES = 5 * 10**9
RECORD = "e3jax.json"  # what an exported folder was made from
# Carried on byte for byte from the source. Code (.py) never is.
TOKENIZER_FILES = ("tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json")
TOKENIZER_FILES += ("added_tokens.json", "chat_template*", "*.tiktoken", "tiktoken.model")
SOURCE_FILES = (*TOKENIZER_FILES, "generation_config.json", "LICENSE*", "NOTICE*", "USE_POLICY*")


def to_json(value: Mapping[str, Any]) -> bytes:
    """How every JSON file of an export is written."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def carried(source: pathlib.Path, patterns: Sequence[str] = SOURCE_FILES) -> dict[str, bytes]:
    """The small files that go along, by name. Raises UserError on a link out of the folder."""
    paths = {path for pattern in patterns for path in source.glob(pattern) if path.is_file()}
    names = sorted(path.name for path in paths if path.suffix != ".py")
    return {name: inside(source, name).read_bytes() for name in names}


def shard(items: Sequence[T], nbytes: Callable[[T], int], most: int) -> dict[str, list[T]]:
    """File name -> its tensors, in the order given, each file at most `most` bytes.

    A tensor that is larger than that alone gets a file of its own.
    """
    groups: list[list[T]] = [[]]
    size = 0
    for item in items:
        if groups[-1] and size + nbytes(item) > most:
            groups.append([])
            size = 0
        groups[-1].append(item)
        size += nbytes(item)
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    n = len(groups)
    return {f"model-{i:05d}-of-{n:05d}.safetensors": g for i, g in enumerate(groups, start=1)}


def index(names: Mapping[str, Sequence[str]], **metadata: int) -> dict[str, bytes]:
    """The index file of shards (file -> tensor names), by its name; none for a single file."""
    if len(names) == 1:
        return {}
    weight_map = {name: file for file, inside_it in names.items() for name in inside_it}
    return {INDEX: to_json({"metadata": metadata, "weight_map": weight_map})}


def check_room(out: pathlib.Path, needed: int) -> None:
    """Raises UserError when the output folder is in use or its disk is too small."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists and is not empty; give another folder or remove it")
    disk = next(p for p in (out, *out.parents) if p.is_dir())
    free = shutil.disk_usage(disk).free
    if free < needed:
        raise UserError(f"{out}: needs {needed:,} bytes and {disk} has {free:,} free; make room")


def partial(out: pathlib.Path, token: int) -> pathlib.Path:
    """The folder beside `out` that becomes it."""
    return out.parent / f".{out.name}.partial-{token:08x}"


def new_token() -> int:
    """What tells this export's folder from one that a killed run left."""
    return secrets.randbits(32)


@contextlib.contextmanager
def aside(out: pathlib.Path, token: int) -> Iterator[pathlib.Path]:
    """A folder beside `out` that becomes it at the end, or vanishes on any failure.

    Raises UserError while another run exports to `out`: so what is found there a killed run left.
    """
    folder = partial(out, token)
    with locked(out.parent / f".{out.name}.lock", str(out)):
        try:
            for left in out.parent.glob(f".{glob.escape(out.name)}.partial-*"):
                shutil.rmtree(left, ignore_errors=True)
            folder.mkdir()
            yield folder
            folder.replace(out)  # over an empty folder too
            sync(out.parent)
        except BaseException as error:
            shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise UserError(f"{out}: the disk is full; nothing was left behind") from error
            raise


def write_files(folder: pathlib.Path, content: Mapping[str, bytes]) -> None:
    """Writes small files, and syncs them and the folder to the disk."""
    for name, data in content.items():
        with (folder / name).open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    sync(folder)


def sync(folder: pathlib.Path) -> None:
    """A file's name is on the disk only when its folder is."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

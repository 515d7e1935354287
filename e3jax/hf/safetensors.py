"""The safetensors file format: a JSON header, then the tensors' bytes. Never whole in memory.

Layout: 8 bytes little-endian header length, the header {name: {dtype, shape, data_offsets}} with
an optional `__metadata__` of strings, and the data, each tensor right after the other.
"""

import dataclasses
import json
import math
import os
import pathlib
import struct
from collections.abc import Iterable, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from e3jax.errors import UserError

MAX_HEADER = 100_000_000  # bytes; the limit of the reference reader
DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class Stored:
    """Where a tensor lies."""

    path: pathlib.Path
    name: str
    code: str  # dtype as the format writes it; a key of DTYPES where it can be read
    shape: tuple[int, ...]
    start: int  # byte of the file
    nbytes: int
    scale: "Stored | None" = None  # of a quantised tensor, what its blocks are multiplied by

    def read(self, start: int, nbytes: int) -> bytes:
        """`nbytes` of the tensor from its byte `start` on, or what there is of them."""
        with self.path.open("rb") as file:
            file.seek(self.start + start)
            return file.read(min(nbytes, self.nbytes - start))


def read_header(path: pathlib.Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """Tensors by name, and the metadata, of one file.

    Raises UserError naming the file when it is truncated, its header lies, or tensors overlap.
    """

    def bad(what: str) -> UserError:
        return UserError(f"{path}: not a sound safetensors file: {what}; fetch or write it again")

    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(8)
            if len(head) < 8:
                raise bad(f"{size} bytes long")
            (length,) = struct.unpack("<Q", head)
            if length > size - 8:
                raise bad(f"header of {length} bytes in a file of {size}")
            if length > MAX_HEADER:
                raise bad(f"header of {length} bytes, more than {MAX_HEADER}")
            header = json.loads(file.read(length), object_pairs_hook=_no_duplicates)
        metadata = header.pop("__metadata__", None) or {}
        tensors = {name: _entry(path, name, e, 8 + length) for name, e in header.items()}
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except UserError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise bad(f"broken header ({error})") from None
    end = 8 + length
    for t in sorted(tensors.values(), key=lambda t: (t.start, t.nbytes)):
        if t.start != end:
            raise bad(f"{t.name} begins at byte {t.start}, the one before ends at {end}")
        end += t.nbytes
    if end > size:
        raise bad(f"truncated: {size} bytes of {end}")
    if end < size:
        raise bad(f"{size - end} bytes that belong to no tensor")
    return tensors, metadata


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"twice: {', '.join(sorted({n for n in names if names.count(n) > 1}))}")
    return found


def _entry(path: pathlib.Path, name: str, entry: dict[str, Any], base: int) -> Stored:
    code, shape = entry["dtype"], tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    if not all(isinstance(n, int) and n >= 0 for n in (*shape, begin, end)) or end < begin:
        raise ValueError(f"{name} has shape {shape} and offsets {begin}, {end}")
    if code in DTYPES and end - begin != math.prod(shape) * DTYPES[code].itemsize:
        raise ValueError(f"{name} is {code} {shape} in {end - begin} bytes")
    return Stored(path, name, code, shape, base + begin, end - begin)


Entry = tuple[str, str, tuple[int, ...], int]  # name, dtype code, shape, bytes


def header(layout: Iterable[Entry]) -> bytes:
    """What stands before the data of tensors that follow each other as in `layout`."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers insists on it
    end = 0
    for name, code, shape, nbytes in layout:
        begin, end = end, end + nbytes
        entries[name] = {"dtype": code, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins aligned
    return struct.pack("<Q", len(text)) + text


def write_file(path: pathlib.Path, layout: Sequence[Entry], pieces: Iterable[np.ndarray]) -> None:
    """Writes a file whose data come in contiguous pieces, and syncs it to disk."""
    with path.open("wb") as file:
        file.write(header(layout))
        start = file.tell()
        for piece in pieces:
            file.write(piece.reshape(-1).view(np.uint8).data)
        assert file.tell() - start == sum(nbytes for *_, nbytes in layout), path
        file.flush()
        os.fsync(file.fileno())

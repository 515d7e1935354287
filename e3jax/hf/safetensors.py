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

    def array(self) -> np.ndarray:
        """The tensor as a read-only memory map: only the pages that are looked at are read."""
        return np.memmap(self.path, DTYPES[self.code], "r", self.start, self.shape)


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


def write_file(
    path: pathlib.Path,
    layout: Sequence[tuple[str, tuple[int, ...]]],
    dtype: np.dtype,
    arrays: Iterable[np.ndarray],
) -> None:
    """Writes (name, shape) tensors of one dtype as they come from `arrays`, and syncs to disk."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers insists on it
    end = 0
    for name, shape in layout:
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": CODES[dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins aligned
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for (name, shape), array in zip(layout, arrays, strict=True):
            assert array.shape == shape and array.dtype == dtype, (name, array.shape, array.dtype)
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())

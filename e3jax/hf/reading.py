"""Parts of stored tensors into host memory: only their byte ranges, by several threads.

A box is (begin, end) on each axis. Without jax.
"""

import concurrent.futures
import itertools
import math
import os
import threading
from collections.abc import Mapping, Sequence

import numpy as np

from e3jax.errors import UserError
from e3jax.hf import blocks, dequantise
from e3jax.hf.safetensors import DTYPES, Stored
from e3jax.hf.tensors import Piece

Box = tuple[tuple[int, int], ...]
PAGE = 4096  # bytes

_thread = threading.local()


def submit(
    pool: concurrent.futures.Executor,
    piece: Piece,
    stored: Stored,
    parts: Mapping[Box, np.ndarray],
) -> list[concurrent.futures.Future[bool]]:
    """Starts reading the parts of a piece, given by their place in it.

    What several parts have in common is read once. The results: whether all was finite.
    """
    if stored.scale is not None:
        count = piece.split[0] // (total := dequantise.parts(stored))
        wanted = [
            n
            for n in range(total)
            if any(b < (n + 1) * count and n * count < e for (b, e), *_ in parts)
        ]
        return [pool.submit(_fill_dequantised, stored, n, piece.split, parts) for n in wanted]
    itemsize = DTYPES[stored.code].itemsize
    row_bytes = math.prod(piece.split[1:]) * itemsize
    reads = []
    for (begin, end), *rest in merged([_with_gaps(box, piece.split, itemsize) for box in parts]):
        for cut in blocks.cuts(end - begin, row_bytes):
            box = ((begin + cut.start, begin + cut.stop), *rest)
            reads.append(pool.submit(_fill, stored, piece.split, box, parts))
    return reads


def _with_gaps(box: Box, shape: Sequence[int], itemsize: int) -> Box:
    """The box, with what lies between its bytes where they lie together in runs shorter than a
    page: the disk gives whole pages, and a call a run costs more than the copy of what is wanted.
    """
    wide = list(box)
    while True:
        cut = [axis for axis, (begin, end) in enumerate(wide) if end - begin != shape[axis]]
        last = max(cut, default=0)
        run = math.prod(end - begin for begin, end in wide[last:]) * itemsize
        if last == 0 or run >= PAGE:
            return tuple(wide)
        wide[last] = (0, shape[last])


def merged(boxes: Sequence[Box]) -> list[Box]:
    """Boxes that are equal or do not overlap, those side by side joined: the same bytes."""
    found = sorted(set(boxes))
    axes = range(len(found[0]) if found else 0)
    for axis in reversed(axes):
        joined: list[Box] = []
        for box in sorted(found, key=lambda b: (b[:axis], b[axis + 1 :], b[axis])):
            last = joined[-1] if joined else None
            others_equal = last and all(last[a] == box[a] for a in axes if a != axis)
            if last and others_equal and last[axis][1] == box[axis][0]:
                joined[-1] = (*last[:axis], (last[axis][0], box[axis][1]), *last[axis + 1 :])
            else:
                joined.append(box)
        found = joined
    return found


def _fill(stored: Stored, shape: Sequence[int], box: Box, parts: Mapping[Box, np.ndarray]) -> bool:
    """Reads a box to where the parts have it; whether it is finite in their dtype."""
    dtype = DTYPES[stored.code]
    sizes = tuple(end - begin for begin, end in box)
    targets = []
    for place, part in parts.items():
        common = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(box, place, strict=True)]
        if all(a < b for a, b in common):
            to = tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(common, place))
            of = tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(common, box))
            targets.append((part[to], of))
    first = targets[0][0]
    if first.shape == sizes and first.dtype == dtype and first.flags.c_contiguous:
        read(stored, shape, box, first)
        return blocks.finite(first)
    found = _buffer(math.prod(sizes) * dtype.itemsize).view(dtype).reshape(sizes)
    read(stored, shape, box, found)
    if first.dtype != dtype:
        with np.errstate(over="ignore"):  # what overflows the dtype is told by its name
            found = found.astype(first.dtype)
    for part, of in targets:
        blocks.bits(part)[...] = blocks.bits(found)[of]
    return blocks.finite(found)


def _fill_dequantised(
    stored: Stored, number: int, shape: Sequence[int], parts: Mapping[Box, np.ndarray]
) -> bool:
    """Dequantises one of a tensor's parts along axis 0 to where `parts` have it; is it finite?"""
    count = shape[0] // dequantise.parts(stored)
    values = dequantise.part(stored, number).reshape(count, *shape[1:])
    for ((begin, end), *rest), part in parts.items():
        first, last = max(begin, number * count), min(end, (number + 1) * count)
        if first < last:
            rows = slice(first - number * count, last - number * count)
            part[first - begin : last - begin] = values[(rows, *(slice(*ends) for ends in rest))]
    return blocks.finite(values)


def read(stored: Stored, shape: Sequence[int], box: Box, to: np.ndarray) -> None:
    """Fills contiguous `to` with a box of a tensor seen as `shape`, and reads no byte beside it.

    The one place that reads weights.
    """
    sizes = [end - begin for begin, end in box]
    steps = [math.prod(shape[axis + 1 :]) * to.itemsize for axis in range(len(shape))]
    # The last axis that is not whole: from there on bytes lie together.
    last = max((axis for axis in range(len(shape)) if sizes[axis] != shape[axis]), default=0)
    run = math.prod(sizes[last:]) * to.itemsize
    first = stored.start + box[last][0] * steps[last]
    outer = itertools.product(*(range(begin, end) for begin, end in box[:last]))
    memory = memoryview(to.reshape(-1).view(np.uint8))
    with stored.path.open("rb", 0) as file:
        if last == 0 and hasattr(os, "posix_fadvise"):
            # One large request: a file just opened is otherwise read ahead in small ones.
            os.posix_fadvise(file.fileno(), first, run, os.POSIX_FADV_WILLNEED)
        for i, places in enumerate(outer):
            offset = first + sum(p * step for p, step in zip(places, steps))
            _read_into(file.fileno(), memory[i * run : (i + 1) * run], offset, stored)


def _read_into(handle: int, part: memoryview, offset: int, stored: Stored) -> None:
    while part:
        size = os.preadv(handle, [part], offset)
        if not size:
            raise UserError(f"{stored.path}: became shorter while {stored.name} was read")
        part, offset = part[size:], offset + size


def _buffer(nbytes: int) -> np.ndarray:
    """Memory of this thread that is used again: fresh pages cost as much as the copy."""
    if len(getattr(_thread, "buffer", b"")) < nbytes:
        _thread.buffer = np.empty(nbytes, np.uint8)
    return _thread.buffer[:nbytes]

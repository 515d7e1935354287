"""Pieces of a few MB of tensors: transposed, cast and checked while they are in the cache."""

from collections.abc import Iterator

import ml_dtypes
import numpy as np

BYTES = 4 * 2**20  # of a piece
# 16 rows of a matrix at a time: a transposed copy of 2-byte elements at 1.4 GB/s a core, numpy's
# own way 0.3 (12288 x 4096; 8 rows 1.2, 32 rows 0.9).
ROWS = 16
EXPONENT = {  # all its bits set: infinite or NaN
    np.dtype(ml_dtypes.bfloat16): 0x7F80,
    np.dtype(np.float16): 0x7C00,
    np.dtype(np.float32): 0x7F800000,
}


def cuts(rows: int, row_bytes: int) -> Iterator[slice]:
    """Slices of axis 0 of about BYTES each."""
    step = max(1, BYTES // max(1, row_bytes))
    return (slice(i, min(i + step, rows)) for i in range(0, rows, step))


def copy(to: np.ndarray, of: np.ndarray) -> None:
    """to[...] = of, of any strides and dtype; fast where one is the other transposed."""
    if to.dtype == of.dtype:  # numpy has loops for integers, and none for bfloat16
        to, of = to.view(_bits(to)), of.view(_bits(of))
    to, of = _joined(to, of)
    if to.ndim < 2:
        to[...] = of
        return
    # Whole rows of what is read, so that short runs are written: the other way waits for memory.
    axis = int(np.argmax(of.strides))
    to, of = np.moveaxis(to, axis, 0), np.moveaxis(of, axis, 0)
    with np.errstate(over="ignore"):  # what overflows the dtype is told by its name
        for i in range(0, len(to), ROWS):
            to[i : i + ROWS] = of[i : i + ROWS]


def finite(x: np.ndarray) -> bool:
    """Whether all of a contiguous float array is finite: 13 GB/s, where jnp.isfinite has 2."""
    unsigned = x.view(_bits(x)) & ((1 << (8 * x.itemsize - 1)) - 1)
    return not unsigned.size or int(unsigned.max()) < EXPONENT[x.dtype]


def _bits(x: np.ndarray) -> np.dtype:
    return np.dtype(f"u{x.itemsize}")


def _joined(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same arrays with neighbouring axes joined where both allow it without a copy."""
    shape = [n for n in a.shape if n != 1] or [1]
    a, b = a.reshape(shape), b.reshape(shape)
    i = 0
    while i + 1 < len(shape):
        if all(x.strides[i] == x.strides[i + 1] * shape[i + 1] for x in (a, b)):
            shape[i : i + 2] = [shape[i] * shape[i + 1]]
            a, b = np.reshape(a, shape, copy=False), np.reshape(b, shape, copy=False)
        else:
            i += 1
    return a, b

"""Pieces of a few MB of tensors, so that they are checked and cast while they are in the cache."""

from collections.abc import Iterator

import ml_dtypes
import numpy as np

BYTES = 4 * 2**20  # of a piece
EXPONENT = {  # all its bits set: infinite or NaN
    np.dtype(ml_dtypes.bfloat16): 0x7F80,
    np.dtype(np.float16): 0x7C00,
    np.dtype(np.float32): 0x7F800000,
}


def cuts(rows: int, row_bytes: int) -> Iterator[slice]:
    """Slices of axis 0 of about BYTES each."""
    step = max(1, BYTES // max(1, row_bytes))
    return (slice(i, min(i + step, rows)) for i in range(0, rows, step))


def bits(x: np.ndarray) -> np.ndarray:
    """The array as unsigned integers: numpy has fast loops for those and none for bfloat16."""
    return x.view(f"u{x.itemsize}")


def finite(x: np.ndarray) -> bool:
    """Whether all of a float array is finite, without a copy: fresh pages cost more than the look.

    Bit patterns grow with the magnitude: the greatest signed one is of the positive numbers, the
    greatest unsigned one of the negative ones, if there are any.
    """
    if not x.size:
        return True
    limit, sign = EXPONENT[x.dtype], 1 << (8 * x.itemsize - 1)
    return int(x.view(f"i{x.itemsize}").max()) < limit and int(bits(x).max()) < (sign | limit)

"""Token windows -> batches. The batch is a function of the step number, so resuming is exact."""

import collections
import itertools
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import grain
import numpy as np

from e3jax.data.text import Windows

Arrays = dict[str, np.ndarray]
T = TypeVar("T")


def gather(windows: Windows, index_b: np.ndarray) -> Arrays:
    """The batch of these windows; a window number of -1 gives an empty row.

    Returns
      tokens     int32 [B, T]
      positions  int32 [B, T], within the document; 0 on padding
      segments   int32 [B, T], document number in the window from 1; 0 = padding
      targets    int32 [B, T], the token at t + 1; 0 at the end
      mask       bool  [B, T], the prediction made at t carries loss: t + 1 belongs to the same
                 document and is a loss token
      index      int64 [B]
    """
    index_b = np.asarray(index_b, np.int64)
    rows, real_b1 = np.maximum(index_b, 0), index_b[:, None] >= 0
    tokens = np.where(real_b1, windows.tokens[rows], 0).astype(np.int32)
    segments = np.where(real_b1, windows.segments[rows], 0).astype(np.int32)
    loss = windows.loss[rows]

    same = segments[:, 1:] == segments[:, :-1]
    time = np.arange(tokens.shape[1], dtype=np.int32)
    starts = np.zeros_like(tokens)
    starts[:, 1:] = np.where(same, 0, time[1:])
    positions = np.where(segments > 0, time - np.maximum.accumulate(starts, axis=1), 0)

    targets, mask = np.zeros_like(tokens), np.zeros(tokens.shape, bool)
    targets[:, :-1] = tokens[:, 1:]
    mask[:, :-1] = same & (segments[:, 1:] > 0) & loss[:, 1:]
    return {
        "tokens": tokens,
        "positions": positions.astype(np.int32),
        "segments": segments,
        "targets": targets,
        "mask": mask,
        "index": index_b,
    }


def make_batches(
    windows: Windows,
    batch: int,
    seed: int,
    *,
    shuffle: bool = True,
    rows: np.ndarray | None = None,
) -> Callable[[int], Arrays]:
    """A function of the step number: step -> the batch, or those of its `rows` (see `gather`).

    Endless; every epoch visits each window once, in an order of its own that depends on the seed
    only, and on no process: each takes its rows of the same batch.
    """
    rows = np.arange(batch) if rows is None else rows
    order = _order(len(windows), seed, shuffle)

    def batch_at(step: int) -> Arrays:
        return gather(windows, np.array([order[int(i)] for i in step * batch + rows]))

    return batch_at


def used_windows(count: int, batch: int, seed: int, steps: int) -> np.ndarray:
    """The windows, of `count`, that `steps` shuffled batches are made of: int64, ascending."""
    if steps * batch >= count:  # the first epoch visits each
        return np.arange(count)
    order = _order(count, seed, shuffle=True)
    return np.unique(np.array([order[i] for i in range(steps * batch)]))


def _order(count: int, seed: int, shuffle: bool) -> grain.MapDataset:
    order = grain.MapDataset.source(range(count)).seed(seed)
    return (order.shuffle() if shuffle else order).repeat()


def ordered_batches(
    windows: Windows, batch: int, *, rows: np.ndarray | None = None
) -> Iterator[Arrays]:
    """Every window once, in order; the last batch is filled up with empty rows (index -1)."""
    rows = np.arange(batch) if rows is None else rows
    for start in range(0, len(windows), batch):
        yield gather(windows, np.where(start + rows < len(windows), start + rows, -1))


def prefetch(
    fn: Callable[[int], T], start: int, stop: int, depth: int = 2
) -> Generator[tuple[int, T], None, None]:
    """Yield (step, fn(step)) for start <= step < stop, computed up to `depth` ahead in a thread.

    An exception of `fn` is raised at its step; closing the generator ends the thread. One that is
    not exhausted must be closed: the garbage collector would wait for the thread wherever it
    happens to run, be it with the lock that a thread needs to end.
    """
    pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
    try:
        steps = iter(range(start, stop))
        ahead = collections.deque((s, pool.submit(fn, s)) for s in itertools.islice(steps, depth))
        while ahead:
            step, future = ahead.popleft()
            result = future.result()
            ahead.extend((s, pool.submit(fn, s)) for s in itertools.islice(steps, 1))
            yield step, result
    finally:
        pool.shutdown(cancel_futures=True)

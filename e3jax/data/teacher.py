"""The offline teacher: top-k log-probabilities of windows, in TensorStore (zarr3, zstd).

Row m belongs to window m, so any shuffle finds its row, and only the windows that a run uses need
be there. One chunk a row, so that a row is read alone; 16 rows a shard file, so that half a million
windows are not two million files. A shard file is rewritten as its rows come, so all windows of a
block go to one process.
"""

import dataclasses
import hashlib
import logging
import os
import zlib
from typing import Any

import jax
import numpy as np
import tensorstore as ts

from e3jax import processes
from e3jax.data.batches import gather
from e3jax.data.store import Store
from e3jax.data.windows import Windows
from e3jax.errors import UserError

log = logging.getLogger(__name__)

VERSION = 2
FINISHED = "finished.json"
ROWS_PER_SHARD = 16
BLOCK = 64  # rows that one process writes: whole shard files of every array
ROWS_TOGETHER = 64  # read at a time when the whole cache is verified
WRITTEN = 1 << 32  # added to a row's crc32: a row that was never written reads as 0
UNIT = 2.0**-40  # of sums over rows, as whole numbers: exact, so the same for any host count


def estimate_bytes(tokens: int, k: int) -> int:
    """Bytes of the cache before compression: 68 a token at k = 10."""
    return tokens * (k * (4 + 2) + 4 + 4)


def deal(todo: np.ndarray, owner_b: np.ndarray) -> np.ndarray:
    """Which window each row of each batch writes: int64 [batches, B], -1 for none.

    todo: windows still to be written, ascending; owner_b: the process that has a row of a batch.
    Blocks of windows go to the processes in turn, so no two ever write into the same file.
    """
    blocks = todo // BLOCK
    turn = np.searchsorted(np.unique(blocks), blocks)
    writers = np.unique(owner_b)
    queues = {w: todo[turn % len(writers) == i] for i, w in enumerate(writers)}
    places = {w: np.flatnonzero(owner_b == w) for w in writers}
    count = max(-(-len(queues[w]) // len(places[w])) for w in writers)
    dealt = np.full((count, len(owner_b)), -1, np.int64)
    for w in writers:
        mine = np.full(count * len(places[w]), -1, np.int64)
        mine[: len(queues[w])] = queues[w]
        dealt[:, places[w]] = mine.reshape(count, -1)
    return dealt


@dataclasses.dataclass(frozen=True)
class TeacherCache:
    """A cache that is open: for writing (`create`) or, when finished, for reading (`open_cache`).

    Arrays on disk, with log-probabilities at the temperature in `meta`:
      ids      int32   [M, T, k], most probable first
      logp     float16 [M, T, k]
      entropy  float32 [M, T], of the full vocabulary, nats
      lognorm  float32 [M, T], logsumexp of logits / temperature
      check    uint64  [M], crc32 of the row's bytes + 2**32 once they are durable, 0 before
    rows: the windows that are needed, ascending.
    stats is None until the cache is finished with these rows, then
      mean_entropy   mean of entropy over the predictions that carry loss, nats
      captured_mass  mean of sum_k exp(logp) over them
      loss_tokens    how many they are
    """

    store: Store
    meta: dict[str, Any]
    k: int
    rows: np.ndarray
    arrays: dict[str, ts.TensorStore]
    stats: dict[str, float] | None

    @classmethod
    def create(
        cls,
        place: str | os.PathLike[str],
        windows: Windows,
        k: int,
        temperature: float,
        teacher_hash: str,
        rows: np.ndarray | None = None,
    ) -> "TeacherCache":
        """Open a cache for writing, a new one or one that was begun with the same facts.

        place: a folder or gs://bucket/path. rows: the windows that are needed; None = all.
        Raises UserError when it holds a cache of other facts, or the disk is too small.
        """
        store, rows = Store(str(place)), _all_rows(windows, rows)
        meta = _facts(windows, k, temperature, teacher_hash)
        begun = store.read_json("meta.json")
        if begun is not None:
            for name, value in begun.items():
                if meta.get(name) != value:
                    raise UserError(
                        f"{place}: holds a teacher cache with {name} {value!r}, and this run has "
                        f"{meta.get(name)!r}; remove the folder or choose another"
                    )
        elif any(not name.startswith(".") for name in store.names()):
            raise UserError(f"{place}: is not an empty folder and holds no teacher cache")
        else:
            _check_disk(store, len(rows) * meta["window"], k)
            store.write_json("meta.json", meta)
        cache = cls(store, meta, k, rows, _open_arrays(store, meta, create=True), None)
        if begun is not None and (left := len(cache.todo())):
            _check_disk(store, left * meta["window"], k)
        return dataclasses.replace(cache, stats=_stats(store, rows))

    def todo(self) -> np.ndarray:
        """Numbers of the needed rows that are not yet durably written, int64, ascending."""
        try:
            return self.rows[self.arrays["check"].read().result()[self.rows] == 0]
        except ValueError as error:
            raise self.store.failed("read", error) from error

    def write(
        self,
        index_b: np.ndarray,
        ids_btk: np.ndarray,
        logp_btk: np.ndarray,
        entropy_bt: np.ndarray,
        lognorm_bt: np.ndarray,
    ) -> None:
        """Write rows and return when they are durable; rows with index -1 are left out.

        Raises UserError when the teacher gave a NaN or an infinity, naming the window.
        """
        real = np.asarray(index_b) >= 0
        index = np.asarray(index_b, np.int64)[real]
        if not len(index):
            return
        given = {"ids": ids_btk, "logp": logp_btk, "entropy": entropy_bt, "lognorm": lognorm_bt}
        rows = {
            name: np.ascontiguousarray(np.asarray(x)[real], self.arrays[name].dtype.numpy_dtype)
            for name, x in given.items()
        }
        for name in ("logp", "entropy", "lognorm"):
            finite = np.isfinite(rows[name]).reshape(len(index), -1).all(axis=1)
            if not finite.all():
                raise UserError(
                    f"the teacher's {name} is not finite in window {index[~finite][0]}; "
                    "check the checkpoint and its compute dtype"
                )
        try:
            for write in [self.arrays[n][index].write(x) for n, x in rows.items()]:
                write.result()
            # Only now: a kill before this line leaves the rows to do.
            self.arrays["check"][index].write(_checks(rows)).result()
        except ValueError as error:
            raise self.store.failed("written", error) from error

    def read(self, index_b: np.ndarray) -> dict[str, np.ndarray]:
        """Rows by window number, -1 giving zeros: ids [B, T, k], logp, entropy and lognorm.

        Raises UserError naming the first row that is missing or damaged.
        """
        index_b = np.asarray(index_b, np.int64)
        index = np.maximum(index_b, 0)
        try:
            rows, check = self._rows(index)
            bad = np.flatnonzero(_checks(rows) != check)
        except ValueError as error:
            if len(index) == 1:
                raise self._damaged(index[0], str(error)) from error
            for one in index:
                self.read(np.array([one]))
            raise
        if len(bad):
            reason = "its checksum is wrong" if check[bad[0]] else "it was never written"
            raise self._damaged(index[bad[0]], reason)
        for x in rows.values():
            x[index_b < 0] = 0
        return rows | {name: rows[name][:, :, : self.k] for name in ("ids", "logp")}

    def finish(self, windows: Windows) -> dict[str, float]:
        """Verify every needed row, measure `stats` and mark the cache as finished with these rows.

        Each process verifies a part of them. Raises UserError when rows are missing or damaged.
        """
        part = np.array_split(self.rows, jax.process_count())[jax.process_index()]
        entropy = mass = count = 0
        for start in range(0, len(part), ROWS_TOGETHER):
            index = part[start : start + ROWS_TOGETHER]
            rows, mask_bt = self.read(index), gather(windows, index)["mask"]
            p_bt = np.exp(rows["logp"].astype(np.float64)).sum(axis=-1)
            entropy += _fixed(rows["entropy"].sum(axis=1, where=mask_bt, dtype=np.float64))
            mass += _fixed(p_bt.sum(axis=1, where=mask_bt))
            count += int(np.count_nonzero(mask_bt))
        entropy, mass, count = map(sum, zip(*processes.gather([entropy, mass, count]), strict=True))
        stats = {
            "mean_entropy": entropy * UNIT / max(count, 1),
            "captured_mass": mass * UNIT / max(count, 1),
            "loss_tokens": count,
        }
        if processes.is_first():
            self.store.write_json(FINISHED, {"needed": _digest(self.rows)} | stats)
        processes.barrier("teacher cache finished")
        return stats

    def bytes_a_token(self) -> float:
        """What a token takes as stored, compressed; from some of the shard files."""
        files = np.unique(self.rows // ROWS_PER_SHARD)
        files = files[np.linspace(0, len(files) - 1, min(len(files), 8)).astype(int)]
        total = rows = 0
        for file in files.tolist():
            end = min((file + 1) * ROWS_PER_SHARD, self.meta["rows"])
            check = self.arrays["check"][file * ROWS_PER_SHARD : end]
            rows += int(np.count_nonzero(check.read().result()))
            for name, ends in (
                ("ids", "/0/0"),
                ("logp", "/0/0"),
                ("entropy", "/0"),
                ("lognorm", "/0"),
            ):
                total += len(self.store.read(f"{name}/c/{file}{ends}") or b"")
        return total / max(rows * self.meta["window"], 1)

    def _rows(self, index: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
        reads = {name: array[index].read() for name, array in self.arrays.items()}
        rows = {name: np.array(read.result()) for name, read in reads.items()}
        return rows, rows.pop("check")

    def _damaged(self, row: int, reason: str) -> UserError:
        return UserError(
            f"{self.store.place}: row {row} of the teacher cache cannot be used: {reason}; "
            "remove the folder and run again to write it anew"
        )


def open_cache(
    place: str | os.PathLike[str],
    windows: Windows,
    k: int,
    temperature: float,
    teacher_hash: str,
    rows: np.ndarray | None = None,
) -> TeacherCache:
    """Open a finished cache for reading the first k outcomes of `rows` (None = all).

    Raises UserError when it is not there or not finished, has fewer than k outcomes, or was written
    for other windows, another teacher or another temperature.
    """
    store, rows = Store(str(place)), _all_rows(windows, rows)
    meta = store.read_json("meta.json")
    if meta is None:
        raise UserError(f"{place}: no teacher cache here")
    wanted = _facts(windows, k, temperature, teacher_hash)
    for name, value in wanted.items():
        if name != "k" and meta.get(name) != value:
            raise UserError(
                f"{place}: the teacher cache was written for {name} {meta.get(name)!r}, and this "
                f"run asks for {value!r}; write another cache, or go back to that {name}"
            )
    if meta["k"] < k:
        raise UserError(
            f"{place}: the teacher cache holds the {meta['k']} most probable tokens, and this run "
            f"asks for distill.top_k={k}; lower it or write another cache"
        )
    stats = _stats(store, rows)
    if stats is None:
        raise UserError(
            f"{place}: the teacher cache is not finished with this run's windows; run its writing "
            "again"
        )
    return TeacherCache(store, meta, k, rows, _open_arrays(store, meta, create=False), stats)


def _facts(windows: Windows, k: int, temperature: float, teacher_hash: str) -> dict[str, Any]:
    """What a cache is of; kept beside it and compared by whoever opens it."""
    return {
        "version": VERSION,
        "windows": windows.fingerprint,
        "rows": len(windows),
        "window": windows.tokens.shape[1],
        "teacher": teacher_hash,
        "temperature": float(temperature),
        "k": k,
    }


def _open_arrays(store: Store, meta: dict[str, Any], create: bool) -> dict[str, ts.TensorStore]:
    m, t, k = meta["rows"], meta["window"], meta["k"]
    layout: dict[str, tuple[str, tuple[int, ...], int, int]] = {
        # dtype, shape, rows a chunk, rows a shard
        "ids": ("int32", (m, t, k), 1, ROWS_PER_SHARD),
        "logp": ("float16", (m, t, k), 1, ROWS_PER_SHARD),
        "entropy": ("float32", (m, t), 1, ROWS_PER_SHARD),
        "lognorm": ("float32", (m, t), 1, ROWS_PER_SHARD),
        "check": ("uint64", (m,), BLOCK, BLOCK),
    }
    try:
        opening = {name: store.open_array(name, *of, create=create) for name, of in layout.items()}
        return {name: future.result() for name, future in opening.items()}
    except ValueError as error:
        raise store.failed("opened", error) from error


def _checks(rows: dict[str, np.ndarray]) -> np.ndarray:
    """WRITTEN + crc32 over the bytes of each row's arrays, uint64 [B]."""
    checks = np.full(len(rows["ids"]), WRITTEN, np.uint64)
    for i in range(len(checks)):
        crc = 0
        for name in ("ids", "logp", "entropy", "lognorm"):
            crc = zlib.crc32(np.ascontiguousarray(rows[name][i]), crc)
        checks[i] += np.uint64(crc)
    return checks


def _check_disk(store: Store, tokens: int, k: int) -> None:
    """Tell the size; UserError when the disk that will hold the cache has less free."""
    need, free = estimate_bytes(tokens, k), store.free_bytes()
    room = "" if free is None else f", {free / 1e9:.1f} GB free"
    log.info(
        "teacher cache: %.2f GB to write to %s (%d bytes a token before compression%s)",
        need / 1e9,
        store.place,
        estimate_bytes(1, k),
        room,
    )
    if free is not None and need > free:
        raise UserError(
            f"{store.place}: the teacher cache needs {need / 1e9:.2f} GB and the disk has "
            f"{free / 1e9:.2f} GB free; choose another folder (distill.cache), a smaller "
            "distill.top_k, or distill.teacher=online"
        )


def _all_rows(windows: Windows, rows: np.ndarray | None) -> np.ndarray:
    return np.arange(len(windows)) if rows is None else rows


def _digest(rows: np.ndarray) -> str:
    return hashlib.sha256(np.asarray(rows, np.int64).tobytes()).hexdigest()[:16]


def _stats(store: Store, rows: np.ndarray) -> dict[str, float] | None:
    found = store.read_json(FINISHED) or {}
    return found if found.pop("needed", None) == _digest(rows) else None


def _fixed(x_b: np.ndarray) -> int:
    """The sum of float64 numbers in whole UNITs."""
    return sum(round(x / UNIT) for x in x_b.tolist())

"""The offline teacher: top-k log-probabilities of every window, in TensorStore (zarr3, zstd).

Row m belongs to window m, so any shuffle finds its row. One chunk a row, so that a row is read
alone; 16 rows a shard file, so that half a million windows are not two million files.
"""

import dataclasses
import json
import logging
import os
import pathlib
import shutil
import zlib
from typing import Any

import numpy as np
import tensorstore as ts

from e3jax.data.batches import gather
from e3jax.data.windows import Windows
from e3jax.errors import UserError

log = logging.getLogger(__name__)

VERSION = 1
ROWS_PER_SHARD = 16
ROWS_TOGETHER = 64  # read at a time when the whole cache is verified
WRITTEN = 1 << 32  # added to a row's crc32: a row that was never written reads as 0


def estimate_bytes(tokens: int, k: int) -> int:
    """Bytes of the cache before compression: 68 a token at k = 10."""
    return tokens * (k * (4 + 2) + 4 + 4)


@dataclasses.dataclass(frozen=True)
class TeacherCache:
    """A cache that is open: for writing (`create`) or, when finished, for reading (`open_cache`).

    Arrays on disk, with log-probabilities at the temperature in `meta`:
      ids      int32   [M, T, k], most probable first
      logp     float16 [M, T, k]
      entropy  float32 [M, T], of the full vocabulary, nats
      lognorm  float32 [M, T], logsumexp of logits / temperature
      check    uint64  [M], crc32 of the row's bytes + 2**32 once they are durable, 0 before
    stats is None until the cache is finished, then
      mean_entropy   mean of entropy over the predictions that carry loss, nats
      captured_mass  mean of sum_k exp(logp) over them
      loss_tokens    how many they are
    """

    path: pathlib.Path
    meta: dict[str, Any]
    k: int
    arrays: dict[str, ts.TensorStore]
    stats: dict[str, float] | None

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        windows: Windows,
        k: int,
        temperature: float,
        teacher_hash: str,
    ) -> "TeacherCache":
        """Open a cache for writing, a new one or one that was begun with the same facts.

        Raises UserError when the folder holds a cache of other facts, or the disk is too small.
        """
        path = pathlib.Path(path).expanduser()
        meta = _facts(windows, k, temperature, teacher_hash)
        begun = (path / "meta.json").is_file()
        if begun:
            for name, value in _read_json(path / "meta.json").items():
                if meta.get(name) != value:
                    raise UserError(
                        f"{path}: holds a teacher cache with {name} {value!r}, and this run has "
                        f"{meta.get(name)!r}; remove the folder or choose another"
                    )
        elif path.is_file() or any(not f.name.startswith(".") for f in path.glob("*")):
            raise UserError(f"{path}: is not an empty folder and holds no teacher cache")
        else:
            _check_disk(path, estimate_bytes(windows.tokens.size, k))
            path.mkdir(parents=True, exist_ok=True)
            _write_json(path / "meta.json", meta)
        cache = cls(path, meta, k, _open_arrays(path, meta, create=True), _stats(path))
        if begun:
            _check_disk(path, estimate_bytes(len(cache.todo()) * meta["window"], k))
        return cache

    def todo(self) -> np.ndarray:
        """Numbers of the rows that are not yet durably written, int64, ascending."""
        return np.flatnonzero(self.arrays["check"].read().result() == 0)

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
            raise UserError(f"{self.path}: cannot be written: {error}") from error

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
        """Verify every row, measure `stats` and mark the cache as finished; returns the stats.

        Raises UserError when rows are missing or damaged.
        """
        entropy = mass = count = 0
        for start in range(0, len(windows), ROWS_TOGETHER):
            index = np.arange(start, min(start + ROWS_TOGETHER, len(windows)))
            rows, mask_bt = self.read(index), gather(windows, index)["mask"]
            entropy += rows["entropy"].sum(where=mask_bt, dtype=np.float64)
            mass += np.exp(rows["logp"].astype(np.float64)).sum(axis=-1).sum(where=mask_bt)
            count += np.count_nonzero(mask_bt)
        stats = {
            "mean_entropy": float(entropy / max(count, 1)),
            "captured_mass": float(mass / max(count, 1)),
            "loss_tokens": int(count),
        }
        _write_json(self.path / "finished.json", stats)
        return stats

    def _rows(self, index: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
        reads = {name: array[index].read() for name, array in self.arrays.items()}
        rows = {name: np.array(read.result()) for name, read in reads.items()}
        return rows, rows.pop("check")

    def _damaged(self, row: int, reason: str) -> UserError:
        return UserError(
            f"{self.path}: row {row} of the teacher cache cannot be used: {reason}; "
            "remove the folder and run again to write it anew"
        )


def open_cache(
    path: str | os.PathLike[str], windows: Windows, k: int, temperature: float, teacher_hash: str
) -> TeacherCache:
    """Open a finished cache for reading its first k outcomes.

    Raises UserError when it is not there or not finished, has fewer than k outcomes, or was written
    for other windows, another teacher or another temperature.
    """
    path = pathlib.Path(path).expanduser()
    if not (path / "meta.json").is_file():
        raise UserError(f"{path}: no teacher cache here")
    meta = _read_json(path / "meta.json")
    wanted = _facts(windows, k, temperature, teacher_hash)
    for name, value in wanted.items():
        if name != "k" and meta.get(name) != value:
            raise UserError(
                f"{path}: the teacher cache was written for {name} {meta.get(name)!r}, and this "
                f"run asks for {value!r}; write another cache, or go back to that {name}"
            )
    if meta["k"] < k:
        raise UserError(
            f"{path}: the teacher cache holds the {meta['k']} most probable tokens, and this run "
            f"asks for distill.top_k={k}; lower it or write another cache"
        )
    stats = _stats(path)
    if stats is None:
        raise UserError(f"{path}: the teacher cache is not finished; run its writing again")
    return TeacherCache(path, meta, k, _open_arrays(path, meta, create=False), stats)


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


def _open_arrays(
    path: pathlib.Path, meta: dict[str, Any], create: bool
) -> dict[str, ts.TensorStore]:
    t, k = meta["window"], meta["k"]
    layout = {  # dtype, shape of a row, rows a chunk, rows a shard
        "ids": ("int32", (t, k), 1, ROWS_PER_SHARD),
        "logp": ("float16", (t, k), 1, ROWS_PER_SHARD),
        "entropy": ("float32", (t,), 1, ROWS_PER_SHARD),
        "lognorm": ("float32", (t,), 1, ROWS_PER_SHARD),
        "check": ("uint64", (), 4096, 4096),
    }
    zstd = [{"name": "bytes"}, {"name": "zstd", "configuration": {"level": 3}}]
    try:
        opening = {
            name: ts.open(
                {
                    "driver": "zarr3",
                    "kvstore": {"driver": "file", "path": str(path / name)},
                    "metadata": {
                        "codecs": [
                            {
                                "name": "sharding_indexed",
                                "configuration": {"chunk_shape": (chunk, *row), "codecs": zstd},
                            }
                        ]
                    },
                },
                open=True,
                create=create,
                dtype=dtype,
                shape=(meta["rows"], *row),
                chunk_layout=ts.ChunkLayout(write_chunk_shape=(shard, *row)),
            )
            for name, (dtype, row, chunk, shard) in layout.items()
        }
        return {name: future.result() for name, future in opening.items()}
    except ValueError as error:
        raise UserError(f"{path}: the teacher cache cannot be opened: {error}") from error


def _checks(rows: dict[str, np.ndarray]) -> np.ndarray:
    """WRITTEN + crc32 over the bytes of each row's arrays, uint64 [B]."""
    checks = np.full(len(rows["ids"]), WRITTEN, np.uint64)
    for i in range(len(checks)):
        crc = 0
        for name in ("ids", "logp", "entropy", "lognorm"):
            crc = zlib.crc32(np.ascontiguousarray(rows[name][i]), crc)
        checks[i] += np.uint64(crc)
    return checks


def _check_disk(path: pathlib.Path, need: int) -> None:
    """Tell the size; UserError when the disk that will hold `path` has less free."""
    there = next(p for p in (path, *path.absolute().parents) if p.exists())
    free = shutil.disk_usage(there).free
    log.info("teacher cache: %.2f GB to write to %s, %.1f GB free", need / 1e9, path, free / 1e9)
    if need > free:
        raise UserError(
            f"{path}: the teacher cache needs {need / 1e9:.2f} GB and the disk has "
            f"{free / 1e9:.2f} GB free; choose another folder, a smaller distill.top_k, or "
            "distill.teacher=online"
        )


def _stats(path: pathlib.Path) -> dict[str, float] | None:
    finished = path / "finished.json"
    return _read_json(finished) if finished.is_file() else None


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); remove its folder") from error


def _write_json(path: pathlib.Path, content: dict[str, Any]) -> None:
    """Whole or not at all."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with aside.open("w") as file:
        json.dump(content, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)

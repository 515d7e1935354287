"""Fixed token windows: documents packed into them, and kept on disk as .npy memory maps."""

import bisect
import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np

from e3jax.errors import UserError

ARRAYS = {"tokens": np.dtype(np.int32), "segments": np.dtype(np.int32), "loss": np.dtype(bool)}
OPEN_WINDOWS = 256  # bounds the packer's memory: a window of 4096 tokens is some 20 kB


class Document(NamedTuple):
    """Tokens int32 [N] of one document, and bool [N]: the token is one to be learnt."""

    ids: np.ndarray
    loss: np.ndarray


@dataclasses.dataclass(frozen=True)
class Windows:
    """Documents in windows of T tokens, memory-mapped.

    tokens    int32 [M, T]
    segments  int32 [M, T], document number in the window from 1; 0 = padding
    loss      bool  [M, T], the token is one to be learnt
    meta      counts: documents, tokens, loss_tokens (predictions that carry loss), windows, split,
              dropped, empty and contaminated documents; fill, the share of places in use
    fingerprint  hash of the three arrays: the windows' identity, wherever they lie
    """

    tokens: np.ndarray
    segments: np.ndarray
    loss: np.ndarray
    meta: dict[str, Any]
    fingerprint: str

    def __len__(self) -> int:
        return len(self.tokens)

    def first(self, count: int) -> "Windows":
        """The first `count` of them, or all."""
        if count >= len(self):
            return self
        return Windows(
            tokens=self.tokens[:count],
            segments=self.segments[:count],
            loss=self.loss[:count],
            meta=self.meta,
            fingerprint=f"{self.fingerprint}/first {count}",
        )

    def filled(self, count: int) -> int:
        """Places of the first `count` that are not padding."""
        return int(np.count_nonzero(self.segments[:count]))

    @functools.cached_property
    def documents(self) -> int:
        """How many a window has at most."""
        return int(self.segments.max(initial=1))


def from_arrays(
    tokens: np.ndarray, segments: np.ndarray | None = None, loss: np.ndarray | None = None
) -> Windows:
    """Windows of arrays [M, T] as `Windows` has them. Without segments each is one document;
    without loss all tokens that are not padding are to be learnt.

    Raises UserError for arrays that are not of one shape [M, T], and tokens that are no integers.
    """
    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or not tokens.size or not np.issubdtype(tokens.dtype, np.integer):
        raise UserError(
            f"tokens: {tokens.dtype} {list(tokens.shape)}; expected integers [windows, tokens]"
        )
    segments = np.ones_like(tokens) if segments is None else np.asarray(segments)
    loss = segments > 0 if loss is None else np.asarray(loss)
    for name, array in (("segments", segments), ("loss", loss)):
        if array.shape != tokens.shape:
            raise UserError(f"{name}: shape {list(array.shape)}; tokens have {list(tokens.shape)}")
    arrays = {
        name: np.ascontiguousarray(array, ARRAYS[name])
        for name, array in zip(ARRAYS, (tokens, segments, loss), strict=True)
    }
    digest = _digest(tokens.shape[1])
    for row in zip(*arrays.values(), strict=True):
        for part in row:
            digest.update(part)
    return Windows(**arrays, meta={}, fingerprint=digest.hexdigest())


def _digest(window: int) -> Any:
    """What the arrays' rows, one after the other, make the fingerprint with."""
    return hashlib.sha256(f"{window}".encode())


def cut(
    documents: Iterable[Document], window: int, long_rows: Literal["split", "drop"], counts: dict
) -> Iterator[Document]:
    """Documents of at most `window` tokens: longer ones are split into pieces, or dropped."""
    for document in documents:
        size = len(document.ids)
        if size > window and long_rows == "drop":
            counts["dropped"] += 1
            continue
        counts["documents"] += 1
        counts["split"] += size > window
        for start in range(0, size, window):
            yield Document(*(part[start : start + window] for part in document))


def pack(documents: Iterable[Document], window: int, limit: int) -> Iterator[list[Document]]:
    """Documents that share a window: best fit over at most `limit` open windows; 0 = one each."""
    ready: list[tuple[int, int, list[Document]]] = []  # (room left, age, documents), by room
    for age, document in enumerate(documents):
        size = len(document.ids)
        fit = bisect.bisect_left(ready, (size,))
        room, _, members = ready.pop(fit) if fit < len(ready) else (window, age, [])
        members.append(document)
        bisect.insort(ready, (room - size, age, members))
        while ready and (ready[0][0] == 0 or len(ready) > limit):
            yield ready.pop(0)[2]
    for _, _, members in ready:
        yield members


@contextlib.contextmanager
def alone(folder: pathlib.Path) -> Iterator[None]:
    """Others on this host that would make the same folder wait: one tokenises for all of them.

    On a disk without locks each works for itself, and the first to end wins.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # a folder that cannot be written is told when it is
            folder.parent.mkdir(parents=True, exist_ok=True)
            path = folder.with_name(f".{folder.name}.lock")
            lock = stack.enter_context(open(path, "w"))
            stack.callback(path.unlink, missing_ok=True)  # while it is held
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def store_windows(
    packed: Iterable[list[Document]], window: int, folder: pathlib.Path, counts: dict[str, int]
) -> None:
    """Write the windows and meta.json aside, then rename to `folder`.

    `counts` goes to meta.json as it is after the last window. Where another process was first, its
    folder stays. Raises UserError when there is no window, or the folder cannot be written.
    """
    aside = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = pathlib.Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        meta = _write_arrays(packed, window, aside)
        if not meta["windows"]:
            raise UserError(
                "no document is left: "
                + ", ".join(f"{counts[k]} {k}" for k in ("empty", "dropped", "contaminated"))
                + "; check the source's fields and rows, data.window and data.long_rows"
            )
        meta |= counts
        (aside / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
        try:
            aside.rename(folder)
        except OSError:
            if not (folder / "meta.json").is_file():  # it is there: another process was first
                raise
    except OSError as error:
        raise UserError(f"data.cache: {folder.parent} cannot be written: {error}") from error
    finally:
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)


def _write_arrays(
    packed: Iterable[list[Document]], window: int, folder: pathlib.Path
) -> dict[str, Any]:
    """The three .npy files, one window at a time; returns what was counted on the way."""
    count = tokens = loss_tokens = 0
    digest = _digest(window)
    with contextlib.ExitStack() as stack:
        files = {n: stack.enter_context((folder / f"{n}.npy").open("wb")) for n in ARRAYS}
        for name, file in files.items():
            _write_header(file, ARRAYS[name], (0, window))
        for members in packed:
            row = {name: np.zeros(window, dtype) for name, dtype in ARRAYS.items()}
            end = 0
            for segment, (ids, loss) in enumerate(members, 1):
                place = slice(end, end + len(ids))
                row["tokens"][place], row["segments"][place] = ids, segment
                row["loss"][place] = loss
                end = place.stop
                loss_tokens += int(np.count_nonzero(loss[1:]))  # nothing predicts the first token
            for name, file in files.items():
                file.write(row[name].tobytes())
                digest.update(row[name])
            count += 1
            tokens += end
        for name, file in files.items():
            file.seek(0)
            _write_header(file, ARRAYS[name], (count, window))
            file.flush()
            os.fsync(file.fileno())
    return {
        "windows": count,
        "window": window,
        "tokens": tokens,
        "loss_tokens": loss_tokens,
        "fill": tokens / max(count * window, 1),
        "fingerprint": digest.hexdigest(),
    }


def _write_header(file: BinaryIO, dtype: np.dtype, shape: tuple[int, int]) -> None:
    """An .npy header; numpy pads it so that the first axis can grow in place."""
    header = {"descr": dtype.str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


def load_windows(folder: pathlib.Path) -> Windows:
    """The windows stored in a folder. Raises UserError where it is damaged."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        arrays = {n: np.load(folder / f"{n}.npy", mmap_mode="r") for n in ARRAYS}
        shapes = {a.shape for a in arrays.values()}
        if shapes != {(meta["windows"], meta["window"])}:
            raise ValueError(f"shapes {shapes} are not those of meta.json")
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{folder}: damaged token windows ({error}); remove this folder, it is made again"
        ) from error
    return Windows(**arrays, meta=meta, fingerprint=meta["fingerprint"])

"""Rows of anything `datasets` reads, in order, with a fingerprint of what they hold.

Local files are streamed, so that nothing of them is copied into the Hugging Face cache.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import logging
import pathlib
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

from e3jax.config import Source
from e3jax.errors import UserError
from e3jax.files import bundled

log = logging.getLogger(__name__)

BUILDERS = {
    ".jsonl": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".txt": "text",
}
COMPRESSED = {".gz", ".bz2", ".xz", ".zst"}
PROBE_S = 10.0  # the hub's client retries a dead network for 23 s; asking once first is quick


class HubUnavailable(UserError):
    """The set is neither here nor to be had from the hub."""


@dataclasses.dataclass(frozen=True)
class Rows:
    """A source that was found: its content's fingerprint, and its rows when iterated.

    Iterating yields (number of the row in the source, from 0; dict of its fields) and raises
    UserError for what cannot be read, naming the line where there is one.
    """

    source: Source
    fingerprint: str
    load: Callable[[], Any]

    def __iter__(self) -> Iterator[tuple[int, dict[str, Any]]]:
        with _readable(self.source):
            data = self.load()
            for rows in self.source.rows or (":",):
                start, stop = self._bounds(data, rows)
                part = data.skip(start)
                if stop is not None:
                    part = part.take(max(stop - start, 0))
                number = start - 1
                for number, row in zip(itertools.count(start), part):
                    yield number, row
                if number < start:
                    what = "the data set is empty" if rows == ":" else f"rows {rows} select nothing"
                    raise UserError(f"{self.source.path}: {what} (split {self.source.split!r})")

    def _bounds(self, data: Any, rows: str) -> tuple[int, int | None]:
        """First row and end of a slice; an end of None where the length need not be known."""
        start, stop = (int(part) if part else None for part in rows.split(":"))
        if hasattr(data, "__len__"):
            size = len(data)
        elif (start or 0) >= 0 and (stop or 0) >= 0:
            return start or 0, stop
        elif is_local(self.source.path):
            size = sum(1 for _ in data)
        else:
            raise UserError(
                f"{self.source.path}: rows {rows} count from the end, which a streamed hub set "
                "does not know; give numbers from the start, or streaming: false"
            )
        return slice(start, stop).indices(size)[:2]


def open_rows(source: Source) -> Rows:
    """Find a local file, a folder or a hub data set.

    Raises UserError for a missing file or unknown format, HubUnavailable for a hub id that is
    neither reachable nor in the local Hugging Face cache.
    """
    if is_local(source.path):
        return _open_local(source, bundled(source.path))
    return _open_hub(source)


def is_local(path: str) -> bool:
    """Whether a path means a file or folder of this machine rather than a hub id."""
    here = pathlib.Path(path).expanduser()
    return (
        here.exists()
        or path.startswith((".", "/", "~"))
        or path.count("/") > 1
        or _kind(here) in BUILDERS
    )


def _kind(path: pathlib.Path) -> str:
    """The suffix that tells the format: `train.jsonl.gz` -> `.jsonl`."""
    suffixes = [s.lower() for s in path.suffixes]
    while suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _open_local(source: Source, path: pathlib.Path) -> Rows:
    if not path.exists():
        raise UserError(f"{source.path}: no such file or folder; check data.*.path")
    if path.is_dir():
        files = sorted(
            f
            for f in path.rglob("*")
            if f.is_file() and not any(p.startswith(".") for p in f.relative_to(path).parts)
        )
        if not any(_kind(f) in BUILDERS for f in files):
            raise UserError(f"{source.path}: the folder holds none of {', '.join(BUILDERS)}")
        options: dict[str, Any] = {"path": str(path)}
    else:
        files = [path]
        if _kind(path) not in BUILDERS:
            raise UserError(
                f"{source.path}: unknown format {path.suffix!r}; "
                f"expected one of {', '.join(BUILDERS)}, or any of them with .gz"
            )
        options = {"path": BUILDERS[_kind(path)], "data_files": {source.split: str(path)}}
    if all(_kind(f) == ".txt" for f in files if _kind(f) in BUILDERS):
        options["sample_by"] = "document"
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
        digest.update(f"{file.relative_to(path.parent)} {content}\n".encode())

    def load() -> Any:
        # Streaming keeps nothing but would leave a lock file in the home's cache.
        with tempfile.TemporaryDirectory() as scratch:
            return _quiet().load_dataset(
                **options, split=source.split, streaming=True, cache_dir=scratch
            )

    return Rows(source, digest.hexdigest(), load)


def _open_hub(source: Source) -> Rows:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        revision = huggingface_hub.HfApi().dataset_info(source.path, timeout=PROBE_S).sha
    except (HfHubHTTPError, HFValidationError) as error:
        raise UserError(
            f"{source.path}: no such file or folder here, and the Hugging Face hub refuses a data "
            f"set of this name ({str(error).strip().splitlines()[0]}); check the spelling, or log "
            "in with `hf auth login` where the set is gated"
        ) from error
    except Exception as error:  # the transport's own errors differ between releases of the client
        import datasets

        cached = pathlib.Path(datasets.config.HF_DATASETS_CACHE, source.path.replace("/", "___"))
        if source.streaming or not cached.is_dir():
            raise HubUnavailable(
                f"{source.path}: no such file or folder here, and the Hugging Face hub cannot be "
                f"reached to look for a data set of this name ({type(error).__name__}); give a "
                "local file, or run where there is a network"
            ) from error
        log.warning("%s: no network; using the copy in %s", source.path, cached)
        revision = None

    def load() -> Any:
        return _quiet().load_dataset(
            source.path,
            source.name,
            split=source.split,
            revision=revision,
            streaming=source.streaming,
        )

    return Rows(source, f"{source.path} {source.name} {source.split} {revision}", load)


def _quiet() -> Any:
    """The `datasets` module with its progress bars and log off."""
    logging.getLogger("datasets").setLevel(logging.CRITICAL)  # it speaks while being imported
    import datasets

    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity(logging.CRITICAL)
    return datasets


@contextlib.contextmanager
def _readable(source: Source) -> Iterator[None]:
    """Errors of the readers -> UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        cause = error.__cause__ or error
        if isinstance(cause, StopIteration):  # how `datasets` says that a file has no content
            raise UserError(f"{source.path}: the data set is empty") from error
        line = _malformed_line(pathlib.Path(source.path).expanduser())
        reason = line or str(cause).strip() or type(cause).__name__
        raise UserError(f"{source.path}: cannot be read: {reason}") from error


def _malformed_line(path: pathlib.Path) -> str | None:
    """What is wrong with the first line of a jsonl file that is no JSON object, if any."""
    if not path.is_file() or _kind(path) != ".jsonl":
        return None
    import fsspec

    with (
        contextlib.suppress(OSError, EOFError, UnicodeDecodeError),  # the caller's error says it
        fsspec.open(path, "rt", compression="infer", encoding="utf-8") as lines,
    ):
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    parsed = json.loads(line)
                except ValueError as error:
                    return f"line {number} (row {number - 1}) is not valid JSON: {error}"
                if not isinstance(parsed, dict):
                    return f"line {number} (row {number - 1}) is not a JSON object"
    return None

"""Where large arrays lie: a folder, or a Google Cloud Storage bucket, through TensorStore."""

import contextlib
import json
import pathlib
import re
import shutil
from collections.abc import Iterator
from typing import Any

import tensorstore as ts

from e3jax import files
from e3jax.errors import UserError

LOCK = ".lock"  # held by the run that writes

# TensorStore's own 32 retries would keep a run without network waiting for a quarter of an hour.
CONTEXT = {
    "gcs_request_retries": {"max_retries": 5, "initial_delay": "1s", "max_delay": "8s"},
}


def kvstore(place: str) -> dict[str, Any]:
    """TensorStore's kvstore specification of a folder or of gs://bucket/path.

    Raises UserError for an address of another kind, and for a bucket without a name.
    """
    if "://" not in place:
        return {"driver": "file", "path": f"{pathlib.Path(place).expanduser().absolute()}/"}
    found = re.fullmatch(r"gs://([a-z0-9][a-z0-9._-]+)(?:/(.*))?", place)
    if found is None:
        raise UserError(f"{place}: expected a folder, or gs://bucket/path")
    path = (found[2] or "").strip("/")
    return {"driver": "gcs", "bucket": found[1], "path": f"{path}/" if path else ""}


class Store:
    """A place: small JSON files, written whole or not at all, and zarr3 arrays."""

    def __init__(self, place: str) -> None:
        self.place, self.spec = place, kvstore(place)
        self.context = ts.Context(CONTEXT)
        self._files = ts.KvStore.open(self.spec, context=self.context).result()

    def read(self, name: str) -> bytes | None:
        """A file's bytes, or None where there is none. Raises UserError."""
        try:
            found = self._files.read(name).result()
        except ValueError as error:
            raise self.failed("read", error) from error
        return None if found.state == "missing" else found.value

    def read_json(self, name: str) -> dict[str, Any] | None:
        text = self.read(name)
        try:
            return None if text is None else json.loads(text)
        except ValueError as error:
            raise UserError(
                f"{self.place}/{name}: not valid JSON ({error}); remove the cache"
            ) from error

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        try:
            self._files.write(name, json.dumps(content, indent=2).encode()).result()
        except ValueError as error:
            raise self.failed("written", error) from error

    def names(self) -> list[str]:
        """Everything that lies here."""
        try:
            return [name.decode() for name in self._files.list().result()]
        except ValueError as error:
            raise self.failed("read", error) from error

    def open_array(
        self, name: str, dtype: str, shape: tuple[int, ...], chunk: int, shard: int, create: bool
    ) -> ts.Future:
        """A zarr3 array of zstd chunks: rows a chunk, which is read alone, and a shard file."""
        row = shape[1:]
        zstd = [{"name": "bytes"}, {"name": "zstd", "configuration": {"level": 3}}]
        sharding = {"chunk_shape": (chunk, *row), "codecs": zstd}
        return ts.open(
            {
                "driver": "zarr3",
                "kvstore": self.spec | {"path": f"{self.spec['path']}{name}/"},
                "metadata": {
                    "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
                },
            },
            context=self.context,
            open=True,
            create=create,
            dtype=dtype,
            shape=shape,
            chunk_layout=ts.ChunkLayout(write_chunk_shape=(shard, *row)),
        )

    @contextlib.contextmanager
    def locked(self, key: str) -> Iterator[None]:
        """Nobody else writes here while this is open. For a bucket there is no lock: let one run at
        a time write there. Raises UserError, naming who does, where another run does."""
        if self.spec["driver"] != "file":
            yield
            return
        with files.locked(self._lock, f"{key}={self.place}"):
            yield

    def check_free(self, key: str) -> None:
        """Raises UserError where another run writes here. A store that is read only is free."""
        if self.spec["driver"] == "file" and self._lock.exists():
            with self.locked(key):
                pass

    @property
    def _lock(self) -> pathlib.Path:
        return pathlib.Path(self.spec["path"]) / LOCK

    def free_bytes(self) -> int | None:
        """Room on the disk that the folder is or will be on; None where there is no limit."""
        if self.spec["driver"] != "file":
            return None
        path = pathlib.Path(self.spec["path"])
        return shutil.disk_usage(next(p for p in (path, *path.parents) if p.exists())).free

    def failed(self, what: str, error: ValueError) -> UserError:
        """The UserError for an error of TensorStore."""
        advice = ""
        if self.spec["driver"] == "gcs":
            advice = (
                "; check the bucket's name, the network and the credentials "
                "(gcloud auth application-default login)"
            )
        return UserError(f"{self.place}: cannot be {what}: {error}{advice}")

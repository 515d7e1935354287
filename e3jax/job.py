"""A loaded job: the model on its mesh, its tokenizer, and the data as token windows."""

import dataclasses
import functools
import hashlib
import itertools
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from e3jax import config, files, mesh
from e3jax.data import batches as data_batches
from e3jax.data import text
from e3jax.data.windows import Windows
from e3jax.errors import UserError
from e3jax.hf import families, load
from e3jax.models.config import ModelConfig
from e3jax.models.decoder import Batch, Params

BATCH_FIELDS = tuple(f.name for f in dataclasses.fields(Batch))
DTYPES = {"bfloat16": jnp.bfloat16, "float32": jnp.float32}


@dataclasses.dataclass(frozen=True)
class Job:
    """What every stage needs. `params` are the dense model's, in the dtype they are stored in."""

    run: config.Run
    out: pathlib.Path
    source: pathlib.Path  # the dense checkpoint's folder
    identity: str  # hash of that checkpoint
    cfg: ModelConfig
    params: Params
    tokenizer: Any

    @property
    def dtype(self) -> Any:
        return DTYPES[self.run.model.dtype]

    def inputs(self, **more: Any) -> dict[str, Any]:
        """What decides a stage's result: the model, the seed, the arithmetic, and `more`."""
        common = {"model": self.identity, "seed": self.run.seed, "dtype": self.run.model.dtype}
        return files.plain_tree(common | more)

    @functools.cached_property
    def train(self) -> Windows:
        return self._windows(self.run.data.train, self.run.data.decontaminate)

    @functools.cached_property
    def held_out(self) -> Windows:
        return self._windows(self.run.data.held_out)

    @functools.cached_property
    def measured(self) -> Windows:
        """Windows that the figures are taken on: data.measure, or else the test problems."""
        return self._windows(self.run.data.measure or self.run.data.test)

    def _windows(
        self, sources: Sequence[config.Source], decontaminate: Sequence[str] = ()
    ) -> Windows:
        return text.tokenize(sources, self.run.data, self.source, decontaminate=decontaminate)

    @functools.cached_property
    def problems(self) -> list[text.Problem]:
        found = itertools.chain.from_iterable(
            text.problems(source, self.tokenizer) for source in self.run.data.test
        )
        return list(itertools.islice(found, self.run.evaluate.rows))

    @functools.cached_property
    def eos(self) -> tuple[int, ...]:
        """End-of-sequence ids: of generation_config.json, else config.json, else the tokenizer."""
        for name in ("generation_config.json", "config.json"):
            path = self.source / name
            ids = families.read_json(path).get("eos_token_id") if path.is_file() else None
            if ids is not None:
                return tuple(ids) if isinstance(ids, list) else (ids,)
        return (self.tokenizer.eos_token_id,) if self.tokenizer.eos_token_id is not None else ()


def open_mesh(spec: config.Mesh) -> Any:
    """Context manager: the mesh of a configuration, set for everything inside."""
    return jax.set_mesh(mesh.make_mesh(spec.replica, spec.data, spec.model))


def open_job(run: config.Run) -> Job:
    """Loads the dense model and checks that its parts belong together. Call under the mesh."""
    out = claim_folder(run)
    source = load.resolve(run.model.path, run.model.revision)
    cfg = families.read_config(source)
    check_window(run, cfg)
    load.check_vocabulary(source, cfg)
    return Job(
        run=run,
        out=out,
        source=source,
        identity=files.checkpoint_hash(source),
        cfg=cfg,
        params=load.load_params(source, cfg),
        tokenizer=text.load_tokenizer(source),
    )


def check_window(run: config.Run, cfg: ModelConfig) -> None:
    """Raises UserError when a window does not fit the model's context."""
    if run.data.window > cfg.max_position:
        raise UserError(
            f"data.window={run.data.window}: the model's context is {cfg.max_position} tokens"
        )


def claim_folder(run: config.Run) -> pathlib.Path:
    """The run folder, created or ours already. Raises UserError when it holds something else."""
    out = pathlib.Path(run.out).expanduser()
    mark = out / "run.json"
    if out.exists() and not out.is_dir():
        raise UserError(f"out={out}: is a file; expected a folder, or a name to create one under")
    if out.exists() and any(out.iterdir()) and not mark.exists():
        raise UserError(f"out={out}: not empty, and not a run of e3jax; choose another folder")
    if jax.process_index() == 0:
        files.write_json(mark, config.as_dict(run))
    return out


def to_batch(arrays: dict[str, np.ndarray]) -> Batch:
    """The fields of a gathered batch that a model sees."""
    return Batch(**{name: arrays[name] for name in BATCH_FIELDS})


def step_batches(windows: Windows, batch: int, seed: int) -> Callable[[int], dict[str, np.ndarray]]:
    """step -> this process's rows of the shuffled batch, with the windows' numbers as `index`."""
    return data_batches.make_batches(
        windows,
        batch,
        seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


def ordered(windows: Windows, batch: int, limit: int | None = None) -> Iterator[Batch]:
    """The first `limit` windows (or all) in order, as numpy batches; a multiple of the devices."""
    if limit is not None:
        windows = dataclasses.replace(
            windows,
            tokens=windows.tokens[:limit],
            segments=windows.segments[:limit],
            loss=windows.loss[:limit],
        )
    batch = rows_per_batch(min(batch, len(windows)))
    rows = data_batches.ordered_batches(
        windows, batch, process_index=jax.process_index(), process_count=jax.process_count()
    )
    return map(to_batch, rows)


def rows_per_batch(batch: int) -> int:
    """`batch` rounded up to a multiple of the devices that share its rows."""
    set_mesh = mesh.current()
    shards = 1 if set_mesh is None else mesh.axis_size(set_mesh, mesh.BATCH)
    return -(-batch // shards) * shards


def data_seed(run: config.Run, stage: str) -> int:
    """A seed of its own for each stage's order of the data; int32."""
    digest = hashlib.sha256(f"{run.seed}/{stage}".encode()).digest()
    return int.from_bytes(digest[:4], "little") >> 1

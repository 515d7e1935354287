"""A loaded job: the model on its mesh, its tokenizer, and the data as token windows."""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import logging
import os
import pathlib
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from e3jax import config, configure, files, mesh, processes
from e3jax.data import batches as data_batches
from e3jax.data import text
from e3jax.data.windows import Windows
from e3jax.errors import UserError
from e3jax.hf import families, folders, hub, load
from e3jax.models import decoder
from e3jax.models.config import ModelConfig
from e3jax.models.decoder import Batch, Params
from e3jax.training import metrics

log = logging.getLogger(__name__)

BATCH_FIELDS = ("tokens", "positions", "segments", "targets", "mask")
LOCK = ".lock"  # held by the process that writes in a run folder
SHARED_S = 10  # for what one host wrote to be seen by another
DTYPES = {"bfloat16": jnp.bfloat16, "float32": jnp.float32}


@dataclasses.dataclass(frozen=True)
class Job:
    """What every stage needs."""

    run: config.Run
    out: pathlib.Path
    source: pathlib.Path  # the dense checkpoint's folder
    identity: str  # hash of that checkpoint
    cfg: ModelConfig
    load: Any  # functools.cache of () -> Params: jobs that share it share these too
    tokenizer: Any

    @property
    def dtype(self) -> Any:
        return DTYPES[self.run.model.dtype]

    @property
    def params(self) -> Params:
        """The dense model's, in the dtype they are stored in; read when first asked for: where all
        was done before, never, but for what a recovery with `distill.freeze` did not train."""
        return self.load()

    def release(self) -> None:
        """The dense parameters are kept no longer; who asks for them again has them read."""
        self.load.cache_clear()

    def having(self, **changes: Any) -> "Job":
        """The same job with other fields, in another folder for one; what was read is shared, where
        they do not decide it."""
        other = dataclasses.replace(self, **changes)
        before, now = self.run, other.run
        if (before.data, before.model, before.evaluate) != (now.data, now.model, now.evaluate):
            return other
        other.__dict__.update({k: v for k, v in self.__dict__.items() if k not in FIELDS})
        return other

    def on(self, train: Windows, held_out: Windows) -> "Job":
        """The same job with these windows in place of those of its configuration."""
        other = self.having()
        other.__dict__.update(train=train, held_out=held_out)
        return other

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
        return tokenize(self.run, sources, self.source, decontaminate)

    @functools.cached_property
    def problems(self) -> list[text.Problem]:
        found = itertools.chain.from_iterable(
            text.problems(source, self.tokenizer, self.cfg.max_position)
            for source in self.run.data.test
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


FIELDS = {field.name for field in dataclasses.fields(Job)}


def open_mesh(spec: config.Mesh) -> Any:
    """Context manager: the mesh of a configuration, set for everything inside."""
    return jax.set_mesh(mesh.make_mesh(spec.replica, spec.data, spec.model))


def open_job(run: config.Run) -> Job:
    """Checks that the parts of the dense model belong together. Call under the mesh."""
    source = hub.resolve(run.model.path, run.model.revision)
    cfg = families.read_config(source)
    tokenizer = text.load_tokenizer(source)
    text.check_vocab(tokenizer, cfg.vocab_size)
    tell_replicated(cfg, folders.source_dtype(source))
    identity = files.checkpoint_hash(source)
    processes.same(f"model.path={run.model.path}", identity)
    return Job(
        run=run,
        out=pathlib.Path(run.out).expanduser(),
        source=source,
        identity=identity,
        cfg=cfg,
        load=functools.cache(functools.partial(load.load_params, source, cfg)),
        tokenizer=tokenizer,
    )


def in_memory(
    run: config.Run, cfg: ModelConfig, params: Params, train: Windows, held_out: Windows
) -> Job:
    """A job of a model and of windows that are there, in the folder `run.out`.

    Nothing is known of a checkpoint or a tokenizer, so that stages which write none are for it.
    """
    check_window(run, cfg)
    return Job(
        run=run,
        out=pathlib.Path(run.out),
        source=pathlib.Path(run.model.path),
        identity="in memory",
        cfg=cfg,
        load=functools.cache(lambda: params),
        tokenizer=None,
    ).on(train, held_out)


def tell_replicated(cfg: ModelConfig, dtype: str) -> None:
    """Logs which parameters the mesh does not divide, and what that costs."""
    for line in decoder.replicated(cfg, dtype):
        log.info("%s", line)


def tokenize(
    run: config.Run,
    sources: Sequence[config.Source],
    tokenizer: pathlib.Path,
    decontaminate: Sequence[str] = (),
) -> Windows:
    """Token windows of sources. Every host makes them once, in its own data.cache or a shared one.

    Raises UserError where hosts would train on different data.
    """
    windows = text.tokenize(sources, run.data, tokenizer, decontaminate=decontaminate)
    names = ", ".join(source.path for source in sources)
    processes.same(f"the tokens of {names}", windows.fingerprint)
    return windows


def check_window(run: config.Run, cfg: ModelConfig) -> None:
    """Raises UserError when a window does not fit the model's context."""
    if run.data.window > cfg.max_position:
        raise UserError(
            f"data.window={run.data.window}: the model's context is {cfg.max_position} tokens"
        )


def check_batches(run: config.Run, *, search: bool, distill: bool) -> None:
    """Raises UserError where the mesh that is set cannot share the batches of these stages evenly.

    They are never filled up: what a step learns must not depend on the number of devices.
    """
    if search:
        mesh.check_shared("search.batch", run.search.batch)
        mesh.check_shared("search.microbatch", run.search.together)
    trains = search and (run.search.candidates > 1 or run.search.adapt_steps)
    if distill or trains:
        mesh.check_shared("distill.batch", run.distill.batch)
        mesh.check_shared("distill.microbatch", run.distill.together)


@contextlib.contextmanager
def claim_folder(run: config.Run) -> Iterator[pathlib.Path]:
    """The run folder, created or ours already, and nobody else's while the block runs.

    Raises UserError when it holds something else, when another run works in it, and when the
    processes of this one do not all see the same folder.
    """
    out = pathlib.Path(run.out).expanduser()
    processes.same("the configuration", files.fingerprint(dataclasses.replace(run, out="")))
    lock = contextlib.ExitStack()

    def claim() -> str:
        mark = out / "run.json"
        if out.exists() and not out.is_dir():
            raise UserError(f"out={out}: is a file; expected a folder, or a name for a new one")
        # A kill may leave the lock and the mark half written.
        found = os.listdir(out) if out.exists() else []
        strange = [name for name in found if name != LOCK and not name.startswith(".run.json.")]
        if strange and not mark.exists():
            raise UserError(f"out={out}: not empty, and not a run of e3jax; choose another folder")
        token = lock.enter_context(files.locked(out / LOCK, f"out={out}"))
        try:
            if not mark.exists():
                record(run, out)
        except OSError as error:
            raise UserError(f"out={out}: cannot be written: {error.strerror}") from error
        return token

    with lock:
        token = processes.from_first(claim)
        if not processes.everywhere(_sees(out / LOCK, token)):
            raise UserError(
                f"out={out}: the processes do not see the same folder there; with several hosts it "
                "must lie on storage that all of them share"
            )
        yield out


def _sees(lock: pathlib.Path, token: str) -> bool:
    """Whether a file has this text, or gets it: a network's file system may show an older state."""
    end = time.monotonic() + SHARED_S
    while not (lock.is_file() and lock.read_text().strip() == token):
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True


def record(run: config.Run, out: pathlib.Path) -> None:
    """run.json: the configuration that is at work in a run folder. Its folder is ours."""
    if processes.is_first():
        files.write_json(out / "run.json", configure.as_dict(run))


def boards(run: config.Run, out: pathlib.Path) -> contextlib.AbstractContextManager[None]:
    """Weights & Biases where it was asked for: a run folder is one run there, restarts included."""
    if run.wandb is None or not processes.is_first():
        return contextlib.nullcontext()
    path = out / "wandb.json"
    if not path.exists():
        files.write_json(path, secrets.token_hex(8))
    place = files.read_json(path)
    return metrics.weights_and_biases(run.wandb, place, out, configure.as_dict(run))


def keep_compiled(out: pathlib.Path) -> None:
    """Keeps what XLA compiles in the run folder `out`, which must be ours, for a restart and for a
    baseline's recovery (the same program); elsewhere where JAX_COMPILATION_CACHE_DIR says so.
    """
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(out / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def to_batch(arrays: Mapping[str, np.ndarray | jax.Array], windows: Windows) -> Batch:
    """The fields of a batch gathered from `windows` that a model sees."""
    fields = {name: arrays[name] for name in BATCH_FIELDS}
    return Batch(**fields, documents=windows.documents)


def step_batches(windows: Windows, batch: int, seed: int) -> Callable[[int], dict[str, np.ndarray]]:
    """step -> this process's rows of the shuffled batch, with the windows' numbers as `index`."""
    try:
        rows = mesh.rows_here(batch)
    except UserError as error:
        refusal = error

        def refused(step: int) -> Any:  # a finished stage asks for none, on whatever devices
            raise refusal

        return refused
    return data_batches.make_batches(windows, batch, seed, rows=rows)


def ordered(windows: Windows, batch: int, limit: int | None = None) -> Iterator[Batch]:
    """The first `limit` windows (or all) in order, as numpy batches; a multiple of the devices."""
    return (to_batch(arrays, windows) for arrays in ordered_arrays(windows, batch, limit))


def ordered_arrays(
    windows: Windows, batch: int, limit: int | None = None
) -> Iterator[dict[str, np.ndarray]]:
    """The same with the windows' numbers as `index`."""
    if limit is not None:
        windows = windows.first(limit)
    batch = rows_per_batch(min(batch, len(windows)))
    return data_batches.ordered_batches(windows, batch, rows=mesh.rows_here(batch))


def sample(windows: Windows, count: int, seed: int) -> Windows:
    """`count` of the windows, or all, without any twice and in an order that the seed decides."""
    chosen = np.random.default_rng(seed).permutation(len(windows))[:count]
    return dataclasses.replace(
        windows,
        tokens=windows.tokens[chosen],
        segments=windows.segments[chosen],
        loss=windows.loss[chosen],
        fingerprint=f"{windows.fingerprint}/{count}/{seed}",
    )


def rows_per_batch(batch: int) -> int:
    """`batch` rounded up to a multiple of the devices that share its rows."""
    return -(-batch // mesh.row_shards()) * mesh.row_shards()


def data_seed(run: config.Run, stage: str) -> int:
    """A seed of its own for each stage's order of the data; int32."""
    digest = hashlib.sha256(f"{run.seed}/{stage}".encode()).digest()
    return int.from_bytes(digest[:4], "little") >> 1


def once(path: pathlib.Path, inputs: Mapping[str, Any], make: Callable[[], Any]) -> Any:
    """The JSON value of `make()`, kept in a file and made again only for other inputs."""
    key = files.fingerprint(inputs)

    def kept() -> Any:
        found = files.read_json(path) if path.exists() else {}
        return found if found.get("inputs") == key else None

    if (found := processes.from_first(kept)) is not None:
        return found["value"]
    value = make()
    if processes.is_first():
        files.write_json(path, {"inputs": key, "value": value})
    return value

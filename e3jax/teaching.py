"""The offline teacher's pass over the windows of a recovery: all processes fill its caches.

From then on the recovery is done without the dense model, and without its memory.
"""

import contextlib
import dataclasses
import logging
import pathlib

import jax
import numpy as np

from e3jax import config, job, mesh, processes
from e3jax.data import batches
from e3jax.data.store import Store
from e3jax.data.teacher import FINISHED, TeacherCache, deal, estimate_bytes, open_cache
from e3jax.data.windows import Windows
from e3jax.distill import losses
from e3jax.errors import UserError
from e3jax.job import Job
from e3jax.models import decoder
from e3jax.models.decoder import Params
from e3jax.progress import over

log = logging.getLogger(__name__)


HELD_OUT = "held_out"  # in the folder of the train windows' cache


@dataclasses.dataclass(frozen=True)
class Stored:
    """The dense model's top-k: of the train windows that a recovery uses, and of data.held_out."""

    train: TeacherCache
    held_out: TeacherCache


def read_rows(cache: TeacherCache, index_b: np.ndarray) -> losses.TopK:
    """What is stored of windows, by their numbers, as numpy arrays."""
    found = cache.read(index_b)
    return losses.TopK(ids=found["ids"], logp=found["logp"], entropy=found["entropy"])


def stored_teacher(job_: Job) -> Stored:
    """What the dense model says, written once.

    In distill.cache, else in the run folder. It goes on where it was killed, and takes in more
    windows when a run needs more. Each process writes files of its own. Raises UserError while
    another run writes it; in a bucket (gs://) that is not noticed.
    """
    recipe = job_.run.distill
    if recipe.top_k > job_.cfg.vocab_size:
        raise UserError(
            f"distill.top_k={recipe.top_k}: the model's vocabulary has {job_.cfg.vocab_size} tokens"
        )
    place = _place(job_.run, job_.out)
    seed = job.data_seed(job_.run, "distill")
    used = batches.used_windows(len(job_.train), recipe.batch, seed, recipe.steps)
    held_out = np.arange(len(job_.held_out))
    return Stored(
        train=_written(job_, "teacher cache", place, job_.train, used),
        held_out=_written(
            job_,
            "teacher cache of data.held_out",
            f"{place.rstrip('/')}/{HELD_OUT}",
            job_.held_out,
            held_out,
        ),
    )


def check_free(run: config.Run, out: pathlib.Path) -> None:
    """Raises UserError while another run writes the teacher cache that `run` will need."""

    def look() -> None:
        store = Store(_place(run, out))
        if store.read_json(FINISHED) is None:  # else it may hold what is needed
            store.check_free("distill.cache")

    if run.distill.teacher == "cache":
        processes.from_first(look)


def _place(run: config.Run, out: pathlib.Path) -> str:
    return run.distill.cache or str(out / "teacher")


def _written(job_: Job, name: str, place: str, windows: Windows, rows: np.ndarray) -> TeacherCache:
    """The finished cache of these rows, written or completed if need be."""
    recipe = job_.run.distill
    facts = (place, windows, recipe.top_k, recipe.temperature, job_.identity, rows)
    made, lock = None, contextlib.ExitStack()

    def ready() -> bool:
        nonlocal made
        try:
            open_cache(*facts)
            return True
        except UserError:
            lock.enter_context(Store(place).locked("distill.cache"))
            made = TeacherCache.create(*facts)  # one makes the files, all open them
            return False

    with lock:
        if not processes.from_first(ready):
            _fill(job_, name, windows, made or TeacherCache.create(*facts))
    return open_cache(*facts)


def _fill(job_: Job, name: str, windows: Windows, cache: TeacherCache) -> None:
    recipe = job_.run.distill

    @jax.jit
    def topk(params: Params, batch: decoder.Batch) -> tuple[jax.Array, ...]:
        h = decoder.hidden(params, batch, job_.cfg, dtype=job_.dtype, remat="none")
        head = decoder.head(params, job_.cfg)
        return losses.teacher_topk(h, head, recipe.top_k, recipe.temperature, recipe.chunk)

    needed = np.isin(cache.rows, cache.todo()).astype(np.uint8)
    todo = cache.rows[processes.array_from_first(needed) == 1]
    rows = job.rows_per_batch(recipe.together)
    here, owner = mesh.rows_here(rows), mesh.row_owners(rows)
    turns = deal(todo, owner)
    for index in over(name, turns, len(turns)):
        batch = job.to_batch(batches.gather(windows, index[here]), windows)
        found = map(mesh.local_rows, topk(job_.params, mesh.shard_batch(batch)))
        mine = np.where(owner[here] == jax.process_index(), index[here], -1)
        cache.write(mine, *found)
    processes.barrier("teacher cache written")
    stats = cache.finish(windows)
    log.info(
        "%s: %d of %d windows, %.1f bytes a token (%d before compression), %.2f %% of the mass "
        "captured",
        name,
        len(cache.rows),
        len(windows),
        cache.bytes_a_token(),
        estimate_bytes(1, recipe.top_k),
        100 * stats["captured_mass"],
    )

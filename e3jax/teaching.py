"""The offline teacher's pass over the windows of a recovery: all processes fill its cache."""

import contextlib
import logging

import jax
import numpy as np

from e3jax import job, mesh, processes
from e3jax.data import batches
from e3jax.data.store import Store
from e3jax.data.teacher import TeacherCache, deal, estimate_bytes, open_cache
from e3jax.distill import losses
from e3jax.errors import UserError
from e3jax.job import Job
from e3jax.models import decoder
from e3jax.models.decoder import Params
from e3jax.progress import over

log = logging.getLogger(__name__)


def teacher_cache(job_: Job) -> TeacherCache:
    """The dense model's top-k for the train windows that the recovery uses.

    In distill.cache, else in the run folder. It goes on where it was killed, and takes in more
    windows when a run needs more. Each process writes files of its own. Raises UserError while
    another run writes it; in a bucket (gs://) that is not noticed.
    """
    recipe = job_.run.distill
    if recipe.top_k > job_.cfg.vocab_size:
        raise UserError(
            f"distill.top_k={recipe.top_k}: the model's vocabulary has {job_.cfg.vocab_size} tokens"
        )
    place = recipe.cache or str(job_.out / "teacher")
    seed = job.data_seed(job_.run, "distill")
    used = batches.used_windows(len(job_.train), recipe.batch, seed, recipe.steps)
    facts = (place, job_.train, recipe.top_k, recipe.temperature, job_.identity, used)
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
            _fill(job_, made or TeacherCache.create(*facts))
    return open_cache(*facts)


def _fill(job_: Job, cache: TeacherCache) -> None:
    recipe, windows = job_.run.distill, job_.train

    @jax.jit
    def topk(params: Params, batch: decoder.Batch) -> tuple[jax.Array, ...]:
        h = decoder.hidden(params, batch, job_.cfg, dtype=job_.dtype, remat="none")
        head = decoder.head(params, job_.cfg)
        return losses.teacher_topk(h, head, recipe.top_k, recipe.temperature, recipe.chunk)

    needed = np.isin(cache.rows, cache.todo()).astype(np.uint8)
    todo = cache.rows[processes.array_from_first(needed) == 1]
    rows = job.rows_per_batch(recipe.microbatch or recipe.batch)
    here, owner = mesh.rows_here(rows), mesh.row_owners(rows)
    turns = deal(todo, owner)
    for index in over("teacher cache", turns, len(turns)):
        batch = job.to_batch(batches.gather(windows, index[here]))
        found = map(mesh.local_rows, topk(job_.params, mesh.shard_batch(batch)))
        mine = np.where(owner[here] == jax.process_index(), index[here], -1)
        cache.write(mine, *found)
    processes.barrier("teacher cache written")
    stats = cache.finish(windows)
    log.info(
        "teacher cache: %d of %d windows, %.1f bytes a token (%d before compression), %.2f %% of "
        "the mass captured",
        len(cache.rows),
        len(windows),
        cache.bytes_a_token(),
        estimate_bytes(1, recipe.top_k),
        100 * stats["captured_mass"],
    )

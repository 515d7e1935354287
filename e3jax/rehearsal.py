"""The gate before a long run: two steps of every stage, on the model's first two layers (three with
`distill.freeze`: one that is frozen, one that is trained, one that goes).

What would stop the run hours later (a shape, a full device, a folder that cannot be written) stops
it now.
"""

import dataclasses
import functools
import logging
import pathlib
import shutil
import time
from collections.abc import Callable

import jax

from e3jax import choice, config, files, job, outputs, processes, recovery
from e3jax.evaluate import table
from e3jax.job import Job
from e3jax.mask import Mask
from e3jax.models import decoder

log = logging.getLogger(__name__)

FROM = 50_000_000  # planned tokens: minutes lost to a late mistake outweigh the rehearsal
TWO, THREE = (0, 1), (0, 1, 2)  # the layers
SHORT = {"steps": 2, "evaluate_every": 2, "checkpoint_every": 2}
FOLDER, RECORD = ".rehearsal", "rehearsal.json"


def before(
    run: config.Run, out: pathlib.Path, *, tokens: int, layers: int, play: Callable[..., None]
) -> None:
    """Calls `play(short run, its folder)` before a run of many tokens, in a folder that then goes.

    Once it passed it is not played again for the same configuration on as many devices.
    """
    if tokens < FROM or layers <= len(few(run)):
        return
    devices = [jax.device_count(), jax.devices()[0].device_kind, jax.process_count()]
    facts = files.plain_tree({"run": dataclasses.replace(run, out=""), "devices": devices})

    def passed() -> str:
        log.info("rehearsal: two steps of every stage on %d layers", len(few(run)))
        begun, folder = time.monotonic(), out / FOLDER
        _clear(folder)
        try:
            play(shorten(run, folder), folder)
            processes.barrier("rehearsal ends")
        finally:
            _clear(folder)
        return f"passed in {time.monotonic() - begun:.0f} s"

    log.info("rehearsal on %d layers: %s", len(few(run)), job.once(out / RECORD, facts, passed))


def few(run: config.Run) -> tuple[int, ...]:
    """The layers of a rehearsal."""
    return THREE if run.distill.freeze else TWO


def _clear(folder: pathlib.Path) -> None:
    if processes.is_first():
        shutil.rmtree(folder, ignore_errors=True)


def shorten(run: config.Run, folder: pathlib.Path) -> config.Run:
    """The configuration of a rehearsal: batches and windows as they are, little of everything."""
    spec = run.evaluate
    return dataclasses.replace(
        run,
        out=str(folder),
        search=dataclasses.replace(
            run.search,
            keep=len(few(run)) - 1,
            start=None,
            protect=(),
            force=(),
            refine=int(run.search.adapt_steps > 0),
            adapt_steps=min(2, run.search.adapt_steps),
            candidates=1,
            steps=2,
            score_every=2,
            checkpoint_every=2,
        ),
        # What two layers teach must not get into the run's own cache.
        distill=dataclasses.replace(run.distill, cache=None, **SHORT),
        train=dataclasses.replace(run.train, recipe=dataclasses.replace(run.train.recipe, **SHORT)),
        evaluate=dataclasses.replace(
            spec, rows=min(spec.batch, spec.rows or spec.batch), samples=1, max_new_tokens=2
        ),
    )


def play(job_: Job, command: str, run: config.Run, folder: pathlib.Path) -> None:
    """The stages of a command, with few layers of the model."""
    layers = few(run)
    small = dataclasses.replace(
        job_,
        run=run,
        out=folder,
        cfg=job_.cfg.take_layers(layers),
        load=functools.cache(lambda: decoder.take_layers(job_.params, job_.cfg, layers)),
    )
    mask = Mask(num_layers=len(layers), keep=layers[:-1], order=layers[-1:])
    if run.distill.mask is None or command == "search":
        found = choice.search_mask(small)
        mask = mask if run.distill.freeze else found
    if command == "search" and job_.run.search.candidates == 1:
        return
    student = recovery.recover(small, mask, folder / "distill")
    if command in ("run", "evaluate", "compare"):
        table.measure(small, "raw", mask, lambda: recovery.survivors(small, mask))
        table.measure_student(small, "recovered", lambda: student, mask, "distill")
    if command in ("run", "export"):
        outputs.export(small, mask, student, folder / "export", recovered=True, transformers=False)

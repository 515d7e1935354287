"""Stage 2 of a run, what is left trained: distilled from the dense model, or plainly.

Restartable: called again, it goes on, or returns what it has.
"""

import logging
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from e3jax import config, devices, files, job, mesh, teaching
from e3jax.data.windows import Windows
from e3jax.distill import distill, freezing
from e3jax.distill.least_squares import fitted
from e3jax.errors import UserError
from e3jax.evaluate.figures import make_figures
from e3jax.job import Job
from e3jax.mask import Mask
from e3jax.models.config import ModelConfig
from e3jax.models.decoder import Params
from e3jax.selectors import laco
from e3jax.training.loop import fit
from e3jax.training.optim import make_optimizer

log = logging.getLogger(__name__)

# Of a recipe: places, and what another mesh may need to be another; no result but for rounding.
NO_RESULT = ("checkpoint_every", "cache", "mask", "microbatch", "chunk")
CALIBRATION_WINDOWS = 64  # whose mean teacher entropy is the H of the token weights


def decides(recipe: config.Distill) -> dict[str, Any]:
    """What of a recipe decides the result, by name."""
    return {key: value for key, value in recipe.facts().items() if key not in NO_RESULT}


def survivors(job_: Job, mask: Mask) -> Params:
    """The layers that a mask keeps, with what it merges into them."""
    return laco.survivors(job_.params, job_.cfg, mask.keep, mask.merges)


def recover(
    job_: Job, mask: Mask, folder: pathlib.Path | None, held_out: Windows | None = None
) -> Params:
    """Stage 2: the student of a mask, distilled from the dense model; float32 parameters.

    folder: of the recovery, which goes on from what is there; None: nothing of it stays.
    held_out: the windows of its held-out figures, instead of the configuration's.
    """
    run, recipe = job_.run, job_.run.distill
    stored = teaching.stored_teacher(job_) if recipe.teacher == "cache" else None
    name = "distill" if folder is None else folder.name
    student_cfg = job_.cfg.take_layers(mask.keep)
    if recipe.float8 and not devices.has_float8():
        log.warning("%s: float8=true only takes time here: no GPU that multiplies in it", name)
    frozen = 0
    if recipe.freeze:
        frozen = freezing.frozen_layers(mask.keep, mask.merges)
        log.info("%s: %d of %d layers stay as they are", name, frozen, len(mask.keep))

    def entropy() -> float:
        if stored is not None:
            assert stored.train.stats is not None  # it is finished
            return stored.train.stats["mean_entropy"]
        return distill.mean_teacher_entropy(
            job_.params,
            job_.cfg,
            job.ordered(job_.train, recipe.together, CALIBRATION_WINDOWS),
            temperature=recipe.temperature,
            dtype=job_.dtype,
            chunk=recipe.chunk,
        )

    mean_entropy = 1.0
    if recipe.weight != "uniform":
        facts = job_.inputs(
            train=job_.train.fingerprint, temperature=recipe.temperature, teacher=recipe.teacher
        )
        if stored is not None:  # it is that of the windows in it
            facts |= {"steps": recipe.steps, "batch": recipe.batch}
        mean_entropy = job.once(job_.out / "distill" / "entropy.json", facts, entropy)

    def start() -> Params:
        params = survivors(job_, mask)
        if recipe.fit:
            windows = job.ordered(job_.train, recipe.together, recipe.fit)
            batches = [mesh.shard_batch(batch) for batch in windows]
            log.info("%s: the mlps are fitted to %d windows", name, recipe.fit)
            params = fitted(job_.params, job_.cfg, mask.keep, params, batches, dtype=job_.dtype)
        if stored is not None:
            job_.release()
        return freezing.trained(params, student_cfg, frozen)

    own = train_student(
        name,
        run,
        recipe,
        cfg=student_cfg,
        make_params=start,
        teacher=(lambda: job_.params, job_.cfg) if stored is None else None,
        train=job_.train,
        held_out=held_out or job_.held_out,
        keep=mask.keep,
        inputs=job_.inputs(keep=mask.keep, **({"merges": mask.merges} if mask.merges else {})),
        folder=folder,
        frozen=frozen,
        mean_entropy=mean_entropy,
        stored=stored,
    )
    return freezing.whole(own, job_.params, job_.cfg, frozen) if frozen else own


def train_student(
    name: str,
    run: config.Run,
    recipe: config.Distill,
    *,
    cfg: ModelConfig,
    make_params: Callable[[], Params],
    teacher: tuple[Callable[[], Params], ModelConfig] | None,
    train: Windows,
    held_out: Windows,
    inputs: dict[str, Any],
    folder: pathlib.Path | None,
    keep: Sequence[int] | None = None,
    frozen: int = 0,
    mean_entropy: float = 1.0,
    stored: teaching.Stored | None = None,
) -> Params:
    """Trains parameters by a recipe and returns them in float32. The teacher, if any, is frozen.

    make_params: those to begin with, in any dtype; on a restart nobody asks for them. Those of the
      teacher are asked for at the first step. keep: its layers that the student has. frozen: the
      first so many of them are not trained, and not among the parameters. stored: the teacher
      instead, for `teacher: cache`.
    Held-out figures are KL and agreement with the teacher, and perplexity.
    """
    if recipe.batch % recipe.together:
        raise UserError(
            f"distill.microbatch={recipe.microbatch} does not divide distill.batch={recipe.batch}"
        )
    dtype = job.DTYPES[run.model.dtype]
    optimizer = make_optimizer(recipe.optimizer, recipe.steps)
    dense, teacher_cfg = teacher if teacher is not None else (None, None)  # called: parameters
    take_step = distill.make_train_step(
        cfg,
        recipe,
        optimizer,
        teacher_cfg=teacher_cfg,
        keep=keep,
        frozen=frozen,
        dtype=dtype,
        remat=run.model.remat,
    )
    taught = dense is not None or stored is not None
    figures = make_figures(
        teacher_cfg or cfg,
        cfg,
        dtype=dtype,
        chunk=recipe.chunk,
        temperature=1.0 if stored is None else recipe.temperature,
        frozen=frozen,
    )

    def step(state: distill.TrainState, arrays: Any) -> tuple[distill.TrainState, dict]:
        online = dense() if dense and recipe.teacher == "online" else None
        return take_step(state, online, job.to_batch(arrays, train), arrays.get("stored"))

    def measured() -> Iterator[Any]:
        # The batch size of a forward pass in the step is one that fits.
        for arrays in job.ordered_arrays(held_out, recipe.together):
            known = stored and teaching.read_rows(stored.held_out, arrays["index"])
            yield job.to_batch(arrays, held_out), known

    def evaluate(_: int, state: distill.TrainState) -> tuple[distill.TrainState, dict]:
        found = figures(dense() if dense else None, state.params, measured())
        values = {"held_out_perplexity": found.perplexity}
        if taught:
            values |= {"held_out_kl": found.kl, "held_out_agreement": found.agreement}
        return state, values

    plain_batches = job.step_batches(train, recipe.batch, job.data_seed(run, "distill"))

    def batches(step: int, /) -> dict[str, Any]:
        arrays: dict[str, Any] = plain_batches(step)
        if stored is not None:
            arrays["stored"] = teaching.read_rows(stored.train, arrays["index"])
        return arrays

    facts = decides(recipe)
    for key in ("hidden", "fit", "freeze"):
        if not facts[key]:
            del facts[key]
    state = fit(
        name,
        step,
        lambda: distill.init_state(make_params(), optimizer, mean_entropy),
        batches,
        like=distill.abstract_state(cfg, optimizer, frozen),
        steps=recipe.steps,
        folder=folder,
        inputs=files.plain_tree(inputs | {"recipe": facts, "train": train.fingerprint}),
        checkpoint_every=recipe.checkpoint_every,
        evaluate=evaluate,
        evaluate_every=recipe.evaluate_every,
        patience=recipe.patience,
        keep=run.keep_checkpoints,
        best="held_out_kl" if taught else "held_out_perplexity",
    )
    if skipped := int(state.skipped):
        log.warning("%s: %d steps were not finite and were left out", name, skipped)
    return state.params

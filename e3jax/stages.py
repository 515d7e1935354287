"""The stages of a run. Each is restartable: called again, it goes on, or returns what it has."""

import dataclasses
import logging
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from e3jax import config, files, job, mesh, processes, teaching
from e3jax.data.windows import Windows
from e3jax.distill import distill
from e3jax.errors import UserError
from e3jax.evaluate.figures import make_figures
from e3jax.job import Job
from e3jax.mask import Mask, read_mask
from e3jax.models import decoder
from e3jax.models.config import ModelConfig
from e3jax.models.decoder import Params
from e3jax.search import gumbel, search
from e3jax.selectors import laco, registry, removal, similarity
from e3jax.selectors.selection import Calibration, Task
from e3jax.training.loop import fit
from e3jax.training.optim import make_optimizer

log = logging.getLogger(__name__)

CALIBRATION_WINDOWS = 64  # whose mean teacher entropy is the H of the token weights


# ---------------------------------------------------------------- stage 1: the mask


def search_mask(job_: Job) -> Mask:
    """Stage 1: search/mask.json, by the Gumbel-TopK search."""
    run, cfg, spec = job_.run, job_.cfg, job_.run.search
    folder = job_.out / "search"
    keep = search.resolve_keep(spec.keep, cfg.num_layers)
    protect, force = search.fixed_layers(spec, cfg.num_layers)
    decides = dataclasses.asdict(spec)
    for key in ("checkpoint_every", "microbatch"):
        del decides[key]
    inputs = job_.inputs(
        search=decides, train=job_.train.fingerprint, held_out=job_.held_out.fingerprint
    )
    path = folder / "mask.json"
    if (mask := _finished(path, cfg, inputs)) is not None:
        log.info("search: finished before; keeping layers %s", list(mask.keep))
        return mask

    importance_l, spent = IMPORTANCE.get(spec.init, _no_importance)(job_)
    theta = gumbel.init_theta(
        importance_l, spec.init, spec.init_form, spec.init_scale, seed=run.seed
    )
    figures = make_figures(cfg, cfg, dtype=job_.dtype, chunk=run.distill.chunk)
    held_out = list(job.ordered(job_.held_out, spec.together, spec.score_windows))
    held_tokens = float(np.count_nonzero(job_.held_out.segments[: spec.score_windows]))
    take_step = search.make_search_step(
        cfg, spec, seed=run.seed, dtype=job_.dtype, remat=run.model.remat, chunk=run.distill.chunk
    )

    def step(state: search.SearchState, arrays: Any) -> tuple[search.SearchState, dict]:
        return take_step(state, job_.params, job.to_batch(arrays, job_.train))

    def score(number: int, state: search.SearchState) -> tuple[search.SearchState, dict]:
        theta = np.asarray(state.theta)
        answer = gumbel.answer(theta, keep, protect, force)
        kl = figures(job_.params, job_.params, held_out, np.flatnonzero(answer)).kl
        state = state.replace(tokens=state.tokens + held_tokens)
        best_kl, best = float(state.best_kl), np.asarray(state.best_theta)
        # The same answer again has the same KL, but for a rounding that differs between meshes.
        new = np.isinf(best_kl) or np.any(answer != gumbel.answer(best, keep, protect, force))
        if new and kl < best_kl:
            state = state.replace(
                best_kl=mesh.replicate(jnp.float32(kl)), best_theta=mesh.replicate(theta)
            )
        probability = gumbel.keep_probability(
            jax.random.key(0), theta, keep, protect, force, samples=2000
        )
        values = {
            "held_out_kl": kl,
            "best_kl": float(state.best_kl),
            "theta": theta.tolist(),
            "keep_probability": np.asarray(probability).tolist(),
        }
        return state, values

    state = fit(
        "search",
        step,
        lambda: mesh.replicate(search.init_state(theta, spec)),
        job.step_batches(job_.train, spec.batch, job.data_seed(run, "search")),
        like=search.abstract_state(cfg, spec),
        steps=spec.steps,
        folder=folder,
        inputs=inputs,
        checkpoint_every=spec.checkpoint_every,
        evaluate=score,
        evaluate_every=spec.score_every,
        keep=run.keep_checkpoints,
    )
    best, best_kl, tried = search.refine(
        np.asarray(state.best_theta),
        float(state.best_kl),
        lambda kept: figures(job_.params, job_.params, held_out, np.flatnonzero(kept)).kl,
        keep=keep,
        protect_l=protect,
        force_l=force,
        tries=spec.swaps,
    )
    kept = gumbel.answer(best, keep, protect, force)
    order = sorted(
        np.flatnonzero(~kept).tolist(), key=lambda layer: (not force[layer], best[layer])
    )
    scored = held_tokens * (-(-spec.steps // spec.score_every) + 1)
    searched = (float(state.tokens) - scored) / spec.masks_per_window
    mask = Mask(
        selector="e3",
        num_layers=cfg.num_layers,
        keep=tuple(np.flatnonzero(kept).tolist()),
        order=tuple(order),
        theta=tuple(best.tolist()),
        scores=tuple(importance_l.tolist()),
        kl=best_kl,
        tokens=int(state.tokens) + int(tried * held_tokens) + spent,
        teacher_tokens=round((spec.loss == "kl") * searched + scored + tried * held_tokens),
        seed=run.seed,
        checkpoint=job_.identity,
        config=files.fingerprint(inputs),
    )
    if processes.is_first():
        files.write_json(path, mask)
    log.info("search: keeping layers %s, held-out KL %.4f", list(mask.keep), best_kl)
    return mask


def _finished(path: pathlib.Path, cfg: ModelConfig, inputs: dict[str, Any]) -> Mask | None:
    """The mask in a file, where it was made from the same inputs."""
    if not processes.from_first(path.exists):
        return None
    mask = read_mask(path, cfg.num_layers)
    return mask if mask.config == files.fingerprint(inputs) else None


def _calibration(job_: Job, windows: Windows, limit: int | None = None) -> Calibration:
    run = job_.run
    batches = list(job.ordered(windows, run.search.together, limit))
    return Calibration(job_.params, job_.cfg, batches, job_.dtype, run.distill.chunk, seed=run.seed)


def kl_importance(job_: Job) -> tuple[np.ndarray, int]:
    """KL importance of each layer on the first train windows, and the tokens it cost."""
    return _importance(job_, "importance", removal.leave_one_out_kl)


def block_influence(job_: Job) -> tuple[np.ndarray, int]:
    """ShortGPT's score of each layer on the same windows; masked models see no token."""
    return _importance(job_, "influence", lambda given: (similarity.block_influence(given), 0))


def _importance(
    job_: Job, name: str, measure: Callable[[Calibration], tuple[np.ndarray, int]]
) -> tuple[np.ndarray, int]:
    """`measure` on the first windows, kept in the file search/`name`.json."""
    windows = job_.run.search.init_windows
    inputs = job_.inputs(scores=name, train=job_.train.fingerprint, windows=windows)

    def make() -> dict[str, Any]:
        log.info("%s: scoring each of %d layers", name, job_.cfg.num_layers)
        scores, tokens = measure(_calibration(job_, job_.train, windows))
        return {"scores": scores.tolist(), "tokens": tokens}

    value = job.once(job_.out / "search" / f"{name}.json", inputs, make)
    return np.asarray(value["scores"]), value["tokens"]


def _no_importance(job_: Job) -> tuple[np.ndarray, int]:
    return np.zeros(job_.cfg.num_layers), 0


IMPORTANCE = {"kl": kl_importance, "shortgpt": block_influence}  # by search.init


def selector_mask(job_: Job, name: str, keep: int, tokens: int | None = None) -> Mask:
    """NAME/mask.json: a published selector's choice of `keep` layers.

    It looks at the windows that measure the importance; with `tokens` at a sample of the train
    windows, as large as those tokens through masked models allow, which the run's seed draws.
    """
    cfg, rule = job_.cfg, registry.SELECTORS[name]
    protect, force = search.fixed_layers(job_.run.search, cfg.num_layers)
    task = Task(
        cfg.num_layers,
        keep,
        frozenset(np.flatnonzero(protect).tolist()),
        frozenset(np.flatnonzero(force).tolist()),
    )
    if tokens is None:
        count, windows = min(job_.run.search.init_windows, len(job_.train)), job_.train
    else:
        count = registry.windows_for(rule, task, tokens, job_.run.data.window)
        windows = job.sample(job_.train, count, job_.run.seed)
    inputs = job_.inputs(
        selector=name,
        keep=keep,
        fixed=(sorted(task.protect), sorted(task.force)),
        train=windows.fingerprint,
        windows=count,
        tokens=tokens,
    )
    path = job_.out / name / "mask.json"
    if (mask := _finished(path, cfg, inputs)) is not None:
        return mask
    log.info("%s: choosing by %d windows", name, min(count, len(windows)))
    chosen = rule.choose(_calibration(job_, windows, count), task, tokens)
    mask = Mask(
        selector=name,
        num_layers=cfg.num_layers,
        keep=chosen.keep,
        order=chosen.order,
        merges=chosen.merges,
        scores=chosen.scores if np.isfinite(chosen.scores).all() else (),  # not all were scored
        tokens=chosen.tokens,
        teacher_tokens=chosen.teacher_tokens,
        seed=job_.run.seed,
        checkpoint=job_.identity,
        config=files.fingerprint(inputs),
    )
    if processes.is_first():
        files.write_json(path, mask)
    return mask


def survivors(params: Params, mask: Mask) -> Params:
    """The layers that a mask keeps, with what it merges into them."""
    whole = laco.merge(params, mask.merges) if mask.merges else params
    return decoder.take_layers(whole, mask.keep)


# ---------------------------------------------------------------- stage 2: recovery


def recover(job_: Job, mask: Mask, folder: pathlib.Path) -> Params:
    """Stage 2: the student of a mask, distilled from the dense model; float32 parameters."""
    run, recipe = job_.run, job_.run.distill
    stored = teaching.stored_teacher(job_) if recipe.teacher == "cache" else None

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
        params = survivors(job_.params, mask)
        if stored is not None:
            job_.release()
        return params

    return train_student(
        folder.name,
        run,
        recipe,
        cfg=job_.cfg.take_layers(mask.keep),
        make_params=start,
        teacher=(lambda: job_.params, job_.cfg) if stored is None else None,
        train=job_.train,
        held_out=job_.held_out,
        inputs=job_.inputs(keep=mask.keep, **({"merges": mask.merges} if mask.merges else {})),
        folder=folder,
        mean_entropy=mean_entropy,
        stored=stored,
    )


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
    folder: pathlib.Path,
    mean_entropy: float = 1.0,
    stored: teaching.Stored | None = None,
) -> Params:
    """Trains parameters by a recipe and returns them in float32. The teacher, if any, is frozen.

    make_params: those to begin with, in any dtype; on a restart nobody asks for them. Those of the
      teacher are asked for at the first step. stored: the teacher instead, for `teacher: cache`.
    Held-out figures are KL and agreement with the teacher, and perplexity.
    """
    if recipe.batch % recipe.together:
        raise UserError(
            f"distill.microbatch={recipe.microbatch} does not divide distill.batch={recipe.batch}"
        )
    dtype = job.DTYPES[run.model.dtype]
    optimizer = make_optimizer(recipe.optimizer, recipe.steps)
    frozen, teacher_cfg = teacher if teacher is not None else (None, None)  # called: parameters
    take_step = distill.make_train_step(
        cfg, recipe, optimizer, teacher_cfg=teacher_cfg, dtype=dtype, remat=run.model.remat
    )
    taught = frozen is not None or stored is not None
    figures = make_figures(
        teacher_cfg or cfg,
        cfg,
        dtype=dtype,
        chunk=recipe.chunk,
        temperature=1.0 if stored is None else recipe.temperature,
    )

    def step(state: distill.TrainState, arrays: Any) -> tuple[distill.TrainState, dict]:
        online = frozen() if frozen and recipe.teacher == "online" else None
        return take_step(state, online, job.to_batch(arrays, train), arrays.get("stored"))

    def measured() -> Iterator[Any]:
        # The batch size of a forward pass in the step is one that fits.
        for arrays in job.ordered_arrays(held_out, recipe.together):
            known = stored and teaching.read_rows(stored.held_out, arrays["index"])
            yield job.to_batch(arrays, held_out), known

    def evaluate(_: int, state: distill.TrainState) -> tuple[distill.TrainState, dict]:
        found = figures(frozen() if frozen else None, state.params, measured())
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

    decides = dataclasses.asdict(recipe)
    # Places, and what another mesh may need to be another: no result but for rounding.
    for key in ("checkpoint_every", "cache", "mask", "microbatch", "chunk"):
        del decides[key]
    state = fit(
        name,
        step,
        lambda: distill.init_state(make_params(), optimizer, mean_entropy),
        batches,
        like=distill.abstract_state(cfg, optimizer),
        steps=recipe.steps,
        folder=folder,
        inputs=files.plain_tree(inputs | {"recipe": decides, "train": train.fingerprint}),
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

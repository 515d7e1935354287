"""Stage 1 of a run, which layers stay: by the search, or by a published selector.

Restartable: called again, it goes on, or returns what it has.
"""

import dataclasses
import logging
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from e3jax import files, job, mesh, processes
from e3jax.data.windows import Windows
from e3jax.evaluate.figures import make_figures
from e3jax.job import Job
from e3jax.mask import Mask, read_mask
from e3jax.models.config import ModelConfig
from e3jax.search import gumbel, search
from e3jax.selectors import registry, removal, similarity
from e3jax.selectors.selection import Calibration, Task
from e3jax.training.loop import fit

log = logging.getLogger(__name__)


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

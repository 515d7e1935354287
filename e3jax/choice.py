"""Stage 1 of a run, which layers stay: by the search, or by a published selector.

Restartable: called again, it goes on, or returns what it has.
"""

import dataclasses
import logging
import math
import pathlib
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from e3jax import config, files, job, mesh, processes, recovery, refinement
from e3jax.data.windows import Windows
from e3jax.errors import Diverged, UserError
from e3jax.evaluate.figures import make_figures
from e3jax.job import Job
from e3jax.mask import Mask, read_mask
from e3jax.models.config import ModelConfig
from e3jax.progress import strip
from e3jax.search import gumbel, refine, search
from e3jax.search.refine import Measured
from e3jax.selectors import registry, removal, similarity
from e3jax.selectors.selection import Calibration, Task
from e3jax.training.loop import fit
from e3jax.training.metrics import read_metrics

log = logging.getLogger(__name__)


def search_mask(job_: Job) -> Mask:
    """Stage 1: search/mask.json, by the Gumbel-TopK search."""
    run, cfg, spec = job_.run, job_.cfg, job_.run.search
    folder = job_.out / "search"
    keep = search.resolve_keep(spec.keep, cfg.num_layers)
    protect, force = search.fixed_layers(spec, cfg.num_layers)
    fixed = {"keep": keep, "protect_l": protect, "force_l": force}
    decides = dataclasses.asdict(spec)  # of the steps; what ends the search is apart
    trials = {key: decides.pop(key) for key in ("candidates", "candidate_steps")}
    refined = {key: decides.pop(key) for key in ("refine", "refine_windows", "adapt_steps")}
    if not refined["adapt_steps"]:
        del refined["adapt_steps"]
    for key in ("target", "checkpoint_every", "microbatch", "start"):
        del decides[key]
    start = _start(spec, cfg)
    inputs = job_.inputs(
        search=decides, train=job_.train.fingerprint, held_out=job_.held_out.fingerprint
    )
    if start is not None:
        inputs["start"] = files.fingerprint((start.theta, len(start.keep)))
    facts = dict(inputs)
    if spec.refine:
        facts["refined"] = refined
        if spec.adapt_steps:
            facts["adapted"] = _trial_recipe(run)
    if spec.candidates > 1:
        facts["trials"] = trials | _trial_recipe(run)
    path = folder / "mask.json"
    if (mask := _finished(path, cfg, facts)) is not None:
        refinement.forget(job_.out)  # what a kill left
        log.info("search: finished before; keeping layers %s", list(mask.keep))
        return mask

    if start is None:
        above = None
        importance_l, spent = IMPORTANCE.get(spec.init, _no_importance)(job_)
        theta = gumbel.init_theta(
            importance_l, spec.init, spec.init_form, spec.init_scale, seed=run.seed
        )
    else:
        above, theta = len(start.keep), np.array(start.theta, np.float32)
        importance_l, spent = np.array(start.scores), start.tokens
    figures = make_figures(cfg, cfg, dtype=job_.dtype, chunk=run.distill.chunk)
    held_out = list(job.ordered(job_.held_out, spec.together, spec.score_windows))
    held_tokens = float(job_.held_out.filled(spec.score_windows))
    take_step = search.make_search_step(
        cfg,
        spec,
        dtype=job_.dtype,
        remat=run.model.remat,
        chunk=run.distill.chunk,
        above=above,
    )

    def step(state: search.SearchState, arrays: Any) -> tuple[search.SearchState, dict]:
        return take_step(state, job_.params, job.to_batch(arrays, job_.train))

    def score(number: int, state: search.SearchState) -> tuple[search.SearchState, dict]:
        theta = np.asarray(state.theta)
        answer = gumbel.answer(theta, **fixed)
        kl = figures(job_.params, job_.params, held_out, np.flatnonzero(answer)).kl
        state = state.replace(tokens=state.tokens + held_tokens)
        best_kl, best = float(state.best_kl), np.asarray(state.best_theta)
        # The same answer again has the same KL, but for a rounding that differs between meshes.
        new = np.isinf(best_kl) or np.any(answer != gumbel.answer(best, **fixed))
        if new and kl < best_kl:
            state = state.replace(
                best_kl=mesh.replicate(jnp.float32(kl)), best_theta=mesh.replicate(theta)
            )
        probability = gumbel.keep_probability(
            jax.random.key(0), theta, keep, protect, force, samples=2000
        )
        for line in strip(probability.tolist()):
            log.info("search %d: layers %s", number, line)
        values = {
            "held_out_kl": kl,
            "best_kl": float(state.best_kl),
            "mask_entropy": gumbel.mask_entropy(probability),
            "theta": theta.tolist(),
            "keep_probability": probability.tolist(),
        }
        return state, values

    state = fit(
        "search",
        step,
        lambda: mesh.replicate(search.init_state(theta, spec, run.seed)),
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
    answers, refined_tokens = refinement.answers(job_, state, figures, fixed)
    best, tried = answers[0], 0.0
    if spec.candidates > 1 and len(answers) > 1:
        best, tried = _recovered_best(job_, answers[: spec.candidates], fixed)
    kept = gumbel.answer(best.theta, **fixed)
    order = sorted(
        np.flatnonzero(~kept).tolist(), key=lambda layer: (not force[layer], best.theta[layer])
    )
    scored = held_tokens * (-(-spec.steps // spec.score_every) + 1)
    searched = (float(state.tokens) - scored) / spec.masks_per_window
    mask = Mask(
        selector="e3",
        num_layers=cfg.num_layers,
        keep=tuple(np.flatnonzero(kept).tolist()),
        order=tuple(order),
        theta=tuple(best.theta.tolist()),
        scores=tuple(importance_l.tolist()),
        kl=best.kl,
        tokens=int(state.tokens) + int(refined_tokens + tried) + spent,
        teacher_tokens=round((spec.loss == "kl") * searched + scored + refined_tokens + tried)
        + (start.teacher_tokens if start is not None else 0),
        seed=run.seed,
        checkpoint=job_.identity,
        config=files.fingerprint(facts),
    )
    if processes.is_first():
        files.write_json(path, mask)
    refinement.forget(job_.out)
    log.info("search: keeping layers %s, held-out KL %.4f", list(mask.keep), mask.kl)
    return mask


def _start(spec: config.Search, cfg: ModelConfig) -> Mask | None:
    """The answer that the search goes on from. Raises UserError where it is none of a search."""
    if spec.start is None:
        return None
    path = pathlib.Path(spec.start).expanduser()
    found = read_mask(path, cfg.num_layers)
    if len(found.theta) != cfg.num_layers:
        raise UserError(
            f"search.start={path}: {len(found.theta)} logits (theta) for {cfg.num_layers} layers; "
            "expected the search/mask.json of a run"
        )
    return found


def _trial_recipe(run: config.Run) -> dict[str, Any]:
    """What of a candidate's recovery decides its result."""
    fields = recovery.decides(run.distill)
    del fields["steps"], fields["evaluate_every"]
    return {"recipe": fields, "windows": run.search.refine_windows}


def _recovered_best(
    job_: Job, answers: Sequence[Measured], fixed: dict[str, Any]
) -> tuple[Measured, float]:
    """The answer that has the least held-out KL after a short recovery; and the tokens of all those
    recoveries."""
    spec, layers = job_.run.search, range(job_.cfg.num_layers)
    steps = spec.candidate_steps
    recipe = dataclasses.replace(job_.run.distill, mask=None, steps=steps, evaluate_every=steps)
    folder, found = job_.out / "search" / "candidates", []
    here = job_.having(out=folder, run=dataclasses.replace(job_.run, distill=recipe))
    held_out = job_.held_out.first(spec.refine_windows)
    # Held-out windows before the first step and after the last, and what the fit before it takes.
    scored = 2.0 * held_out.filled(spec.refine_windows) + job_.train.filled(recipe.fit)
    for answer in answers:
        keep = tuple(np.flatnonzero(gumbel.answer(answer.theta, **fixed)).tolist())
        mask = Mask(len(layers), keep, order=tuple(i for i in layers if i not in keep))
        place = folder / mask.place

        def measure(mask: Mask = mask, place: pathlib.Path = place) -> dict[str, float]:
            try:
                recovery.recover(here, mask, place, held_out)
            except Diverged as error:  # one candidate less
                log.warning("search: without %s: not recovered: %s", list(mask.order), error)
            lines = processes.from_first(lambda: read_metrics(place))
            kl = [x["held_out_kl"] for x in lines if x["step"] == steps and "held_out_kl" in x]
            tokens = scored + sum(line.get("tokens", 0.0) for line in lines)
            return {"kl": refine.finite(kl[-1]) if kl else math.inf, "tokens": tokens}

        facts = here.inputs(
            keep=keep,
            recipe=recipe.facts(),
            train=job_.train.fingerprint,
            held_out=held_out.fingerprint,
        )
        found.append(job.once(place.with_suffix(".json"), facts, measure))
        if processes.is_first():
            shutil.rmtree(place, ignore_errors=True)  # checkpoints, each of a model's size
        kl = found[-1]["kl"]
        log.info("search: without %s: KL %.4f, recovered %.4f", list(mask.order), answer.kl, kl)
    best = min(range(len(found)), key=lambda number: found[number]["kl"])
    return answers[best], sum(each["tokens"] for each in found)


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
    spec = dataclasses.replace(job_.run.search, keep=keep)
    protect, force = search.fixed_layers(spec, cfg.num_layers)
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

"""What ends the search of a run: the answers that its surrogate proposes are scored, and the best
is the run's. Scored as they are, or with weights that have learnt to do without layers.

Which layers are least missed is not which a recovery best does without: near the best in raw KL the
two have little to do with each other (docs/results.md). So weights can be trained first for a few
steps of distillation, each row under a mask of its own that is drawn as the search draws them; what
an answer's KL is with these, which all answers share, tells what its own recovery would make of it.
So do one-shot architecture searches (Guo et al., arXiv 1904.00420); it is not in the paper.
"""

import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from e3jax import files, job, mesh, processes, recovery
from e3jax.distill import distill
from e3jax.evaluate.figures import Figures
from e3jax.job import Job
from e3jax.models.decoder import Params
from e3jax.search import gumbel, refine, search
from e3jax.search.refine import Measured
from e3jax.training.loop import fit
from e3jax.training.metrics import read_metrics
from e3jax.training.optim import make_optimizer

TOGETHER = 4  # windows that a batch of held-out ones has


def answers(
    job_: Job, state: search.SearchState, figures: Callable[..., Figures], fixed: dict[str, Any]
) -> tuple[list[Measured], float]:
    """What the search found, the best first, and the tokens of its end, which go through the dense
    model too. Without a refinement: every answer that was scored."""
    spec, theta = job_.run.search, np.asarray(state.best_theta)
    if not spec.refine:
        return _scored_before(job_, state, fixed), 0.0
    params, spent = job_.params, 0.0
    if spec.adapt_steps:
        params, spent = _adapted(job_, theta, figures, fixed)
    windows = min(spec.refine_windows, len(job_.held_out))
    each = min(TOGETHER, windows)
    rows = job.rows_per_batch(min(each, spec.together))
    batches = list(job.ordered(job_.held_out, rows, windows))
    known: dict[tuple[bytes, int], tuple[tuple[float, float], ...]] = {}

    def score(kept: np.ndarray, number: int) -> tuple[float, float]:
        """Of `each` windows, whatever a batch has: that depends on the devices."""
        nonlocal spent
        part = range(number * each, min((number + 1) * each, windows))
        name, keep = kept.tobytes(), np.flatnonzero(kept)
        for at in {window // rows for window in part}:
            if (name, at) not in known:
                found = figures(job_.params, params, [batches[at]], keep, each_window=True)
                known[name, at] = found.windows
        spent += np.count_nonzero(job_.held_out.segments[list(part)])
        kl, tokens = zip(*(known[name, n // rows][n % rows] for n in part), strict=True)
        return sum(kl), sum(tokens)

    steps = spec.steps if spec.loss == "kl" else 0  # a cross-entropy tells of another scale
    drawn, log_loss = np.asarray(state.drawn)[:steps], np.asarray(state.log_loss)[:steps]
    seen = refine.drawn(
        drawn, log_loss, fixed["keep"], spec.masks_per_window, other=spec.adapt_steps > 0
    )
    found = refine.refine(
        theta,
        seen,
        score,
        batches=-(-windows // each),
        windows=each,
        budget=-(-spec.refine * spec.score_windows // each),
        seed=job_.run.seed,
        answers=max(1, spec.candidates),
        **fixed,
    )
    return found, spent


def _scored_before(job_: Job, state: search.SearchState, fixed: dict[str, Any]) -> list[Measured]:
    lines = processes.from_first(lambda: read_metrics(job_.out / "search"))
    scored = [x for x in lines if "held_out_kl" in x]
    found = [
        Measured(np.array(x["theta"], np.float32), refine.finite(x["held_out_kl"])) for x in scored
    ]
    best, known = Measured(np.asarray(state.best_theta), float(state.best_kl)), {}
    for each in [best, *sorted(found, key=lambda x: x.kl)]:
        known.setdefault(gumbel.answer(each.theta, **fixed).tobytes(), each)
    return list(known.values())


def _adapted(
    job_: Job, theta: np.ndarray, figures: Callable[..., Figures], fixed: dict[str, Any]
) -> tuple[Params, float]:
    """All layers' weights after `search.adapt_steps` of distillation under masks drawn from theta,
    float32, and the tokens that took. By `Run.adaptation`. Restartable."""
    run, cfg = job_.run, job_.cfg
    spec, recipe = run.search, run.adaptation
    optimizer = make_optimizer(recipe.optimizer, recipe.steps)
    keep, protect, force = fixed["keep"], fixed["protect_l"], fixed["force_l"]

    def gates(step: jax.Array, rows: int) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(run.seed), step)
        draw = gumbel.sample(key, theta, keep, rows, protect, force)
        return mesh.place(draw.keep.astype(np.float32), ("batch", None))

    take_step = distill.make_train_step(
        cfg,
        recipe,
        optimizer,
        teacher_cfg=cfg,
        gates=gates,
        dtype=job_.dtype,
        remat=run.model.remat,
    )

    def step(state: distill.TrainState, arrays: Any) -> tuple[distill.TrainState, dict]:
        return take_step(state, job_.params, job.to_batch(arrays, job_.train), None)

    answer = np.flatnonzero(gumbel.answer(theta, **fixed))
    held_out = list(job.ordered(job_.held_out, spec.together, spec.score_windows))

    def measured(_: int, state: distill.TrainState) -> tuple[distill.TrainState, dict]:
        return state, {"held_out_kl": figures(job_.params, state.params, held_out, answer).kl}

    decides = recovery.decides(recipe)
    folder = job_.out / "search" / "adapted"
    state = fit(
        "adapt",
        step,
        lambda: distill.init_state(job_.params, optimizer, 1.0),
        job.step_batches(job_.train, recipe.batch, job.data_seed(run, "adapt")),
        like=distill.abstract_state(cfg, optimizer),
        steps=recipe.steps,
        folder=folder,
        inputs=files.plain_tree(
            job_.inputs(
                theta=theta.tolist(),
                keep=keep,
                recipe=decides,
                train=job_.train.fingerprint,
                seed=run.seed,
            )
        ),
        checkpoint_every=recipe.checkpoint_every,
        evaluate=measured,
        evaluate_every=recipe.evaluate_every,
    )
    tokens = sum(x.get("tokens", 0.0) for x in processes.from_first(lambda: read_metrics(folder)))
    return state.params, tokens + 2.0 * job_.held_out.filled(spec.score_windows)


def forget(out: pathlib.Path) -> None:
    """Removes the weights that answers shared, a model's size with its moments."""
    if processes.is_first():
        shutil.rmtree(out / "search" / "adapted" / "checkpoints", ignore_errors=True)

"""The end of the search: what its masks told, followed up under a budget of held-out scores.

Ours, not the paper's. The masks that the steps drew were all scored, and then forgotten but for
theta, which knows of no pairs of layers. A surrogate of them proposes answers, new ones and those
that may still be the best (Thompson sampling); each round's are scored on the same windows and
added to what it knows. The answer is what it has for the best at the end.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from e3jax import processes
from e3jax.search import gumbel, surrogate
from e3jax.search.surrogate import Scored

RECENT = 2000  # masks of the search that are looked at, the last ones: a matrix of N x N is solved
ROUND = 8  # answers proposed together: the surrogate's best, and the best of samples of it
LEAST = 4  # so many at least, or scores would have nothing to be compared with
STARTS = 8  # of the surrogate's descents, drawn as the search draws masks
FITTED = 32  # scores after which the surrogate's scales are fitted anew


@dataclasses.dataclass(frozen=True)
class Measured:
    """An answer that was measured on all batches."""

    theta: np.ndarray  # float32 [L], whose TopK it is
    kl: float  # nats a token; inf where it is not finite


def refine(
    theta_l: np.ndarray,
    seen: Scored,
    score: Callable[[np.ndarray, int], tuple[float, float]],
    *,
    batches: int,
    windows: int,
    keep: int,
    protect_l: np.ndarray,
    force_l: np.ndarray,
    budget: int,
    seed: int,
    answers: int = 1,
) -> list[Measured]:
    """The best `answers` of those proposed, measured on all batches, the best first.

    theta: the search's. seen: the masks it scored. score: (kept layers as bool [L], number of a
    batch) -> (KL to the dense model, tokens), sums over `windows` windows. Ends before `budget`
    batches are exceeded; what is measured for the result comes on top. An answer's theta has its
    entries in another order. Process 0 has the surrogate: what linear algebra rounds to differs
    between hosts, and `score` is the work of all.
    """
    fixed = (keep, protect_l, force_l)
    start = gumbel.answer(theta_l, *fixed)
    parts: dict[bytes, dict[int, tuple[float, float]]] = {start.tobytes(): {}}
    spent = 0

    def has(kept: np.ndarray, number: int) -> bool:
        return number in parts.get(kept.tobytes(), ())

    def measured(kept: np.ndarray, number: int) -> tuple[float, float]:
        """KL and tokens of a batch."""
        nonlocal spent
        seen = parts.setdefault(kept.tobytes(), {})
        if number not in seen:
            seen[number] = score(kept, number)
            spent += 1
        return seen[number]

    def known() -> Scored:
        """What the search saw, and what was measured since, once each."""
        found = [(name, n, *sums) for name, of in parts.items() for n, sums in of.items()]
        if not found:
            return seen
        names, numbers, kl, tokens = zip(*found, strict=True)
        mean = np.array(kl) / np.maximum(tokens, 1.0)
        kept = np.array([np.frombuffer(name, bool) for name in names])
        log_kl = np.log(np.maximum(mean, gumbel.LOSS_FLOOR))
        return seen.and_(scored(~kept, log_kl, np.array(numbers), windows))

    def first(make: Callable[[], np.ndarray]) -> np.ndarray:
        return np.array(processes.from_first(lambda: make().tolist()))

    def pool() -> np.ndarray:
        """All that were measured, and the search's answer."""
        return np.array([np.frombuffer(name, bool) for name in parts])

    def expected() -> np.ndarray:
        said = known()
        return surrogate.posterior(said, surrogate.fit_scales(said), 0, rng)[0](~pool())

    rng, number, idle = np.random.default_rng(seed), 0, 0
    scales = surrogate.fit_scales(seen)
    fitted = 0
    while spent < budget and idle < batches:
        if spent >= fitted + FITTED:
            scales, fitted = surrogate.fit_scales(known()), spent
        found = first(lambda: _proposals(theta_l, known(), scales, pool(), rng, fixed))  # noqa: B023
        new = [kept for kept in found if not has(kept, number)][: budget - spent]
        for kept in new:
            measured(kept, number)
        number, idle = (number + 1) % batches, 0 if new else idle + 1
    results = []
    for kept in pool()[first(lambda: np.argsort(expected(), kind="stable"))][:answers]:
        kl, tokens = np.sum([measured(kept, n) for n in range(batches)], axis=0)
        results.append(Measured(_theta_of(kept, theta_l), finite(kl / max(tokens, 1.0))))
    return sorted(results, key=lambda result: result.kl)


def scored(removed_nl: np.ndarray, log_kl: np.ndarray, batch: np.ndarray, windows: int) -> Scored:
    """Masks, bool [N, L], that were scored on so many windows each, by the number of their batch;
    those that overflow count as e times the worst of the others, or they would be proposed
    again."""
    fine = np.isfinite(log_kl)
    worst = log_kl[fine].max() + 1.0 if fine.any() else 0.0
    each, other = np.full(len(log_kl), float(windows)), np.zeros(len(log_kl), bool)
    return Scored(removed_nl, np.where(fine, log_kl, worst), batch, each, other)


def drawn(
    keep_srl: np.ndarray,
    log_loss_sr: np.ndarray,
    keep: int,
    masks_per_window: int,
    *,
    other: bool = False,
) -> Scored:
    """The last masks of the search that keep so many layers. Those of one window are a group; where
    each window has one, those of a step are, and how windows differ is noise. other: answers are
    scored in another way."""
    steps, rows, layers = keep_srl.shape
    each = masks_per_window if masks_per_window > 1 else rows
    group = np.arange(steps * rows) // each
    kept, log_loss = keep_srl.reshape(-1, layers), log_loss_sr.ravel()
    (fine,) = np.nonzero(np.isfinite(log_loss) & (kept.sum(axis=1) == keep))
    fine = fine[-RECENT:]
    flags = np.full(len(fine), other)
    return Scored(~kept[fine], log_loss[fine], group[fine], np.ones(len(fine)), flags)


def finite(kl: float) -> float:
    """What an answer's KL counts as: a masked model that overflows is the worst."""
    return float(kl) if np.isfinite(kl) else math.inf


def _proposals(
    theta_l: np.ndarray,
    known: Scored,
    scales: surrogate.Scales,
    pool: np.ndarray,
    rng: np.random.Generator,
    fixed: tuple[int, np.ndarray, np.ndarray],
) -> np.ndarray:
    """Answers, bool [N, L] and no two the same, that the surrogate or a sample of it (Thompson
    sampling) has for the best of the pool and of where its descents end; where they are few, the
    next of the pool."""
    noise = rng.gumbel(size=(STARTS, len(theta_l)))
    starts = [~gumbel.answer(theta, *fixed) for theta in [theta_l, *(theta_l + noise)]]
    may_move = ~(fixed[1] | fixed[2])
    mean, *samples = surrogate.posterior(known, scales, ROUND - 1, rng)
    ranked = pool[np.argsort(mean(~pool), kind="stable")]
    found = []
    for model in (mean, *samples):
        best = ~pool[np.argmin(model(~pool))]
        ends = np.array([best, *(model.descend(removed, may_move) for removed in [best, *starts])])
        found.append(~ends[np.argmin(model(ends))])
    proposed = {kept.tobytes(): kept for kept in found}
    for kept in ranked[:LEAST]:
        if len(proposed) < LEAST:
            proposed.setdefault(kept.tobytes(), kept)
    return np.array(list(proposed.values()))


def _theta_of(kept: np.ndarray, theta: np.ndarray) -> np.ndarray:
    """theta's entries, those of an answer's layers the greatest, otherwise in their order. Equal
    entries could not tell layers apart: then ranks."""
    entries = np.sort(theta)[::-1]
    if len(np.unique(entries)) < len(entries):
        entries = np.arange(len(entries), 0, -1, dtype=theta.dtype)
    found = np.empty_like(theta)
    found[np.lexsort((-theta, ~kept))] = entries
    return found

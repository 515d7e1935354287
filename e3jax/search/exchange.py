"""The end of the search: exchanges of kept and removed layers around its answer.

Ours, not the paper's. Most exchanges are bad and seen to be after a few windows; those that are
nearly as good as the answer take all windows, and no fewer would tell. So each is a race, and what
the races tell of single layers says which exchanges to try next.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from e3jax.search import gumbel

SURE = 1.5  # standard errors by which one answer is worse or better than another
LEAST_WORSE, LEAST_BETTER = 2, 4  # batches before that is believed
PAIRS = 600  # double exchanges that are looked at, the most promising by the layers' worth
# What theta, a standard deviation, says of a layer's worth before any race: as a share of the KL.
PRIOR = 0.3


@dataclasses.dataclass(frozen=True)
class Measured:
    """An answer that was measured on all batches."""

    theta: np.ndarray  # float32 [L], whose TopK it is
    kl: float  # nats a token; inf where it is not finite


def refine(
    theta_l: np.ndarray,
    score: Callable[[np.ndarray, int], tuple[float, float]],
    *,
    batches: int,
    keep: int,
    protect_l: np.ndarray,
    force_l: np.ndarray,
    budget: int,
    answers: int = 1,
) -> list[Measured]:
    """Local search around the answer of theta: `answers` of those found, measured on all batches,
    the best first.

    score: (kept layers as bool [L], number of a batch) -> (KL to the dense model, tokens), sums.
    The answer is compared with those one or two exchanges away, batch by batch, until one of the
    two is `SURE`ly worse, or has the greater KL on all batches; the other is the answer from then
    on. Those come first that are expected best by the `_worth` of their layers. theta's entries
    change places with the layers, so that an answer is still its TopK. Ends where none is left, or
    before `budget` batches are exceeded; what is measured for the result comes on top.
    """
    fixed = (keep, protect_l, force_l)
    parts: dict[bytes, list[tuple[float, float]]] = {}  # of each answer's first batches

    def measured(kept: np.ndarray, count: int) -> np.ndarray:
        """KL and tokens of the first batches, [count, 2]."""
        seen = parts.setdefault(kept.tobytes(), [])
        seen += [score(kept, number) for number in range(len(seen), count)]
        return np.array(seen[:count])

    def race(kept: np.ndarray, best: np.ndarray) -> Race | None:
        """None where the budget is over before it is."""
        for count in range(1, batches + 1):
            wanted = sum(count > len(parts.get(each.tobytes(), ())) for each in (kept, best))
            if sum(map(len, parts.values())) + wanted > budget:
                return None
            theirs, ours = measured(best, count), measured(kept, count)
            gap = ours[:, 0] - theirs[:, 0]
            if (better := _verdict(gap, count == batches)) is not None:
                mean = finite(gap.sum() / max(theirs[:, 1].sum(), 1.0))
                return Race(kept.astype(float) - best, mean, count, better)
        raise AssertionError("there is no batch")

    theta = _ordered(theta_l)
    best = gumbel.answer(theta, *fixed)
    thetas, races = {best.tobytes(): theta}, []
    while True:
        level = finite(np.divide(*measured(best, 1)[0]))
        near = _near(theta, best, _worth(races, theta, level), protect_l, force_l)
        new = ((t, gumbel.answer(t, *fixed)) for t in near)
        trial, kept = next(((t, a) for t, a in new if a.tobytes() not in thetas), (None, best))
        if trial is None or (told := race(kept, best)) is None:
            break
        thetas[kept.tobytes()] = trial
        races.append(told)
        if told.better:
            theta, best = trial, kept

    def behind(name: bytes) -> float:
        """By how much an answer is worse than the best, on the batches that both have seen."""
        count = min(len(parts[name]), len(parts[best.tobytes()]))
        gap = np.array(parts[name][:count]) - np.array(parts[best.tobytes()][:count])
        return -math.inf if name == best.tobytes() else finite(gap[:, 0].mean())

    chosen = sorted(thetas, key=behind)[:answers]
    results = [
        _measured(thetas[name], measured(np.frombuffer(name, best.dtype), batches))
        for name in chosen
    ]
    return sorted(results, key=lambda result: result.kl)


class Race(NamedTuple):
    """What comparing an answer with the best one told."""

    moved: np.ndarray  # float [L]: 1 for layers it has and the best one has not, -1 for the others
    gap: float  # its KL less the best one's, nats a token
    batches: int  # that told it
    better: bool


def _measured(theta: np.ndarray, parts: np.ndarray) -> Measured:
    kl, tokens = parts.sum(axis=0)
    return Measured(theta.copy(), finite(kl / max(tokens, 1.0)))


def finite(kl: float) -> float:
    """What an answer's KL counts as: a masked model that overflows is the worst."""
    return float(kl) if np.isfinite(kl) else math.inf


def _ordered(theta_l: np.ndarray) -> np.ndarray:
    """The same order of layers without ties, which go to the lower one: equal entries could not
    change places."""
    theta = np.array(theta_l)
    if len(np.unique(theta)) < len(theta):
        theta[np.argsort(-theta, kind="stable")] = np.arange(len(theta), 0, -1)
    return theta


def _verdict(gap: np.ndarray, all_of_them: bool) -> bool | None:
    """Whether an answer is better than another, by the differences of their KL on some batches;
    None: they do not tell."""
    if not np.isfinite(gap).all():
        return bool(gap[~np.isfinite(gap)].max() == -math.inf)
    if len(gap) > 1:
        error = SURE * gap.std(ddof=1) / math.sqrt(len(gap))
        if len(gap) >= LEAST_WORSE and gap.mean() > error:
            return False
        if len(gap) >= LEAST_BETTER and gap.mean() < -error:
            return True
    return bool(gap.mean() < 0) if all_of_them else None


def _worth(races: list[Race], theta: np.ndarray, level: float) -> np.ndarray:
    """What keeping each layer takes off the KL, nats a token [L]: linear regression on the races,
    each by its batches, drawn (by one batch's weight) to what theta says."""
    start = PRIOR * (level if math.isfinite(level) else 1.0) * (theta - theta.mean())
    start = start / max(theta.std(), 1e-9)
    told = [race for race in races if math.isfinite(race.gap)]
    if not told:
        return start
    moved, weight = np.array([r.moved for r in told]), np.array([float(r.batches) for r in told])
    rest = np.array([r.gap for r in told]) + moved @ start  # a gap is less the worth of what moved
    square = (moved * weight[:, None]).T @ moved + np.eye(len(theta))
    return start - np.linalg.solve(square, (moved * weight[:, None]).T @ rest)


def _near(
    theta: np.ndarray,
    kept: np.ndarray,
    worth: np.ndarray,
    protect_l: np.ndarray,
    force_l: np.ndarray,
) -> Iterator[np.ndarray]:
    """Thetas of answers one or two exchanges away, those first whose layers are worth most; a kept
    and a removed layer that may change places do, in theta."""
    inside = np.flatnonzero(kept & ~protect_l)
    outside = np.flatnonzero(~kept & ~force_l)
    lost = worth[inside][:, None] - worth[outside]  # [inside, outside]
    singles = [((a, b),) for a in range(len(inside)) for b in range(len(outside))]
    pairs = []
    order = [divmod(at, len(outside)) for at in np.argsort(lost, axis=None, kind="stable")]
    for first, second in itertools.combinations(order, 2):
        if first[0] != second[0] and first[1] != second[1]:
            pairs.append((first, second))
            if len(pairs) == PAIRS:
                break
    for exchanges in sorted(singles + pairs, key=lambda e: sum(lost[place] for place in e)):
        trial = theta.copy()
        for a, b in exchanges:
            i, j = inside[a], outside[b]
            trial[[i, j]] = trial[[j, i]]
        yield trial

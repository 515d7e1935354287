"""The end of the search: exchanges of a kept and a removed layer around its answer.

Ours, not the paper's. Most exchanges are bad and seen to be after a few windows; those that are
nearly as good as the answer take all windows, and no fewer would tell. So each is a race.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator

import numpy as np

from e3jax.search import gumbel

SURE = 2.0  # standard errors by which an answer is worse, to be given up


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
) -> list[Measured]:
    """Local search around the answer of theta: the answers measured on all batches, the best first.

    score: (kept layers as bool [L], number of a batch) -> (KL to the dense model, tokens), sums.
    Exchanges those layers first that are nearest in theta, as the search is least sure of them. An
    answer is given up where its KL is `SURE`ly above the best one's on the batches so far, two at
    least. One that is lower on all of them is the best from then on; theta's two entries change
    places, so that the answer is still its TopK. Ends where no exchange helps, or once exchanges
    have taken `budget` batches.
    """
    left = budget

    def measure(kept: np.ndarray, best: np.ndarray | None) -> np.ndarray | None:
        """KL and tokens of each batch [n, 2]; None: given up."""
        nonlocal left
        parts = []
        for number in range(batches):
            if best is not None:
                if left == 0:
                    return None
                left -= 1
            parts.append(score(kept, number))
            if best is not None and _is_worse(np.array(parts), best[: number + 1]):
                return None
        return np.array(parts)

    def answer(theta: np.ndarray) -> np.ndarray:
        return gumbel.answer(theta, keep, protect_l, force_l)

    theta = _ordered(theta_l)
    best = measure(answer(theta), None)
    assert best is not None
    found = [_measured(theta, best)]
    known, better = {answer(theta).tobytes()}, True
    while better:
        better = False
        for i, j in _pairs(theta, answer(theta), protect_l, force_l):
            trial = theta.copy()
            trial[[i, j]] = trial[[j, i]]
            if answer(trial).tobytes() in known:
                continue
            if left == 0:
                break
            known.add(answer(trial).tobytes())
            if (parts := measure(answer(trial), best)) is None:
                continue
            found.append(_measured(trial, parts))
            if found[-1].kl < _measured(theta, best).kl:
                theta, best, better = trial, parts, True
                break
    return sorted(found, key=lambda measured: measured.kl)


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


def _is_worse(parts: np.ndarray, best: np.ndarray) -> bool:
    if not np.isfinite(best).all():
        return False
    gap = parts[:, 0] - best[:, 0]
    if not np.isfinite(gap).all():
        return True
    error = gap.std(ddof=1) / np.sqrt(len(gap)) if len(gap) > 1 else np.inf
    return bool(gap.mean() > SURE * error)


def _pairs(
    theta: np.ndarray, kept: np.ndarray, protect_l: np.ndarray, force_l: np.ndarray
) -> Iterator[tuple[int, int]]:
    """A kept and a removed layer that may change places, the nearest in theta first."""
    pairs = [
        (i, j)
        for i in np.flatnonzero(kept & ~protect_l).tolist()
        for j in np.flatnonzero(~kept & ~force_l).tolist()
    ]
    yield from sorted(pairs, key=lambda pair: theta[pair[0]] - theta[pair[1]])

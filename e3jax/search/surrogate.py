"""What the masks scored so far tell of the others: a quadratic model of log KL.

Ours, not the paper's. log KL of a set of removed layers is taken as a sum of terms of layers and of
pairs of layers, each normal around 0 (Bayesian quadratic regression, as BOCS of Baptista & Poloczek
2018, arXiv 1806.08838), plus what masks on the same windows have in common, plus noise. N scored
masks are one normal vector, so nothing is as large as the number of pairs but [L, L] matrices.
"""

import dataclasses
import itertools
from typing import NamedTuple

import numpy as np
import scipy.linalg

COMMON = 3.0  # nats of log KL by which groups of windows differ, a standard deviation
# Standard deviations that are tried, in log KL: of a layer's term, of a pair's as a share of it, of
# the noise of one window. The first are taken where nothing is known.
LAYER, PAIR, NOISE = (1.0, 0.3, 0.1, 3.0), (0.15, 0.05, 0.4), (0.4, 0.1, 0.2, 0.8)
TRIED_ON = 400  # scores, the last ones


class Scored(NamedTuple):
    """Masks and what was measured of them."""

    removed: np.ndarray  # bool [N, L]
    log_kl: np.ndarray  # float [N]
    group: np.ndarray  # int [N]: the same for masks scored on the same windows
    windows: np.ndarray  # float [N], of each score

    def and_(self, other: "Scored") -> "Scored":
        """Both, the other's groups apart from these."""
        shift = 1 + max(self.group, default=-1)
        other = other._replace(group=other.group + shift)
        return Scored(*(np.concatenate(pair) for pair in zip(self, other, strict=True)))


@dataclasses.dataclass(frozen=True)
class Scales:
    """Standard deviations in log KL: of a layer's term, of a pair's, of the noise of a window."""

    layer: float
    pair: float
    noise: float


def _kernel(scored: Scored, s: Scales) -> np.ndarray:
    """Covariance of the scores, float64 [N, N]."""
    x = scored.removed.astype(float)
    shared = x @ x.T  # layers that two masks both remove, and so shared (shared - 1) / 2 pairs
    same = scored.group[:, None] == scored.group
    found = s.layer**2 * shared + s.pair**2 * shared * (shared - 1) / 2 + COMMON**2 * same
    return found + np.diag(s.noise**2 / scored.windows)


def fit_scales(scored: Scored) -> Scales:
    """Those of the grid under which what was measured last is most likely."""
    last, best = Scored(*(column[-TRIED_ON:] for column in scored)), None
    for layer, share, noise in itertools.product(LAYER, PAIR, NOISE):
        scales = Scales(layer, share * layer, noise)
        factor = np.linalg.cholesky(_kernel(last, scales))
        white = scipy.linalg.solve_triangular(factor, _centred(last), lower=True)
        evidence = -0.5 * white @ white - np.log(np.diag(factor)).sum()
        if best is None or evidence > best[0]:
            best = evidence, scales
    assert best is not None
    return best[1]


def _centred(scored: Scored) -> np.ndarray:
    return scored.log_kl - (scored.log_kl.mean() if len(scored.log_kl) else 0.0)


class Surrogate(NamedTuple):
    """log KL of removing x, bool [L], but for a constant: layers @ x + x @ pairs @ x / 2."""

    layers: np.ndarray  # float64 [L]
    pairs: np.ndarray  # float64 [L, L], symmetric, 0 on the diagonal

    def __call__(self, removed_nl: np.ndarray) -> np.ndarray:
        """float64 [N] of bool [N, L]."""
        x = removed_nl.astype(float)
        return x @ self.layers + np.einsum("nl,lm,nm->n", x, self.pairs, x) / 2

    def descend(self, removed_l: np.ndarray, may_move_l: np.ndarray) -> np.ndarray:
        """The best exchange of a removed and a kept layer, until none is better: bool [L]."""
        x = removed_l.copy()
        while True:
            slope = self.layers + self.pairs @ x
            inside, outside = np.flatnonzero(x & may_move_l), np.flatnonzero(~x & may_move_l)
            if not len(inside) or not len(outside):
                return x
            change = slope[outside] - slope[inside][:, None] - self.pairs[np.ix_(inside, outside)]
            a, b = divmod(int(np.argmin(change)), len(outside))
            if change[a, b] >= -1e-9:
                return x
            x[[inside[a], outside[b]]] = x[[outside[b], inside[a]]]


def posterior(scored: Scored, s: Scales, samples: int, rng: np.random.Generator) -> list[Surrogate]:
    """The mean, and samples of it given the scores (Matheron's rule: a sample of the prior, moved
    by what it says otherwise than the scores)."""
    x, (count, layers) = scored.removed.astype(float), scored.removed.shape
    upper = np.triu(np.ones((layers, layers)), 1)
    prior = [Surrogate(np.zeros(layers), np.zeros((layers, layers)))]
    said = [np.zeros(count)]
    for _ in range(samples):
        above = s.pair * rng.normal(size=(layers, layers)) * upper
        prior.append(Surrogate(s.layer * rng.normal(size=layers), above + above.T))
        common = COMMON * rng.normal(size=1 + max(scored.group, default=-1))[scored.group]
        noise = s.noise * rng.normal(size=count) / np.sqrt(scored.windows)
        said.append(prior[-1](scored.removed) + common + noise)
    gaps = _centred(scored) - np.array(said)
    found = []
    for before, v in zip(prior, np.linalg.solve(_kernel(scored, s), gaps.T).T, strict=True):
        together = s.pair**2 * (x.T * v) @ x
        np.fill_diagonal(together, 0.0)
        found.append(Surrogate(before.layers + s.layer**2 * v @ x, before.pairs + together))
    return found

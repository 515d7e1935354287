"""What the masks scored so far tell of the others: a quadratic model of log KL.

Ours, not the paper's. log KL of a set of removed layers is taken as a sum of terms of layers and of
pairs of layers, each normal around 0 (Bayesian quadratic regression, as BOCS of Baptista & Poloczek
2018, arXiv 1806.08838), and of a term of the set's own, for what the others leave; plus what sets
scored on the same windows have in common, plus noise. N scores are one normal vector, so nothing is
as large as the number of pairs but [L, L] matrices.

Scores of another kind than what is asked for (with the dense weights, where answers are scored with
adapted ones) tell of it too: of its terms and others beside them, as two fidelities of one
experiment (Kennedy & O'Hagan 2000).
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import scipy.linalg

COMMON = 3.0  # nats of log KL by which groups of windows differ, a standard deviation
# Standard deviations that are tried, in log KL: of a layer's term, of a pair's, of a set's own, of
# the noise of one window; and of the terms of the other kind, relative to these. The first are
# taken where nothing is known.
LAYER, PAIR = (1.0, 0.1, 0.3, 3.0), (0.15, 0.015, 0.05, 0.5)
OWN, NOISE, OTHER = (0.03, 0.01, 0.1, 0.3), (0.4, 0.1, 0.2, 0.8), (1.0, 0.5, 2.0)
TRIED_ON = 400  # scores, the last ones


class Scored(NamedTuple):
    """Masks and what was measured of them."""

    removed: np.ndarray  # bool [N, L]
    log_kl: np.ndarray  # float [N]
    group: np.ndarray  # int [N]: the same for masks scored on the same windows
    windows: np.ndarray  # float [N], of each score
    other: np.ndarray  # bool [N]: scores of the other kind

    def and_(self, other: "Scored") -> "Scored":
        """Both, the other's groups apart from these."""
        shift = 1 + max(self.group, default=-1)
        other = other._replace(group=other.group + shift)
        return Scored(*(np.concatenate(pair) for pair in zip(self, other, strict=True)))


@dataclasses.dataclass(frozen=True)
class Scales:
    """Standard deviations in log KL: of a layer's term, of a pair's, of a set's own, of the noise
    of a window; and of the terms that scores of the other kind have beside these, relative."""

    layer: float
    pair: float
    own: float
    noise: float
    other: float


def _make_kernel(scored: Scored, which: np.ndarray) -> Callable[[Scales], np.ndarray]:
    """Scales -> covariance of the scores, float64 [N, N]. which: from `_sets`."""
    x = scored.removed.astype(float)
    shared = x @ x.T  # layers that two sets both remove, and so as many pairs as follow
    pairs = shared * (shared - 1) / 2
    same, common = which[:, None] == which, COMMON**2 * (scored.group[:, None] == scored.group)
    noise, other = np.diag(1 / scored.windows), np.outer(scored.other, scored.other)

    def kernel(s: Scales) -> np.ndarray:
        terms = s.layer**2 * shared + s.pair**2 * pairs + s.own**2 * same
        return terms * (1 + s.other**2 * other) + common + s.noise**2 * noise

    return kernel


def _sets(scored: Scored) -> tuple[np.ndarray, np.ndarray]:
    """The distinct masks, bool [S, L], and which one each score is of, int [N]."""
    sets, which = np.unique(scored.removed, axis=0, return_inverse=True)
    return sets, which.ravel()  # NumPy 2.0 kept an axis


def fit_scales(scored: Scored) -> Scales:
    """Those of the grid under which what was measured last is most likely: one after the other is
    changed, until no change of one makes it likelier."""
    last = Scored(*(column[-TRIED_ON:] for column in scored))
    kernel, said = _make_kernel(last, _sets(last)[1]), _centred(last)

    @functools.cache
    def evidence(scales: Scales) -> float:
        factor = np.linalg.cholesky(kernel(scales))
        white = scipy.linalg.solve_triangular(factor, said, lower=True)
        return -0.5 * white @ white - np.log(np.diag(factor)).sum()

    tried = {"layer": LAYER, "pair": PAIR, "own": OWN, "noise": NOISE, "other": OTHER}
    best = Scales(*(values[0] for values in tried.values()))
    while True:
        others = [
            dataclasses.replace(best, **{name: value})
            for name, values in tried.items()
            for value in values
        ]
        likeliest = max(others, key=evidence)
        if evidence(likeliest) <= evidence(best):
            return best
        best = likeliest


def _centred(scored: Scored) -> np.ndarray:
    return scored.log_kl - (scored.log_kl.mean() if len(scored.log_kl) else 0.0)


class Surrogate(NamedTuple):
    """log KL of removing x, bool [L], but for a constant: layers @ x + x @ pairs @ x / 2 + own."""

    layers: np.ndarray  # float64 [L]
    pairs: np.ndarray  # float64 [L, L], symmetric, 0 on the diagonal
    own: Mapping[bytes, float] = {}  # of the sets that were scored, by the bytes of x

    def __call__(self, removed_nl: np.ndarray) -> np.ndarray:
        """float64 [N] of bool [N, L]."""
        x = removed_nl.astype(float)
        own = np.array([self.own.get(row.tobytes(), 0.0) for row in removed_nl])
        return x @ self.layers + np.einsum("nl,lm,nm->n", x, self.pairs, x) / 2 + own

    def descend(self, removed_l: np.ndarray, may_move_l: np.ndarray) -> np.ndarray:
        """The best exchange of a removed and a kept layer, until none is better, but for sets' own
        terms: bool [L]."""
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
    (sets, which), upper = _sets(scored), np.triu(np.ones((layers, layers)), 1)
    names = [row.tobytes() for row in sets]

    def draw() -> tuple[Surrogate, np.ndarray]:
        above = s.pair * rng.normal(size=(layers, layers)) * upper
        terms = Surrogate(s.layer * rng.normal(size=layers), above + above.T)
        return terms, s.own * rng.normal(size=len(sets))

    prior = [(Surrogate(np.zeros(layers), np.zeros((layers, layers))), np.zeros(len(sets)))]
    said = [np.zeros(count)]
    for _ in range(samples):
        (terms, own), (beside, its_own) = draw(), draw()
        common = COMMON * rng.normal(size=1 + max(scored.group, default=-1))[scored.group]
        noise = s.noise * rng.normal(size=count) / np.sqrt(scored.windows)
        prior.append((terms, own))
        said.append(terms(scored.removed) + own[which] + common + noise)
        said[-1] += s.other * scored.other * (beside(scored.removed) + its_own[which])
    gaps, found = (_centred(scored) - np.array(said)).T, []
    if count:
        gaps = scipy.linalg.solve(_make_kernel(scored, which)(s), gaps, assume_a="pos")
    for (before, of), v in zip(prior, gaps.T, strict=True):
        together = s.pair**2 * (x.T * v) @ x
        np.fill_diagonal(together, 0.0)
        of = (of + s.own**2 * np.bincount(which, v, len(sets))).tolist()
        own = dict(zip(names, of, strict=True))
        terms = before.layers + s.layer**2 * v @ x, before.pairs + together
        found.append(Surrogate(*terms, own))
    return found

"""The quadratic model of log KL against Bayesian regression written out in its weights."""

import itertools

import numpy as np
import pytest

from e3jax.search import surrogate
from e3jax.search.surrogate import COMMON, Scales, Scored, Surrogate

SCALES = Scales(layer=0.7, pair=0.3, own=0.2, noise=0.4, other=0.5)
L = 4
PAIRS = list(itertools.combinations(range(L), 2))
MASKS = np.array(list(itertools.product([False, True], repeat=L)))


def some(count=12, seed=0):
    """Random masks in groups of three, with random scores, a third of the other kind."""
    rng = np.random.default_rng(seed)
    windows = rng.integers(1, 5, count).astype(float)
    return Scored(
        rng.random((count, L)) < 0.5,
        rng.normal(size=count),
        np.arange(count) // 3,
        windows,
        np.arange(count) < count // 3,
    )


def features(removed):
    """Layers, pairs, and which of all masks it is."""
    x = np.atleast_2d(removed).astype(float)
    pairs = np.stack([x[:, i] * x[:, j] for i, j in PAIRS], axis=1)
    which = (x[:, None] == MASKS[None]).all(axis=-1)
    return np.concatenate([x, pairs, which], axis=1)


def textbook(scored, s=SCALES):
    """Mean and covariance of the weights of layers, pairs and masks, beside those of groups and
    those that scores of the other kind have of their own."""
    groups = np.eye(scored.group.max() + 1)[scored.group]
    own = features(scored.removed)
    f = np.concatenate([own, groups, own * scored.other[:, None]], axis=1)
    terms = [s.layer] * L + [s.pair] * len(PAIRS) + [s.own] * len(MASKS)
    prior = np.array([*terms, *[COMMON] * groups.shape[1], *(s.other * np.array(terms))])
    precision = (f.T * scored.windows / s.noise**2) @ f + np.diag(1 / prior**2)
    cov, y = np.linalg.inv(precision), scored.log_kl - scored.log_kl.mean()
    count = len(terms)
    return (cov @ (f.T * scored.windows / s.noise**2) @ y)[:count], cov[:count, :count]


def weights(model):
    own = [model.own.get(mask.tobytes(), 0.0) for mask in MASKS]
    return np.concatenate([model.layers, [model.pairs[i, j] for i, j in PAIRS], own])


def test_the_mean_is_that_of_the_regression():
    (mean,) = surrogate.posterior(some(), SCALES, 0, np.random.default_rng(0))
    np.testing.assert_allclose(weights(mean), textbook(some())[0], atol=1e-9)
    np.testing.assert_array_equal(mean.pairs, mean.pairs.T)
    np.testing.assert_allclose(mean(MASKS), features(MASKS) @ weights(mean), atol=1e-12)


def test_samples_have_the_mean_and_the_covariance_of_the_regression():
    mean, *samples = surrogate.posterior(some(), SCALES, 20000, np.random.default_rng(0))
    found = np.array([weights(x) for x in samples])
    _, cov = textbook(some())
    seen = np.array([True] * (L + len(PAIRS)) + [mask.tobytes() in mean.own for mask in MASKS])
    error = np.sqrt(np.diag(cov) / len(found))
    assert np.all(np.abs(found.mean(axis=0) - weights(mean))[seen] < 4 * error[seen])
    cov = cov[np.ix_(seen, seen)]
    np.testing.assert_allclose(np.cov(found[:, seen].T), cov, atol=0.02 * cov.max())


def test_nothing_scored_is_the_prior():
    none = Scored(
        np.zeros((0, L), bool), np.zeros(0), np.zeros(0, int), np.zeros(0), np.zeros(0, bool)
    )
    mean, *samples = surrogate.posterior(
        none, surrogate.fit_scales(none), 3, np.random.default_rng(0)
    )
    assert not weights(mean).any() and all(x.layers.all() and not x.own for x in samples)


def test_groups_stay_apart_when_joined():
    one = some()
    both = one.and_(one)
    assert len(np.unique(both.group)) == 2 * len(np.unique(one.group))
    same = both.group[:, None] == both.group
    assert not same[: len(one.group), len(one.group) :].any()


@pytest.mark.parametrize("noise", surrogate.NOISE[:3])
def test_scales_are_those_planted(noise):
    rng = np.random.default_rng(1)
    removed = rng.random((300, 8)) < 0.5
    upper = 0.15 * np.triu(rng.normal(size=(8, 8)), 1)
    planted = Surrogate(rng.normal(size=8), upper + upper.T)
    group, windows = np.arange(300) // 4, np.ones(300)
    common = rng.normal(size=75)[group]
    log_kl = planted(removed) + common + noise * rng.normal(size=300)
    none = np.zeros(300, bool)
    found = surrogate.fit_scales(Scored(removed, log_kl, group, windows, none))
    assert found.noise == noise and found.layer == 1.0 and found.pair == 0.15


def test_a_sets_own_term_is_told_from_noise():
    """Of sets scored again and again; one that stands out is known to be the best."""
    rng = np.random.default_rng(0)
    sets = rng.random((20, 8)) < 0.5
    own = 0.3 * rng.normal(size=20)
    which = np.tile(np.arange(20), 20)
    log_kl = own[which] + 0.1 * rng.normal(size=400)
    scored = Scored(sets[which], log_kl, np.zeros(400, int), np.ones(400), np.zeros(400, bool))
    scales = surrogate.fit_scales(scored)
    assert scales.own == 0.3 and scales.noise == 0.1
    (mean,) = surrogate.posterior(scored, scales, 0, rng)
    assert np.argmin(mean(sets)) == np.argmin(own)


def test_scores_of_the_other_kind_tell_where_there_are_no_others():
    """Eight scores of many terms say little; with many of another kind, which have terms of their
    own too, what was not scored is foretold."""
    rng = np.random.default_rng(0)
    upper = 0.15 * np.triu(rng.normal(size=(2, 12, 12)), 1)
    truth, beside = (Surrogate(rng.normal(size=12), u + u.T) for u in upper)
    removed = rng.random((408, 12)) < 0.5
    other = np.arange(408) < 400
    log_kl = truth(removed) + 0.5 * other * beside(removed) + 0.1 * rng.normal(size=408)
    both = Scored(removed, log_kl, other.astype(int), np.ones(408), other)
    asked = rng.random((300, 12)) < 0.5

    def foretold(scored):
        (mean,) = surrogate.posterior(scored, surrogate.fit_scales(scored), 0, rng)
        return np.corrcoef(mean(asked), truth(asked))[0, 1]

    few = Scored(*(column[400:] for column in both))
    assert surrogate.fit_scales(both).other == 0.5
    assert foretold(both) > 0.9 and foretold(both) > foretold(few) + 0.05


@pytest.mark.parametrize("seed", range(5))
def test_descents_end_where_no_exchange_helps(seed):
    rng = np.random.default_rng(seed)
    upper = np.triu(rng.normal(size=(9, 9)), 1)
    model = Surrogate(rng.normal(size=9), upper + upper.T)
    may_move = np.arange(9) > 1  # layer 0 is kept and layer 1 removed, whatever they cost
    start = np.arange(9) % 2 == 1
    end = model.descend(start, may_move)
    assert end.sum() == start.sum() and not end[0] and end[1]
    (cost,) = model(end[None])
    assert cost <= model(start[None])[0]
    for i, j in itertools.product(np.flatnonzero(end)[1:], np.flatnonzero(~end)[1:]):
        other = end.copy()
        other[[i, j]] = False, True
        assert model(other[None])[0] >= cost - 1e-9

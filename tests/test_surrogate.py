"""The quadratic model of log KL against Bayesian regression written out in its weights."""

import itertools

import numpy as np
import pytest

from e3jax.search import surrogate
from e3jax.search.surrogate import COMMON, Scales, Scored, Surrogate

SCALES = Scales(layer=0.7, pair=0.3, noise=0.4)
L = 4
PAIRS = list(itertools.combinations(range(L), 2))


def some(count=12, seed=0):
    """Random masks in groups of three, with random scores."""
    rng = np.random.default_rng(seed)
    windows = rng.integers(1, 5, count).astype(float)
    return Scored(
        rng.random((count, L)) < 0.5, rng.normal(size=count), np.arange(count) // 3, windows
    )


def features(removed):
    x = np.atleast_2d(removed).astype(float)
    return np.concatenate([x, np.stack([x[:, i] * x[:, j] for i, j in PAIRS], axis=1)], axis=1)


def textbook(scored, s=SCALES):
    """Mean and covariance of the weights of layers, pairs and groups."""
    groups = np.eye(scored.group.max() + 1)[scored.group]
    f = np.concatenate([features(scored.removed), groups], axis=1)
    prior = [s.layer] * L + [s.pair] * len(PAIRS) + [COMMON] * groups.shape[1]
    precision = (f.T * scored.windows / s.noise**2) @ f + np.diag(1 / np.array(prior) ** 2)
    cov, y = np.linalg.inv(precision), scored.log_kl - scored.log_kl.mean()
    weights = L + len(PAIRS)
    return (cov @ (f.T * scored.windows / s.noise**2) @ y)[:weights], cov[:weights, :weights]


def weights(model):
    return np.concatenate([model.layers, [model.pairs[i, j] for i, j in PAIRS]])


def test_the_mean_is_that_of_the_regression():
    (mean,) = surrogate.posterior(some(), SCALES, 0, np.random.default_rng(0))
    np.testing.assert_allclose(weights(mean), textbook(some())[0], atol=1e-9)
    np.testing.assert_array_equal(mean.pairs, mean.pairs.T)
    masks = np.array(list(itertools.product([False, True], repeat=L)))
    np.testing.assert_allclose(mean(masks), features(masks) @ weights(mean), atol=1e-12)


def test_samples_have_the_mean_and_the_covariance_of_the_regression():
    mean, *samples = surrogate.posterior(some(), SCALES, 20000, np.random.default_rng(0))
    found = np.array([weights(x) for x in samples])
    _, cov = textbook(some())
    error = np.sqrt(np.diag(cov) / len(found))
    assert np.all(np.abs(found.mean(axis=0) - weights(mean)) < 4 * error)
    np.testing.assert_allclose(np.cov(found.T), cov, atol=0.02 * cov.max())


def test_nothing_scored_is_the_prior():
    none = Scored(np.zeros((0, L), bool), np.zeros(0), np.zeros(0, int), np.zeros(0))
    mean, *samples = surrogate.posterior(
        none, surrogate.fit_scales(none), 3, np.random.default_rng(0)
    )
    assert not weights(mean).any() and all(weights(x).all() for x in samples)


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
    found = surrogate.fit_scales(Scored(removed, log_kl, group, windows))
    assert found.noise == noise and found.layer == 1.0 and found.pair == pytest.approx(0.15)


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

"""Exchanges at the end of the search: where they end, what they try first, when one is given up."""

import numpy as np
import pytest

from e3jax.search import exchange, gumbel

PROTECT, FORCE = np.arange(7) == 0, np.arange(7) == 6
FIXED = {"keep": 4, "protect_l": PROTECT, "force_l": FORCE}


def refined(budget: int, seed: int = 0, noise: float = 0.0, batches: int = 1, answers: int = 99):
    """Refines random logits of 7 layers, 4 kept, 0 protected, 6 forced, by random scores. Returns
    what was measured, what was asked in order, and the true scores."""
    rng = np.random.default_rng(seed)
    values, asked = {}, []

    def score(kept, number) -> tuple[float, float]:
        asked.append((tuple(np.flatnonzero(kept).tolist()), number))
        true = values.setdefault(asked[-1][0], 1 + rng.random())
        return 10 * (true + noise * rng.normal()), 10.0

    theta = rng.normal(size=7).astype(np.float32)
    options = {"batches": batches, "budget": budget, "answers": answers}
    return exchange.refine(theta, score, **options, **FIXED), asked, values


def kept(measured):
    return tuple(np.flatnonzero(gumbel.answer(measured.theta, **FIXED)).tolist())


@pytest.mark.parametrize("seed", range(5))
def test_they_end_where_none_helps(seed):
    found, asked, values = refined(1000, seed)
    best = kept(found[0])
    assert found[0].kl == pytest.approx(values[best]) and values[best] == min(values.values())
    assert len(best) == 4 and 0 in best and 6 not in best
    for out in set(best) - {0}:
        for new in set(range(1, 6)) - set(best):
            assert values[tuple(sorted(set(best) - {out} | {new}))] >= values[best]
    assert len(asked) == len(set(asked))  # no answer is scored twice
    assert [x.kl for x in found] == sorted(x.kl for x in found)
    for each in found:
        assert each.kl == pytest.approx(values[kept(each)])


def test_they_are_the_nearest_in_theta_and_no_more_than_asked():
    whole = refined(1000)[1]
    assert len(whole) > 4
    for budget in (0, 1, 3):
        found, asked, values = refined(budget)
        assert asked == whole[: max(budget, 1)]
        assert found[0].kl == pytest.approx(min(values.values()))


THETA = np.array([0.0, 3.0, 1.0, 2.0, 0.9, -1.0, 5.0])


def test_the_first_exchange_is_of_the_least_sure_layers():
    asked = []

    def score(kept, number):
        asked.append(np.flatnonzero(kept).tolist())
        return 1.0, 1.0

    exchange.refine(THETA, score, batches=1, budget=2, **FIXED)
    assert asked == [[0, 1, 2, 3], [0, 1, 3, 4]]


def test_two_exchanges_at_once():
    """Where only both together help: no single exchange is better than the start."""
    good = {(0, 1, 2, 3): 1.0, (0, 1, 4, 5): 0.5}
    score = lambda kept, number: (good.get(tuple(np.flatnonzero(kept).tolist()), 2.0), 1.0)
    found = exchange.refine(THETA, score, batches=1, budget=100, **FIXED)
    assert kept(found[0]) == (0, 1, 4, 5) and found[0].kl == 0.5


def test_what_races_tell_of_layers_is_tried_first():
    """Layer 5 is worth much, which theta does not know: after it has shown, it is in every one."""
    asked = []

    def score(kept, number):
        asked.append(tuple(np.flatnonzero(kept).tolist()))
        return 2.0 - kept[5] - 0.1 * kept[2], 1.0

    exchange.refine(THETA, score, batches=1, budget=100, **FIXED)
    first = next(n for n, name in enumerate(asked) if 5 in name)
    assert first < 6 and all(5 in name for name in asked[first : first + 3])


def test_an_exchange_is_decided_when_it_is_sure():
    """A constant difference is believed after four batches of ten, and the answer is measured on
    all of them; where the budget ends before that, it does not count, however good."""
    for budget, kl in ((7, 1.0), (8, 0.0)):
        asked = []

        def score(kept, number, asked=asked):
            asked.append((kept[4], number))
            return (0.0 if kept[4] else 1.0), 1.0

        found = exchange.refine(THETA, score, batches=10, budget=budget, **FIXED)
        assert found[0].kl == kl and len(asked) == len(set(asked))
        assert sum(kept4 == (kl == 0.0) for kept4, _ in asked) == 10


def test_a_bad_exchange_is_given_up_early_and_a_near_one_is_not():
    """Of 20 batches two show that an answer is much worse; a hundredth worse takes more."""
    for gap, most in ((0.5, 3), (0.001, 20)):
        rng, asked = np.random.default_rng(1), []

        def score(kept, number, gap=gap, rng=rng, asked=asked):
            asked.append(tuple(np.flatnonzero(kept).tolist()))
            first = asked[0] == asked[-1]
            return 1.0 + (0.0 if first else gap) + 0.01 * rng.normal(), 1.0

        exchange.refine(np.arange(7, 0, -1.0), score, batches=20, budget=60, **FIXED)
        counts = sorted(asked.count(x) for x in dict.fromkeys(asked))
        assert counts[-1] == 20 and len(counts) > 3  # the answer is measured on all
        assert counts[-2] <= most if gap > 0.1 else counts[-2] > 4


def test_noise_seldom_hides_the_best():
    """Answers measured to a tenth of their spread on each batch: the true best of those visited is
    found, or one a hundredth worse, in nine of ten searches."""
    near = 0
    for seed in range(40):
        found, _, values = refined(1000, seed, noise=0.03, batches=25)
        near += values[kept(found[0])] <= 1.01 * min(values.values())
    assert near >= 36


def test_an_answer_that_overflows_is_the_worst():
    theta = np.arange(7, 0, -1.0)
    for bad_start in (False, True):
        asked = []

        def score(kept, number, asked=asked, bad_start=bad_start):
            name = tuple(np.flatnonzero(kept).tolist())
            asked.append(name)
            bad = (name == asked[0]) == bad_start
            return (np.nan if bad else 1.0), 1.0

        found = exchange.refine(theta, score, batches=2, budget=20, answers=9, **FIXED)
        assert found[0].kl == 1.0 and (kept(found[0]) == asked[0]) != bad_start


def test_layers_that_theta_cannot_tell_apart_change_places_too():
    """The answer is that of the ties, which go to the lower layers."""
    score = lambda kept, number: (0.1 if kept[5] else 1.0, 1.0)
    found = exchange.refine(np.zeros(7), score, batches=1, budget=50, answers=99, **FIXED)
    assert found[0].kl == 0.1 and 5 in kept(found[0])
    assert any(kept(x) == (0, 1, 2, 3) for x in found)

"""The end of the search: what it proposes, what it spends, what it finds."""

import itertools

import numpy as np
import pytest

from e3jax.search import gumbel, refine, surrogate

L, KEEP = 9, 5
PROTECT, FORCE = np.arange(L) == 0, np.arange(L) == 8
FIXED = {"keep": KEEP, "protect_l": PROTECT, "force_l": FORCE}
ALL = [
    np.isin(np.arange(L), (0, *inside)) for inside in itertools.combinations(range(1, 8), KEEP - 1)
]
NOBODY = surrogate.Scored(
    np.zeros((0, L), bool), np.zeros(0), np.zeros(0, int), np.zeros(0), np.zeros(0, bool)
)


def landscape(seed, pair=0.3):
    """log KL of every answer, of terms of layers and pairs; the best answer."""
    rng = np.random.default_rng(seed)
    upper = pair * np.triu(rng.normal(size=(L, L)), 1)
    model = surrogate.Surrogate(rng.normal(size=L), upper + upper.T)
    log_kl = {kept.tobytes(): float(model(~kept[None])[0]) for kept in ALL}
    return log_kl, min(log_kl, key=log_kl.__getitem__)


def refined(
    log_kl, *, seen=NOBODY, budget=200, batches=10, noise=0.0, seed=0, answers=1, theta=None
):
    """What was measured, and what was asked, in order."""
    rng, asked = np.random.default_rng(seed), []

    def score(kept, number):
        asked.append((kept.tobytes(), number))
        return 10 * np.exp(log_kl[kept.tobytes()] + noise * rng.normal()), 10.0

    theta = rng.normal(size=L).astype(np.float32) if theta is None else theta
    found = refine.refine(
        theta, seen, score, batches=batches, windows=1, budget=budget, seed=seed, answers=answers,
        **FIXED,
    )  # fmt: skip
    return found, asked


def kept(measured):
    return gumbel.answer(measured.theta, **FIXED).tobytes()


@pytest.mark.cases(2)
@pytest.mark.parametrize("seed", range(5))
def test_the_best_of_all_is_found(seed):
    """Of 35 answers, each of which is scored on some batches at most."""
    log_kl, best = landscape(seed)
    found, asked = refined(log_kl, seed=seed, answers=3)
    assert kept(found[0]) == best
    assert [x.kl for x in found] == sorted(x.kl for x in found) and len(found) == 3
    for each in found:
        assert each.kl == pytest.approx(np.exp(log_kl[kept(each)]), rel=1e-6)
    assert len(asked) == len(set(asked)) and {name for name, _ in asked} <= log_kl.keys()


def test_noise_seldom_hides_it():
    """Scores that are off by a tenth: the best, or one a twentieth worse, in nine of ten."""
    near = 0
    for seed in range(20):
        log_kl, best = landscape(seed)
        found, _ = refined(log_kl, seed=seed, noise=0.1, batches=20, budget=100)
        near += log_kl[kept(found[0])] <= log_kl[best] + 0.05
    assert near >= 18


@pytest.mark.parametrize("budget", [0, 1, 7, 40])
def test_no_more_than_the_budget_and_the_result(budget):
    log_kl, _ = landscape(0)
    found, asked = refined(log_kl, budget=budget, noise=0.1)
    assert len(found) == 1 and len(asked) <= budget + 10


def test_a_small_budget_proposes_too():
    """Four batches, less than a round: nothing is known, so the samples' answers, on the same
    windows."""
    found, asked = refined(landscape(0)[0], budget=4, answers=1)
    assert len(found) == 1 and len({name for name, _ in asked[:4]}) == 4
    assert {number for _, number in asked[:4]} == {0}


def test_what_the_search_saw_is_where_it_begins():
    """With the masks of a search of this landscape the first proposal is the best answer; without
    them it is not."""
    first = []
    for told in (True, False):
        right = 0
        for seed in range(6):
            log_kl, best = landscape(seed)
            rng = np.random.default_rng(seed)
            masks = np.array([ALL[i] for i in rng.integers(len(ALL), size=200)])
            losses = np.array([log_kl[m.tobytes()] for m in masks]) + 0.05 * rng.normal(size=200)
            seen = refine.drawn(masks[:, None], losses[:, None], KEEP, 1)
            seen = seen._replace(group=np.zeros(len(masks), int))
            _, asked = refined(log_kl, seen=seen if told else NOBODY, seed=seed, budget=1)
            right += asked[0][0] == best
        first.append(right)
    assert first[0] >= 5 and first[1] <= 2


@pytest.mark.parametrize("batches", [1, 3])
def test_what_was_measured_is_known_once(monkeypatch, batches):
    """However often it is proposed; and a batch that comes again has the same windows."""
    known, posterior = [], surrogate.posterior

    def told(scored, *more):
        known.append(scored)
        return posterior(scored, *more)

    monkeypatch.setattr(surrogate, "posterior", told)
    _, asked = refined(landscape(0)[0], batches=batches)
    assert len(known) > batches + 2  # batches came again
    last = list(zip(map(bytes, ~known[-1].removed), known[-1].group, strict=True))
    assert len(last) == len(set(last)) and set(last) == set(asked[: len(last)])


def test_another_process_follows_the_first(monkeypatch):
    """It measures the same in the same order, and asks no surrogate of its own, which may round to
    another answer."""
    said, from_first = [], refine.processes.from_first

    def tell(make):
        said.append(from_first(make))
        return said[-1]

    monkeypatch.setattr(refine.processes, "from_first", tell)
    found, asked = refined(landscape(1)[0])
    monkeypatch.setattr(refine.processes, "from_first", lambda make: said.pop(0))
    monkeypatch.setattr(surrogate, "posterior", None)
    again, asked_again = refined(landscape(1)[0])
    assert asked_again == asked and kept(again[0]) == kept(found[0]) and not said


def test_overflows_count_as_e_times_the_worst():
    found = refine.scored(np.zeros((3, L), bool), np.array([-4.0, np.inf, -3.0]), np.arange(3), 2)
    assert found.log_kl.tolist() == [-4.0, -2.0, -3.0] and found.windows.tolist() == [2.0] * 3


def test_masks_of_the_search():
    """Those of another count of layers, or without a loss, are left out; groups are windows, or
    steps where each window has one mask."""
    rng = np.random.default_rng(0)
    keep = np.array([[ALL[i] for i in rng.integers(len(ALL), size=6)] for _ in range(4)])
    keep[0] = True
    log_loss = rng.normal(size=(4, 6))
    log_loss[2, 1] = np.nan
    for masks, groups in ((3, [2, 2, 2, 3, 3, 3, 4, 4, 5, 5, 5, 6, 6, 6, 7, 7, 7]), (1, None)):
        found = refine.drawn(keep, log_loss, KEEP, masks)
        assert found.group.tolist() == (groups or [1] * 6 + [2] * 5 + [3] * 6)
        fine = np.isfinite(log_loss[1:]).ravel()
        np.testing.assert_array_equal(found.removed, ~keep[1:].reshape(-1, L)[fine])
        np.testing.assert_array_equal(found.log_kl, log_loss[1:].ravel()[fine])


def test_an_answer_that_overflows_is_the_worst():
    log_kl, best = landscape(0)
    log_kl = log_kl | {best: np.nan}
    theta = refine._theta_of(np.frombuffer(best, bool), np.arange(L, dtype=np.float32))
    found, asked = refined(log_kl, answers=99, theta=theta)  # the search's own answer
    assert kept(found[-1]) == best and found[-1].kl == np.inf
    assert len(found) > 4 and kept(found[0]) == min(
        {name for name, _ in asked} - {best}, key=log_kl.__getitem__
    )
    assert kept(refined(log_kl, theta=theta)[0][0]) == kept(found[0])


def test_every_answer_is_the_topk_of_its_theta():
    """Also of layers that the search's theta cannot tell apart."""
    for theta in (np.zeros(L, np.float32), np.arange(L, dtype=np.float32)):
        for answer in ALL:
            found = refine._theta_of(answer, theta)
            np.testing.assert_array_equal(gumbel.answer(found, **FIXED), answer)
    np.testing.assert_array_equal(refine._theta_of(theta >= 4, theta), theta)

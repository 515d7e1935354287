"""Selectors that remove layers: against transformers with the layers deleted, exhaustive search and
published figures."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from e3jax import config, job
from e3jax.data.text import tokenize
from e3jax.errors import UserError
from e3jax.hf.families import read_config
from e3jax.hf.load import load_params
from e3jax.models import decoder
from e3jax.models.decoder import Batch
from e3jax.selectors import evopress as evolution
from e3jax.selectors import removal
from e3jax.selectors.evopress import evopress
from e3jax.selectors.removal import dense_passes, greedy_kl, kl, leave_one_out_kl, ppl, sleb
from e3jax.selectors.selection import Calibration, Task, lowest
from hf_tiny import random_tokens
from selectors_tiny import as_batch, make_tiny
from training_tiny import set_mesh

# KL to the dense model without each layer of chain-math-24l, 24 training rows: PyTorch, float32.
LEAVE_ONE_OUT = (
    "6.4506 0.7557 0.4530 0.5122 1.0366 0.0032 0.0033 0.0164 0.0557 0.0050 0.0020 0.0017 "
    "0.0024 0.0014 0.0013 0.0020 0.0024 0.0014 0.0130 0.0051 0.0058 0.0043 0.1409 0.0798"
)


ALL = [ppl, kl, sleb, greedy_kl, evopress]


def on_no_device(found):
    """Parameters that are good for any mesh."""
    model, params, cfg = found
    return model, jax.tree.map(np.asarray, params), cfg


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return on_no_device(make_tiny(tmp_path_factory.mktemp("tiny"), "llama", num_hidden_layers=4))


@pytest.fixture(scope="module")
def six(tmp_path_factory):
    return on_no_device(make_tiny(tmp_path_factory.mktemp("six"), "llama", num_hidden_layers=6))


def torch_log_probs(model, tokens):
    with torch.no_grad():
        return torch.log_softmax(
            model(torch.as_tensor(tokens), use_cache=False).logits.double(), -1
        )


def torch_without(model, tokens, removed) -> tuple[float, float]:
    """NLL and KL(dense || without the layers) over the predictions of tokens 1.. of each row."""
    whole, dense = model.model.layers, torch_log_probs(model, tokens)[:, :-1]
    model.model.layers = torch.nn.ModuleList(x for i, x in enumerate(whole) if i not in removed)
    pruned = torch_log_probs(model, tokens)[:, :-1]
    model.model.layers = whole
    nll = -pruned.gather(-1, torch.as_tensor(tokens)[:, 1:, None]).mean()
    return float(nll), float((dense.exp() * (dense - pruned)).sum(-1).mean())


def calibrate(found, batches, **changes) -> Calibration:
    _, params, cfg = found
    given = {"params": params, "cfg": cfg, "dtype": jnp.float32, "chunk": 10, **changes}
    return Calibration(batches=batches, **given)


def rows(cfg, count=2, length=12) -> list[Batch]:
    return [as_batch([[row] for row in random_tokens(cfg.vocab_size, length, rows=count)], length)]


@pytest.mark.parametrize("form", ["rows", "packed", "two batches"])
def test_scores_are_those_of_transformers(tiny, form):
    """However the tokens come: padding, empty rows and neighbours in the window change nothing."""
    model, _, cfg = tiny
    tokens = random_tokens(cfg.vocab_size, 12)
    batches = {
        "rows": [as_batch([[row] for row in tokens], 12)],
        "packed": [as_batch([list(tokens), []], 27)],
        "two batches": [as_batch([[row]], 12) for row in tokens],
    }[form]
    calibration, task = calibrate(tiny, batches), Task(4, keep=3)
    want = np.array([torch_without(model, tokens, [i]) for i in range(4)])
    scores, spent = leave_one_out_kl(calibration)
    np.testing.assert_allclose(scores, want[:, 1], rtol=2e-4)
    assert spent == 4 * 24 and np.ptp(want[:, 1]) > 0.1 * want[:, 1].max()
    for selector, column in ((ppl, 0), (kl, 1)):
        found = selector(calibration, task)
        np.testing.assert_allclose(found.scores, want[:, column], rtol=2e-4)
        assert found.order == (np.argmin(want[:, column]),)
        assert (found.tokens, found.teacher_tokens) == (4 * 24, 24)


@pytest.mark.parametrize(("selector", "column", "ends"), [(sleb, 0, 1), (greedy_kl, 1, 0)])
@pytest.mark.parametrize("fixed", [{}, {"protect": {2}, "force": {3}}], ids=["free", "fixed"])
def test_greedy_is_that_of_transformers(six, selector, column, ends, fixed):
    model, _, cfg = six
    tokens = random_tokens(cfg.vocab_size, 12)
    task = Task(6, keep=3, **{k: frozenset(v) for k, v in fixed.items()})
    found = selector(calibrate(six, rows(cfg)), task)

    gone, first, models = sorted(task.force), None, 0
    while len(gone) < 3:
        alive = [i for i in range(6) if i not in gone]
        free = set(alive[ends : len(alive) - ends]) - task.protect
        scores = {i: torch_without(model, tokens, [*gone, i])[column] for i in free}
        first, models = first or scores, models + len(free)
        gone.append(min(scores, key=scores.get))
    assert found.order == tuple(gone) and found.keep == tuple(set(range(6)) - set(gone))
    assert (found.tokens, found.teacher_tokens) == (models * 24, 24)
    np.testing.assert_allclose(
        found.scores, [first.get(i, np.nan) for i in range(6)], rtol=2e-4, equal_nan=True
    )


def test_rounds_share_a_program(six):
    calibration = calibrate(six, rows(six[2]), chunk=7)
    before = removal._removals._cache_size(), evolution._divergences._cache_size()
    for selector in (ppl, kl, sleb, greedy_kl):
        selector(calibration, Task(6, keep=3))
    evopress(calibration, Task(6, keep=3), few=24, many=24)
    after = removal._removals._cache_size(), evolution._divergences._cache_size()
    assert after == (before[0] + 1, before[1] + 1)


@pytest.mark.parametrize("fixed", [{}, {"protect": {5}, "force": {0}}], ids=["free", "fixed"])
def test_evopress_finds_the_best_set(six, fixed):
    """Of all sets, scored by transformers."""
    model, _, cfg = six
    task = Task(6, keep=3, **{k: frozenset(v) for k, v in fixed.items()})
    tokens = random_tokens(cfg.vocab_size, 12)
    allowed = lambda gone: task.force <= {*gone} and not task.protect & {*gone}
    sets = [gone for gone in itertools.combinations(range(6), 3) if allowed(gone)]
    want = min(sets, key=lambda gone: torch_without(model, tokens, gone)[1])
    found = [evopress(calibrate(six, rows(cfg), seed=0), task, few=12) for _ in range(2)]
    assert set(found[0].order) == set(want)
    assert found[0] == found[1]
    # All are ranked on one row, few on both, none on either twice.
    assert found[0].teacher_tokens == 12 + 24
    assert found[0].tokens % 12 == 0 and 12 < found[0].tokens <= len(sets) * 36


def test_evopress_stops_at_its_budget(six):
    calibration, task = calibrate(six, rows(six[2], count=8)), Task(6, keep=3)
    spend = lambda budget: evopress(calibration, task, few=12, offspring=2, budget=budget).tokens
    assert spend(1) == 12  # a start there must be
    assert spend(60) <= 60
    # Where sets are drawn twice the start is cheaper, and generations use what that leaves.
    generation = 2 * 12 + 3 * 96
    assert spend(60 + generation) <= 60 + generation
    assert 64 * 12 < spend(None) <= 20 * (12 + 96)


def test_first_windows():
    batches = [as_batch([[np.arange(5)]] * 4, 16) for _ in range(3)]
    shapes = lambda tokens: [b.tokens.shape for b in evolution.first_windows(batches, tokens)]
    assert shapes(1) == shapes(16) == [(1, 16)]
    assert shapes(17) == [(2, 16)]
    assert shapes(64) == [(4, 16)]
    assert shapes(65) == [(4, 16)] * 2
    assert shapes(10**6) == [(4, 16)] * 3
    with set_mesh(2, 2, 2):
        assert shapes(1) == [(4, 16)]


@pytest.mark.parametrize("selector", ALL)
def test_planted_layer_goes_first(six, selector):
    """A layer that adds nothing, in a model that is right: any other removal costs."""
    _, params, cfg = six
    (batch,) = rows(cfg)
    idle = {k: v.copy() for k, v in params["layers"].items()}
    for name in ("o", "down"):
        idle[name][3] = 0
    params = {**params, "layers": idle}
    h = decoder.hidden(params, batch, cfg, dtype=jnp.float32, remat="none")
    batch = batch.replace(targets=np.asarray(decoder.logits(params, h, cfg)).argmax(-1))
    found = selector(calibrate(six, [batch], params=params), Task(6, keep=5))
    assert found.order == (3,)
    if selector in (kl, greedy_kl):
        assert found.scores[3] == 0 < min(found.scores[:3] + found.scores[4:])
    forced = Task(6, keep=4, protect=frozenset({3}), force=frozenset({1}))
    found = selector(calibrate(six, [batch], params=params), forced)
    assert 3 in found.keep and 1 in found.order
    if selector is not evopress:
        assert found.order[0] == 1


def test_sleb_has_to_leave_both_ends(six):
    calibration = calibrate(six, rows(six[2]))
    with pytest.raises(UserError, match=r"search.keep=1: of the layers left, \[0, 5\], none"):
        sleb(calibration, Task(6, keep=1))
    assert len(greedy_kl(calibration, Task(6, keep=1)).order) == 5


@pytest.mark.slow
def test_eight_devices_give_what_one_does(six):
    calibration, task = calibrate(six, rows(six[2], count=8), chunk=16), Task(6, keep=3)
    run = lambda: [selector(calibration, task) for selector in ALL]
    one, (scores, spent) = run(), leave_one_out_kl(calibration)
    with set_mesh(2, 2, 2):
        eight, (scores_eight, spent_eight) = run(), leave_one_out_kl(calibration)
    np.testing.assert_allclose(scores_eight, scores, rtol=1e-4)
    assert spent_eight == spent
    for a, b in zip(one, eight, strict=True):
        assert (a.keep, a.order, a.tokens) == (b.keep, b.order, b.tokens)
        np.testing.assert_allclose(a.scores, b.scores, rtol=1e-4, equal_nan=True)


def test_lowest():
    scores = np.array([0.5, 0.1, 0.3, 0.2, 0.1])
    choose = lambda keep, **fixed: lowest(
        Task(5, keep, **{k: frozenset(v) for k, v in fixed.items()}), scores, tokens=7
    )
    assert choose(3).keep == (0, 2, 3)
    assert choose(3).order == (1, 4)  # of the tie, the lower layer first
    assert choose(2, protect={1}).order == (4, 3, 2)
    assert choose(3, force={0}).order == (0, 1)
    assert choose(3, protect={1, 4}, force={0}).order == (0, 3)
    assert choose(3).scores == tuple(scores) and choose(3).tokens == 7


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_published_figures(shared, tmp_path, one_device):
    """Of a real model: leave-one-out KL, and the six layers that each selector removes."""
    folder = shared / "models" / "chain-math-24l"
    train = shared / "data" / "chain-math" / "train.jsonl.gz"
    source = config.Source(path=str(train), rows=("0:24",))
    data = config.Data(train=(source,), window=512, cache=str(tmp_path), decontaminate=())
    windows = tokenize(data.train, data, folder)
    assert windows.meta["documents"] == 24
    cfg = read_config(folder)
    params = load_params(folder, cfg, jnp.float32)
    batches = list(job.ordered(windows, 8))
    calibration = Calibration(params, cfg, batches, jnp.float32, chunk=4096)
    task, layers = Task(24, keep=18), range(24)
    found = removal.removals(calibration, dense_passes(calibration, batches), layers, layers)
    want = np.array(LEAVE_ONE_OUT.split(), float)
    np.testing.assert_allclose(found.kl, want, rtol=2e-4, atol=5.1e-5)  # four digits are published
    assert sorted(lowest(task, found.kl).order) == [10, 11, 13, 14, 15, 17]
    assert sorted(lowest(task, found.nll).order) == [10, 13, 14, 15, 16, 17]
    assert sorted(sleb(calibration, task).order) == [6, 10, 13, 14, 17, 21]

"""Batches: what they hold, their order, processes, and the prefetcher."""

import collections
import threading
import time

import numpy as np
import pytest

from e3jax.data.batches import gather, make_batches, ordered_batches, prefetch
from e3jax.data.windows import Document, load_windows, pack, store_windows
from e3jax.errors import UserError

T = 12


@pytest.fixture(scope="module")
def windows(tmp_path_factory):
    """23 windows of documents of 1 to 12 tokens, with random loss masks; ids are never 0."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, T + 1, 41)
    stream = (Document(rng.integers(1, 99, n).astype(np.int32), rng.random(n) < 0.6) for n in sizes)
    folder = tmp_path_factory.mktemp("windows") / "stored"
    store_windows(pack(stream, T, limit=8), T, folder, {})
    return load_windows(folder)


def equal(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def test_fields_equal_a_plain_loop(windows):
    batch = gather(windows, np.arange(len(windows)))
    dtypes = {name: x.dtype for name, x in batch.items()}
    assert dtypes == {
        **dict.fromkeys(["tokens", "positions", "segments", "targets"], np.int32),
        "mask": bool,
        "index": np.int64,
    }
    for b in range(len(windows)):
        tokens, segments, loss = windows.tokens[b], windows.segments[b], windows.loss[b]
        position = 0
        for t in range(T):
            position = position + 1 if t and segments[t] == segments[t - 1] else 0
            last = t == T - 1
            assert batch["tokens"][b, t] == tokens[t]
            assert batch["positions"][b, t] == (position if segments[t] else 0)
            assert batch["targets"][b, t] == (0 if last else tokens[t + 1])
            carries = not last and segments[t] and segments[t + 1] == segments[t] and loss[t + 1]
            assert batch["mask"][b, t] == carries
    assert batch["mask"].sum() == windows.meta["loss_tokens"] > 0
    assert (batch["segments"].max(axis=1) > 1).any() and (batch["segments"] == 0).any()


def test_each_epoch_visits_every_window_once_in_its_own_order(windows):
    m = len(windows)
    batches = make_batches(windows, batch=5, seed=3)
    visited = np.concatenate([batches(step)["index"] for step in range(m)])  # five epochs
    epochs = visited.reshape(5, m)
    assert (np.sort(epochs) == np.arange(m)).all()
    assert len({tuple(e) for e in epochs}) == 5
    plain = make_batches(windows, batch=m, seed=3, shuffle=False)
    assert (plain(4)["index"] == np.arange(m)).all()


def test_a_batch_depends_on_seed_and_step_only(windows):
    one, same, other = (make_batches(windows, 8, seed) for seed in (1, 1, 2))
    forward = [one(step) for step in range(6)]
    backward = [same(step) for step in reversed(range(6))][::-1]
    assert all(equal(a, b) for a, b in zip(forward, backward, strict=True))
    assert not equal(one(0), other(0))


def test_fewer_windows_than_a_batch_repeat(windows):
    m = len(windows)
    index = make_batches(windows, 2 * m + 3, seed=0)(0)["index"]
    assert set(collections.Counter(index[: 2 * m].tolist()).values()) == {2}


@pytest.mark.parametrize("count", [2, 4])
def test_processes_concatenate_to_the_single_process(windows, count):
    shares = np.split(np.arange(8), count)
    parts = [make_batches(windows, 8, 5, rows=rows) for rows in shares]
    whole = make_batches(windows, 8, 5)
    for step in range(7):
        pieces = [part(step) for part in parts]
        assert equal(whole(step), {k: np.concatenate([p[k] for p in pieces]) for k in whole(step)})
    ordered = zip(
        *(ordered_batches(windows, 8, rows=rows) for rows in shares),
        strict=True,
    )
    for pieces, single in zip(ordered, ordered_batches(windows, 8), strict=True):
        assert equal(single, {k: np.concatenate([p[k] for p in pieces]) for k in single})


def test_ordered_batches_visit_every_window_once(windows):
    m = len(windows)
    batches = list(ordered_batches(windows, 5))
    index = np.concatenate([b["index"] for b in batches])
    assert (index[:m] == np.arange(m)).all() and (index[m:] == -1).all() and len(index) % 5 == 0
    empty = batches[-1]["index"] == -1
    assert empty.any()
    for name in ("tokens", "positions", "segments", "targets", "mask"):
        assert not batches[-1][name][empty].any(), name
    assert sum(b["mask"].sum() for b in batches) == windows.meta["loss_tokens"]


def test_prefetch_is_in_order_ahead_and_bounded():
    started = []

    def fn(step):
        started.append(step)
        return step * step

    stream = prefetch(fn, 3, 20, depth=2)
    assert next(stream) == (3, 9)
    deadline = time.monotonic() + 5
    while len(started) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert started == [3, 4, 5]
    assert list(stream) == [(s, s * s) for s in range(4, 20)]
    assert list(prefetch(fn, 5, 5)) == []


def test_prefetch_raises_at_its_step_and_closes():
    def fn(step):
        if step == 2:
            raise UserError("row 7 is bad")
        return step

    stream = prefetch(fn, 0, 9)
    assert [next(stream), next(stream)] == [(0, 0), (1, 1)]
    with pytest.raises(UserError, match="row 7 is bad"):
        next(stream)
    begun = prefetch(lambda step: step, 0, 10**9)
    next(begun)
    begun.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("prefetch")]

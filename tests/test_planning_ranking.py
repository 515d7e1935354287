"""Which mesh, micro-batch and recomputation a plan finds."""

import dataclasses
import itertools

import pytest

from e3jax import config
from e3jax.errors import UserError
from e3jax.planning import chips, compile, ranking
from planning_tiny import MODEL, small_run


def test_ranking_is_sane():
    run = small_run(batch=32)
    some, more = (
        ranking.rank(run, MODEL, "bfloat16", chips.parse(t)) for t in ("h100:2", "h100:8")
    )
    assert [c.seconds for c in more] == sorted(c.seconds for c in more)

    def least(choices):
        return min(c.memory for c in choices)

    assert least(some) > least(more)  # a smaller mesh needs more of each device
    by = {(c.model, c.microbatch, c.remat): c for c in more if c.replica == 1}
    assert {c.model for c in more} == {1, 2, 4}  # eight would divide the four heads of keys
    assert by[1, 8, "layer"].memory < by[1, 8, "selective"].memory < by[1, 8, "none"].memory
    assert by[1, 8, "layer"].memory < by[1, 32, "layer"].memory
    assert by[1, 32, "none"].seconds < by[1, 32, "layer"].seconds
    overrides = more[0].overrides.split()
    tree = {key: value for key, _, value in (text.partition("=") for text in overrides)}
    assert tree["model.remat"] == more[0].remat


def test_no_mesh_can_share_the_batch():
    few = dataclasses.replace(small_run(), search=config.Search(keep=2, batch=16, microbatch=1))
    with pytest.raises(UserError, match=r"the 1 of search\.microbatch, or"):
        ranking.rank(few, MODEL, "bfloat16", chips.parse("h100:8"))
    with pytest.raises(UserError, match=r"distill\.batch=2: no mesh of h100:64"):
        ranking.rank(small_run(batch=2), MODEL, "bfloat16", chips.parse("h100:64"))


def test_slices_are_replicas():
    found = ranking.rank(small_run(batch=64), MODEL, "bfloat16", chips.parse("2xv5p:2x2x1"))
    assert {c.replica for c in found} == {2} and {c.data * c.model for c in found} == {4}


def test_replicas_within_the_only_slice():
    """Each holds the whole model: more memory, and no weights to gather. A small model takes it."""
    found = ranking.rank(small_run(batch=32), MODEL, "bfloat16", chips.parse("v5p:2x2x2"))
    assert {c.replica * c.data * c.model for c in found} == {8}
    one = {c.replica: c for c in found if (c.model, c.microbatch, c.remat) == (1, 32, "layer")}
    assert one.keys() == {1, 2, 4, 8}
    assert one[1].memory < one[2].memory < one[4].memory < one[8].memory
    assert found[0].replica > 1


def memory(peak, capacity):
    parts = dict.fromkeys(("parameters", "optimiser", "teacher", "activations"), 0)
    return compile.Memory(temporaries=peak, capacity=capacity, compiled=True, seconds=1.0, **parts)


@pytest.mark.parametrize(
    ("seconds", "fits_from", "compiled"),
    [(1, 2, 3), (1, 5, 6), (140, 5, 6), (160, 5, 3), (40, 10**9, 21)],
    ids=["one of three", "one of six", "in time", "no time", "none"],
)
def test_three_are_compiled_and_three_more_in_five_minutes(
    monkeypatch, seconds, fits_from, compiled
):
    """Where none of three fits: if the clock allows. The fastest that fits, or the least."""
    topology, run = chips.parse("h100:4"), small_run(batch=8)
    clock, number, told = itertools.count(), itertools.count(), []
    monkeypatch.setattr(ranking.time, "monotonic", lambda: next(clock) * seconds)

    def step(*_):
        this = next(number) // 2  # two steps a choice
        lacks = max(fits_from - this, 0) * 10**6
        return memory(
            topology.memory // 2 if not lacks else topology.memory + lacks, topology.memory
        )

    class OneByOne:
        """In place of threads, so that the order is told."""

        def __init__(self, _): ...
        def __enter__(self):
            return self

        def __exit__(self, *_): ...
        def map(self, fn, items):
            return [fn(item) for item in items]

    monkeypatch.setattr(ranking.concurrent.futures, "ThreadPoolExecutor", OneByOne)
    monkeypatch.setattr(compile, "search_step", step)
    monkeypatch.setattr(compile, "train_step", step)
    ranked = ranking.rank(run, MODEL, "bfloat16", topology)
    found = ranking.search_mesh(run, MODEL, "bfloat16", topology, told.append)
    assert len(told) - 1 == min(compiled, len(ranked))
    best = fits_from if fits_from < compiled else compiled - 1
    assert dataclasses.replace(found, compiled=None) == ranked[min(best, len(ranked) - 1)]

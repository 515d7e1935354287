"""search.target: the most layers that meet it, by counting every model of each depth."""

import dataclasses
import itertools
import logging

import pytest

from e3jax import config, target
from e3jax.errors import UserError
from e3jax.models.config import Experts
from e3jax.models.params import count_params
from test_cli import CFG, checkpoint, place, refused  # noqa: F401

WHOLE = count_params(CFG)
HALF = count_params(CFG.take_layers([0, 1]))


def keep_of(cfg=CFG, dtype="bfloat16", export="source", **asked):
    spec = config.Search(target=config.Target(**asked))
    run = config.Run(out="x", search=spec, export=config.Export(dtype=export))
    found = target.resolve(run, cfg, lambda: dtype)
    assert found.search.target == config.Target()  # it has been said
    return found.search.keep


def test_params_are_met_and_one_more_layer_would_not():
    for limit in range(count_params(CFG.take_layers([0])), WHOLE, 97):
        keep = keep_of(params=limit)
        assert count_params(CFG.take_layers(range(keep))) <= limit
        assert count_params(CFG.take_layers(range(keep + 1))) > limit


def test_memory_is_of_the_dtype_written():
    assert keep_of(memory=2 * HALF) == keep_of(memory=4 * HALF, dtype="float32") == 2
    assert keep_of(memory=2 * HALF - 1) == keep_of(memory=4 * HALF - 1, dtype="float32") == 1
    assert keep_of(memory=2 * HALF, dtype="float32", export="bfloat16") == 2


@pytest.mark.parametrize(("speedup", "keep"), [(4, 1), (1.3, 3), (4 / 3, 3), (1.34, 2), (2, 2)])
def test_speedup(speedup, keep):
    assert keep_of(speedup=speedup) == keep


def test_layers_that_differ_count_as_the_largest():
    """Whichever layers are then kept, the model is small enough."""
    cfg = dataclasses.replace(CFG, dense=(0, 2), experts=Experts(count=4, per_token=2, width=16))
    sizes = {
        keep: [count_params(cfg.take_layers(k)) for k in itertools.combinations(range(4), keep)]
        for keep in range(1, 5)
    }
    assert len(set(sizes[2])) > 1
    for limit in range(max(sizes[1]), max(sizes[4]), 331):
        keep = keep_of(cfg, params=limit)
        assert max(sizes[keep]) <= limit < max(sizes[keep + 1])


def test_units_and_the_arithmetic(caplog):
    assert target._number("", "1.5B", target.COUNTS) == 1_500_000_000
    assert target._number("", "24 gib", target.SIZES) == 24 * 2**30
    assert target._number("", "13.4GB", target.SIZES) == 13_400_000_000
    assert target._number("", 6e20, target.COUNTS) == 6 * 10**20
    with caplog.at_level(logging.INFO):
        keep_of(params=str(HALF))
    layer = (WHOLE - HALF) // 2
    counted = f"{HALF - 2 * layer:,} outside the layers + {2 * layer:,} in 2 = {HALF:,}"
    assert f"search.target.params={HALF}: 2 of 4 layers stay: {counted}, of at most" in caplog.text


def test_nothing_said_is_three_quarters():
    run = target.resolve(config.Run(out="x"), CFG, lambda: "float32")
    assert run.search.keep == config.KEEP == 0.75


def test_targets_that_cannot_be(refused):  # noqa: F811
    for override, said in (
        ("search.target.params=1K", "not met by a single layer"),
        ("search.target.params=1B", "the whole model meets it"),
        ("search.target.speedup=1", "the whole model meets it"),
        ("search.target.speedup=4.5", "not met by a single layer"),
        ("search.target.memory=24 lots", "one of MB, GB, TB, MiB, GiB, TiB"),
        ("search.target.params=-6B", "expected a number"),
    ):
        for last in ([], ["--dry-run"]):
            assert said in refused("search.keep=null", override, *last)
    assert "search.keep says too how many" in refused("search.target.speedup=2")
    both = ["search.keep=null", "search.target.speedup=2", "search.target.params=1M"]
    assert "search.target.speedup says too" in refused(*both)
    with pytest.raises(UserError, match=r"distill\.mask says too"):
        spec = config.Search(target=config.Target(speedup=2))
        run = config.Run(out="x", search=spec, distill=config.Distill(mask="m.json"))
        target.resolve(run, CFG, lambda: "float32")

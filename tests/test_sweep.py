"""Several numbers of layers: what is shared, what a restart does, the table, and bad input."""

import csv
import json

import numpy as np
import pytest
import transformers

from e3jax import cli, configure, files, sweep
from e3jax.errors import UserError
from e3jax.evaluate.pace import Pace
from e3jax.evaluate.rows import Row
from e3jax.report import pictures
from e3jax.training.metrics import read_metrics
from test_pipeline import CFG, write_job

DEEP = CFG.take_layers([0, 1, 2, 3] * 4)


def run_of(*overrides):
    return configure.load_run(None, ["out=there", *overrides])


def test_runs_are_from_the_most_layers_down():
    run = run_of("sweep.keep=[0.5, 14, 0.876]", "distill.mask=x", "distill.teacher=cache")
    found = sweep.runs(run, DEEP)
    assert [r.search.keep for r in found] == [14, 8]  # 0.876 of 16 is 14 too
    assert [r.out for r in found] == ["there/keep-14", "there/keep-8"]
    assert {r.distill.cache for r in found} == {"there/teacher"} and found[0].distill.mask is None
    assert sweep.runs(run_of(), DEEP)[0].distill.cache is None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sweep.keep=[8, 16]"], "sweep.keep=16: the model has 16 layers"),
        (["sweep.keep=[8, 2]", "search.protect=[0, 1, 2]"], "search.protect names 3"),
        (["search.target.speedup=1.5"], "search.target"),
    ],
)
def test_what_cannot_be_is_told_before_anything_runs(overrides, message):
    with pytest.raises(UserError, match=message):
        sweep.runs(run_of(*overrides), DEEP)


def test_bad_lists_are_refused():
    for bad in ("[]", "[0]", "[-0.5]", "half"):
        with pytest.raises(UserError, match=r"sweep\.keep"):
            run_of(f"sweep.keep={bad}")


def point(model, layers, kl, exact, decode, samples):
    ends = None if exact is None else [exact - 0.1, exact + 0.1]
    row = Row(
        model, layers, 1000 * layers, 1.1, kl, 0.9, exact, 10 if exact else 0, 5,
        samples=samples, interval=ends,
    )  # fmt: skip
    return sweep.Point(row, 0.01, Pace(2 * decode, decode))


@pytest.mark.parametrize(
    ("exact", "samples", "name"),
    [(0.8, 0, "exact match"), (0.8, 4, "pass@1"), (None, 0, "exact match")],
)
def test_table_and_picture(tmp_path, exact, samples, name):
    """Also of sampled answers, whose interval is not of one answer a problem."""
    points = [
        point("dense", 4, 0.0, exact, 100.0, samples),
        point("e3 recovered", 3, 0.1, exact, 150.0, samples),
        point("shortgpt recovered", 3, 0.2, exact, 150.0, samples),
    ]
    head, _, dense, ours, _ = sweep.shown(points).splitlines()
    assert name in head
    assert dense.endswith("1.00x") and ours.endswith("1.50x")
    assert "0.1000 ± 0.0196" in ours and ("80.0 % (70.0 to 90.0)" in ours) == (exact is not None)
    pictures.draw_sweep(tmp_path, points)
    assert (tmp_path / "plots" / "sweep.png").stat().st_size > 5000
    lines = list(csv.DictReader((tmp_path / "plots" / "sweep.csv").open()))
    assert [line["model"] for line in lines] == [p.row.model for p in points]
    assert [float(line["decode tokens/s"]) for line in lines] == [100.0, 150.0, 150.0]
    assert lines[1][name] == ("0.8" if exact else "")
    assert lines[1]["from"] == ("0.7000000000000001" if exact else "")


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A random model of four layers, and its sweep over three and two."""
    place = write_job(tmp_path_factory.mktemp("sweep"))
    assert swept(place) == 0
    return place


def swept(place, *overrides):
    settings = ["sweep.keep=[2, 0.75]", "evaluate.baselines=[]", *overrides]
    return cli.main(["sweep", "--config", str(place / "run.yaml"), *settings])


def mask_of(place, keep):
    return files.read_json(place / "out" / f"keep-{keep}" / "search" / "mask.json")


@pytest.mark.slow
def test_each_is_a_run(place):
    points = json.loads((place / "out" / "sweep.json").read_text())
    assert [p["row"]["layers"] for p in points] == [4, 3, 2]
    assert all(p["speed"]["prefill"] > 0 < p["speed"]["decode"] for p in points)
    for keep, found in ((3, points[1]), (2, points[2])):
        out = place / "out" / f"keep-{keep}"
        rows = files.read_json(out / "evaluate" / "results.json")
        assert found["row"] == rows[-1] and rows[0] == points[0]["row"]
        model = transformers.AutoModelForCausalLM.from_pretrained(out / "export")
        assert model.config.num_hidden_layers == keep
        assert (out / "report.html").is_file()
    assert (place / "out" / "report.html").is_file()


@pytest.mark.slow
def test_a_search_begins_where_the_one_before_ended(place):
    first, second = mask_of(place, 3), mask_of(place, 2)
    lines = read_metrics(place / "out" / "keep-2" / "search")
    scored = [line["theta"] for line in lines if "theta" in line]
    np.testing.assert_array_equal(scored[0], first["theta"])
    assert {line["kept"] for line in lines if "kept" in line} == {2}  # K falls from 3, not from 4
    assert second["scores"] == first["scores"]
    assert (place / "out" / "keep-3" / "search" / "importance.json").is_file()
    assert not (place / "out" / "keep-2" / "search" / "importance.json").exists()
    spent = sum(line.get("tokens", 0) for line in lines)
    assert second["tokens"] > first["tokens"] + spent > first["tokens"]  # and what scoring took


@pytest.mark.slow
def test_a_run_alone_gives_the_same(place, tmp_path, capsys):
    """What keep-2 says of itself is all that decides it; and another start is another search."""
    inner = place / "out" / "keep-2"
    alone = ["search", "--config", str(inner / "run.json")]
    assert cli.main([*alone, f"out={tmp_path / 'again'}"]) == 0
    assert files.read_json(tmp_path / "again" / "search" / "mask.json") == mask_of(place, 2)
    assert cli.main([*alone, f"search.start={inner / 'search' / 'mask.json'}"]) == 2
    assert "start: " in capsys.readouterr().err
    hand = tmp_path / "hand.json"
    hand.write_text('{"num_layers": 4, "keep": [0, 1, 3]}')
    assert cli.main([*alone, f"out={tmp_path / 'other'}", f"search.start={hand}"]) == 2
    assert "0 logits (theta) for 4 layers" in capsys.readouterr().err


@pytest.mark.slow
def test_given_again_nothing_is_done_again(place, monkeypatch):
    def fail(*_, **__):
        raise AssertionError("done again")

    before = (place / "out" / "sweep.json").read_bytes()
    monkeypatch.setattr("e3jax.training.loop.prefetch", fail)
    monkeypatch.setattr("e3jax.evaluate.table._measure", fail)
    monkeypatch.setattr("e3jax.evaluate.pace.measure", fail)
    monkeypatch.setattr("e3jax.selectors.removal.leave_one_out_kl", fail)
    assert swept(place) == 0
    assert (place / "out" / "sweep.json").read_bytes() == before

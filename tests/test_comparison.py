"""Selectors against each other: names, cost, what is shared, restart, and the differences."""

import collections
import json
import shlex
import typing

import numpy as np
import pytest

from e3jax import cli, commands, config, configure, files, ledger, mask, recovery
from e3jax.errors import Diverged
from e3jax.evaluate import intervals
from e3jax.report import facts, words
from e3jax.selectors import registry
from e3jax.selectors.selection import Task
from test_pipeline import SETTINGS, write_job
from test_report import Page

NAMES = typing.get_args(config.Selector)
CHOSEN = ("e3", "shortgpt", "minitron", "sleb", "laco", "random")
# Figures without answers, which take long to compile.
MEASURED = SETTINGS.replace("test: [{{path: demo/test.jsonl", "measure: [{{path: demo/test.jsonl")


def test_every_selector_has_its_name_everywhere():
    assert set(NAMES) == set(registry.SELECTORS)
    assert set(NAMES) | {"given", "e3"} == set(mask.SELECTORS)


def test_windows_are_as_many_as_the_tokens_allow():
    task = Task(num_layers=10, keep=7)
    count = lambda name: registry.windows_for(registry.SELECTORS[name], task, 10_000, 10)
    assert count("shortgpt") == 1000  # the dense model alone
    assert count("kl") == count("ppl") == 100  # ten masked models a window
    assert count("greedy_kl") == 10_000 // (10 * (10 + 9 + 8))
    assert count("sleb") == 10_000 // (10 * (8 + 7 + 6))  # never the ends
    assert registry.windows_for(registry.SELECTORS["kl"], task, 5, 10) == 1


def test_difference_and_its_error_by_hand():
    tokens = np.array([10.0, 30.0, 20.0])
    ours = np.stack([np.stack([kl, tokens], -1) for kl in ([1.0, 3.0, 2.0], [3.0, 3.0, 2.0])])
    theirs = np.stack([np.stack([kl, tokens], -1) for kl in ([2.0, 6.0, 1.0], [4.0, 6.0, 3.0])])
    mean, error = intervals.apart(ours, theirs)
    apart = np.array([1.0, 3.0, 0.0])  # of each window, averaged over the two seeds
    assert mean == pytest.approx(4 / 60)
    rest = apart - mean * tokens
    assert error == pytest.approx(np.sqrt(3) * np.std(rest, ddof=1) / 60)
    assert intervals.apart(ours, ours) == (0.0, 0.0)


def test_error_shrinks_as_that_of_a_mean():
    """With windows of one size it is the textbook's standard error of a mean."""
    kl = np.random.default_rng(0).normal(5, 1, (2, 1, 500))
    ours, theirs = (np.stack([x, np.ones_like(x)], -1) for x in kl)
    mean, error = intervals.apart(ours, theirs)
    apart = (kl[1] - kl[0])[0]
    assert mean == pytest.approx(apart.mean())
    assert error == pytest.approx(apart.std(ddof=1) / np.sqrt(500))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A random model of four layers, and what `compare` makes of it."""
    place = write_job(tmp_path_factory.mktemp("compare"), MEASURED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ledger, "FROM_S", 0.0)  # a choice of this model takes less than it
        assert compare(place) == 0
    return place


def compare(place, *overrides):
    settings = [f"compare.selectors=[{', '.join(CHOSEN)}]", "compare.seeds=[3, 4]"]
    return cli.main(["compare", "--config", str(place / "run.yaml"), *settings, *overrides])


@pytest.mark.slow
def test_all_are_compared_at_equal_cost(place):
    results = json.loads((place / "out" / "compare.json").read_text())
    assert [(r["seed"], r["selector"]) for r in results] == [(s, n) for s in (3, 4) for n in CHOSEN]
    allowed = next(r["tokens"] for r in results if r["selector"] == "e3")
    for result in results:
        assert len(result["removed"]) == 2
        assert result["recovered"]["tokens"] > 0 == result["raw"]["tokens"]  # choosing is apart
        # One more window than fits is no window less than asked for; evolution ends a batch later.
        assert result["tokens"] <= 2 * allowed, result["selector"]
        assert result["seconds"] > 0 and result["recovery_seconds"] > 0
    text = (place / "out" / "compare.txt").read_text()
    assert all(name in text for name in CHOSEN) and "±" in text
    assert (place / "out" / "plots" / "compare.png").stat().st_size > 5000


@pytest.mark.slow
def test_equal_choices_share_their_recovery(place):
    """Minitron's sums of means order these layers as ShortGPT's means do."""
    results = json.loads((place / "out" / "compare.json").read_text())
    for seed in (3, 4):
        here = place / "out" / f"seed-{seed}"
        sets = {(*r["removed"], r["selector"] == "laco") for r in results if r["seed"] == seed}
        assert len(list(here.glob("without-*"))) == len(sets)


@pytest.mark.slow
def test_page_has_the_figures_and_the_layers(place):
    """As compare.json and the files of the windows have them."""
    out = place / "out"
    results = json.loads((out / "compare.json").read_text())
    found = Page((out / "report.html").read_text())
    assert not found.wrong

    def of(name, state):
        own = [r for r in results if r["selector"] == name]
        places = [
            out / f"seed-{r['seed']}/evaluate/{r[state]['model'].replace(' ', '-')}.windows.json"
            for r in own
        ]
        return own, np.array([json.loads(path.read_text()) for path in places])

    for state in ("raw", "recovered"):
        first = of("e3", state)[1]
        for name in CHOSEN:
            own, windows = of(name, state)
            kl = windows[..., 0].sum(1) / windows[..., 1].sum(1)
            assert kl == pytest.approx([r[state]["kl"] for r in own], rel=1e-4)
            shown = f"{name} {kl.mean():.4f} {np.ptp(kl):.4f}"
            if name != "e3":
                mean, error = intervals.apart(first, windows)
                shown += f" {mean:+.4f} ± {error:.4f}"
            assert shown in found.text, state
    labels = [a["aria-label"] for tag, a in found.elements if a.get("class") == "layers"]
    by_selector = [r["removed"] for name in CHOSEN for r in results if r["selector"] == name]
    assert labels == [f"layers removed: {', '.join(map(str, x))}" for x in by_selector]


@pytest.mark.slow
def test_what_each_choice_took_is_on_the_ledger(place):
    lines = files.read_lines(place / "out" / files.LEDGER)
    stages = collections.Counter(line["stage"] for line in lines)
    of_each = {f"choose {name}": 2 for name in CHOSEN}  # seeds
    assert stages == of_each | {"rehearsal": 1, "distill": 12, "evaluate": 1 + 2 * 12}


@pytest.mark.slow
def test_commands_on_the_page_are_understood(place):
    found = words.commands(facts.read(place / "out"))
    assert len(found) == 3
    for _, line in found:
        options = commands.parse(shlex.split(line)[2:])
        if options.command != "report":
            assert configure.load_run(options.config, options.overrides).out.startswith("runs/")


@pytest.mark.slow
def test_given_again_nothing_is_done_again(place, monkeypatch, capsys):
    before = (place / "out" / "compare.json").read_bytes()

    def fail(*_, **__):
        raise AssertionError("done again")

    monkeypatch.setattr("e3jax.hf.load.load_params", fail)  # the weights are not even read
    monkeypatch.setattr(recovery, "fit", fail)
    monkeypatch.setattr("e3jax.evaluate.table._measure", fail)
    monkeypatch.setitem(
        registry.SELECTORS, "sleb", registry.Rule(fail, registry.SELECTORS["sleb"].passes)
    )
    assert compare(place) == 0
    assert (place / "out" / "compare.json").read_bytes() == before
    assert "sleb" in capsys.readouterr().out


@pytest.mark.slow
def test_what_reads_it_back_is_not_timed(place):
    path = place / "out" / "compare.json"
    before = json.loads(path.read_text())
    assert compare(place, "distill.checkpoint_every=2", "search.checkpoint_every=3") == 0
    assert json.loads(path.read_text()) == before


@pytest.mark.slow
def test_a_recovery_that_diverges_leaves_the_others(place, tmp_path, monkeypatch, caplog):
    # The tail first: selectors that agree share what the first of them recovered.
    real, gone = recovery.recover, {("tail", 3), ("tail", 4), ("shortgpt", 4)}

    def recover(job_, mask, *more):
        if (mask.selector, job_.run.seed) in gone:
            raise Diverged("planted")
        return real(job_, mask, *more)

    monkeypatch.setattr(recovery, "recover", recover)
    monkeypatch.setattr(ledger, "FROM_S", 0.0)
    assert compare(place, f"out={tmp_path}/out", "compare.selectors=[tail, shortgpt, random]") == 0
    results = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert {(r["selector"], r["seed"]) for r in results if r["recovered"] is None} == gone
    text = (tmp_path / "out" / "compare.txt").read_text()
    assert "shortgpt (1 of 2 seeds)" in text
    assert "not recovered, for the training diverged: tail" in text
    assert "seed 3, tail: not recovered: planted" in caplog.text
    assert not Page((tmp_path / "out" / "report.html").read_text()).wrong


@pytest.mark.slow
def test_bad_settings_are_told(place, capsys):
    for override, said in (
        ("compare.selectors=[e3, e3]", "twice"),
        ("compare.selectors=[best]", "best"),
        ("compare.seeds=[-1]", "negative"),
        ("compare.seeds=[]", "seeds"),
    ):
        assert compare(place, override) == 2
        assert said in capsys.readouterr().err

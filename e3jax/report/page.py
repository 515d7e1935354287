"""report.html: one page about a run, a comparison or a training, or several runs or trainings
beside each other, that needs nothing but itself.

Templates escape all text that comes from data; figures are drawn in the browser by report.js from
JSON in the page, and no other script may run in it, nor anything be loaded (its policy has the
script's hash).
"""

import base64
import collections
import dataclasses
import hashlib
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import jinja2
import markupsafe

from e3jax import __version__, files
from e3jax.errors import UserError
from e3jax.evaluate import compared, intervals
from e3jax.evaluate.speed import PHASES
from e3jax.report import facts, records, words
from e3jax.report.facts import Comparison, Facts

HERE = pathlib.Path(__file__).parent
# Read now: when a run ends, days later, the files may be another version's than this code.
STYLE, SCRIPT = ((HERE / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
TEMPLATES = {path.name: path.read_text(encoding="utf-8") for path in HERE.glob("*.jinja")}
REPORT = "report.html"
POINTS, COLUMNS = 400, 120  # of a curve, of a heat map: more would be larger and look the same


def write(outs: Sequence[pathlib.Path], path: pathlib.Path) -> None:
    """Writes the report of the run folders `outs`. Raises UserError where one is none, where they
    are not to be put side by side, and where `path` cannot be written."""
    text = render(outs)
    try:
        files.write_text(path, text)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error


def render(outs: Sequence[pathlib.Path]) -> str:
    """The page, HTML."""
    runs = [facts.read(out) for out in outs]
    repeated = collections.Counter(run.name for run in runs)
    runs = [dataclasses.replace(r, name=str(r.out)) if repeated[r.name] > 1 else r for r in runs]
    charts: list[dict[str, Any]] = []

    def chart(**fields: Any) -> int:
        """Adds a figure; its number in the page."""
        charts.append(fields)
        return len(charts) - 1

    sections = [{"facts": run, "charts": _charts(run, chart)} for run in runs]
    together = _together(runs, chart) if len(runs) > 1 else None
    environment = jinja2.Environment(
        loader=jinja2.DictLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        name: getattr(words, name) for name in ("percent", "memory", "seconds", "count", "as_yaml")
    }
    environment.globals |= {
        "summary": words.summary, "commands": words.commands, "removed": removed, "phases": PHASES,
    }  # fmt: skip
    return environment.get_template("report.html.jinja").render(
        title=" beside ".join(run.name for run in runs),
        sections=sections,
        together=together,
        charts=charts,
        style=markupsafe.Markup(STYLE),
        script=markupsafe.Markup(SCRIPT),
        script_hash=base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode(),
        version=__version__,
    )


def removed(run: Facts) -> list[int]:
    """Layers that are gone."""
    assert run.kept is not None
    return [i for i in range(run.kept.num_layers) if i not in run.kept.keep]


# ---------------------------------------------------------------- figures


def _charts(run: Facts, chart: Any) -> dict[str, int]:
    """The figures of a run by name; those that are not on record are left out."""
    found, out = {}, run.out
    keep = run.kept and run.kept.keep  # None while the search goes on
    with facts.understood(out):
        heat, importance = records.heat(out), records.importance(out)
        names = ("search", "recovery", "behaviour", "removal", "training")
        drawn = {name: getattr(records, name)(out) for name in names}
    if heat is not None:
        chosen = _spread(len(heat.steps), COLUMNS)
        found["heat"] = chart(
            kind="heat",
            title="Probability of keeping each layer",
            steps=[heat.steps[i] for i in chosen],
            rows=[[round(p, 3) for p in heat.probability[i]] for i in chosen],
            kl=[_finite(heat.held_out_kl[i]) for i in chosen],
            keep=keep,
        )
    if importance is not None:
        found["importance"] = chart(
            kind="bars",
            title="Importance of each layer",
            ylabel="KL without it (nats/token)",
            values=[_finite(x) for x in importance],
            keep=keep,
        )
    for name, curves in drawn.items():
        if curves is not None:
            found[name] = chart(**_curves(curves))
    if run.comparison is not None:
        found["compare"] = chart(**_dots(run.comparison))
    return found


def _dots(comparison: Comparison) -> dict[str, Any]:
    """A row a selector, the nearest to the dense model first; in it a dot a seed and state."""
    shown = compared.nearest_first(comparison.raw)
    states = {"nothing trained": comparison.raw, "recovered": comparison.recovered}
    seeds = list(dict.fromkeys(result.seed for result in comparison.results))

    def dots(name: str, lines: Sequence[compared.Line]) -> list[float | None]:
        found = {
            seed: _finite(kl)
            for line in lines
            if line.selector == name
            for seed, kl in zip(line.seeds, line.kl, strict=True)
        }
        return [found.get(seed) for seed in seeds]

    return {
        "kind": "dots",
        "title": "Distance from the dense model",
        "xlabel": records.KL,
        "names": [line.selector for line in shown],
        "seeds": seeds,
        "states": [
            {"name": state, "values": [dots(line.selector, lines) for line in shown]}
            for state, lines in states.items()
            if lines
        ],
    }


def _curves(found: records.Curves) -> dict[str, Any]:
    series = [
        {"name": name, "x": x, "y": [_finite(value) for value in y]}
        for name, (x, y) in ((name, _thinned(*curve)) for name, curve in found.series.items())
    ]
    return {
        "kind": "curves",
        "title": found.title,
        "xlabel": found.xlabel,
        "ylabel": found.ylabel,
        "series": series,
    }


def _spread(length: int, most: int) -> list[int]:
    """Up to `most` places of a list, evenly, the first and the last among them."""
    count = min(length, most)
    return [round(i * (length - 1) / max(count - 1, 1)) for i in range(count)]


def _thinned(x: list[float], y: list[float]) -> tuple[list[float], list[float]]:
    """At most POINTS points: each the mean of as many that follow each other."""
    size = -(-len(x) // POINTS)
    parts = [slice(i, i + size) for i in range(0, len(x), size)] if size > 1 else []
    if not parts:
        return x, y
    middle = lambda values: sum(values) / len(values)  # noqa: E731
    return [middle(x[part]) for part in parts], [middle(y[part]) for part in parts]


def _finite(value: float) -> float | None:
    """JSON has no other numbers."""
    return float(f"{value:.5g}") if math.isfinite(value) else None


# ---------------------------------------------------------------- several runs


# Curves of several runs in one figure: by its name, that of each run's curve in it.
SHARED = {
    "run": {"search": "answer, held out", "recovery": "ours, held out"},
    "train": {"training": "held out"},
}


def _together(runs: Sequence[Facts], chart: Any) -> dict[str, Any]:
    """What is shown of several runs beside each other; differences are from the first.

    Raises UserError for those that have no figures in common.
    """
    first, kind = runs[0], _kind(runs)
    charts = {}
    for name, own in SHARED[kind].items():
        found = [(run.name, getattr(records, name)(run.out)) for run in runs]
        series = {
            run: curves.series[own] for run, curves in found if curves and own in curves.series
        }
        if series:
            shown = next(curves for _, curves in found if curves)
            title = {"search": "Search: the answer"}.get(name, name.capitalize())
            shown = dataclasses.replace(
                shown, title=f"{title}, held out", xlabel="step", series=series
            )
            charts[name] = chart(**_curves(shown))
    return {
        "kind": kind,
        "charts": charts,
        "lines": [(run, _apart(first, run)) for run in runs],
        "changed": [(run, _changed(first, run)) for run in runs[1:]],
        "one_model": len({run.dense for run in runs}) == 1,
    }


def _kind(runs: Sequence[Facts]) -> str:
    """`run` or `train`, what all of them are."""
    for run in runs:
        if run.kinds == ["compare"]:
            raise UserError(
                f"{run.out}: a comparison, whose page has its selectors side by side; expected it "
                "alone, or runs"
            )
    trained = [run for run in runs if run.kinds == ["train"]]
    others = [run for run in runs if run not in trained]
    if trained and others:
        raise UserError(
            f"{trained[0].out}: made by train, and {others[0].out} is not: they have no figures in "
            "common; expected runs alone, or trainings alone"
        )
    return "train" if trained else "run"


def _apart(first: Facts, other: Facts) -> tuple[float, float | None] | None:
    """Difference of the recovered models' KL in the same windows; None where they are not."""
    a, b = first.figure("recovered"), other.figure("recovered")
    if a is None or b is None or first is other or first.dense != other.dense:
        return None
    return intervals.paired([a.windows], [b.windows])


def _changed(first: Facts, other: Facts) -> list[str]:
    ours, theirs = ({**run.configuration, "out": None} for run in (first, other))
    return files.differences(ours, theirs)

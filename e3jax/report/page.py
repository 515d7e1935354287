"""report.html: one page about a run, or several beside each other, that needs nothing but itself.

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
import shlex
from collections.abc import Sequence
from typing import Any

import jinja2
import markupsafe
import yaml

from e3jax import __version__, files
from e3jax.errors import UserError
from e3jax.evaluate import intervals
from e3jax.evaluate.speed import PHASES
from e3jax.report import facts, records
from e3jax.report.facts import Facts

HERE = pathlib.Path(__file__).parent
# Read now: when a run ends, days later, the files may be another version's than this code.
TEMPLATE, STYLE, SCRIPT = (
    (HERE / name).read_text(encoding="utf-8")
    for name in ("report.html.jinja", "report.css", "report.js")
)
REPORT = "report.html"
POINTS, COLUMNS = 400, 120  # of a curve, of a heat map: more would be larger and look the same


def write(outs: Sequence[pathlib.Path], path: pathlib.Path) -> None:
    """Writes the report of the run folders `outs`. Raises UserError where one is none, and where
    `path` cannot be written."""
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
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": percent, "memory": memory, "seconds": seconds, "count": count, "yaml": as_yaml,
    }  # fmt: skip
    environment.globals |= {
        "summary": summary, "commands": commands, "removed": removed, "phases": PHASES,
    }  # fmt: skip
    return environment.from_string(TEMPLATE).render(
        title=" beside ".join(run.name for run in runs),
        sections=sections,
        together=together,
        charts=charts,
        style=markupsafe.Markup(STYLE),
        script=markupsafe.Markup(SCRIPT),
        script_hash=base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode(),
        version=__version__,
    )


# ---------------------------------------------------------------- figures


def _charts(run: Facts, chart: Any) -> dict[str, int]:
    """The figures of a run by name; those that are not on record are left out."""
    found, out = {}, run.out
    keep = run.kept and run.kept.keep  # None while the search goes on
    with facts.understood(out):
        heat, importance = records.heat(out), records.importance(out)
        names = ("search", "recovery", "behaviour", "removal")
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
    return found


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


def _together(runs: Sequence[Facts], chart: Any) -> dict[str, Any]:
    """What is shown of several runs beside each other; differences are from the first."""
    first = runs[0]
    charts = {}
    for name in ("search", "recovery"):
        series: records.Series = {}
        for run in runs:
            curves = getattr(records, name)(run.out)
            own = {"search": "answer, held out", "recovery": "ours, held out"}[name]
            if curves is not None and own in curves.series:
                series[run.name] = curves.series[own]
        if series:
            title = {"search": "Search: the answer", "recovery": "Recovery"}[name]
            found = records.Curves(name, f"{title}, held out", "step", records.KL, series)
            charts[name] = chart(**_curves(found))
    return {
        "charts": charts,
        "lines": [(run, _apart(first, run)) for run in runs],
        "changed": [(run, _changed(first, run)) for run in runs[1:]],
        "one_model": len({run.dense for run in runs}) == 1,
    }


def _apart(first: Facts, other: Facts) -> tuple[float, float | None] | None:
    """Difference of the recovered models' KL in the same windows; None where they are not."""
    a, b = first.figure("recovered"), other.figure("recovered")
    if a is None or b is None or first is other or first.dense != other.dense:
        return None
    tokens = [[count for _, count in figure.windows] for figure in (a, b)]
    if not tokens[0] or tokens[0] != tokens[1]:
        return None
    return intervals.apart([a.windows], [b.windows])


def _changed(first: Facts, other: Facts) -> list[str]:
    ours, theirs = ({**run.configuration, "out": None} for run in (first, other))
    return files.differences(ours, theirs)


# ---------------------------------------------------------------- words


def summary(run: Facts) -> str:
    """The run in a sentence or two."""
    path = run.configuration.get("model", {}).get("path", "the model")
    mask, dense = run.kept, run.figure("dense")
    if mask is None:
        return f"No layers of {path} have been chosen yet."
    text = f"{len(mask.keep)} of the {mask.num_layers} decoder layers of {path} were kept"
    figure = run.figure("recovered") or run.figure("raw")
    if dense is None or figure is None:
        return text + "; what is left has not been measured yet."
    row = figure.row
    text += f", {percent(1 - row.parameters / dense.row.parameters)} of its parameters removed. "
    trained = "Recovered" if row.model.endswith("recovered") else "With nothing trained"
    text += f"{trained}, the model "
    if row.exact_match is not None and dense.row.exact_match is not None:
        text += (
            f"solves {percent(row.exact_match)} of {row.problems} problems where the dense model "
            f"solves {percent(dense.row.exact_match)}, and "
        )
    error = (
        ""
        if figure.kl_error is None
        else f"\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}{figure.kl_error:.2g}"
    )
    return text + f"is at a KL divergence of {row.kl:z.2g}{error} nats a token from it."


def removed(run: Facts) -> list[int]:
    """Layers that are gone."""
    assert run.kept is not None
    return [i for i in range(run.kept.num_layers) if i not in run.kept.keep]


def commands(run: Facts) -> list[tuple[str, str]]:
    """What to type to have this again, with what it is for."""
    place = shlex.quote(str(run.out))
    found = [
        ("the whole run", f"python run.py run --config {place}/run.json out=runs/again"),
        ("this page", f"python run.py report {place}"),
    ]
    if run.kept is not None and not run.kept.record.get("merges"):
        model = shlex.quote(str(run.configuration.get("model", {}).get("path")))
        mask = f"{place}/{'search' if run.kept.searched else 'distill'}/mask.json"
        cut = f"python run.py export --from-mask {mask} model.path={model} out=runs/cut"
        found.insert(1, ("the same layers, nothing trained", cut))
    return found


def percent(share: float) -> str:
    """0.918 -> 91.8 %."""
    return f"{100 * share:.1f}\N{NO-BREAK SPACE}%"


def memory(size: int) -> str:
    """Bytes -> 12.3 GiB."""
    value, unit = float(size), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def seconds(value: float) -> str:
    """73.4 -> 73 s; 5000 -> 1.39 h."""
    return f"{value:,.0f} s" if value < 3600 else f"{value / 3600:,.2f} h"


def count(number: float) -> str:
    """1234567 -> 1.23 M."""
    for size, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " K")):
        if number >= size:
            return f"{number / size:,.4g}{unit}"
    return f"{number:,.4g}"


def as_yaml(tree: Any) -> str:
    """A configuration as its files have it."""
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=1000)

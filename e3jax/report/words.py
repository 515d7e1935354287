"""What the page says in words: summaries, commands, numbers."""

import math
import shlex
from collections.abc import Sequence
from typing import Any

import yaml

from e3jax.evaluate import compared
from e3jax.report import records
from e3jax.report.facts import Comparison, Facts


def summary(run: Facts, kind: str) -> str:
    """What a folder holds of one of its kinds, in a sentence or a few, lines of their own."""
    return {"run": _run, "compare": _comparison, "train": _training}[kind](run)


def model(run: Facts) -> str:
    """The path of its model."""
    return run.configuration.get("model", {}).get("path", "the model")


def _run(run: Facts) -> str:
    path = model(run)
    mask, dense = run.kept, run.figure("dense")
    if mask is None and any(run.out.glob("seed-*")):
        return f"The comparison of selectors on {path} has not ended yet."
    if mask is None:
        return f"No layers of {path} have been chosen yet."
    text = f"{len(mask.keep)} of the {mask.num_layers} decoder layers of {path} were kept"
    found = run.figure("recovered") or run.figure("raw")
    if dense is None or found is None:
        return text + "; what is left has not been measured yet."
    row = found.row
    text += f", {percent(1 - row.parameters / dense.row.parameters)} of its parameters removed. "
    trained = "Recovered" if row.model.endswith("recovered") else "With nothing trained"
    text += f"{trained}, the model "
    if row.exact_match is not None and dense.row.exact_match is not None:
        text += (
            f"solves {percent(row.exact_match)} of {row.problems} problems where the dense model "
            f"solves {percent(dense.row.exact_match)}, and "
        )
    kl = figure(row.kl, found.kl_error)
    return text + f"is at a KL divergence of {kl} nats a token from it."


def _comparison(run: Facts) -> str:
    found = run.comparison
    assert found is not None
    first, seeds = found.results[0], {result.seed for result in found.results}
    text = (
        f"{plural(len(found.raw), 'selector')} chose which {first.raw.layers} of the "
        f"{first.num_layers} decoder layers of {model(run)} to keep, over "
        f"{plural(len(seeds), 'seed')}"
    )
    if first.allowed is not None:
        text += f", each time for at most {count(first.allowed)} tokens through masked models"
    text += f".\nWith nothing trained, the choices of {_nearest(found.raw, 'nats a token')}."
    if found.recovered:
        text += f"\nAfter the same recovery, those of {_nearest(found.recovered)}."
    return text


def _nearest(lines: Sequence[compared.Line], unit: str = "") -> str:
    """Whose KL is the least, and by how much."""
    best, *others = compared.nearest_first(lines)
    models = lambda line: [row.model for row in line.rows]  # noqa: E731  by the layers removed
    same = [line.selector for line in others if models(line) == models(best)]
    others = [line for line in others if line.selector not in same]
    text = best.selector
    if same:
        text += f" (and of {', '.join(same)}, which are the same)"
    text += (
        f" are nearest to the dense model, at a KL divergence of {best.mean:z.2g} {unit}".rstrip()
    )
    if not others or not math.isfinite(others[0].mean):
        return text
    after = others[0]
    apart, error = compared.apart(best, after) or (after.mean - best.mean, None)
    text += f"; {after.selector} is next, {figure(apart, error)} farther"
    if error:
        times = "no more than" if apart <= error else f"{apart / error:.1f} times"
        text += f", {times} that standard error over windows"
    ours, theirs = (dict(zip(line.seeds, line.kl, strict=True)) for line in (best, after))
    if len(both := ours.keys() & theirs.keys()) > 1:
        farther = sum(theirs[seed] > ours[seed] for seed in both)
        text += f", and farther with {farther} of {len(both)} seeds"
    return text


def _training(run: Facts) -> str:
    found, steps = run.training, run.configuration["train"]["recipe"]["steps"]
    assert found is not None
    size = "" if found.parameters is None else f" of {count(found.parameters)} parameters"
    text = f"A model{size} was trained from random initialisation" if found.scratch else ""
    text = text or f"{model(run)}, a model{size}, was trained further"
    text += f" on {count(found.tokens)} tokens in {plural(found.steps, 'step')}"
    if found.steps < steps:
        text += f", of {steps:,} so far"
    if not found.perplexity:
        return text + "."
    (_, before), (_, after) = found.perplexity[0], found.perplexity[-1]
    if len(found.perplexity) == 1:
        return text + f". Held-out perplexity was {before:.4g} before."
    return text + f". Held-out perplexity went from {before:.4g} to {after:.4g}."


def commands(run: Facts) -> list[tuple[str, str]]:
    """What to type to have this again, with what it is for."""
    place = shlex.quote(str(run.out))
    whole = {"run": "the whole run", "compare": "the whole comparison", "train": "the training"}
    found = [
        (whole[kind], f"python run.py {kind} --config {place}/run.json out=runs/again")
        for kind in run.kinds
    ]
    if run.comparison is not None:
        found += _best(run, run.comparison)
    if run.kept is not None and not run.kept.record.get("merges"):
        mask = f"{place}/{'search' if run.kept.searched else 'distill'}/mask.json"
        found.append(("the same layers, nothing trained", _cut(run, mask)))
    return [*found, ("this page", f"python run.py report {place}")]


def _best(run: Facts, comparison: Comparison) -> list[tuple[str, str]]:
    """How to have the choice of least KL as a model."""
    results = [x for x in comparison.results if x.recovered is not None] or comparison.results
    kl = lambda result: (result.recovered or result.raw).kl  # noqa: E731
    best = min(results, key=lambda x: kl(x) if math.isfinite(kl(x)) else math.inf)
    path = compared.mask_file(run.out, best)
    place, mask = shlex.quote(str(run.out)), shlex.quote(str(path))
    who = f"the one choice of least KL, of {best.selector} with seed {best.seed}"
    if best.recovered is not None:
        command = f"python run.py export --config {place}/run.json seed={best.seed}"
        return [(f"{who}, recovered", f"{command} distill.mask={mask} out=runs/best")]
    merged = (records.value(path) or {}).get("merges")  # which copying cannot do
    return [] if merged else [(f"{who}, nothing trained", _cut(run, mask))]


def _cut(run: Facts, mask: str) -> str:
    path = shlex.quote(model(run))
    return f"python run.py export --from-mask {mask} model.path={path} out=runs/cut"


# ---------------------------------------------------------------- numbers


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


def figure(value: float, error: float | None) -> str:
    """0.0123 ± 0.0045, so long as the error is known."""
    if error is None:
        return f"{value:z.2g}"
    return f"{value:z.2g}\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}{error:.2g}"


def plural(number: int, noun: str) -> str:
    """1 seed, 2 seeds."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def as_yaml(tree: Any) -> str:
    """A configuration as its files have it."""
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=1000)

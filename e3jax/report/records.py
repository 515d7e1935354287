"""What a run folder has on record, as its figures need it. Reads files alone: no jax, no device."""

import dataclasses
import math
import pathlib
from collections.abc import Sequence
from typing import Any

from e3jax import files
from e3jax.evaluate import rows
from e3jax.mask import SELECTORS
from e3jax.training.metrics import read_metrics

KL = "KL to dense (nats/token)"

Series = dict[str, tuple[list[float], list[float]]]


@dataclasses.dataclass(frozen=True)
class Curves:
    """One figure: named curves, each of x and y."""

    name: str  # of its files
    title: str
    xlabel: str
    ylabel: str
    series: Series


@dataclasses.dataclass(frozen=True)
class Heat:
    """Probability of keeping each layer over the search."""

    steps: list[int]
    probability: list[list[float]]  # [scored steps, L]
    held_out_kl: list[float]  # of the answer at each of the steps, nats a token


@dataclasses.dataclass(frozen=True)
class Kept:
    """Which layers stayed."""

    num_layers: int
    keep: list[int]
    searched: bool  # by this run; else the mask was given to it
    record: dict[str, Any]  # all that the mask file tells


def value(path: pathlib.Path) -> Any:
    """Of a file that `job.once` or the like wrote; None where there is none."""
    return files.read_json(path) if path.is_file() else None


def configuration(out: pathlib.Path) -> dict[str, Any]:
    """The configuration at work in a run folder, as run.json has it."""
    return files.read_json(out / "run.json")


def kept(out: pathlib.Path) -> Kept | None:
    """By the mask at work: this run's search, or the one that was given."""
    given = configuration(out).get("distill", {}).get("mask") is not None
    found = value(out / "distill" / "mask.json") if given else None
    searched, found = found is None, found or value(out / "search" / "mask.json")
    return found and Kept(found["num_layers"], list(found["keep"]), searched, found)


def recoveries(out: pathlib.Path) -> dict[str, str]:
    """Names of the recoveries, by their folder: the run's own, then its baselines'."""
    baselines = configuration(out).get("evaluate", {}).get("baselines", ())
    return {"distill": "ours"} | {name: name for name in baselines if name in SELECTORS}


def heat(out: pathlib.Path) -> Heat | None:
    """plots/kept-layers."""
    scored = [x for x in read_metrics(out / "search") if "keep_probability" in x]
    if not scored:
        return None
    columns = ("step", "keep_probability", "held_out_kl")
    return Heat(*([line[key] for line in scored] for key in columns))


def search(out: pathlib.Path) -> Curves | None:
    """plots/search: loss of masked models, and held-out KL of the answers."""
    lines = read_metrics(out / "search")
    series = {
        "masked models, train": _curve(lines, "loss"),
        "answer, held out": _curve(lines, "held_out_kl"),
        "best answer, held out": _curve(lines, "best_kl"),
    }
    return _curves("search", "Search", "search step", KL, series)


def importance(out: pathlib.Path) -> list[float] | None:
    """plots/importance: KL without each layer, nats a token."""
    found = value(out / "search" / "importance.json")
    return found and found["value"]["scores"]


def removal(out: pathlib.Path) -> Curves | None:
    """plots/removal: KL after each removal in the mask's order."""
    found = value(out / "evaluate" / "removal.json")
    points = found["value"] if found else []
    series = {"KL": ([x["removed"] for x in points], [x["kl"] for x in points])}
    title = "Loss after each removal, before any training"
    return _curves("removal", title, "layers removed, in the search's order", KL, series)


def recovery(out: pathlib.Path) -> Curves | None:
    """plots/distillation: train and held-out KL of every recovery of the run."""
    series: Series = {}
    for stage, name in recoveries(out).items():
        lines = read_metrics(out / stage)
        series |= {f"{name}, train": _curve(lines, "kl")}
        series |= {f"{name}, held out": _curve(lines, "held_out_kl")}
    return _curves("distillation", "Distillation", "step", KL, series)


def behaviour(out: pathlib.Path) -> Curves | None:
    """plots/behaviour: KL of every model by tenths of the tokens."""
    series: Series = {}
    folder = out / "evaluate"
    for row in rows.read(folder)[1:]:  # the dense model is at no distance from itself
        tenths = value(rows.beside(folder, row.model, "deciles.json")) or []
        series[row.model] = (list(range(1, len(tenths) + 1)), [x["kl"] for x in tenths])
    title = "Where the models differ from the dense one"
    xlabel = "tenth of the tokens, those the dense model is surest of first"
    return _curves("behaviour", title, xlabel, KL, series)


def training(out: pathlib.Path) -> Curves | None:
    """plots/training: next-token loss of plain training, on train and held-out windows."""
    lines = read_metrics(out / "train")
    steps, perplexity = _curve(lines, "held_out_perplexity")
    held_out = (steps, [math.log(x) for x in perplexity])
    series = {"train": _curve(lines, "nll"), "held out": held_out}
    return _curves("training", "Training", "step", "cross-entropy (nats/token)", series)


def _curve(lines: Sequence[dict[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """Steps and values of the lines that have the key."""
    found = [line for line in lines if key in line]
    return [line["step"] for line in found], [line[key] for line in found]


def _curves(name: str, title: str, xlabel: str, ylabel: str, series: Series) -> Curves | None:
    drawn = {label: curve for label, curve in series.items() if curve[0]}
    return Curves(name, title, xlabel, ylabel, drawn) if drawn else None

"""Draws a run's pictures from the records its stages left."""

import logging
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from e3jax import files
from e3jax.evaluate import table
from e3jax.job import Job
from e3jax.mask import Mask
from e3jax.report import plots
from e3jax.training.metrics import read_metrics

log = logging.getLogger(__name__)


def draw_search(job_: Job, mask: Mask) -> None:
    """plots/: kept layers over the search, importance by layer, held-out KL, removal curve."""
    folder = job_.out / "plots"
    folder.mkdir(exist_ok=True)
    lines = read_metrics(job_.out / "search")
    scored = [line for line in lines if "keep_probability" in line]
    if scored:
        probability = np.array([line["keep_probability"] for line in scored])
        steps = [line["step"] for line in scored]
        plots.kept_layers(folder / "kept-layers.png", steps, probability, mask.keep)
        losses = [line for line in lines if "loss" in line]
        plots.curves(
            folder / "search.png",
            {
                "masked models, train": ([x["step"] for x in losses], [x["loss"] for x in losses]),
                "answer, held out": (steps, [x["held_out_kl"] for x in scored]),
                "best answer, held out": (steps, [x["best_kl"] for x in scored]),
            },
            xlabel="search step",
            ylabel="KL to dense (nats/token)",
            title="Search",
        )
    importance = job_.out / "search" / "importance.json"
    if importance.exists():
        kl = files.read_json(importance)["value"]["scores"]
        plots.importance(folder / "importance.png", kl, mask.keep)
    removal = job_.out / "evaluate" / "removal.json"
    if removal.exists():
        curve = files.read_json(removal)["value"]
        plots.curves(
            folder / "removal.png",
            {"KL": ([x["removed"] for x in curve], [x["kl"] for x in curve])},
            xlabel="layers removed, in the search's order",
            ylabel="KL to dense (nats/token)",
            title="Loss after each removal, before any training",
        )


def draw_losses(job_: Job) -> None:
    """plots/distillation.png: train and held-out KL of every recovery of the run."""
    series = {}
    for stage in ("distill", *job_.run.evaluate.baselines):
        name = "ours" if stage == "distill" else stage
        lines = read_metrics(job_.out / stage)
        series |= {f"{name}, train": _curve(lines, "kl")}
        series |= {f"{name}, held out": _curve(lines, "held_out_kl")}
    _draw_training(job_.out, "distillation", "KL to dense (nats/token)", series)


def draw_behaviour(out: pathlib.Path, rows: Sequence[table.Row]) -> None:
    """plots/behaviour.png: KL of every model by tenths of the tokens."""
    series = {}
    for row in rows[1:]:  # the dense model is at no distance from itself
        found = table.read_deciles(out / "evaluate", row)
        series[row.model] = (list(range(1, len(found) + 1)), [x.kl for x in found])
    (out / "plots").mkdir(exist_ok=True)
    plots.curves(
        out / "plots" / "behaviour.png",
        series,
        xlabel="tenth of the tokens, those the dense model is surest of first",
        ylabel="KL to dense (nats/token)",
        title="Where the models differ from the dense one",
    )


def draw_comparison(out: pathlib.Path, results: Sequence[Any]) -> None:
    """plots/compare.png: KL of each selector's choices, raw and recovered."""
    names = list(dict.fromkeys(result.selector for result in results))
    found = {
        name: (
            [r.raw.kl for r in results if r.selector == name],
            [r.recovered.kl for r in results if r.selector == name and r.recovered is not None],
        )
        for name in names
    }
    (out / "plots").mkdir(exist_ok=True)
    plots.compared(out / "plots" / "compare.png", found)


def draw_training(out: pathlib.Path) -> None:
    """plots/training.png: next-token loss of plain training, on train and held-out windows."""
    lines = read_metrics(out / "train")
    steps, perplexity = _curve(lines, "held_out_perplexity")
    series = {"train": _curve(lines, "nll"), "held out": (steps, np.log(perplexity).tolist())}
    _draw_training(out, "training", "cross-entropy (nats/token)", series)


def _curve(lines: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of the lines that have the key."""
    found = [line for line in lines if key in line]
    return [line["step"] for line in found], [line[key] for line in found]


def _draw_training(
    out: pathlib.Path, name: str, ylabel: str, series: Mapping[str, tuple[list, list]]
) -> None:
    series = {label: curve for label, curve in series.items() if curve[0]}
    if series:
        folder = out / "plots"
        folder.mkdir(exist_ok=True)
        plots.curves(
            folder / f"{name}.png", series, xlabel="step", ylabel=ylabel, title=name.capitalize()
        )

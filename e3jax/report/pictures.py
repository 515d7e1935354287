"""Draws a run's pictures from the records its stages left."""

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from e3jax.evaluate import compared
from e3jax.evaluate.compared import Result
from e3jax.report import plots, records


def draw(out: pathlib.Path) -> None:
    """plots/: of all that the run folder has on record, a PNG and a CSV a figure."""
    folder = out / "plots"
    folder.mkdir(exist_ok=True)
    mask, heat = records.kept(out), records.heat(out)
    if mask is not None and heat is not None:
        probability = np.array(heat.probability)
        plots.kept_layers(folder / "kept-layers.png", heat.steps, probability, mask.keep)
    importance = records.importance(out)
    if mask is not None and importance is not None:
        plots.importance(folder / "importance.png", importance, mask.keep)
    for read in (
        records.search,
        records.removal,
        records.recovery,
        records.behaviour,
        records.training,
    ):
        if (found := read(out)) is not None:
            plots.curves(
                folder / f"{found.name}.png",
                found.series,
                xlabel=found.xlabel,
                ylabel=found.ylabel,
                title=found.title,
            )
    if results := compared.read(out):
        _comparison(folder, results)


def draw_sweep(out: pathlib.Path, points: Sequence[Any]) -> None:
    """plots/sweep: quality of a sweep's models against their speed and their parameters."""
    (out / "plots").mkdir(exist_ok=True)
    plots.tradeoff(out / "plots" / "sweep.png", points)


def _comparison(folder: pathlib.Path, results: Sequence[Result]) -> None:
    """plots/compare: KL of each selector's choices, raw and recovered."""
    found = {line.selector: (line.kl, []) for line in compared.lines(results, "raw")}
    for line in compared.lines(results, "recovered"):
        found[line.selector] = (found[line.selector][0], line.kl)
    plots.compared(folder / "compare.png", found)

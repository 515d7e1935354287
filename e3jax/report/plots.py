"""The run's figures as PNG, the numbers of each as CSV: what was kept, what each layer is worth,
how the losses fell."""

import csv
import io
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from e3jax import files
from e3jax.evaluate.intervals import Z_95

KEPT, REMOVED, INK = "#1f6f8b", "#d1495b", "#333333"


def _canvas(width: float, height: float) -> Figure:
    """A figure without pyplot: no global state, no display."""
    figure = Figure(figsize=(width, height), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = _canvas(width, height)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(
    figure: Figure, path: pathlib.Path, columns: Sequence[Any], rows: Iterable[Sequence[Any]]
) -> None:
    figure.savefig(path)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    files.write_text(path.with_suffix(".csv"), text.getvalue())


def kept_layers(
    path: pathlib.Path, steps: Sequence[int], probability_sl: np.ndarray, keep: Sequence[int]
) -> None:
    """Heat map of the probability of keeping each layer over the search; the answer on the right.

    probability_sl: [scored steps, L], between 0 and 1.
    """
    layers = probability_sl.shape[1]
    figure, axes = _figure(7.5, 0.6 + 0.19 * layers)
    axes.spines[:].set_visible(False)
    # A column reaches halfway to its neighbours, the first and last end at their own step.
    middles = (np.asarray(steps[1:], float) + steps[:-1]) / 2
    edges = np.concatenate([[steps[0]], middles, [max(steps[-1], steps[0] + 1)]])
    mesh = axes.pcolormesh(
        edges, np.arange(layers + 1) - 0.5, probability_sl.T, cmap="viridis", vmin=0, vmax=1
    )
    margin = 0.03 * (edges[-1] - edges[0])
    for layer in range(layers):
        colour = KEPT if layer in keep else REMOVED
        axes.add_patch(
            _box(edges[-1] + margin, layer - 0.42, margin, 0.84, colour)  # the answer, as a stripe
        )
    axes.set_xlim(edges[0], edges[-1] + 2.5 * margin)
    axes.set(xlabel="search step", ylabel="layer", yticks=range(0, layers, max(1, layers // 16)))
    axes.invert_yaxis()
    figure.colorbar(mesh, ax=axes, label="probability of being kept", pad=0.01)
    axes.set_title(
        f"{len(keep)} of {layers} layers kept; final answer on the right: blue kept, red removed",
        fontsize=10,
    )
    rows = ([step, *row] for step, row in zip(steps, probability_sl.tolist(), strict=True))
    _save(figure, path, ["search step", *(f"layer {i}" for i in range(layers))], rows)


def _box(x: float, y: float, width: float, height: float, colour: str) -> Rectangle:
    return Rectangle((x, y), width, height, color=colour, clip_on=False)


def importance(path: pathlib.Path, kl_l: Sequence[float], keep: Sequence[int]) -> None:
    """KL importance of each layer, log scale, coloured by whether it was kept."""
    figure, axes = _figure(7.5, 3.0)
    colours = [KEPT if i in keep else REMOVED for i in range(len(kl_l))]
    axes.bar(range(len(kl_l)), np.maximum(kl_l, 1e-8), color=colours)
    axes.set(yscale="log", xlabel="layer", ylabel="KL without it (nats/token)")
    axes.set_title("Importance of each layer (blue kept, red removed)", fontsize=10)
    rows = ([i, kl, int(i in keep)] for i, kl in enumerate(kl_l))
    _save(figure, path, ["layer", "KL without it (nats/token)", "kept"], rows)


def curves(
    path: pathlib.Path,
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    xlabel: str,
    ylabel: str,
    title: str,
    log: bool = True,
) -> None:
    """Named (x, y) curves in one picture; non-finite values are left out."""
    figure, axes = _figure(7.5, 3.4)
    for name, (x, y) in series.items():
        xs, ys = np.asarray(x, float), np.asarray(y, float)
        good = np.isfinite(ys) & ((ys > 0) | (not log))
        axes.plot(
            xs[good], ys[good], label=name, linewidth=1.4, marker="." if len(xs) < 30 else None
        )
    axes.set(xlabel=xlabel, ylabel=ylabel, yscale="log" if log else "linear")
    axes.grid(alpha=0.25)
    if len(series) > 1:
        axes.legend(frameon=False, fontsize=8)
    axes.set_title(title, fontsize=10)
    rows = ([name, *point] for name, curve in series.items() for point in zip(*curve, strict=True))
    _save(figure, path, ["curve", xlabel, ylabel], rows)


def compared(path: pathlib.Path, kl: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> None:
    """KL of each selector's choices, raw and recovered, a dot for each seed; the best on top."""
    names = sorted(kl, key=lambda name: -np.mean(kl[name][0]))
    figure, axes = _figure(7.5, 1.0 + 0.32 * len(names))
    for place, name in enumerate(names):
        for values, colour in zip(kl[name], (REMOVED, KEPT), strict=True):
            axes.scatter(np.maximum(values, 1e-8), [place] * len(values), color=colour, s=18)
    axes.set(xscale="log", xlabel="KL to dense (nats/token)", yticks=range(len(names)))
    axes.set_yticklabels(names)
    axes.grid(alpha=0.25)
    axes.set_title("Each seed's choice: red nothing trained, blue recovered", fontsize=10)
    states = ("nothing trained", "recovered")
    rows = (
        [name, state, value]
        for name in reversed(names)
        for state, values in zip(states, kl[name], strict=True)
        for value in values
    )
    _save(figure, path, ["selector", "state", "KL to dense (nats/token)"], rows)


def tradeoff(path: pathlib.Path, points: Sequence[Any]) -> None:
    """Quality against speed and parameters, with 95 % intervals: of each selector the models of a
    sweep, joined; the dense one, the first of the points, as a diamond."""
    dense, *others = points
    scored = dense.row.interval is not None
    figure = _canvas(8.5, 3.2 * (1 + scored))
    grid = figure.subplots(1 + scored, 2, squeeze=False, sharey="row", sharex="col")
    xs = (
        ("decoding (tokens/s)", lambda p: p.speed.decode),
        (
            "parameters (millions)",
            lambda p: p.row.parameters / 1e6,
        ),
    )
    for column, (xlabel, x_of) in enumerate(xs):
        for name in dict.fromkeys(point.row.model for point in others):
            own = [point for point in others if point.row.model == name]
            x = [x_of(point) for point in own]
            margin = [Z_95 * (point.kl_error or 0.0) for point in own]
            style = {"label": name, "marker": "o", "markersize": 4, "linewidth": 1, "capsize": 2}
            grid[0][column].errorbar(x, [p.row.kl for p in own], margin, **style)
            if scored:
                share = np.array([p.row.exact_match for p in own])
                low, high = np.array([p.row.interval for p in own]).T
                ends = 100 * np.maximum([share - low, high - share], 0)
                grid[1][column].errorbar(x, 100 * share, ends, **style)
        grid[0][column].plot(x_of(dense), dense.row.kl, "D", color=INK, label="dense")
        if scored:
            grid[1][column].plot(x_of(dense), 100 * dense.row.exact_match, "D", color=INK)
        grid[-1][column].set_xlabel(xlabel)
    grid[0][0].set_ylabel("KL to dense (nats/token)")
    if scored:
        grid[1][0].set_ylabel(f"{dense.row.solved} (%)")
    for axes in grid.flat:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    grid[0][0].legend(frameon=False, fontsize=8)
    figure.suptitle("Quality against speed here and size", fontsize=10)
    columns = [
        "model", "layers", "parameters", "KL to dense (nats/token)", "standard error",
        dense.row.solved, "from", "to", "prefill tokens/s", "decode tokens/s",
    ]  # fmt: skip
    rows = (
        (
            *(p.row.model, p.row.layers, p.row.parameters, p.row.kl, p.kl_error),
            *(p.row.exact_match, *(p.row.interval or (None, None))),
            *(p.speed.prefill, p.speed.decode),
        )
        for p in points
    )
    _save(figure, path, columns, rows)

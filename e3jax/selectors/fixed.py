"""Selectors that look at neither the model nor the data: places, and chance."""

import numpy as np

from e3jax.selectors import selection
from e3jax.selectors.selection import Calibration, Selection, Task


def tail(calibration: Calibration, task: Task) -> Selection:
    """The last n layers."""
    return selection.block(task, task.keep, "tail")


def deepest(calibration: Calibration, task: Task) -> Selection:
    """The deepest n layers but for the last one, which stays."""
    return selection.block(task, task.keep - 1, "deepest")


def random(calibration: Calibration, task: Task) -> Selection:
    """Layers by chance, which `calibration.seed` decides. scores: the draw, uniform in [0, 1)."""
    draw = np.random.default_rng(calibration.seed).random(task.num_layers)
    return selection.lowest(task, draw)

"""What a layer selector is given and what it answers.

A selector is a function (Calibration, Task) -> Selection. All of them are in registry.py.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from e3jax.errors import UserError
from e3jax.models.config import ModelConfig
from e3jax.models.decoder import Batch, Params


@dataclasses.dataclass(frozen=True)
class Calibration:
    """All that a selector may look at."""

    params: Params
    cfg: ModelConfig
    batches: Sequence[Batch]  # numpy rows, of one shape; the devices can share each
    dtype: Any  # of the computation
    chunk: int  # tokens whose logits exist at a time
    seed: int = 0

    @property
    def tokens(self) -> int:
        """Real (not padding) tokens of all batches."""
        return sum(int(np.count_nonzero(batch.segments)) for batch in self.batches)


@dataclasses.dataclass(frozen=True)
class Task:
    """How many layers stay, and which of them are not to be chosen. Layer numbers are from 0."""

    num_layers: int
    keep: int
    protect: frozenset[int] = frozenset()  # never removed
    force: frozenset[int] = frozenset()  # always removed

    @property
    def remove(self) -> int:
        """Layers that go."""
        return self.num_layers - self.keep


@dataclasses.dataclass(frozen=True)
class Selection:
    """Which layers a selector keeps, what it scored them by, and what that cost."""

    keep: tuple[int, ...]  # ascending
    order: tuple[int, ...]  # removed layers, first removed first
    scores: tuple[float, ...] = ()  # per layer; what they mean is the selector's matter
    tokens: int = 0  # processed by masked models
    teacher_tokens: int = 0  # processed by the dense model, forward or backward
    # Layers whose differences to `keep`'s layer are added to its weights: (kept, (merged, ...)).
    merges: tuple[tuple[int, tuple[int, ...]], ...] = ()


Selector = Callable[[Calibration, Task], Selection]


def without(task: Task, order: Sequence[int], **more: Any) -> Selection:
    """The selection that removes `order`. more: its other fields."""
    gone = set(order)
    keep = tuple(i for i in range(task.num_layers) if i not in gone)
    assert len(keep) == task.keep, (task, order)
    return Selection(keep, tuple(int(i) for i in order), **more)


def lowest(task: Task, scores: np.ndarray, **more: Any) -> Selection:
    """One shot: the layers of least score go, forced ones first, protected ones never. Of equal
    ones the first."""
    ranked = [i for i in np.argsort(scores, kind="stable").tolist() if i not in task.protect]
    order = sorted(ranked, key=lambda i: i not in task.force)[: task.remove]
    return without(task, order, scores=tuple(map(float, scores)), **more)


def block(task: Task, start: int, selector: str, **more: Any) -> Selection:
    """The selection that removes `remove` layers in a row from `start` on. Raises UserError where
    that is not what `protect` and `force` allow."""
    gone = range(start, start + task.remove)
    check_fixed(task, gone, selector)
    return without(task, tuple(gone), **more)


def check_fixed(task: Task, gone: Sequence[int], selector: str) -> None:
    """Raises UserError where a selector that knows no protected or forced layers meets them."""
    if wrong := sorted(task.protect & set(gone)):
        raise UserError(f"{selector} removes layers {wrong}, which search.protect names")
    if wrong := sorted(task.force - set(gone)):
        raise UserError(f"{selector} keeps layers {wrong}, which search.force names")

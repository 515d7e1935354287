"""Every published selector under its name.

`choose` takes (calibration, task, tokens): the last is a bound that only EvoPress heeds, whose cost
is not that of a number of passes. papers: arXiv.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from e3jax.selectors import evopress, fixed, laco, removal, similarity, weights
from e3jax.selectors.selection import Calibration, Selection, Selector, Task


@dataclasses.dataclass(frozen=True)
class Rule:
    """A selector and what it costs."""

    choose: Callable[[Calibration, Task, int | None], Selection]
    passes: Callable[[Task], int]  # of masked models over the calibration data; 0: of the dense one
    paper: str | None = None


def _rule(select: Selector, passes: Any = 0, paper: str | None = None) -> Rule:
    count = passes if callable(passes) else lambda task: passes
    return Rule(lambda calibration, task, _: select(calibration, task), count, paper)


def _each(task: Task) -> int:
    return task.num_layers


def _rounds(ends: int) -> Callable[[Task], int]:
    """Each layer alive once a round, but so many ends."""

    def passes(task: Task) -> int:
        return sum(task.num_layers - gone - ends for gone in range(task.remove))

    return passes


def _trials(task: Task) -> int:
    """LaCo's depend on the data: 41 and 61 for 24 layers, 18 kept."""
    return 5 * task.num_layers // 2


def _evolve(calibration: Calibration, task: Task, tokens: int | None) -> Selection:
    return evopress.evopress(calibration, task, budget=tokens)


SELECTORS = {
    "shortgpt": _rule(similarity.shortgpt, paper="2403.03853"),
    "shortgpt_released": _rule(similarity.shortgpt_released, paper="2403.03853"),
    "minitron": _rule(similarity.minitron, paper="2408.11796"),
    "ppl": _rule(removal.ppl, _each, "2402.02834"),
    "kl": _rule(removal.kl, _each, "2410.14649"),
    "sleb": _rule(removal.sleb, _rounds(2), "2402.09025"),
    "greedy_kl": _rule(removal.greedy_kl, _rounds(0)),
    "taylor": _rule(weights.taylor, paper="2402.02834"),
    "taylor_plus": _rule(weights.taylor_plus, paper="2402.02834"),
    "magnitude": _rule(weights.magnitude, paper="2402.02834"),
    "streamline": _rule(similarity.streamline, paper="2403.19135"),
    "angular": _rule(similarity.angular, paper="2403.17887"),
    "angular_released": _rule(similarity.angular_released, paper="2403.17887"),
    "tail": _rule(fixed.tail),
    "deepest": _rule(fixed.deepest),
    "laco": _rule(laco.laco, _trials, "2402.11187"),
    "laco_released": _rule(laco.laco_released, _trials, "2402.11187"),
    "evopress": Rule(_evolve, lambda task: 1, "2410.14649"),
    "evopress_full": _rule(evopress.evopress, 1, "2410.14649"),
    "random": _rule(fixed.random),
}


def windows_for(rule: Rule, task: Task, tokens: int, window: int) -> int:
    """Calibration windows of `window` tokens that so many tokens through masked models allow; of
    the dense model where no masked one is run. At least one."""
    return max(1, tokens // (max(1, rule.passes(task)) * window))

"""How sure a figure is: of a share over problems, of a mean over windows. Without jax."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

Z_95 = 1.959964  # standard deviations to either side that hold 95 % of a normal distribution


def wilson(right: float, count: float) -> tuple[float, float]:
    """95 % score interval of a share (Wilson 1927), which holds near 0 and 1 too."""
    share, weight = right / count, Z_95**2 / count
    middle = (share + weight / 2) / (1 + weight)
    half = Z_95 * math.sqrt(share * (1 - share) / count + weight / (4 * count)) / (1 + weight)
    return max(0.0, middle - half), min(1.0, middle + half)


def solved(right: Sequence[int], samples: int) -> tuple[float, float]:
    """95 % interval of pass@1, the share of right answers. right: of `samples` to each problem.

    Problems are drawn, and answers to one of them are alike: Wilson's interval is taken of as many
    answers as would vary so much if they were independent (Korn and Graubard 1998), at most all.
    Of one answer each it is Wilson's own. How alike they are is measured with two problems more,
    one all right and one all wrong: a few wrong answers alone do not tell.
    """
    shares = np.array([0, samples, *right]) / samples
    alike = shares.var() / (shares.mean() * (1 - shares.mean()))  # 1: all of a problem are the same
    count = len(right) / max(float(alike), 1 / samples)
    return wilson(sum(right) / samples / len(right) * count, count)


def mean(windows: Sequence[tuple[float, float]]) -> tuple[float, float | None]:
    """Mean a token, and its standard error over windows, from [windows, 2]: sum and tokens of each.

    A ratio of two sums, linearised: windows differ in their tokens. None of a single window.
    """
    total, tokens = np.asarray(windows, float).T
    found = total.sum() / tokens.sum()
    if len(tokens) < 2:
        return float(found), None
    rest = total - found * tokens
    variance = len(rest) / (len(rest) - 1) * np.sum(rest**2)
    return float(found), float(np.sqrt(variance) / tokens.sum())


def apart(ours: Any, theirs: Any) -> tuple[float, float | None]:
    """Difference of KL, theirs - ours, nats a token, and its standard error over windows.

    ours, theirs: [seeds, windows, 2], KL and tokens of the same windows (sums). A window's KL is
    averaged over seeds first, so that seeds do not count as windows.
    """
    (kl_a, tokens), (kl_b, _) = (np.mean(x, axis=0).T for x in (ours, theirs))
    return mean(np.stack([kl_b - kl_a, tokens], axis=1).tolist())


def paired(ours: Sequence[Any], theirs: Sequence[Any]) -> tuple[float, float | None] | None:
    """The same; None where the windows are not the same ones, or not on record."""
    tokens = [[count for _, count in windows] for windows in (*ours, *theirs)]
    if not tokens[0] or any(counts != tokens[0] for counts in tokens):
        return None
    return apart(ours, theirs)

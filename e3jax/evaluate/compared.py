"""What `compare` found: each selector's choices, and what they leave of the model. Without jax."""

import dataclasses
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from e3jax import files
from e3jax.evaluate import intervals, rows
from e3jax.evaluate.rows import Row

COMPARE = "compare.json"  # a list of results, seed by seed, each without its windows
STATES = ("raw", "recovered")


@dataclasses.dataclass(frozen=True)
class Result:
    """One selector, one seed. Seconds are of all devices together."""

    selector: str
    seed: int
    removed: tuple[int, ...]  # ascending
    tokens: int  # that choosing cost, through masked models
    teacher_tokens: int
    seconds: float  # of choosing
    raw: Row
    raw_windows: Any  # [windows, 2], KL and tokens of each, sums; empty: not on record
    recovered: Row | None = None
    recovered_windows: Any = ()
    recovery_seconds: float = 0.0
    allowed: int | None = None  # the most that `tokens` was to be; None: not on record

    @property
    def num_layers(self) -> int:
        """Of the dense model."""
        return self.raw.layers + len(self.removed)


@dataclasses.dataclass(frozen=True)
class Line:
    """A selector over the seeds, with nothing trained or recovered: a line of a table."""

    selector: str
    seeds: list[int]  # that there are figures of
    rows: list[Row]  # one a seed, as all lists here
    windows: list[Any]
    tokens: float  # mean of a seed: of choosing, or of the recovery
    teacher_tokens: float | None  # of choosing
    seconds: float
    diverged: int = 0  # seeds whose recovery did
    # KL less the first selector's in the same windows, with its standard error; None: of the first
    # itself, and where the windows are not on record.
    apart: tuple[float, float | None] | None = None

    @property
    def title(self) -> str:
        """The selector, and that some seeds are left out."""
        total = len(self.seeds) + self.diverged
        return self.selector + (f" ({len(self.seeds)} of {total} seeds)" if self.diverged else "")

    @property
    def kl(self) -> list[float]:
        return [row.kl for row in self.rows]

    @property
    def mean(self) -> float:
        return float(np.mean(self.kl))

    @property
    def spread(self) -> float:
        """From the least to the greatest KL."""
        return float(np.ptp(self.kl))

    @property
    def exact(self) -> float | None:
        """Mean share of problems solved."""
        found = [row.exact_match for row in self.rows if row.exact_match is not None]
        return float(np.mean(found)) if found else None


def lines(results: Sequence[Result], state: str) -> list[Line]:
    """A line a selector, in the order of the results; none where nothing is in that state."""
    found: list[Line] = []
    for name in dict.fromkeys(result.selector for result in results):
        every = [result for result in results if result.selector == name]
        own = [result for result in every if getattr(result, state) is not None]
        if not own:
            continue
        of_rows = [getattr(result, state) for result in own]
        raw = state == "raw"
        line = Line(
            selector=name,
            seeds=[result.seed for result in own],
            rows=of_rows,
            windows=[getattr(result, f"{state}_windows") for result in own],
            tokens=float(np.mean([r.tokens for r in (own if raw else of_rows)])),
            teacher_tokens=float(np.mean([r.teacher_tokens for r in own])) if raw else None,
            seconds=float(np.mean([r.seconds if raw else r.recovery_seconds for r in own])),
            diverged=len(every) - len(own),
        )
        if found:
            line = dataclasses.replace(line, apart=apart(found[0], line))
        found.append(line)
    return found


def apart(ours: Line, theirs: Line) -> tuple[float, float | None] | None:
    """KL of theirs less that of ours in the same windows, over the seeds that both have, with its
    standard error; None where there are none, or the windows are not on record."""
    both = [seed for seed in ours.seeds if seed in theirs.seeds]
    windows = [[line.windows[line.seeds.index(seed)] for seed in both] for line in (ours, theirs)]
    return intervals.paired(*windows) if both else None


def nearest_first(found: Sequence[Line]) -> list[Line]:
    """By the mean KL; what is not finite is last."""
    return sorted(found, key=lambda line: line.mean if math.isfinite(line.mean) else math.inf)


def read(out: pathlib.Path) -> list[Result]:
    """What `compare` left in a folder; none where it has not ended there."""
    path = out / COMPARE
    return [_read(out, fields) for fields in files.read_json(path)] if path.is_file() else []


def read_dense(out: pathlib.Path) -> Row | None:
    """The dense model's figures."""
    path = rows.beside(out / "evaluate", "dense", "json")
    return Row(**files.read_json(path)["value"]) if path.is_file() else None


def mask_file(out: pathlib.Path, result: Result) -> pathlib.Path:
    """Of the layers that a result keeps."""
    folder = "search" if result.selector == "e3" else pathlib.PurePath(result.selector).name
    return out / f"seed-{result.seed}" / folder / "mask.json"


def _read(out: pathlib.Path, fields: dict[str, Any]) -> Result:
    folder = out / f"seed-{int(fields['seed'])}" / "evaluate"
    found = fields | {"removed": tuple(fields["removed"])}
    for state in STATES if fields["recovered"] else STATES[:1]:
        row = Row(**fields[state])
        path = rows.beside(folder, row.model, "windows.json")
        windows = files.read_json(path) if path.is_file() else ()
        found |= {state: row, f"{state}_windows": windows}
    return Result(**found)

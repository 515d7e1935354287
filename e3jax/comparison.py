"""`compare`: selectors against each other, raw and after the same recovery, over seeds.

Each seed has a folder, and in it each selector's mask, and each set of removed layers its figures
and its recovery: selectors that agree share them. All of it is kept, so the command is restartable.
"""

import dataclasses
import functools
import logging
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from e3jax import choice, files, job, processes, recovery
from e3jax.evaluate import intervals, table
from e3jax.job import Job
from e3jax.planning.budget import make_budget
from e3jax.search.search import resolve_keep

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Result:
    """One selector, one seed. Seconds are of all devices together."""

    selector: str
    seed: int
    removed: tuple[int, ...]  # ascending
    tokens: int  # that choosing cost, through masked models
    teacher_tokens: int
    seconds: float  # of choosing
    raw: table.Row
    raw_windows: Any  # KL and tokens of each window, sums
    recovered: table.Row | None = None
    recovered_windows: Any = None
    recovery_seconds: float = 0.0


def compare(job_: Job) -> tuple[list[Result], table.Row]:
    """All results in the order of the configuration, seed by seed; and the dense model's row."""
    spec = job_.run.compare
    keep = resolve_keep(job_.run.search.keep, job_.cfg.num_layers)
    recipe = dataclasses.replace(job_.run.distill, mask=None)  # e3 searches, whatever is given
    counted = make_budget(dataclasses.replace(job_.run, distill=recipe), job_.cfg, "float32")
    tokens = spec.tokens or counted.tokens - counted.distill_tokens
    log.info("compare: at most %s tokens through masked models a choice", f"{tokens:,}")
    dense, results = table.measure_dense(job_), []
    for seed in spec.seeds:
        run = dataclasses.replace(job_.run, seed=seed)
        here = job_.having(out=job_.out / f"seed-{seed}", run=run)
        for name in spec.selectors:
            results.append(_result(here, name, keep, tokens))
            _tell(results[-1])
    return results, dense


def _result(job_: Job, name: str, keep: int, tokens: int) -> Result:
    if name == "e3":
        choose = functools.partial(choice.search_mask, job_)
    else:
        choose = functools.partial(choice.selector_mask, job_, name, keep, tokens)
    spec = {"selector": name, "search": job_.run.search, "tokens": tokens}
    seconds = _timed(job_, job_.out / name, spec, choose)
    mask = choose()  # read back
    place, bare = mask.place, dataclasses.replace(mask, tokens=0)  # rows may be shared
    raw = table.measure(job_, f"{place} raw", bare, lambda: recovery.survivors(job_, mask))
    result = Result(
        selector=name,
        seed=job_.run.seed,
        removed=tuple(sorted(mask.order)),
        tokens=mask.tokens,
        teacher_tokens=mask.teacher_tokens,
        seconds=seconds,
        raw=raw,
        raw_windows=table.windows(job_, raw),
    )
    if not job_.run.compare.recover:
        return result
    recover = functools.partial(recovery.recover, job_, mask, job_.out / place)
    seconds = _timed(job_, job_.out / place, {"recipe": job_.run.distill}, recover)
    row = table.measure_student(job_, f"{place} recovered", recover, bare, place)
    return dataclasses.replace(
        result,
        recovered=row,
        recovered_windows=table.windows(job_, row),
        recovery_seconds=seconds,
    )


def _timed(
    job_: Job, folder: pathlib.Path, facts: dict[str, Any], work: Callable[[], Any]
) -> float:
    """Seconds of `work`, times the devices, kept in `folder`: of the attempt that finished it."""

    def make() -> float:
        begun = time.monotonic()
        work()
        return (time.monotonic() - begun) * jax.device_count()

    facts = job_.inputs(**facts, train=job_.train.fingerprint)
    return job.once(folder / "seconds.json", facts, make)


def _tell(result: Result) -> None:
    text = f"raw KL {result.raw.kl:.4f}"
    if result.recovered is not None:
        text += f", recovered {result.recovered.kl:.4f}"
    removed = list(result.removed)
    log.info("compare: seed %d, %s removes %s: %s", result.seed, result.selector, removed, text)


# ---------------------------------------------------------------- the table


def summary(results: Sequence[Result]) -> str:
    """Two tables, of what the choices leave and of what recovery makes of it: means over seeds,
    their spread, and the difference of KL from the first selector's in the same windows."""
    raw = [(r, r.raw, r.raw_windows) for r in results]
    text = "nothing trained\n" + table.align(_rows(raw, costs=True))
    recovered = [(r, r.recovered, r.recovered_windows) for r in results if r.recovered is not None]
    if recovered:
        text += "\n\nafter the same recovery\n" + table.align(_rows(recovered, costs=False))
    return text


def _rows(
    measured: Sequence[tuple[Result, table.Row, Any]], *, costs: bool
) -> list[dict[str, str]]:
    names = list(dict.fromkeys(result.selector for result, _, _ in measured))
    first = [windows for result, _, windows in measured if result.selector == names[0]]
    shown = []
    for name in names:
        found, rows, windows = zip(*(x for x in measured if x[0].selector == name), strict=True)
        kl = [row.kl for row in rows]
        exact = [row.exact_match for row in rows if row.exact_match is not None]
        line = {"selector": name, "KL": f"{np.mean(kl):.4f}", "spread": f"{np.ptp(kl):.4f}"}
        line["from first"] = "-"
        if name != names[0]:
            mean, error = intervals.apart(first, windows)
            line["from first"] = f"{mean:+.4f}" + ("" if error is None else f" ± {error:.4f}")
        line["exact"] = f"{100 * np.mean(exact):.1f} %" if exact else "-"
        if costs:
            line["M tokens"] = f"{np.mean([r.tokens for r in found]) / 1e6:.2f}"
            line["dense M"] = f"{np.mean([r.teacher_tokens for r in found]) / 1e6:.2f}"
            line["seconds"] = f"{np.mean([r.seconds for r in found]):.0f}"
        else:
            line["M tokens"] = f"{np.mean([row.tokens for row in rows]) / 1e6:.2f}"
            line["seconds"] = f"{np.mean([r.recovery_seconds for r in found]):.0f}"
        shown.append(line)
    return shown


def write(job_: Job, results: Sequence[Result], text: str) -> None:
    """compare.json: every result without its windows; compare.txt: the table."""
    if not processes.is_first():
        return
    plain = []
    for result in results:
        fields = dataclasses.asdict(result)
        plain.append({k: v for k, v in fields.items() if not k.endswith("windows")})
    files.write_json(job_.out / "compare.json", plain)
    files.write_text(job_.out / "compare.txt", text + "\n")

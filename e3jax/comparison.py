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

from e3jax import choice, files, job, ledger, processes, recovery
from e3jax.errors import Diverged
from e3jax.evaluate import compared, table
from e3jax.evaluate.compared import Result
from e3jax.evaluate.rows import Row
from e3jax.job import Job
from e3jax.planning.budget import make_budget
from e3jax.search.search import resolve_keep

log = logging.getLogger(__name__)


def compare(job_: Job) -> tuple[list[Result], Row]:
    """All results in the order of the configuration, seed by seed; and the dense model's row."""
    spec = job_.run.compare
    keep = resolve_keep(job_.run.search.keep, job_.cfg.num_layers)
    recipe = dataclasses.replace(job_.run.distill, mask=None)  # e3 searches, whatever is given
    counted = make_budget(dataclasses.replace(job_.run, distill=recipe), job_.cfg, "float32")
    tokens = spec.tokens or counted.tokens - counted.distill_tokens
    log.info("compare: at most %s tokens through masked models a choice", f"{tokens:,}")
    with ledger.stage(job_.out, "evaluate"):
        dense = table.measure_dense(job_)
    results = []
    for seed in spec.seeds:
        run = dataclasses.replace(job_.run, seed=seed)
        here = job_.having(out=job_.out / f"seed-{seed}", run=run)
        for name in spec.selectors:
            results.append(_result(here, name, keep, tokens, job_.out))
            _tell(results[-1])
    return results, dense


def _result(job_: Job, name: str, keep: int, tokens: int, out: pathlib.Path) -> Result:
    """out: of the comparison, which has the ledger."""
    if name == "e3":
        choose = functools.partial(choice.search_mask, job_)
    else:
        choose = functools.partial(choice.selector_mask, job_, name, keep, tokens)
    with ledger.stage(out, f"choose {name}"):
        begun = time.monotonic()
        mask = choose()
        spent = _since(begun)
    made_by = {"selector": name, "tokens": tokens, "config": mask.config}
    seconds = _kept(job_, job_.out / name, made_by, lambda: spent)
    place, bare = mask.place, dataclasses.replace(mask, tokens=0)  # rows may be shared
    with ledger.stage(out, "evaluate"):
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
        allowed=tokens,
    )
    if not job_.run.compare.recover:
        return result
    recover = functools.partial(recovery.recover, job_, mask, job_.out / place)

    def timed() -> float:
        begun = time.monotonic()
        recover()
        return _since(begun)

    recipe = recovery.decides(job_.run.distill)
    try:
        with ledger.stage(out, "distill"):
            seconds = _kept(job_, job_.out / place, {"recipe": recipe}, timed)
    except Diverged as error:  # no reason to leave the others out
        log.warning("compare: seed %d, %s: not recovered: %s", result.seed, name, error)
        return result
    with ledger.stage(out, "evaluate"):
        row = table.measure_student(job_, f"{place} recovered", recover, bare, place)
    return dataclasses.replace(
        result,
        recovered=row,
        recovered_windows=table.windows(job_, row),
        recovery_seconds=seconds,
    )


def _since(begun: float) -> float:
    """Seconds, times the devices."""
    return (time.monotonic() - begun) * jax.device_count()


def _kept(
    job_: Job, folder: pathlib.Path, made_by: dict[str, Any], seconds: Callable[[], float]
) -> float:
    """The seconds of the attempt that finished what is in `folder`, be it an earlier one than this.

    made_by: what decides the result; what only its memory depends on would have it timed again,
    when it is only read."""
    facts = job_.inputs(**made_by, train=job_.train.fingerprint)
    return job.once(folder / "seconds.json", facts, seconds)


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
    text = "nothing trained\n" + table.align(_shown(compared.lines(results, "raw")))
    if recovered := compared.lines(results, "recovered"):
        text += "\n\nafter the same recovery\n" + table.align(_shown(recovered))
        there = {line.selector for line in recovered}
        if gone := [x for x in dict.fromkeys(r.selector for r in results) if x not in there]:
            text += f"\nnot recovered, for the training diverged: {', '.join(gone)}"
    return text


def _shown(lines: Sequence[compared.Line]) -> list[dict[str, str]]:
    shown = []
    for line in lines:
        cells = {
            "selector": line.title,
            "KL": f"{line.mean:.4f}",
            "spread": f"{line.spread:.4f}",
        }
        cells["from first"] = "-"
        if line.apart is not None:
            mean, error = line.apart
            cells["from first"] = f"{mean:+.4f}" + ("" if error is None else f" ± {error:.4f}")
        cells["exact"] = "-" if line.exact is None else f"{100 * line.exact:.1f} %"
        cells["M tokens"] = f"{line.tokens / 1e6:.2f}"
        if line.teacher_tokens is not None:
            cells["dense M"] = f"{line.teacher_tokens / 1e6:.2f}"
        shown.append(cells | {"seconds": f"{line.seconds:.0f}"})
    return shown


def write(job_: Job, results: Sequence[Result], text: str) -> None:
    """compare.json: every result without its windows; compare.txt: the table."""
    if not processes.is_first():
        return
    plain = []
    for result in results:
        fields = dataclasses.asdict(result)
        plain.append({k: v for k, v in fields.items() if not k.endswith("windows")})
    files.write_json(job_.out / compared.COMPARE, plain)
    files.write_text(job_.out / "compare.txt", text + "\n")

"""The table of a run: every model measured the same way, once."""

import dataclasses
import functools
import logging
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from e3jax import files, job, processes
from e3jax.evaluate import answers, grading, intervals, lm_eval, load
from e3jax.evaluate.behaviour import Decile, deciles, make_tokens
from e3jax.evaluate.exact import solve
from e3jax.evaluate.figures import make_figures
from e3jax.evaluate.rows import Row, beside
from e3jax.job import Job
from e3jax.models import decoder
from e3jax.models.decoder import Batch, Params
from e3jax.training.metrics import read_metrics

log = logging.getLogger(__name__)

SAMPLES = 8  # problems whose answers are shown side by side


def measure_dense(job_: Job) -> Row:
    """Figures of the dense model; kept on disk, measured once."""
    everything = tuple(range(job_.cfg.num_layers))
    return _once(job_, "dense", everything, lambda: job_.params, {"keep": list(everything)}, 0)


def measure(job_: Job, model: str, mask: Any, raw: Callable[[], Params]) -> Row:
    """Figures of what a mask leaves, nothing trained, as `raw` makes it; measured once."""
    inputs = {"keep": list(mask.keep)} | ({"merges": mask.merges} if mask.merges else {})
    return _once(job_, model, mask.keep, raw, inputs, mask.tokens)


def measure_student(
    job_: Job, model: str, student: Callable[[], Params], mask: Any, stage: str
) -> Row:
    """Figures of a recovered model, which is asked for where it was not measured before."""
    inputs = files.read_json(job_.out / stage / "checkpoints" / "inputs.json")
    recipe = job_.run.distill
    tokens = mask.tokens + job_.train.filled(recipe.fit) + int(_spent(job_.out / stage))
    return _once(job_, model, mask.keep, student, {"stage": inputs, "of": recipe.facts()}, tokens)


def borrow(out: pathlib.Path, lender: pathlib.Path, row: Row) -> None:
    """Gives the run folder `out` what was measured of a row in another run folder of its model, in
    place of what is there of other settings."""
    if not processes.is_first():
        return

    def text(folder: pathlib.Path, kind: str) -> str | None:
        path = beside(folder / "evaluate", row.model, kind)
        return path.read_text(encoding="utf-8") if path.exists() else None

    marks = "json", "tasks.json"
    if all(text(out, kind) == text(lender, kind) for kind in marks):
        return
    kinds = "answers.jsonl", "windows.json", "deciles.json", "experts.json"
    for kind in (*marks, *kinds):
        beside(out / "evaluate", row.model, kind).unlink(missing_ok=True)
    for kind in (*kinds, *marks):  # the last ones say that the others are there
        source = beside(lender / "evaluate", row.model, kind)
        if source.exists():
            with open(source, encoding="utf-8") as lines:
                files.write_text(beside(out / "evaluate", row.model, kind), lines)


def windows(job_: Job, row: Row) -> list[list[float]]:
    """KL and tokens of each window that a row was measured on, sums."""
    path = beside(job_.out / "evaluate", row.model, "windows.json")
    return processes.from_first(lambda: files.read_json(path))


def _spent(stage: pathlib.Path) -> float:
    return sum(line.get("tokens", 0.0) for line in read_metrics(stage))


def _once(
    job_: Job, model: str, keep: Sequence[int], params: Any, inputs: dict[str, Any], tokens: int
) -> Row:
    """Measures a model unless its file is there, made from the same model, data and settings."""
    spec = dataclasses.asdict(job_.run.evaluate)
    tasks, folder = spec.pop("tasks"), spec.pop("task_path")
    path = beside(job_.out / "evaluate", model, "json")
    facts = job_.inputs(
        **inputs,
        evaluate=spec,
        measured=job_.measured.fingerprint,
        test=files.fingerprint(job_.problems) if job_.run.data.test else None,
        deciles=10,
        **grading.facts(job_.run.evaluate),
    )
    made = functools.cache(params)  # at most once, for both
    subject = job_.inputs(**inputs)
    measured = job.once(
        path, facts, lambda: _measure(job_, model, keep, made(), tokens, path, subject)
    )
    if not tasks:
        return Row(**measured)

    def figures() -> dict[str, dict[str, float]]:
        batch, cfg = job.rows_per_batch(spec["batch"]), job_.cfg.take_layers(keep)
        subject = lm_eval.Subject(
            cfg, made(), job_.tokenizer, job_.eos, job_.dtype, batch, job_.run.seed
        )
        return lm_eval.figures(subject, tasks, folder)

    facts = job_.inputs(**inputs, **lm_eval.facts(tasks, folder))
    found = job.once(beside(path.parent, model, "tasks.json"), facts, figures)
    return Row(**measured | {"tasks": metrics(found)})


def metrics(found: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """`task metric` of what the harness gave, without standard errors."""
    return {
        f"{task} {name.removesuffix(',none')}": value
        for task, values in found.items()
        for name, value in values.items()
        if "_stderr" not in name and name != "sample_len"
    }


def _measure(
    job_: Job,
    model: str,
    keep: Sequence[int],
    student: Params,
    tokens: int,
    path: pathlib.Path,
    subject: dict[str, Any],
) -> dict[str, Any]:
    """The fields of a Row; every answer, every window's KL and tokens, and the figures by the dense
    model's entropy go to files beside."""
    begun, spec, cfg = time.monotonic(), job_.run.evaluate, job_.cfg.take_layers(keep)
    if processes.is_first():
        path.unlink(missing_ok=True)  # a row of other settings: its answers are about to go
    tokens_of = make_tokens(job_.cfg, cfg, dtype=job_.dtype, chunk=job_.run.distill.chunk)
    each = tokens_of(job_.params, student, _measured(job_))
    found = each.figures()
    loads: dict[int, list[int]] = {}
    if cfg.experts is not None and len(cfg.dense) < cfg.num_layers:
        loads = load.make_loads(cfg, dtype=job_.dtype)(student, _measured(job_))
    right: list[int] = []
    if job_.run.data.test:
        right = solve(
            student,
            cfg,
            job_.problems,
            job_.tokenizer,
            dataclasses.replace(spec, batch=job.rows_per_batch(spec.batch)),
            eos=job_.eos,
            dtype=job_.dtype,
            path=path.with_suffix(".answers.jsonl"),
            inputs=subject,
        )
    row = Row(
        model=model,
        layers=cfg.num_layers,
        parameters=decoder.count_params(cfg),
        perplexity=found.perplexity,
        kl=found.kl,
        agreement=found.agreement,
        exact_match=sum(right) / spec.samples / len(right) if right else None,
        problems=len(right),
        tokens=tokens,
        samples=spec.samples if spec.temperature > 0 else 0,
        interval=list(intervals.solved(right, spec.samples)) if right else None,
    )
    if processes.is_first():
        files.write_json(path.with_suffix(".windows.json"), each.windows())
        files.write_json(path.with_suffix(".deciles.json"), deciles(each))
        if loads:
            files.write_json(path.with_suffix(".experts.json"), loads)
    log.info("evaluate: %-20s %s  (%.0f s)", model, summary(row), time.monotonic() - begun)
    return dataclasses.asdict(row)


def _measured(job_: Job) -> Iterator[Batch]:
    """The windows of the figures; as many at a time as a forward pass of the recovery has."""
    recipe = job_.run.distill
    return job.ordered(job_.measured, recipe.together)


def summary(row: Row) -> str:
    """The row's main figures in a line."""
    shown = row.shown()
    return f"{row.solved} {shown[row.solved]}  KL {shown['KL']}  perplexity {shown['perplexity']}"


def removal_curve(job_: Job, mask: Any) -> list[dict[str, float]]:
    """KL after each removal in the mask's order, nothing trained: evaluate/removal.json."""

    def make() -> list[dict[str, float]]:
        figures = make_figures(job_.cfg, job_.cfg, dtype=job_.dtype, chunk=job_.run.distill.chunk)
        curve = []
        for count in range(len(mask.order) + 1):
            gone = set(mask.order[:count])
            keep = [i for i in range(job_.cfg.num_layers) if i not in gone]
            found = figures(job_.params, job_.params, _measured(job_), keep)
            curve.append({"removed": count, "kl": found.kl, "perplexity": found.perplexity})
        return curve

    facts = job_.inputs(order=mask.order, measured=job_.measured.fingerprint)
    return job.once(job_.out / "evaluate" / "removal.json", facts, make)


def render(rows: Sequence[Row]) -> str:
    """The table as aligned text."""
    return align([row.shown() for row in rows])


def align(rows: Sequence[Mapping[str, str]]) -> str:
    """Rows of named cells as text, the first column to the left, the others to the right."""
    cells = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for line in cells:
        first, *others = (
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        lines.append("  ".join([first, *others]).rstrip())
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(lines)


def write(folder: pathlib.Path, rows: Sequence[Row]) -> None:
    """results.json and results.txt."""
    if processes.is_first():
        files.write_json(folder / "results.json", [dataclasses.asdict(row) for row in rows])
        files.write_text(folder / "results.txt", render(rows) + "\n")


def write_behaviour(folder: pathlib.Path, rows: Sequence[Row]) -> None:
    """behaviour.txt and samples.md, from what lies beside the rows, of which the dense model's is
    the first. folder: `evaluate`."""
    text = "KL by tenths of the tokens, those the dense model is surest of first\n"
    text += align([_by_decile(folder, row) for row in rows])
    if loads := [found for row in rows if (found := _loads(folder, row))]:
        text += "\n\nexperts: the busiest of a layer, in even shares, and those sent nothing\n"
        text += align(loads)
    if rows[0].problems:
        given = {row.model: answers.read(folder, row) for row in rows}
        dense, *others = rows
        lines = [_flipped(other, given[dense.model], given[other.model]) for other in others]
        text += "\n\nanswers beside the dense model's"
        text += f", the first of {dense.samples} to each problem\n" if dense.samples else "\n"
        text += align(lines)
        files.write_text(folder / "samples.md", answers.samples(given, SAMPLES))
    files.write_text(folder / "behaviour.txt", text + "\n")


def read_deciles(folder: pathlib.Path, row: Row) -> list[Decile]:
    """A row's figures by the dense model's entropy; folder: `evaluate`."""
    path = beside(folder, row.model, "deciles.json")
    return [Decile(**fields) for fields in files.read_json(path)]


def _loads(folder: pathlib.Path, row: Row) -> dict[str, str]:
    """How a row's model spreads tokens over experts; empty where it has none."""
    path = beside(folder, row.model, "experts.json")
    return {"model": row.model} | load.summary(files.read_json(path)) if path.exists() else {}


def _by_decile(folder: pathlib.Path, row: Row) -> dict[str, str]:
    found = read_deciles(folder, row)
    return {"model": row.model} | {str(n): f"{x.kl:z.4f}" for n, x in enumerate(found, 1)}


def _flipped(row: Row, dense: Sequence[Any], theirs: Sequence[Any]) -> dict[str, str]:
    found = answers.flips(dense, theirs)
    return {
        "model": row.model,
        "right in both": str(found.both),
        "lost": str(found.lost),
        "gained": str(found.gained),
        "wrong, another": str(found.another),
        "wrong, the same": str(found.same),
    }

"""The table of a run: every model measured the same way, once."""

import dataclasses
import json
import logging
import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

from e3jax import files, job, processes
from e3jax.evaluate.exact import Answer, solve
from e3jax.evaluate.figures import make_figures
from e3jax.job import Job
from e3jax.models import decoder
from e3jax.models.decoder import Batch, Params
from e3jax.training.metrics import read_metrics

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Row:
    """One model's figures."""

    model: str
    layers: int
    parameters: int
    perplexity: float
    kl: float  # KL(dense || model), nats a token
    agreement: float  # top-1, share of tokens
    exact_match: float | None  # share of problems, None without test problems
    problems: int
    tokens: int  # spent to get here, by masked or student models

    def shown(self) -> dict[str, str]:
        """The row as text, for tables."""
        exact = "-" if self.exact_match is None else f"{100 * self.exact_match:.1f} %"
        return {
            "model": self.model,
            "layers": str(self.layers),
            "parameters": f"{self.parameters / 1e6:,.1f} M",
            "exact match": exact,
            "KL": f"{self.kl:.4f}",
            "top-1": f"{100 * self.agreement:.1f} %",
            "perplexity": f"{self.perplexity:.3f}",
            "tokens": f"{self.tokens / 1e6:,.2f} M",
        }


def measure(job_: Job, model: str, keep: Sequence[int], tokens: int) -> Row:
    """Figures of layers `keep` of the dense model; kept on disk, measured once."""

    def params() -> Params:
        whole = len(keep) == job_.cfg.num_layers
        return job_.params if whole else decoder.take_layers(job_.params, keep)

    return _once(job_, model, keep, params, {"keep": list(keep)}, tokens)


def measure_student(job_: Job, model: str, student: Params, mask: Any, stage: str) -> Row:
    """Figures of a recovered model."""
    inputs = files.read_json(job_.out / stage / "checkpoints" / "inputs.json")
    recipe = job_.run.distill
    tokens = mask.tokens + int(_spent(job_.out / stage))
    return _once(job_, model, mask.keep, lambda: student, {"stage": inputs, "of": recipe}, tokens)


def _spent(stage: pathlib.Path) -> float:
    return sum(line.get("tokens", 0.0) for line in read_metrics(stage))


def _once(
    job_: Job, model: str, keep: Sequence[int], params: Any, inputs: dict[str, Any], tokens: int
) -> Row:
    """Measures a model unless its file is there, made from the same model, data and settings."""
    spec = job_.run.evaluate
    path = job_.out / "evaluate" / f"{model.replace(' ', '-')}.json"
    facts = job_.inputs(
        **inputs,
        evaluate=spec,
        measured=job_.measured.fingerprint,
        test=files.fingerprint(job_.problems) if job_.run.data.test else None,
    )
    return Row(**job.once(path, facts, lambda: _measure(job_, model, keep, params(), tokens, path)))


def _measure(
    job_: Job, model: str, keep: Sequence[int], student: Params, tokens: int, path: pathlib.Path
) -> dict[str, Any]:
    """The fields of a Row; every answer goes to a file beside `path`."""
    begun, spec, cfg = time.monotonic(), job_.run.evaluate, job_.cfg.take_layers(keep)
    figures = make_figures(job_.cfg, cfg, dtype=job_.dtype, chunk=job_.run.distill.chunk)
    found = figures(job_.params, student, _measured(job_))
    answers: list[Answer] = []
    if job_.run.data.test:
        answers = solve(
            student,
            cfg,
            job_.problems,
            job_.tokenizer,
            dataclasses.replace(spec, batch=job.rows_per_batch(spec.batch)),
            eos=job_.eos,
            dtype=job_.dtype,
        )
    row = Row(
        model=model,
        layers=cfg.num_layers,
        parameters=decoder.count_params(cfg),
        perplexity=found.perplexity,
        kl=found.kl,
        agreement=found.agreement,
        exact_match=sum(a.correct for a in answers) / len(answers) if answers else None,
        problems=len(answers),
        tokens=tokens,
    )
    if processes.is_first():
        lines = [json.dumps(dataclasses.asdict(a) | {"correct": a.correct}) for a in answers]
        files.write_text(path.with_suffix(".answers.jsonl"), "\n".join(lines) + "\n")
    log.info("evaluate: %-20s %s  (%.0f s)", model, summary(row), time.monotonic() - begun)
    return dataclasses.asdict(row)


def _measured(job_: Job) -> Iterator[Batch]:
    """The windows of the figures; as many at a time as a forward pass of the recovery has."""
    recipe = job_.run.distill
    return job.ordered(job_.measured, recipe.together)


def summary(row: Row) -> str:
    """The row's main figures in a line."""
    shown = row.shown()
    return f"exact match {shown['exact match']}  KL {shown['KL']}  perplexity {shown['perplexity']}"


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
    cells = [list(rows[0].shown()), *(list(row.shown().values()) for row in rows)]
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

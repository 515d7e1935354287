"""What a report says about a run, gathered from its folder. Reads files alone: no jax, no device.

What is not on record is None, or missing from a list; nothing is made up for it.
"""

import collections
import contextlib
import dataclasses
import hashlib
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from e3jax import files
from e3jax.errors import UserError
from e3jax.evaluate import answers, compared, intervals, rows, speed
from e3jax.evaluate.compared import Line, Result
from e3jax.evaluate.rows import Row
from e3jax.evaluate.speed import Speed
from e3jax.hf import families
from e3jax.hf.aside import RECORD
from e3jax.models.params import count_params
from e3jax.report import records
from e3jax.training.metrics import read_metrics

SAMPLES = 12  # problems shown


@dataclasses.dataclass(frozen=True)
class Figure:
    """A row of the table, with how sure it is."""

    row: Row
    exact: Sequence[float] | None  # 95 % interval of the share
    kl_error: float | None  # standard error over windows, nats a token
    windows: list[list[float]]  # KL and tokens of each, sums


@dataclasses.dataclass(frozen=True)
class Sample:
    """A problem and what models answer to it."""

    number: int  # from 1
    prompt: str
    expected: str
    turned: str  # "lost", "gained", "" : the recovered model beside the dense one
    answers: list[tuple[str, dict[str, Any]]]  # by model


@dataclasses.dataclass(frozen=True)
class Cost:
    """A stage, all work on it together."""

    stage: str
    pieces: int  # of work on record: several a stage, more after a restart
    seconds: float
    device_seconds: float
    device_bytes: int | None
    host_bytes: int | None
    tokens: int | None  # through masked or student models
    teacher_tokens: int | None
    where: str  # devices


@dataclasses.dataclass(frozen=True)
class Export:
    """An exported folder."""

    folder: str
    bytes: int
    identity: str  # as files.checkpoint_hash has it
    files: list[tuple[str, int, str | None]]  # name, bytes, sha256 of what is not too large


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What `compare` found."""

    results: list[Result]
    dense: Row | None
    raw: list[Line]
    recovered: list[Line]  # empty where nothing was


@dataclasses.dataclass(frozen=True)
class Training:
    """What `train` has done so far."""

    steps: int
    tokens: int
    perplexity: list[tuple[int, float]]  # held out, after so many steps
    parameters: int | None  # of its export
    scratch: bool  # from random initialisation


@dataclasses.dataclass(frozen=True)
class Facts:
    """All about a run, a comparison or a training."""

    out: pathlib.Path
    name: str
    configuration: dict[str, Any]
    kept: records.Kept | None
    figures: list[Figure]
    flips: list[tuple[str, answers.Flips]]
    samples: list[Sample]
    costs: list[Cost]
    versions: list[str]
    dense: str | None  # hash of the dense checkpoint
    exports: list[Export]
    speed: Speed | None
    comparison: Comparison | None
    training: Training | None

    @property
    def kinds(self) -> list[str]:
        """What was done in the folder: `compare`, `train`, `run` or a stage of it."""
        done = {
            "compare": self.comparison is not None,
            "train": self.training is not None,
            "run": self.kept is not None or bool(self.figures),
        }
        return [kind for kind, found in done.items() if found] or ["run"]

    @property
    def baselines(self) -> list[str]:
        """Stages that are not of ours."""
        return [stage for stage in records.recoveries(self.out) if stage != "distill"]

    def figure(self, kind: str) -> Figure | None:
        """The dense model's figures, or ours, `raw` or `recovered`."""
        place = ("dense", "raw", "recovered").index(kind)
        found = self.figures[place] if len(self.figures) > place else None
        return found if found and found.row.model.endswith(kind) else None


@contextlib.contextmanager
def understood(out: pathlib.Path) -> Iterator[None]:
    """Raises UserError for records of the run folder `out` that are not what they should be."""
    try:
        yield
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{out}: a record there is damaged or of another version of e3jax "
            f"({type(error).__name__}: {error}); give the run's command again"
        ) from error


def read(out: pathlib.Path) -> Facts:
    """All that the run folder `out` tells. Raises UserError where it is none, or is damaged."""
    if not (out / "run.json").is_file():
        raise UserError(f"{out}: not a run of e3jax: there is no run.json; expected a run's folder")
    with understood(out):
        mask, comparison = records.kept(out), _comparison(out)
        figures = [_figure(out, row) for row in rows.read(out / "evaluate")]
        given = {f.row.model: answers.read(out / "evaluate", f.row) for f in figures}
        whole = {model: found for model, found in given.items() if found}
        return Facts(
            out=out,
            name=out.resolve().name,
            configuration=records.configuration(out),
            kept=mask,
            figures=figures,
            flips=_flips(figures, whole),
            samples=_samples([f.row.model for f in figures[:3]], whole),
            costs=_costs(out, mask, comparison),
            versions=_versions(out),
            dense=_dense(out, mask, comparison),
            exports=[e for name in ("export", "export-raw") if (e := _export(out / name))],
            speed=speed.read(out / "bench"),
            comparison=comparison,
            training=_training(out),
        )


def _comparison(out: pathlib.Path) -> Comparison | None:
    results = compared.read(out)
    if not results:
        return None
    raw, recovered = (compared.lines(results, state) for state in compared.STATES)
    return Comparison(results, compared.read_dense(out), raw, recovered)


def _training(out: pathlib.Path) -> Training | None:
    lines = read_metrics(out / "train")
    if not lines:
        return None
    export, key = out / "export" / "config.json", "held_out_perplexity"
    written = (out / "export" / RECORD).is_file()
    return Training(
        steps=max((line["step"] + 1 for line in lines if "loss" in line), default=0),
        tokens=_spent(lines),
        perplexity=[(line["step"], line[key]) for line in lines if key in line],
        parameters=count_params(families.read_config(export)) if written else None,
        scratch=records.configuration(out)["train"]["config"] is not None,
    )


def _figure(out: pathlib.Path, row: Row) -> Figure:
    windows = records.value(rows.beside(out / "evaluate", row.model, "windows.json")) or []
    exact = row.interval
    if exact is None and row.exact_match is not None:  # of an older version
        exact = intervals.wilson(round(row.exact_match * row.problems), row.problems)
    error = intervals.mean(windows)[1] if windows else None
    return Figure(row, exact, error, windows)


def _flips(
    figures: Sequence[Figure], given: dict[str, list[dict[str, Any]]]
) -> list[tuple[str, answers.Flips]]:
    models = [f.row.model for f in figures if f.row.model in given]
    if models[:1] != ["dense"]:
        return []
    return [(model, answers.flips(given["dense"], given[model])) for model in models[1:]]


def _samples(ours: Sequence[str], given: dict[str, list[dict[str, Any]]]) -> list[Sample]:
    """First what the last of our models turned, then what another did, then the first others."""
    models = [model for model in ours if model in given]
    found = []
    for number, problem in enumerate(zip(*(given[model] for model in models), strict=True), 1):
        before, after = problem[0]["correct"], problem[-1]["correct"]
        turned = "" if before == after else "lost" if before else "gained"
        apart = len({answer["correct"] for answer in problem}) > 1
        sample = Sample(
            number,
            problem[0]["prompt"],
            problem[0]["expected"],
            turned,
            list(zip(models, problem, strict=True)),
        )
        found.append((not turned, not apart, number, sample))
    return [sample for *_, sample in sorted(found, key=lambda x: x[:3])[:SAMPLES]]


def _spent(lines: Sequence[dict[str, Any]]) -> int:
    return int(sum(line.get("tokens", 0.0) for line in lines))


def _costs(
    out: pathlib.Path, mask: records.Kept | None, comparison: Comparison | None
) -> list[Cost]:
    lines = list(files.read_lines(out / files.LEDGER))
    tokens: collections.Counter[str] = collections.Counter()
    teacher: collections.Counter[str] = collections.Counter()
    for stage in (*records.recoveries(out), "train"):
        if spent := _spent(read_metrics(out / stage)):
            tokens[stage] = spent
    if mask is not None and mask.searched:
        tokens["search"] = mask.record.get("tokens", 0)
        teacher["search"] = mask.record.get("teacher_tokens", 0)
    recovered = {}  # selectors that agree share a recovery
    for result in comparison.results if comparison else ():
        tokens[f"choose {result.selector}"] += result.tokens
        teacher[f"choose {result.selector}"] += result.teacher_tokens
        if (row := result.recovered) is not None:
            recovered[result.seed, row.model] = row.tokens
    if recovered:
        tokens["distill"] += sum(recovered.values())
    stages = dict.fromkeys([*(line["stage"] for line in lines), *tokens])
    costs = []
    for stage in stages:
        own = [line for line in lines if line["stage"] == stage]
        kinds = collections.Counter(f"{x['devices']} x {x['kind']}" for x in own)
        costs.append(
            Cost(
                stage=stage,
                pieces=len(own),
                seconds=sum(x["seconds"] for x in own),
                device_seconds=sum(x["seconds"] * x["devices"] for x in own),
                device_bytes=max((x["device_bytes"] or 0 for x in own), default=0) or None,
                host_bytes=max((x["host_bytes"] or 0 for x in own), default=0) or None,
                tokens=tokens.get(stage),
                teacher_tokens=teacher.get(stage),
                where=", ".join(kinds),
            )
        )
    return costs


def _versions(out: pathlib.Path) -> list[str]:
    """What the run ran on, each once."""
    found = []
    for line in files.read_lines(out / files.LEDGER):
        commit = f", commit {line['commit']}" if line["commit"] else ""
        found.append(
            f"e3jax {line['e3jax']}{commit}, jax {line['jax']}, Python {line['python']}, "
            f"{line['devices']} x {line['kind']} in {line['processes']} process(es)"
        )
    return list(dict.fromkeys(found))


def _dense(
    out: pathlib.Path, mask: records.Kept | None, comparison: Comparison | None
) -> str | None:
    for stage in ("distill", "train"):
        if recipe := records.value(out / stage / "checkpoints" / "inputs.json"):
            return recipe.get("model")
    record = mask.record if mask else None
    if record is None and comparison is not None:
        record = records.value(compared.mask_file(out, comparison.results[0]))
    return record.get("checkpoint") if record else None


def _export(folder: pathlib.Path) -> Export | None:
    if not (folder / RECORD).is_file():
        return None
    found = []
    for path in sorted(p for p in folder.iterdir() if p.is_file()):
        size, digest = path.stat().st_size, None
        if size <= files.SAMPLED_ABOVE:
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        found.append((path.name, size, digest))
    total = sum(size for _, size, _ in found)
    return Export(folder.name, total, files.checkpoint_hash(folder), found)

"""The commands: which stages run, in order, and what is printed at the end."""

import dataclasses
import functools
import logging
import pathlib
import time
from collections.abc import Callable, Sequence

import jax

from e3jax import (
    __version__,
    choice,
    comparison,
    config,
    files,
    job,
    ledger,
    outputs,
    plain,
    processes,
    recovery,
    rehearsal,
    sweep,
    target,
    teaching,
)
from e3jax.errors import Diverged
from e3jax.evaluate import grading, lm_eval, table
from e3jax.hf import families, folders, hub
from e3jax.job import Job
from e3jax.mask import Mask, read_mask, warn_of_other
from e3jax.models import decoder
from e3jax.models.config import ModelConfig
from e3jax.models.decoder import Params
from e3jax.planning import budget, ranking
from e3jax.planning import plan as planning
from e3jax.planning.chips import Topology
from e3jax.progress import log_file
from e3jax.report import page, pictures

log = logging.getLogger(__name__)


def execute(command: str, run: config.Run, *, dry_run: bool = False) -> None:
    """Runs a command of the command line. Raises UserError for anything the user can put right."""
    if dry_run:
        print(_plan_text(command, run))
        return
    versions = f"e3jax {__version__}, jax {jax.__version__}"
    with (
        job.open_mesh(run.mesh),
        job.claim_folder(run) as out,
        log_file(out, f"{command}: {versions}"),
    ):
        job.keep_compiled(out)
        if command == "train":
            plain.train(run, out)
            return
        begun = processes.from_first(lambda: [(out / x).exists() for x in ("search", "distill")])
        if not any(begun) and command in ("run", "search", "distill", "compare", "sweep"):
            searched = run.distill.mask is None or command == "search"
            job.check_batches(run, search=searched, distill=command != "search")  # before it all
            if command != "search":
                teaching.check_free(run, out)
        path, run = _targeted(run, command)
        planned = _budget(run, command, path)
        job_ = job.open_job(run)
        log.info("%s", _describe_model(job_))
        if command in ("run", "evaluate", "compare", "sweep"):
            # What is wrong with them is told before the training.
            _ = job_.problems, job_.measured, grading.facts(run.evaluate)
            if run.evaluate.tasks:
                lm_eval.known(run.evaluate.tasks, run.evaluate.task_path)
        job.record(run, out)
        several = command == "sweep"  # runs
        with ledger.stage(out, "rehearsal"):
            rehearsal.before(
                run,
                out,
                tokens=planned.tokens,
                layers=job_.cfg.num_layers,
                play=functools.partial(rehearsal.play, job_, "run" if several else command),
            )
        with job.boards(run, out):
            COMMANDS[command](job_)
        if not several and processes.is_first():
            pictures.draw(out)
            page.write([out], out / page.REPORT)
            print(f"report: {out}/{page.REPORT}")


def _plan_text(command: str, run: config.Run) -> str:
    if command == "train":
        cfg = families.read_config(plain.architecture(run))
        job.check_window(run, cfg)
        return (
            f"train: {cfg.num_layers} layers, {decoder.count_params(cfg):,} parameters, "
            f"<= {plain.tokens(run):,} tokens"
        )
    path, run = _targeted(run, command)
    cfg = families.read_config(path)
    runs = sweep.runs(run, cfg) if command == "sweep" else [run]
    text = "\n".join(
        f"{each.model.path} ({cfg.family}) -> {each.out}\n"
        f"{budget.describe(_budget(each, command, path))}"
        for each in runs
    )
    if command != "compare":
        return text
    choices = len(run.compare.selectors) * len(run.compare.seeds)
    return f"{text}\n  compare          {choices} choices, each at most that much"


def _targeted(run: config.Run, command: str) -> tuple[pathlib.Path, config.Run]:
    """The model's config.json, and the run with search.keep for search.target; of a sweep with the
    most layers."""
    path = hub.resolve_config(run.model.path, run.model.revision)
    if command == "sweep":
        most = sweep.runs(run, families.read_config(path))[0].search
        return path, dataclasses.replace(run, search=most)
    dtype = functools.partial(folders.planned_dtype, path)
    return path, target.resolve(run, families.read_config(path), dtype)


def _budget(run: config.Run, command: str, path: pathlib.Path) -> budget.Budget:
    """What the run will take, from the config.json `path` and a given mask alone."""
    cfg = families.read_config(path)
    job.check_window(run, cfg)
    return budget.make_budget(_resolved(run, cfg, command), cfg, folders.planned_dtype(path))


def _resolved(run: config.Run, cfg: ModelConfig, command: str) -> config.Run:
    """The run with search.keep as a given mask has it, and without a mask that is not used."""
    given = _given_mask(run, cfg.num_layers)
    if given is None or command in ("search", "compare", "sweep"):
        return dataclasses.replace(run, distill=dataclasses.replace(run.distill, mask=None))
    return _with_given(run, given)


def _with_given(run: config.Run, given: Mask) -> config.Run:
    """The run with as many layers as a given mask keeps, of which none was fixed."""
    spec = dataclasses.replace(run.search, keep=len(given.keep), protect=(), force=())
    return dataclasses.replace(run, search=spec)


def plan(run: config.Run, topology: Topology, *, search_mesh: bool = False) -> bool:
    """Whether the run fits the topology, which need not be there; prints and saves all of it.

    The files are plan-TOPOLOGY.json and .txt in the run folder. Raises UserError.
    """
    path, run = _targeted(run, "run")
    cfg, dtype = families.read_config(path), folders.planned_dtype(path)
    job.check_window(run, cfg)
    with job.claim_folder(run) as out:
        run = _resolved(run, cfg, "run")
        begun, measured = time.monotonic(), None
        if search_mesh:
            choice = ranking.search_mesh(run, cfg, dtype, topology, log.info)
            run, measured = choice.apply(run), choice.compiled
        found = planning.make_plan(run, cfg, dtype, topology, measured)
        said = f"{run.model.path} ({cfg.family}) on {planning.describe(found)}"
        if search_mesh:
            verdict = "the fastest that fits" if found.fits else "the nearest to fitting"
            said += f"\n{verdict}: {choice.overrides}"
        name = f"plan-{topology.text.replace(':', '-')}"
        files.write_json(out / f"{name}.json", planning.as_json(found))
        files.write_text(out / f"{name}.txt", said + "\n")
        print(f"{said}\n{out}/{name}.json, in {time.monotonic() - begun:.0f} s")
    return found.fits


def _describe_model(job_: Job) -> str:
    cfg, devices = job_.cfg, jax.devices()
    return (
        f"{job_.run.model.path}: {cfg.family}, {cfg.num_layers} layers, "
        f"{decoder.count_params(cfg):,} parameters; {len(devices)} x {devices[0].device_kind}"
    )


# ---------------------------------------------------------------- commands


def search(job_: Job) -> None:
    """Stage 1 alone."""
    with ledger.stage(job_.out, "search"):
        mask = choice.search_mask(job_)
    print(f"kept {list(mask.keep)}  held-out KL {mask.kl:.4f}  {job_.out}/search/mask.json")


def distill(job_: Job) -> None:
    """Stage 2 alone, of this run's mask or a given one."""
    _recover(job_, _mask(job_), "distill")


def export(job_: Job) -> None:
    """The recovered model as a Hugging Face folder, and the raw one where asked for."""
    mask = _mask(job_)
    student = _recover(job_, mask, "distill")
    if job_.run.export.raw:
        _export_raw(job_, mask)
    _export(job_, mask, student, "export")


def evaluate(job_: Job) -> None:
    """All models of the run in one table."""
    _evaluate(job_, _mask(job_))


def run_all(job_: Job) -> None:
    """search, distill, evaluate, export."""
    _, _, rows = _whole(job_)
    print(table.render(rows))
    print(f"\npruned and recovered: {job_.out}/export   pictures: {job_.out}/plots")
    if rows[0].problems:
        print(f"answers side by side: {job_.out}/evaluate/samples.md")


def _whole(job_: Job) -> tuple[Mask, Params, list[table.Row]]:
    mask = _mask(job_)
    student, rows = _evaluate(job_, mask)
    if job_.run.export.raw:
        _export_raw(job_, mask, rows)
    _export(job_, mask, student, "export", rows)
    return mask, student, rows


def sweep_all(job_: Job) -> None:
    """The whole job for several numbers of layers."""
    points = sweep.sweep(job_, _whole)
    sweep.write(job_.out, points)
    print(f"{sweep.shown(points)}\n\nexports: {job_.out}/keep-*/export   picture: {job_.out}/plots")


def compare(job_: Job) -> None:
    """Selectors against each other, raw and recovered, over seeds."""
    results, dense = comparison.compare(job_)
    text = f"dense: {table.summary(dense)}\n\n{comparison.summary(results)}"
    comparison.write(job_, results, text)
    print(f"{text}\n\neach result: {job_.out}/compare.json   picture: {job_.out}/plots")


COMMANDS: dict[str, Callable[[Job], None]] = {
    "run": run_all,
    "search": search,
    "distill": distill,
    "export": export,
    "evaluate": evaluate,
    "compare": compare,
    "sweep": sweep_all,
}


def _export_raw(job_: Job, mask: Mask, rows: Sequence[table.Row] = ()) -> None:
    _export(job_, mask, recovery.survivors(job_, mask), "export-raw", rows)


def _export(
    job_: Job, mask: Mask, params: Params, name: str, rows: Sequence[table.Row] = ()
) -> None:
    with ledger.stage(job_.out, "export"):
        recovered = name == "export"
        outputs.export(job_, mask, params, job_.out / name, recovered=recovered, rows=rows)


def _recover(job_: Job, mask: Mask, stage: str) -> Params:
    with ledger.stage(job_.out, stage):
        return recovery.recover(job_, mask, job_.out / stage)


def _mask(job_: Job) -> Mask:
    """The mask file of the configuration, or this run's own search."""
    given = _given_mask(job_.run, job_.cfg.num_layers)
    if given is None:
        with ledger.stage(job_.out, "search"):
            return choice.search_mask(job_)
    warn_of_other(given, job_.identity)
    # Figures are kept by the selector's name, and a baseline's is taken.
    taken = given.selector in job_.run.evaluate.baselines
    mask = dataclasses.replace(given, selector="given") if taken else given
    if processes.is_first():
        files.write_json(job_.out / "distill" / "mask.json", mask)  # the file may go
    return mask


def _given_mask(run: config.Run, num_layers: int) -> Mask | None:
    if run.distill.mask is None:
        return None
    return read_mask(pathlib.Path(run.distill.mask).expanduser(), num_layers)


def _evaluate(job_: Job, mask: Mask) -> tuple[Params, list[table.Row]]:
    """Recovers and measures dense, raw and recovered models, ours and the baselines', one after the
    other; ours, recovered, and all rows.

    What needs no training is measured first: a mistake in the evaluation is told before it. While a
    baseline is trained ours is on the disk alone.
    """
    with ledger.stage(job_.out, "evaluate"):
        dense = table.measure_dense(job_)
    rows = [dense, _raw_row(job_, mask)]
    searched = job_.run.distill.mask is None
    rival = job_ if searched else job_.having(run=_with_given(job_.run, mask))
    student: Params | None = _recover(job_, mask, "distill")
    rows.append(_recovered_row(job_, student, mask, "distill"))
    for name in job_.run.evaluate.baselines:
        student = None
        with ledger.stage(job_.out, name):
            other = choice.selector_mask(rival, name, len(mask.keep))
        rows.append(_raw_row(job_, other))
        try:
            theirs = _recover(job_, other, name)
        except Diverged as error:  # no reason to leave ours without an export
            log.warning("%s: not recovered: %s", name, error)
            continue
        rows.append(_recovered_row(job_, theirs, other, name))
        del theirs
    if job_.run.evaluate.loss_curve:
        with ledger.stage(job_.out, "evaluate"):
            table.removal_curve(job_, mask)
    table.write(job_.out / "evaluate", rows)
    if processes.is_first():
        table.write_behaviour(job_.out / "evaluate", rows)
    if student is None:
        student = _recover(job_, mask, "distill")  # read back
    return student, rows


def _raw_row(job_: Job, mask: Mask) -> table.Row:
    name = f"{mask.selector} raw"
    with ledger.stage(job_.out, "evaluate"):
        return table.measure(job_, name, mask, lambda: recovery.survivors(job_, mask))


def _recovered_row(job_: Job, student: Params, mask: Mask, stage: str) -> table.Row:
    name = f"{mask.selector} recovered"
    with ledger.stage(job_.out, "evaluate"):
        return table.measure_student(job_, name, lambda: student, mask, stage)

"""`sweep`: the whole job for several numbers of layers, and what quality costs in speed.

From the most layers to the fewest, each in a run folder of its own, OUT/keep-K. Model, data, the
dense model's figures and a stored teacher are shared. The first search begins at the importance of
the layers, each other one where the one before ended (`search.start`): so the importance is
measured once, and a mask's tokens are those of the searches before it too. All of it is kept, so
the command is restartable; fewer layers may be added later, while more would change what follows.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence

import jax

from e3jax import config, files, job, ledger, processes
from e3jax.errors import UserError
from e3jax.evaluate import intervals, pace, table
from e3jax.evaluate.pace import Pace
from e3jax.evaluate.rows import Row
from e3jax.job import Job
from e3jax.mask import Mask
from e3jax.models.config import ModelConfig
from e3jax.models.decoder import Params
from e3jax.report import page, pictures
from e3jax.search.search import fixed_layers, resolve_keep

# A whole run: what it kept, our recovered model, the table.
Work = Callable[[Job], tuple[Mask, Params, list[Row]]]


@dataclasses.dataclass(frozen=True)
class Point:
    """A model of the sweep."""

    row: Row
    kl_error: float | None  # standard error over windows, nats a token
    speed: Pace


def runs(run: config.Run, cfg: ModelConfig) -> list[config.Run]:
    """The configuration of each run, the most layers first; `search.start` apart.

    Raises UserError for a number of layers that the model, `protect` or `force` does not allow.
    """
    if run.search.target != config.Target():
        raise UserError(
            "search.target says how many layers stay, and sweep.keep too; give one of them"
        )
    counts = {resolve_keep(keep, cfg.num_layers, "sweep.keep") for keep in run.sweep.keep}
    found = []
    for keep in sorted(counts, reverse=True):
        spec = dataclasses.replace(run.search, keep=keep)
        fixed_layers(spec, cfg.num_layers)
        recipe = dataclasses.replace(run.distill, mask=None)
        if recipe.teacher == "cache" and recipe.cache is None:
            recipe = dataclasses.replace(recipe, cache=f"{run.out}/teacher")
        out = f"{run.out}/keep-{keep}"
        found.append(dataclasses.replace(run, out=out, search=spec, distill=recipe))
    return found


def sweep(job_: Job, work: Work) -> list[Point]:
    """The dense model, and of each number of layers the recovered ones, ours and the baselines'."""
    with ledger.stage(job_.out, "evaluate"):
        dense = table.measure_dense(job_)
    points = [_point(job_, dense, _speed(job_, job_.cfg, lambda: job_.params))]
    if job_.run.distill.teacher == "cache":
        job_.release()  # who needs them reads them, and has them for as long as that takes
    _ = job_.train, job_.held_out  # read for all
    start, outs = job_.run.search.start, []
    for run in runs(job_.run, job_.cfg):
        run = dataclasses.replace(run, search=dataclasses.replace(run.search, start=start))
        here = job_.having(run=run, out=pathlib.Path(run.out).expanduser())
        job.record(run, here.out)
        table.borrow(here.out, job_.out, dense)
        mask, student, rows = work(here)
        found = _speed(here, here.cfg.take_layers(mask.keep), lambda w=student: w)
        del student  # before the next is trained
        points += [_point(here, row, found) for row in rows if row.model.endswith("recovered")]
        if processes.is_first():
            pictures.draw(here.out)
            page.write([here.out], here.out / page.REPORT)
        start = str(here.out / "search" / "mask.json")
        outs.append(here.out)
    if processes.is_first():
        page.write(outs, job_.out / page.REPORT)
    return points


def _point(job_: Job, row: Row, found: Pace) -> Point:
    return Point(row, intervals.mean(table.windows(job_, row))[1], found)


def _speed(job_: Job, cfg: ModelConfig, params: Callable[[], Params]) -> Pace:
    """Measured once on devices of a kind; the baselines of as many layers have ours."""
    devices = [jax.device_count(), jax.devices()[0].device_kind]
    facts = job_.inputs(shape=cfg, devices=devices, mesh=job_.run.mesh)

    def make() -> dict[str, float]:
        return dataclasses.asdict(pace.measure(params(), cfg, dtype=job_.dtype))

    with ledger.stage(job_.out, "speed"):
        return Pace(**job.once(job_.out / "evaluate" / "speed.json", facts, make))


# ---------------------------------------------------------------- the table


def shown(points: Sequence[Point]) -> str:
    """The table as text; intervals are of 95 %."""
    dense, lines = points[0], []
    for point in points:
        row = point.row.shown()
        line = {key: row[key] for key in ("model", "layers", "parameters")}
        line[point.row.solved] = point.row.share(ends=True)
        line["KL"] = row["KL"]
        if point.kl_error is not None:
            line["KL"] += f" \N{PLUS-MINUS SIGN} {intervals.Z_95 * point.kl_error:.4f}"
        line["prefill tok/s"] = f"{point.speed.prefill:,.0f}"
        line["decode tok/s"] = f"{point.speed.decode:,.0f}"
        line["faster"] = f"{point.speed.decode / dense.speed.decode:.2f}x"
        lines.append(line)
    return table.align(lines)


def write(out: pathlib.Path, points: Sequence[Point]) -> None:
    """sweep.json, sweep.txt, the picture with its CSV."""
    if not processes.is_first():
        return
    files.write_json(out / "sweep.json", [dataclasses.asdict(point) for point in points])
    files.write_text(out / "sweep.txt", shown(points) + "\n")
    pictures.draw_sweep(out, points)

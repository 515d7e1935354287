"""e3jax from Python: the whole job as the command line does it, and each stage on arrays.

    model = e3jax.load("demo")
    windows = e3jax.tokenize("demo", "demo/train.jsonl.gz", window=128)
    mask = e3jax.search_mask(model.params, model.cfg, windows, held_out, keep=12)
    student = e3jax.recover(model.params, model.cfg, mask, windows, held_out)
    e3jax.export(student, mask, "demo", "cut", windows)

`**settings` are keys of the configuration (`python run.py run --help` lists them) with Python
values: `seed=1, search={"steps": 60}`, or `**{"search.steps": 60}`. Arrays lie where jax puts them;
under a mesh that is set (`from e3jax.mesh import make_mesh`; `with jax.set_mesh(make_mesh())`, for
all devices) a model is loaded in parts and everything runs on them all. The stages here leave
nothing in a folder and know of no restart, `prune` does. What the user can put right is an
e3jax.UserError.
"""

import contextlib
import dataclasses
import logging
import os
import pathlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax._src import xla_bridge

from e3jax import choice, cli, config, configure, job, notice, outputs, pipeline, recovery
from e3jax.data.windows import Windows, from_arrays
from e3jax.errors import UserError
from e3jax.evaluate import rows, table
from e3jax.evaluate.rows import Row
from e3jax.hf import hub
from e3jax.hf import load as loading
from e3jax.mask import Mask, checked
from e3jax.models import decoder
from e3jax.models.config import ModelConfig
from e3jax.models.decoder import Params
from e3jax.progress import Terminal
from e3jax.report import records

Path = str | os.PathLike[str]
Sources = Path | Mapping[str, Any] | Sequence[Path | Mapping[str, Any]]

SPLIT = {"train": ":-400", "measure": "-400:-200", "held_out": "-200:"}  # rows of one file


class Loaded(NamedTuple):
    """A checkpoint."""

    cfg: ModelConfig
    params: Params  # nested dict of arrays; layers that are alike are stacked on axis 0
    tokenizer: Any  # the fast Hugging Face tokenizer


@dataclasses.dataclass(frozen=True)
class Pruned:
    """What a run gave."""

    keep: tuple[int, ...]  # layers of the dense model, ascending from 0
    rows: tuple[Row, ...]  # of the table: the dense model, ours raw and recovered, then baselines
    export: pathlib.Path  # the Hugging Face folder of the pruned and recovered model
    out: pathlib.Path  # the run folder

    def __str__(self) -> str:
        return f"{table.render(self.rows)}\n\nlayers kept: {list(self.keep)}\n{self.export}"


def prune(
    path: str | None = None,
    /,
    *,
    keep: int | float | None = None,
    data: Path | Mapping[str, Any] | None = None,
    out: Path | None = None,
    config: Path | None = None,
    **settings: Any,
) -> Pruned:
    """The whole job, as `python run.py run`: the same stages, run folder and restart.

    path: of the model, a folder or a hub id. keep: layers that stay, a count, or a share below 1.
    data: the section `data` as a mapping, in which one source may stand for a list and a path for a
      source; or one path, of which the last 200 rows score the search, the 200 before them are for
      the table and all others are trained on. out: the run folder. config: a YAML file that all of
      this and `settings` override.

    Given again (after an interrupt too) it goes on, or reads what is there. Raises UserError for
    bad input, Diverged where training did.
    """
    given = {"model.path": path, "search.keep": keep, "out": out}
    known = {key: value for key, value in given.items() if value is not None}
    run = configure.load_run(config, values=known | {"data": _data(data)} | settings)
    if run.deterministic and "deterministic" not in os.environ.get("XLA_FLAGS", ""):
        _refuse_late()
    cli.prepare_jax(run)
    with _shown(), notice.listen():
        pipeline.execute("run", run)
    folder = pathlib.Path(run.out).expanduser()
    mask = records.kept(folder)
    assert mask is not None  # it was just found
    return Pruned(
        keep=tuple(mask.keep),
        rows=tuple(rows.read(folder / "evaluate")),
        export=folder / "export",
        out=folder,
    )


def _refuse_late() -> None:
    if xla_bridge.backends_are_initialized() and jax.default_backend() == "gpu":
        raise UserError(
            "deterministic=True: jax is at work already; expected it in the first call of a "
            "session, or XLA_FLAGS=--xla_gpu_deterministic_ops=true before it"
        )


def load(path: str, /, *, dtype: Any = None, **settings: Any) -> Loaded:
    """The checkpoint of a folder or a hub id; `demo` is the bundled one.

    dtype: of the parameters; None = as they are stored.
    """
    with _shown():
        opened = job.open_job(_run(settings, {"model.path": path}))
        params = loading.load_params(opened.source, opened.cfg, dtype)
    return Loaded(opened.cfg, params, opened.tokenizer)


def tokenize(path: str, sources: Sources, /, **data: Any) -> Windows:
    """Documents in windows, tokenised as the model at `path` has it and packed.

    sources: a path or hub id, a mapping with the keys of a source such as rows=["0:100"] and path,
    or a list of these. data: the other keys of the section `data`, such as window=128. `windows`
    makes them of arrays.
    """
    run = _run({"model.path": path}, {"data": {"decontaminate": ()} | data})
    read = configure.load_run(None, values={"out": run.out, "data.train": _sources(sources)})
    with _shown():
        folder = hub.resolve(run.model.path)
        return job.tokenize(run, read.data.train, folder, run.data.decontaminate)


windows = from_arrays


def importance(
    params: Params,
    cfg: ModelConfig,
    windows: Windows | np.ndarray,
    /,
    *,
    by: Literal["kl", "shortgpt"] = "kl",
    **settings: Any,
) -> np.ndarray:
    """How much each layer matters: float64 [L].

    windows: `Windows`, or tokens int [M, T]; all of them are used. by: `kl`, nats a token between
    the model and itself without the layer; `shortgpt`, the block influence of arXiv 2403.03853.
    """
    if by not in choice.IMPORTANCE:
        raise UserError(f"by={by!r}: expected one of {', '.join(choice.IMPORTANCE)}")
    with _job(params, cfg, windows, windows, settings) as job_:
        spec = dataclasses.replace(job_.run.search, init_windows=len(job_.train))
        scores, _ = choice.IMPORTANCE[by](
            job_.having(run=dataclasses.replace(job_.run, search=spec))
        )
    return scores


def search_mask(
    params: Params,
    cfg: ModelConfig,
    train: Windows | np.ndarray,
    held_out: Windows | np.ndarray,
    /,
    *,
    keep: int | float | None = None,
    **settings: Any,
) -> Mask:
    """Stage 1: which layers stay. Its `keep` are their numbers, `theta` the logits, L of each.

    train, held_out: `Windows`, or tokens int [M, T], one document each; the search learns of the
    first and is scored on the second. keep: as in `prune`.
    """
    known = {} if keep is None else {"search.keep": keep}
    with _job(params, cfg, train, held_out, known | settings) as job_:
        job.check_batches(job_.run, search=True, distill=False)
        return dataclasses.replace(choice.search_mask(job_), checkpoint=None, config=None)


def recover(
    params: Params,
    cfg: ModelConfig,
    mask: Mask | Sequence[int],
    train: Windows | np.ndarray,
    held_out: Windows | np.ndarray,
    /,
    **settings: Any,
) -> Params:
    """Stage 2: the layers that stay, distilled from the whole model: float32, a model of
    `cfg.take_layers(keep)`.

    params: the dense model's, which stay as they are. mask: a Mask, or the layers kept.
    train, held_out: as in `search_mask`.
    """
    found = _mask(mask, cfg)
    with _job(params, cfg, train, held_out, settings) as job_:
        job.check_batches(job_.run, search=False, distill=True)
        return recovery.recover(job_, found, None)


def export(
    params: Params,
    mask: Mask | Sequence[int],
    path: str,
    out: Path,
    windows: Windows | np.ndarray,
    /,
    *,
    recovered: bool = True,
    **settings: Any,
) -> pathlib.Path:
    """Writes a pruned model as a Hugging Face folder, read back and verified; returns the folder.

    params: of the layers that stay (`recover`, or `take_layers` and recovered=False, which the
    model card then says). path: of the dense checkpoint, whose config.json is cut and whose
    tokenizer goes along. out: a new folder. windows: on which the logits are compared.
    """
    folder = pathlib.Path(out).expanduser()
    with _shown():
        opened = job.open_job(_run(settings, {"model.path": path, "out": folder}))
        found = _mask(mask, opened.cfg)
        wanted = decoder.abstract_params(opened.cfg.take_layers(found.keep))
        shape = jax.tree.map(lambda x: x.shape, params)
        if shape != jax.tree.map(lambda x: x.shape, wanted):
            raise UserError(
                f"params are not those of layers {list(found.keep)} of {path}; expected "
                "`take_layers(params, cfg, keep)`, or what `recover` gave for them"
            )
        probes = _windows(windows, opened.cfg)
        facts = opened.inputs(keep=found.keep, recovered=recovered, by="e3jax.export")
        outputs.write(
            opened.on(probes, probes), found, params, folder, inputs=facts, recovered=recovered
        )
    return folder


# ---------------------------------------------------------------- what they share


def _run(settings: Mapping[str, Any], own: Mapping[str, Any]) -> config.Run:
    """The configuration of a stage: it has no run folder."""
    return configure.load_run(None, values={"out": "."} | dict(settings) | dict(own))


@contextlib.contextmanager
def _job(
    params: Params,
    cfg: ModelConfig,
    train: Windows | np.ndarray,
    held_out: Windows | np.ndarray,
    settings: Mapping[str, Any],
) -> Iterator[job.Job]:
    """The job that a stage is given, in a folder that then goes."""
    both = [_windows(found, cfg) for found in (train, held_out)]
    with _shown(), tempfile.TemporaryDirectory(prefix="e3jax-") as folder:
        run = _run(settings, {"out": folder, "data.window": max(w.tokens.shape[1] for w in both)})
        yield job.in_memory(run, cfg, params, *both)


def _windows(found: Windows | np.ndarray, cfg: ModelConfig) -> Windows:
    made = found if isinstance(found, Windows) else from_arrays(found)
    least, greatest = int(made.tokens.min()), int(made.tokens.max())
    if not 0 <= least <= greatest < cfg.vocab_size:
        raise UserError(
            f"windows: token ids from {least} to {greatest}; the model has 0 to "
            f"{cfg.vocab_size - 1}"
        )
    return made


def _mask(mask: Mask | Sequence[int], cfg: ModelConfig) -> Mask:
    if not isinstance(mask, Mask):
        mask = Mask(cfg.num_layers, tuple(int(layer) for layer in mask))
    return checked(mask, cfg.num_layers, "mask")


def _sources(given: Sources) -> list[Any]:
    """What stands for a list of sources, as the configuration has it."""
    listed = [given] if isinstance(given, str | os.PathLike | Mapping) else given
    return [{"path": str(x)} if isinstance(x, str | os.PathLike) else dict(x) for x in listed]


def _data(given: Path | Mapping[str, Any] | None) -> dict[str, Any]:
    """The section `data`."""
    if given is None:
        return {}
    if isinstance(given, str | os.PathLike):
        return {name: [{"path": str(given), "rows": [part]}] for name, part in SPLIT.items()}
    lists = ("train", "held_out", "test", "measure")
    return {key: _sources(value) if key in lists else value for key, value in given.items()}


@contextlib.contextmanager
def _shown() -> Iterator[None]:
    """Lines of the work go to stderr, as from the command line, unless the logger `e3jax` has a
    handler. (That the root has one says nothing: libraries give it theirs.)"""
    logger, handler = logging.getLogger("e3jax"), Terminal()
    if logger.handlers:
        yield
        return
    level, passes = logger.level, logger.propagate
    logger.setLevel(level or logging.INFO)
    logger.propagate = False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = passes

"""The record of a stage: JSON lines, TensorBoard beside it, Weights & Biases where asked for, and
progress for a person to read."""

import contextlib
import errno
import json
import logging
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from e3jax import files
from e3jax.errors import UserError
from e3jax.progress import Progress

log = logging.getLogger(__name__)

# Of a step, on the terminal.
SHOWN = {"loss": "loss {:.4f}", "kept": "K {:.0f}", "tau": "tau {:.2f}"}

_wandb: Any = None  # the run that is open


class Metrics:
    """Records what a stage measures at each step; only process 0 has one that writes.

    A step has a line with its `loss`; figures measured of the state after n steps have one of their
    own, with step n. folder: gets metrics.jsonl and tensorboard/. start: the step work goes on
    from; lines after it, written before a kill, are dropped, so the record is that of an
    uninterrupted run. due: so are the figures of `start` itself, which are measured again.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        name: str,
        *,
        start: int,
        steps: int,
        write: bool = True,
        due: bool = False,
    ) -> None:
        self._write, self._name = write, name
        if not write:
            return
        from tensorboardX import SummaryWriter  # protobuf is slow to import

        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        kept = _drop_from(path, start, due)
        # A line is out before the checkpoint that follows it is: a kill cannot part them.
        self._file = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115  see close()
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start)
        for line in kept[-1:]:  # the figures of `start` were purged too
            if line["step"] == start:
                self._draw(start, line)
        if _wandb is not None:
            _wandb.define_metric(f"{name}/*", step_metric=f"{name}/step")
        self._progress = Progress(name, steps, done=start, patience_s=0.0)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Records the values of a step, or figures: floats, or lists of floats.

        `tokens`, if there, is the tokens of this step, for the tokens/s that are shown.
        """
        if not self._write:
            return
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._draw(step, values)
        if "loss" in values:
            text = "  ".join(form.format(values[k]) for k, form in SHOWN.items() if k in values)
            self._progress.advance(step + 1, values.get("tokens", 0.0), text)
            if "tokens" in values:
                self._draw(step, {"tokens_per_second": self._progress.rate})
        else:
            shown = [f"{k} {v:.4f}" for k, v in values.items() if isinstance(v, float)]
            log.info("%s %d: %s", self._name, step, "  ".join(shown))

    def _draw(self, step: int, values: Mapping[str, Any]) -> None:
        if not self._drawing():
            raise OSError(errno.ENOSPC, "TensorBoard's file cannot be written", self._board.logdir)
        scalars = dict(_scalars({k: v for k, v in values.items() if k != "step"}))
        for key, value in scalars.items():
            self._board.add_scalar(key, value, step)
        if _wandb is not None:
            named = {f"{self._name}/{key}": value for key, value in scalars.items()}
            _wandb.log({f"{self._name}/step": step, **named})

    def _drawing(self) -> bool:
        """Whether TensorBoard's thread lives: it ends with a full disk, and then its queue blocks
        whoever adds to it."""
        return self._events()._worker.is_alive()

    def _events(self) -> Any:
        return self._board._get_file_writer().event_writer

    def close(self) -> None:
        """Flushes everything to disk."""
        if not self._write:
            return
        self._progress.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        if self._drawing():
            self._board.close()
        else:  # nor may the end of the process wait for what nobody takes
            self._events()._event_queue.cancel_join_thread()


def _scalars(values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Lists as scalars of their own, by place."""
    for key, value in values.items():
        if isinstance(value, list):
            yield from ((f"{key}/{place:03d}", each) for place, each in enumerate(value))
        elif isinstance(value, int | float):
            yield key, value


@contextlib.contextmanager
def weights_and_biases(
    project: str, identity: str, folder: pathlib.Path, configuration: Mapping[str, Any]
) -> Iterator[None]:
    """While open, Weights & Biases gets the scalars too: a run called as `folder`, which an equal
    `identity` continues. Raises UserError where it is not installed, or does not let us in."""
    global _wandb
    try:
        import wandb  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(
            f"wandb={project}: Weights & Biases is not installed: pip install wandb"
        ) from error
    try:
        opened = wandb.init(
            project=project,
            id=identity,
            name=folder.name,
            dir=str(folder),
            config=dict(configuration),
            resume="allow",
            settings=wandb.Settings(console="off"),  # bars are drawn there
        )
    except wandb.Error as error:
        raise UserError(
            f"wandb={project}: {error}; `wandb login`, or WANDB_MODE=offline for no network"
        ) from error
    _wandb, code = opened, 1
    try:
        yield
        code = 0
    finally:
        _wandb = None
        opened.finish(exit_code=code)


def read_metrics(folder: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of a stage's metrics.jsonl, in order; a torn last line is left out."""
    return list(files.read_lines(folder / "metrics.jsonl"))


def _drop_from(path: pathlib.Path, start: int, due: bool) -> list[dict[str, Any]]:
    """Keeps the lines of steps before `start`, and the figures of its state, which came before the
    checkpoint, unless they are still due. Returns what is kept."""

    def before(line: dict[str, Any]) -> bool:
        figures = 0 < start == line["step"] and "loss" not in line and not due
        return line["step"] < start or figures

    kept = [line for line in read_metrics(path.parent) if before(line)]
    aside = path.with_suffix(".partial")
    aside.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    aside.replace(path)
    return kept

"""The record of a stage: JSON lines, TensorBoard beside it, and progress for a person to read."""

import errno
import json
import logging
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from e3jax.progress import Progress

log = logging.getLogger(__name__)


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
        self._progress = Progress(name, steps, done=start, patience_s=0.0)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Records the values of a step, or figures: floats, or lists of floats (JSON only).

        `tokens`, if there, is the tokens of this step, for the tokens/s that are shown.
        """
        if not self._write:
            return
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._draw(step, values)
        if "loss" in values:
            text = f"loss {values['loss']:.4f}"
            self._progress.advance(step + 1, values.get("tokens", 0.0), text)
        else:
            shown = [f"{k} {v:.4f}" for k, v in values.items() if isinstance(v, float)]
            log.info("%s %d: %s", self._name, step, "  ".join(shown))

    def _draw(self, step: int, values: Mapping[str, Any]) -> None:
        if not self._drawing():
            raise OSError(errno.ENOSPC, "TensorBoard's file cannot be written", self._board.logdir)
        for key, value in values.items():
            if key != "step" and isinstance(value, int | float):
                self._board.add_scalar(key, value, step)

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


def read_metrics(folder: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of a stage's metrics.jsonl, in order; a torn last line is left out."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


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

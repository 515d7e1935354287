"""What a person sees while it runs: bars on a terminal, plain lines elsewhere, and a log file."""

import contextlib
import logging
import pathlib
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

T = TypeVar("T")

TELL_EVERY_S = 10.0  # between plain lines
LEVELS = "·▁▂▃▄▅▆▇█"  # of a strip, from 0 to 1
LOG = "run.log"

log = logging.getLogger(__name__)

_console = Console(stderr=True, highlight=False, soft_wrap=True)
_bars: Bars | None = None  # all that are shown, one below the other


class Progress:
    """How far a piece of work is, in steps and tokens a second, and how long it still takes.

    A context manager. total: None where it is not known. done: what was done before. patience_s:
    nothing is shown of work that is over sooner. A process that does not speak shows nothing.
    """

    def __init__(
        self, name: str, total: int | None, *, done: int = 0, patience_s: float = TELL_EVERY_S
    ) -> None:
        self._name, self._total, self._start, self._done = name, total, done, done
        self._tokens, self._begun = 0.0, time.monotonic()
        self._next = self._begun + patience_s  # when to tell
        self._shown, self._task = False, None

    def __enter__(self) -> "Progress":
        return self

    def advance(self, done: int, tokens: float = 0.0, text: str = "") -> None:
        """`done` steps are done by now; `tokens` have gone through since the last call."""
        self._done = done
        self._tokens += tokens
        now = time.monotonic()
        if self._tokens:
            text = f"{self.rate:,.0f} tok/s  {text}".rstrip()
        if self._task is not None:
            assert _bars is not None
            _bars.update(self._task, completed=done, text=f"{self._count()}  {text}")
        if now < self._next and not (self._shown and done == self._total):
            return
        self._next, self._shown = now + TELL_EVERY_S, True
        if self._task is None and sys.stderr.isatty() and log.isEnabledFor(logging.INFO):
            self._task = _open_bar(self._name, self._total, done, f"{self._count()}  {text}")
        parts = [f"{self._name} {self._count()}", text]
        if self._total is not None and done > self._start:
            left = (now - self._begun) / (done - self._start) * (self._total - done)
            parts.append(f"{_duration(left)} left")
        log.info("%s", "  ".join(filter(None, parts)), extra={"drawn": self._task is not None})

    @property
    def rate(self) -> float:
        """Tokens a second since it began."""
        return self._tokens / max(time.monotonic() - self._begun, 1e-9)

    def _count(self) -> str:
        return f"{self._done}" if self._total is None else f"{self._done}/{self._total}"

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Takes the bar away."""
        if self._task is not None:
            _close_bar(self._task)
            self._task = None


def over(name: str, items: Iterable[T], total: int | None = None) -> Iterator[T]:
    """The items of a long loop, with its progress."""
    with Progress(name, total) as shown:
        for done, item in enumerate(items, start=1):
            yield item
            shown.advance(done)


def strip(values: Sequence[float]) -> list[str]:
    """Numbers between 0 and 1 as columns of eight heights, ten and ten, fifty a line; each line
    begins with the place of its first."""
    marks = [LEVELS[round(min(max(x, 0.0), 1.0) * (len(LEVELS) - 1))] for x in values]
    tens = ["".join(marks[i : i + 10]) for i in range(0, len(marks), 10)]
    return [f"{10 * i:>3} {' '.join(tens[i : i + 5])}" for i in range(0, len(tens), 5)]


def _open_bar(name: str, total: int | None, done: int, text: str) -> Any:
    global _bars
    if _bars is None:
        _bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
            console=_console,
            redirect_stdout=False,
        )
        _bars.start()
    return _bars.add_task(name, total=total, completed=done, text=text)


def _close_bar(task: Any) -> None:
    global _bars
    assert _bars is not None
    _bars.remove_task(task)
    if not _bars.tasks:
        _bars.stop()
        _bars = None


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


# ---------------------------------------------------------------- where lines go


class Terminal(logging.Handler):
    """Lines to stderr, above the bars; those that a bar shows already are left out."""

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "drawn", False):
            return
        text = self.format(record)
        with contextlib.suppress(OSError):  # the terminal is gone; run.log is not
            if _bars is not None:
                _console.print(text, markup=False)
            else:
                print(text, file=sys.stderr)


@contextlib.contextmanager
def log_file(folder: pathlib.Path, begin: str) -> Iterator[None]:
    """Adds every line of the block to run.log in `folder`, with its time, and how it ended.

    begin: the first line. A log that cannot be written stops nothing.
    """
    logger = logging.getLogger("e3jax")
    if not logger.isEnabledFor(logging.INFO):
        yield
        return
    handler = _LogFile(folder / LOG, encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    only_there = {"drawn": True}
    logger.addHandler(handler)
    try:
        logger.info("%s", begin, extra=only_there)
        yield
        logger.info("done", extra=only_there)
    except BaseException as error:
        logger.info("ended: %s: %s", type(error).__name__, error, extra=only_there)
        raise
    finally:
        logger.removeHandler(handler)
        with contextlib.suppress(OSError):
            handler.close()


class _LogFile(logging.FileHandler):
    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError):  # that it cannot be opened
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        """A full disk is told by whatever else writes there."""

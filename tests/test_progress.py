"""What a person sees: lines at their time, bars on a terminal, all of it in the log file."""

import io
import logging
import pathlib

import pytest
from rich.console import Console

from e3jax import progress
from e3jax.progress import Progress, Terminal, log_file, over, strip


@pytest.fixture
def clock(monkeypatch):
    """Seconds, as a list of one number to change."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def open_screen(monkeypatch):
    """What a terminal of 100 columns is sent from now on (pytest changes stderr after fixtures)."""
    sent = io.StringIO()
    sent.isatty = lambda: True
    monkeypatch.setattr(progress.sys, "stderr", sent)
    console = Console(file=sent, force_terminal=True, width=100, highlight=False)
    monkeypatch.setattr(progress, "_console", console)
    return sent


@pytest.fixture
def logger():
    """e3jax's logger as the command line sets it up."""
    found = logging.getLogger("e3jax")
    old, handler = found.level, Terminal()
    found.setLevel(logging.INFO)
    found.addHandler(handler)
    yield found
    found.removeHandler(handler)
    found.setLevel(old)


def test_a_line_every_ten_seconds_with_rate_and_time_left(clock, caplog):
    caplog.set_level(logging.INFO, "e3jax")
    with Progress("work", 100, done=20, patience_s=0) as shown:
        for done in range(21, 101):
            clock[0] += 1.0
            shown.advance(done, tokens=50, text="loss 0.1")
    lines = [r.getMessage() for r in caplog.records]
    assert len(lines) == 9  # the first at once, then every ten seconds, the last among them
    assert lines[1] == "work 31/100  50 tok/s  loss 0.1  1:09 left"
    assert lines[-1].startswith("work 100/100") and lines[-1].endswith("0:00 left")


def test_short_work_says_nothing_and_long_work_ends_with_a_line(clock, caplog):
    caplog.set_level(logging.INFO, "e3jax")
    for _ in over("short", range(9), 9):
        clock[0] += 1.0
    assert not caplog.records
    for _ in over("unknown", range(13)):
        clock[0] += 1.0
    for _ in over("long", range(13), 13):
        clock[0] += 1.0
    said = [r.getMessage() for r in caplog.records]
    assert said == ["unknown 10", "long 10/13  0:03 left", "long 13/13  0:00 left"]


def test_a_process_that_does_not_speak(clock, logger, monkeypatch):
    screen = open_screen(monkeypatch)
    logger.setLevel(logging.WARNING)
    with Progress("work", 3, patience_s=0) as shown:
        shown.advance(1)
    assert not screen.getvalue()


def test_bars_one_below_the_other_and_lines_above_them(clock, logger, monkeypatch, tmp_path):
    screen = open_screen(monkeypatch)
    with log_file(tmp_path, "e3jax"), Progress("steps", 5, patience_s=0) as steps:
        steps.advance(1, 10)
        for _ in over("measured", range(3), 3):
            clock[0] += 20.0
            logger.info("a line")
        steps.advance(2, 10)
    seen = screen.getvalue()
    assert "steps" in seen and "measured" in seen and "1/5" in seen and "tok/s" in seen
    assert seen.count("a line") == 3
    kept = (tmp_path / "run.log").read_text()
    assert "measured 2/3  0:20 left" in kept and "steps 2/5" in kept  # no bar in a file
    assert progress._bars is None


def test_strip_is_higher_where_the_number_is_and_fits_a_terminal():
    assert strip([0, 0.5, 1, 1.01, -1e-9]) == ["  0 ·▄██·"]
    lines = strip([i / 126 for i in range(127)])
    assert [line.split()[0] for line in lines] == ["0", "50", "100"]
    marks = "".join("".join(line.split()[1:]) for line in lines)
    assert len(marks) == 127 and [*marks] == sorted(marks, key=progress.LEVELS.index)
    assert max(map(len, lines)) + len("search 100000: layers ") <= 80


def test_the_log_file_goes_on_and_tells_how_it_ended(logger, tmp_path):
    with pytest.raises(ValueError), log_file(tmp_path, "first"):
        raise ValueError("no such layer")
    with log_file(tmp_path, "second"):
        logger.info("search: keeping")
    lines = (tmp_path / "run.log").read_text().splitlines()
    texts = [line.split(" ", 2)[2] for line in lines]
    assert texts == [
        "first",
        "ended: ValueError: no such layer",
        "second",
        "search: keeping",
        "done",
    ]
    assert all(line[:2] == "20" and line[4] == "-" for line in lines)


def test_a_log_that_cannot_be_written_stops_nothing(logger, capsys):
    with log_file(pathlib.Path("/proc/nowhere"), "first"):
        logger.info("work")
    assert "Traceback" not in capsys.readouterr().err

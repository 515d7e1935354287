"""Whether an answer is right: what a text says in the end, beside the gold answer."""

import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import logging
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

from e3jax import config, processes
from e3jax.errors import UserError
from e3jax.evaluate import judge

log = logging.getLogger(__name__)

INSTALL = 'pip install "math-verify[antlr4_13_2]>=0.9,<0.10"'
LIMIT_S = 10  # for a comparison, most of which take milliseconds


@dataclasses.dataclass(frozen=True)
class Grade:
    """What became of a text."""

    expected: str  # the gold answer
    found: str | None  # the text's; None: it has none
    correct: bool


Grader = Callable[[str, str], Grade]  # (text, gold)


@contextlib.contextmanager
def open_grader(spec: config.Evaluate) -> Iterator[Grader]:
    """The function that grades by `evaluate.grader`: (text, gold) -> Grade. Gold may be a whole
    solution. What cannot be graded is wrong. Raises UserError where math-verify is missing."""
    pattern = re.compile(spec.answer)

    def by_text(text: str, gold: str) -> Grade:
        expected, found = last_match(pattern, gold) or plain(gold), last_match(pattern, text)
        return Grade(expected, found, found == expected)

    if spec.grader == "regex":
        yield by_text
        return
    with contextlib.closing(Judge()) as equal:

        def by_value(text: str, gold: str) -> Grade:
            expected = last_boxed(gold) or last_match(pattern, gold) or gold.strip()
            found = last_boxed(text)
            return Grade(expected, found, bool(found) and equal(expected, found))

        yield by_value
        if equal.given_up:
            log.warning(
                "%d different answers that math-verify could not compare in %d s are wrong",
                equal.given_up,
                LIMIT_S,
            )


def facts(spec: config.Evaluate) -> dict[str, Any]:
    """What decides grades beside the configuration. Raises UserError where math-verify is asked for
    and missing."""
    return {} if spec.grader == "regex" else {"math_verify": processes.from_first(_version)}


@functools.cache
def _version() -> str:
    """Of math-verify, which can be imported."""
    Judge().close()
    return importlib.metadata.version("math-verify")


# ---------------------------------------------------------------- what a text says


def last_match(pattern: re.Pattern[str], text: str) -> str | None:
    """The answer in a text: the last match of the pattern's one group, `plain`."""
    found = pattern.findall(text)
    return plain(found[-1]) if found else None


def plain(answer: str) -> str:
    """An answer as it is compared: stripped, 1,234 as 1234, and without a full stop at the end."""
    return re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", answer.strip()).rstrip(".")


def last_boxed(text: str) -> str | None:
    """What is in the last \\boxed{} that is closed, stripped: MATH's answer (arXiv 2103.03874)."""
    opened: list[tuple[int, bool]] = []
    last = (-1, -1)
    for mark in re.finditer(r"\\{1,2}boxed\s*\{|\\.|[{}]", text, re.DOTALL):
        if mark[0] == "}":
            begin, boxed = opened.pop() if opened else (-1, False)
            if boxed and begin > last[0]:
                last = begin, mark.start()
        elif mark[0].endswith("{") and mark[0] != r"\{":
            opened.append((mark.end(), mark[0] != "{"))
    return None if last[0] < 0 else text[last[0] : last[1]].strip()


# ---------------------------------------------------------------- math-verify


class Judge:
    """Whether two answers in LaTeX are equal, the gold one first, by math-verify in a process of
    its own: where it ends over a comparison, by its limits, they are not.

    Raises UserError where math-verify cannot be imported. To be closed.
    """

    def __init__(self) -> None:
        self.given_up = 0  # different comparisons
        self._equal = functools.cache(self._ask)
        self._start()

    def __call__(self, gold: str, answer: str) -> bool:
        return gold == answer or self._equal(gold, answer)

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.communicate()

    def _start(self) -> None:
        # -P: the folder of judge.py is no place to import from.
        self._process = subprocess.Popen(
            [sys.executable, "-P", judge.__file__, str(LIMIT_S)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        if (said := self._reply()) != judge.READY:
            self.close()
            raise UserError(
                f"evaluate.grader=math_verify: math-verify cannot be used ({said or 'it ended'}): "
                f"{INSTALL}"
            )

    def _reply(self) -> str:
        """Its next line; empty where it has ended."""
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def _ask(self, gold: str, answer: str) -> bool:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps([gold, answer]), file=self._process.stdin, flush=True)
        said = self._reply()
        if not said:
            self.given_up += 1
            self.close()
            self._start()
        return said == "1"

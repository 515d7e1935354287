"""Answers of several models to the same problems: which turned, and texts side by side.

As many may turn right as wrong, which exact match does not show (arXiv 2407.09141).

Without jax. An answer is a line of `answers.jsonl`: see exact.py.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from e3jax import files
from e3jax.evaluate.rows import Row, beside


def read(folder: pathlib.Path, row: Row) -> list[dict[str, Any]]:
    """A row's answers, of drawn ones each problem's first; empty unless all are there and graded.

    folder: `evaluate`.
    """
    lines = files.read_lines(beside(folder, row.model, "answers.jsonl"))
    found = [line for line in lines if line.get("sample", 1) == 1 and "correct" in line]
    return found if len(found) == row.problems else []


@dataclasses.dataclass(frozen=True)
class Flips:
    """Problems by what the dense model and another one make of them."""

    both: int  # right in both
    lost: int  # right in the dense model alone
    gained: int  # right in the other alone
    another: int  # wrong in both, with two different answers
    same: int  # wrong in both, with the same


def flips(dense: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]]) -> Flips:
    """Of two models' answers to the same problems, as `answers.jsonl` has them."""
    pairs = list(zip(dense, other, strict=True))
    wrong = [(a, b) for a, b in pairs if not a["correct"] and not b["correct"]]
    another = sum(a["found"] != b["found"] for a, b in wrong)
    return Flips(
        both=sum(a["correct"] and b["correct"] for a, b in pairs),
        lost=sum(a["correct"] and not b["correct"] for a, b in pairs),
        gained=sum(b["correct"] and not a["correct"] for a, b in pairs),
        another=another,
        same=len(wrong) - another,
    )


def samples(answers: Mapping[str, Sequence[Mapping[str, Any]]], count: int) -> str:
    """Markdown: problems with every model's answer side by side, first those where the models that
    are right differ. answers: by model, to the same problems; the first is the dense one's."""
    problems = list(zip(*answers.values(), strict=True))
    apart = [len({answer["correct"] for answer in problem}) == 1 for problem in problems]
    chosen = sorted(range(len(problems)), key=lambda i: (apart[i], i))[:count]
    parts = []
    for i in sorted(chosen):
        first = problems[i][0]
        parts.append(
            f"## Problem {i + 1}, answer {first['expected']}\n\n{_quoted(first['prompt'])}"
        )
        for model, answer in zip(answers, problems[i], strict=True):
            verdict = "right" if answer["correct"] else f"wrong: {answer['found']}"
            parts.append(f"**{model}** ({verdict})\n\n{_quoted(answer['text'])}")
    return "\n\n".join(parts) + "\n"


def _quoted(text: str) -> str:
    """As a code block that the text cannot end."""
    fence = "`" * 3
    while fence in text:
        fence += "`"
    return f"{fence}text\n{text.strip()}\n{fence}"

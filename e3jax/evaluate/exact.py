"""Exact match: greedy answers to problems whose answer can be checked."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from e3jax import config
from e3jax.data.text import Problem
from e3jax.errors import UserError
from e3jax.models.config import ModelConfig
from e3jax.models.decoder import Params
from e3jax.models.generate import make_generator
from e3jax.models.serve import generate
from e3jax.progress import Progress


@dataclasses.dataclass(frozen=True)
class Answer:
    """One problem and what the model made of it."""

    prompt: str
    expected: str
    found: str | None  # the last match of the answer pattern, None = no match
    text: str
    ended: bool  # an end-of-sequence token came within the limit

    @property
    def correct(self) -> bool:
        return self.found == self.expected


def answer_pattern(pattern: str) -> re.Pattern[str]:
    """Compiles `evaluate.answer`. Raises UserError unless it is a pattern with one group."""
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UserError(
            f"evaluate.answer={pattern!r}: not a regular expression: {error}"
        ) from error
    if compiled.groups != 1:
        raise UserError(f"evaluate.answer={pattern!r}: expected exactly one group, the answer")
    return compiled


def last_match(pattern: re.Pattern[str], text: str) -> str | None:
    """The answer in a text: the group's last match, `plain`."""
    found = pattern.findall(text)
    return plain(found[-1]) if found else None


def plain(answer: str) -> str:
    """An answer as it is compared: stripped, 1,234 as 1234, and without a full stop at the end."""
    return re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", answer.strip()).rstrip(".")


def solve(
    params: Params,
    cfg: ModelConfig,
    problems: Sequence[Problem],
    tokenizer: Any,
    spec: config.Evaluate,
    *,
    eos: Sequence[int],
    dtype: Any,
) -> list[Answer]:
    """Greedy answers to all problems, in order."""
    pattern = answer_pattern(spec.answer)
    limit = min(spec.max_new_tokens, cfg.max_position - max(len(p.prompt_ids) for p in problems))
    generator = make_generator(cfg, dtype=dtype, eos=eos)
    prompts = [p.prompt_ids for p in problems]
    answers: list[Answer] = []
    with Progress("problems solved", len(problems)) as shown:
        found = generate(
            generator,
            params,
            prompts,
            spec.batch,
            limit,
            tell=lambda tokens: shown.advance(len(answers), tokens),
        )
        for problem, ids in zip(problems, found, strict=True):
            text = tokenizer.decode(ids, skip_special_tokens=True)
            answers.append(
                Answer(
                    prompt=problem.prompt,
                    # A gold answer may be a whole solution (GSM8K's ends in `#### 18`).
                    expected=last_match(pattern, problem.answer) or plain(problem.answer),
                    found=last_match(pattern, text),
                    text=text,
                    ended=bool(ids) and ids[-1] in set(eos),
                )
            )
    return answers

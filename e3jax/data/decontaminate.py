"""Keeps evaluation questions out of the training data.

A document is contaminated when it shares 13 consecutive words with a question of an evaluation set
(the n-gram length of GPT-3, arXiv 2005.14165, appendix C), or, for a question shorter than that,
when it contains the whole question. Words are compared after NFKC and case folding, and without
punctuation and symbols; questions of fewer than 3 words say too little and are not looked for.
"""

import dataclasses
import functools
import hashlib
import logging
import re
import unicodedata
from collections.abc import Mapping, Sequence

from e3jax.config import Source
from e3jax.data.sources import HubUnavailable, is_local, open_rows
from e3jax.errors import UserError

log = logging.getLogger(__name__)

NGRAM = 13
SHORTEST = 3
FIELDS = ("question", "problem", "prompt", "text")
KNOWN = {
    "math-500": Source(path="HuggingFaceH4/MATH-500", split="test"),
    "gsm8k": Source(path="openai/gsm8k", name="main", split="test"),
}


@dataclasses.dataclass(frozen=True)
class Questions:
    """N-grams of evaluation questions by their length in words; empty finds nothing."""

    grams: Mapping[int, frozenset[tuple[str, ...]]]
    checked: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()

    def occur_in(self, text: str) -> bool:
        """Whether the text holds a question, or 13 words in a row of one."""
        text_words = words(text) if self.grams else []
        return any(not grams.isdisjoint(_ngrams(text_words, n)) for n, grams in self.grams.items())

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 of all n-grams."""
        grams = sorted(" ".join(g) for grams in self.grams.values() for g in grams)
        return hashlib.sha256("\n".join(grams).encode()).hexdigest()


def words(text: str) -> list[str]:
    """The text's words as they are compared."""
    return re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold())


def _ngrams(text_words: list[str], n: int) -> zip:
    return zip(*(text_words[i:] for i in range(n)), strict=False)


def evaluation_questions(names: Sequence[str]) -> Questions:
    """Questions of known sets (`math-500`, `gsm8k`) and of files (jsonl, parquet …).

    A file's questions stand in a field `question`, `problem`, `prompt` or `text`. A known set that
    cannot be had is skipped with a warning; a missing file is a UserError.
    """
    grams: dict[int, set[tuple[str, ...]]] = {}
    checked, skipped = [], []
    for name in names:
        try:
            for question in _questions(name):
                question_words = words(question)
                n = min(NGRAM, len(question_words))
                if n >= SHORTEST:
                    grams.setdefault(n, set()).update(_ngrams(question_words, n))
            checked.append(name)
        except HubUnavailable:
            skipped.append(name)
            log.warning(
                "decontamination against %s is skipped: the hub cannot be reached; give "
                "data.decontaminate the path of a local jsonl file instead",
                name,
            )
    frozen = {n: frozenset(g) for n, g in sorted(grams.items())}
    return Questions(frozen, tuple(checked), tuple(skipped))


def _questions(name: str) -> list[str]:
    if name not in KNOWN and not is_local(name):
        raise UserError(
            f"data.decontaminate: {name!r} is neither a known set ({', '.join(KNOWN)}) nor a file"
        )
    questions = []
    for number, row in open_rows(KNOWN.get(name) or Source(path=name)):
        question = next((row[f] for f in FIELDS if isinstance(row.get(f), str)), None)
        if question is None:
            raise UserError(
                f"{name}: row {number} has no question: expected one of the fields "
                f"{', '.join(FIELDS)}, found {', '.join(row)}"
            )
        questions.append(question)
    return questions

"""Documents -> token windows: read, checked against evaluation sets, tokenised and packed, once.

Also the one place that loads a tokenizer, and the problems that evaluation by generation solves.
"""

import collections
import dataclasses
import hashlib
import itertools
import json
import logging
import os
import pathlib
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from e3jax.config import Data, Source
from e3jax.data.decontaminate import Questions, evaluation_questions
from e3jax.data.rendering import Rendered, encode, prompt_of, render
from e3jax.data.sources import Rows, open_rows
from e3jax.data.windows import (
    OPEN_WINDOWS,
    Document,
    Windows,
    alone,
    cut,
    load_windows,
    pack,
    store_windows,
)
from e3jax.errors import UserError

log = logging.getLogger(__name__)

VERSION = 1  # counted up when a change of rendering, packing or layout makes other windows
TELL_EVERY_S = 30.0
TOKENIZER_FILES = ("*token*.json", "*.model", "*.jinja", "vocab*", "merges.txt")


@dataclasses.dataclass(frozen=True)
class Problem:
    """A prompt to go on from, and its checkable answer.

    prompt_ids: with the tokenizer's BOS, without EOS; a prefix of the ids that the same prompt and
      its completion have as a training document.
    """

    prompt_ids: tuple[int, ...]
    prompt: str
    answer: str


def load_tokenizer(folder: str | os.PathLike[str]) -> Any:
    """The fast Hugging Face tokenizer of a folder; code in the folder is never run.

    Raises UserError when the folder holds none or a broken one.
    """
    folder = pathlib.Path(folder).expanduser()
    if not tokenizer_files(folder):
        raise UserError(f"{folder}: holds no tokenizer (tokenizer.json and tokenizer_config.json)")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise UserError(f"{folder}: the tokenizer cannot be loaded: {error}") from error
    if not tokenizer.is_fast:
        raise UserError(f"{folder}: only fast tokenizers are supported; tokenizer.json is missing")
    return tokenizer


def tokenizer_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The files of a model folder that decide how text becomes tokens, by name."""
    return sorted({file for pattern in TOKENIZER_FILES for file in folder.glob(pattern)})


def check_vocab(tokenizer: Any, vocab_size: int) -> None:
    """Raise UserError when the tokenizer can give an id that the model has no embedding for."""
    token, largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if largest >= vocab_size:
        raise UserError(
            f"tokenizer {tokenizer.name_or_path}: token {token!r} has id {largest}, but the "
            f"model's vocab_size is {vocab_size}; tokenizer and model do not belong together"
        )


def tokenize(
    sources: Sequence[Source],
    data: Data,
    tokenizer_folder: str | os.PathLike[str],
    *,
    decontaminate: Sequence[str] = (),
) -> Windows:
    """The sources' documents in windows of `data.window` tokens; made once, reused when there.

    `decontaminate` names the evaluation sets whose questions no document may hold. Other processes
    may do the same at the same time. Raises UserError for anything wrong with a source, a row or
    the tokenizer, and when no document is left.
    """
    if not sources:
        raise UserError("no data: name at least one source (data.train, data.held_out, data.test)")
    opened = [open_rows(source) for source in sources]
    questions = evaluation_questions(decontaminate)
    folder = pathlib.Path(data.cache).expanduser() / _key(opened, data, tokenizer_folder, questions)
    if not (folder / "meta.json").is_file():
        with alone(folder):
            if not (folder / "meta.json").is_file():
                _make(folder, opened, questions, data, tokenizer_folder)
    windows = load_windows(folder)
    if not windows.meta["loss_tokens"]:
        raise UserError(
            f"{', '.join(s.path for s in sources)}: no token carries loss with data.loss_on: "
            f"{data.loss_on}; check that the completions (assistant turns) are not empty"
        )
    log.info("%s: %s", ", ".join(s.path for s in sources), summary(windows))
    return windows


def _make(
    folder: pathlib.Path,
    opened: list[Rows],
    questions: Questions,
    data: Data,
    tokenizer_folder: str | os.PathLike[str],
) -> None:
    tokenizer = load_tokenizer(tokenizer_folder)
    counts = collections.Counter(documents=0, split=0, dropped=0, empty=0, contaminated=0)
    rendered = itertools.chain.from_iterable(
        render(rows, tokenizer, data.loss_on, counts) for rows in opened
    )
    documents = encode(_clean(rendered, questions, counts), tokenizer)
    pieces = cut(documents, data.window, data.long_rows, counts)
    packed = pack(pieces, data.window, OPEN_WINDOWS if data.pack else 0)
    store_windows(_telling(packed, counts), data.window, folder, counts)


def problems(source: Source, tokenizer: Any, context: int) -> Iterator[Problem]:
    """The test problems of a source, in order; fields `source.prompt` (or messages) and answer.

    Raises UserError that names the row for a missing or empty prompt or answer, and for a prompt
    that leaves no token of the model's `context` for an answer.
    """
    for number, row in open_rows(source):
        where = f"{source.path}: row {number}"
        answer = row.get(source.answer)
        if not isinstance(answer, str | int | float) or not str(answer).strip():
            raise UserError(
                f"{where}: no answer in field {source.answer!r}; it has {', '.join(row)}. Name the "
                "field with `answer` in the source"
            )
        prompt = prompt_of(source, row, tokenizer, where)
        ids = tokenizer(prompt.text, add_special_tokens=prompt.plain, verbose=False)["input_ids"]
        if prompt.plain and ids and ids[-1] == tokenizer.eos_token_id:
            ids = ids[:-1]
        if not ids:
            raise UserError(f"{where}: the prompt is empty")
        if len(ids) >= context:
            raise UserError(
                f"{where}: a prompt of {len(ids)} tokens fills the model's context of {context}; "
                "leave the row out (`rows` of the source)"
            )
        yield Problem(tuple(ids), prompt.text, str(answer).strip())


def summary(windows: Windows) -> str:
    """What went into the windows, and what did not, in a line."""
    meta = windows.meta
    left_out = [f"{meta[k]:,} {k}" for k in ("dropped", "empty", "contaminated") if meta[k]]
    return (
        f"{meta['documents']:,} documents, {meta['tokens']:,} tokens ({meta['loss_tokens']:,} "
        f"predicted with loss), {meta['windows']:,} windows of {meta['window']:,} "
        f"({meta['fill']:.1%} full)"
        + (f", {meta['split']:,} documents split" if meta["split"] else "")
        + (f", left out: {', '.join(left_out)}" if left_out else "")
    )


def _key(
    opened: list[Rows], data: Data, tokenizer_folder: str | os.PathLike[str], questions: Questions
) -> str:
    """Hash of everything that decides the windows; where the files lie does not."""
    files = tokenizer_files(pathlib.Path(tokenizer_folder).expanduser())
    sources = [dataclasses.asdict(r.source) | {"path": "", "answer": ""} for r in opened]
    for source in sources:
        if not source["instruction"]:  # as it was before there were any
            del source["instruction"]
    facts = {
        "version": VERSION,
        "contents": [rows.fingerprint for rows in opened],
        "sources": sources,
        "data": [data.window, data.pack, data.loss_on, data.long_rows],
        "tokenizer": [(f.name, hashlib.sha256(f.read_bytes()).hexdigest()) for f in files],
        "questions": questions.fingerprint,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def _clean(
    rendered: Iterable[Rendered], questions: Questions, counts: dict[str, int]
) -> Iterator[Rendered]:
    for document in rendered:
        if questions.occur_in(document.text):
            counts["contaminated"] += 1
        else:
            yield document


def _telling(packed: Iterable[list[Document]], counts: dict[str, int]) -> Iterator[list[Document]]:
    """A line now and then while a large set is tokenised."""
    told = time.monotonic()
    for members in packed:
        if time.monotonic() - told > TELL_EVERY_S:
            told = time.monotonic()
            log.info("tokenising: %s documents so far", f"{counts['documents']:,}")
        yield members

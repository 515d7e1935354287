"""Problems whose answer can be checked: the model is asked, and each answer kept and graded."""

import contextlib
import dataclasses
import json
import logging
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from e3jax import config, files, processes
from e3jax.data.text import Problem
from e3jax.evaluate.grading import open_grader
from e3jax.models.config import ModelConfig
from e3jax.models.decoder import Params
from e3jax.models.generate import make_generator
from e3jax.models.serve import Request, serve
from e3jax.progress import Progress, over

log = logging.getLogger(__name__)


class Asked(NamedTuple):
    """What the model is asked once. Numbers are from 1."""

    problem: int
    sample: int
    request: Request
    key: str  # of all that decides the answer


def solve(
    params: Params,
    cfg: ModelConfig,
    problems: Sequence[Problem],
    tokenizer: Any,
    spec: config.Evaluate,
    *,
    eos: Sequence[int],
    dtype: Any,
    path: pathlib.Path,
    inputs: Any,
) -> list[int]:
    """How many of `evaluate.samples` answers to each problem are right.

    path: all answers, a line of JSON each: problem, sample (both from 1), prompt, expected, found,
      correct, text, tokens, ended (by an end-of-sequence token, or else cut at the limit), key.
      A line is written when its answer is there, and graded when all are. Those that are there
      from before are not asked for again, whatever graded them.
    inputs: what decides the answers beside `spec`, as JSON: the model.
    """
    asked = _asked(problems, spec, cfg.max_position, {"model": inputs, "eos": eos})
    there = set(processes.from_first(lambda: _keep(path, asked)))
    left = [one for one in asked if one.key not in there]
    if there and left:
        log.info("%d of %d answers are there from before", len(there), len(asked))
    first = processes.is_first()
    with (
        open(path, "a", encoding="utf-8") if first else contextlib.nullcontext() as file,
        Progress("answers given", len(asked), done=len(there)) as shown,
    ):
        for number, ids in serve(
            make_generator(cfg, dtype=dtype, eos=eos),
            params,
            [one.request for one in left],
            spec.batch,
            tell=lambda tokens: shown.advance(len(there), tokens),
        ):
            one = left[number]
            there.add(one.key)
            if file is not None:
                line = {
                    "problem": one.problem,
                    "sample": one.sample,
                    "prompt": problems[one.problem - 1].prompt,
                    "text": tokenizer.decode(ids, skip_special_tokens=True),
                    "tokens": len(ids),
                    "ended": bool(ids) and ids[-1] in set(eos),
                    "key": one.key,
                }
                print(json.dumps(line), file=file, flush=True)
    return processes.from_first(lambda: _graded(path, asked, problems, spec))


def _asked(
    problems: Sequence[Problem], spec: config.Evaluate, context: int, inputs: Any
) -> list[Asked]:
    """Every problem once, then again: what is there of a run that was killed is of all problems."""
    found, same = [], files.fingerprint(inputs)
    for sample in range(1, spec.samples + 1):
        for number, problem in enumerate(problems, start=1):
            request = Request(
                problem.prompt_ids, min(spec.max_new_tokens, context - len(problem.prompt_ids))
            )
            if spec.temperature > 0:
                draws = np.random.SeedSequence((spec.seed, number, sample)).generate_state(1)
                request = dataclasses.replace(
                    request,
                    temperature=spec.temperature,
                    top_p=spec.top_p,
                    top_k=spec.top_k,
                    seed=int(draws[0]),
                )
            key = files.fingerprint([same, number, sample, request])
            found.append(Asked(number, sample, request, key))
    return found


def _keep(path: pathlib.Path, asked: Sequence[Asked]) -> list[str]:
    """The keys of the answers that are there; all else leaves the file."""
    wanted, there = {one.key for one in asked}, dict[str, None]()

    def lines() -> Iterator[dict[str, Any]]:
        for line in files.read_lines(path):
            if line.get("key") in wanted and line["key"] not in there:
                there[line["key"]] = None
                yield line

    _write(path, lines())
    return list(there)


def _graded(
    path: pathlib.Path, asked: Sequence[Asked], problems: Sequence[Problem], spec: config.Evaluate
) -> list[int]:
    """Grades the answers, and has them in the file in order; right ones of each problem.

    One is held at a time: of 64 samples of 32,000 tokens to 500 problems there are gigabytes.
    """
    right, cut = [0] * len(problems), 0
    ordered = sorted(asked, key=lambda one: (one.problem, one.sample))

    def lines() -> Iterator[dict[str, Any]]:
        nonlocal cut
        for one in over("answers graded", ordered):
            file.seek(places[one.key])
            line = json.loads(file.readline())
            found = grade(line["text"], problems[one.problem - 1].answer)
            right[one.problem - 1] += found.correct
            cut += not line["ended"]
            yield line | dataclasses.asdict(found)

    with open(path, "rb") as file, open_grader(spec) as grade:
        places, at = {}, 0
        for text in file:
            places[json.loads(text)["key"]], at = at, at + len(text)
        _write(path, lines())
    if cut:
        log.info("%d of %d answers were cut at the limit of their length", cut, len(asked))
    return right


def _write(path: pathlib.Path, lines: Iterable[Any]) -> None:
    files.write_text(path, (f"{json.dumps(line)}\n" for line in lines))

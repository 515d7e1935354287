"""Chain arithmetic modulo 19, worked out to a checkable answer: the bundled model's task.

A problem defines variables in shuffled order, some of them not needed, and asks for one:

    prompt      oak = fig * 3 ; elk = oak + fig ; fig = 7 ; bee = fig - 2 ; elk ?
    completion  fig = 7 ; oak = fig * 3 = 7 * 3 = 2 ; elk = oak + fig = 2 + 7 = 9 ; answer : 9

The solution works out just what is needed, in order of dependency: the definition, its values, the
result. Problems whose prompt hashes to 0 modulo 64 are test problems, all others train: the two
never meet, whatever the seeds.

    python -m e3jax.demo.generate --rows 8000 --seed 1 --split train --out train.jsonl.gz
    python -m e3jax.demo.generate --rows 1000 --seed 1 --split test --out test.jsonl
    python -m e3jax.demo.generate --tokenizer model/
"""

import argparse
import gzip
import io
import json
import multiprocessing
import operator
import os
import pathlib
import random
import zlib
from collections.abc import Iterator
from typing import Any

from e3jax.errors import UserError

MODULUS = 19
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
WORDS = (
    "ant bat bee cat cow dog elk fig fox gem hat hen ice ivy jar jay key kid log map "
    "net nut oak owl pan pea pie pig ram rat rye sea sky sun tea toe urn van wax yak"
).split()
SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
TOKENS = (*SPECIAL, *map(str, range(MODULUS)), *OPERATORS, *"=;?:", "answer", *WORDS)
TEST_SHARE = 64  # one problem in so many is a test problem
BLOCK = 10_000  # rows of one random stream, the unit of work of a process


def problem(rng: random.Random, most: int = 7) -> dict[str, str]:
    """One problem of 4 to `most` definitions: prompt, completion, answer."""
    names = rng.sample(WORDS, rng.randint(4, most))
    values: dict[str, int] = {}
    definitions: dict[str, str] = {}
    solutions: dict[str, str] = {}
    needs: dict[str, set[str]] = {}
    for place, name in enumerate(names):
        known = names[:place]
        if place == 0 or rng.random() < 0.12:
            values[name], needs[name] = rng.randrange(MODULUS), {name}
            definitions[name] = solutions[name] = f"{name} = {values[name]}"
            continue
        sign = rng.choice("+-*")
        left = rng.choice(known[-2:])  # recent ones make long chains
        if rng.random() < 0.5:
            right = rng.choice(known)
            second, needs[name] = values[right], needs[left] | needs[right] | {name}
        else:
            second = rng.randrange(MODULUS)
            right, needs[name] = str(second), needs[left] | {name}
        values[name] = OPERATORS[sign](values[left], second) % MODULUS
        definitions[name] = f"{name} = {left} {sign} {right}"
        worked = f"{values[left]} {sign} {second} = {values[name]}"
        solutions[name] = f"{definitions[name]} = {worked}"
    asked = names[-rng.randint(1, 3)]
    shuffled = rng.sample(names, len(names))
    prompt = " ; ".join(definitions[n] for n in shuffled) + f" ; {asked} ?"
    steps = " ; ".join(solutions[n] for n in names if n in needs[asked])
    answer = str(values[asked])
    return {
        "prompt": prompt,
        "completion": f"{steps} ; answer : {answer}",
        "answer": answer,
    }


def is_test(prompt: str) -> bool:
    """Whether a problem belongs to the test split: a property of its text alone."""
    return zlib.crc32(prompt.encode()) % TEST_SHARE == 0


def _block(job: tuple[str, int, int, int, int]) -> str:
    split, seed, most, number, rows = job
    rng = random.Random(f"{split}/{seed}/{number}")
    lines = []
    while len(lines) < rows:
        one = problem(rng, most)
        if is_test(one["prompt"]) == (split == "test"):
            lines.append(json.dumps(one))
    return "\n".join(lines) + "\n"


def problems(rows: int, seed: int, split: str, processes: int = 1, most: int = 7) -> Iterator[str]:
    """JSON lines of `rows` problems in blocks; the same for any number of processes."""
    jobs = [
        (split, seed, most, number, min(BLOCK, rows - number * BLOCK))
        for number in range(-(-rows // BLOCK))
    ]
    if processes == 1:
        yield from map(_block, jobs)
        return
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        yield from pool.imap(_block, jobs)


def write_problems(
    path: pathlib.Path, rows: int, seed: int, split: str, processes: int = 1, most: int = 7
) -> None:
    """Writes a jsonl file, gzipped if so named; whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(aside, "wb") as raw:
            # No name and no time in the gzip header: the same problems are the same bytes.
            packed = gzip.GzipFile("", "wb", 6, raw, mtime=0) if path.suffix == ".gz" else None
            with io.TextIOWrapper(packed or raw, "utf-8", newline="\n") as file:
                for block in problems(rows, seed, split, processes, most):
                    file.write(block)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def write_tokenizer(folder: pathlib.Path) -> None:
    """A word-level Hugging Face tokenizer of TOKENS: splits at spaces, puts <bos> first."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    ids = {token: number for number, token in enumerate(TOKENS)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(SPECIAL))
    save_tokenizer(tokenizer, folder)


def save_tokenizer(tokenizer: Any, folder: pathlib.Path) -> None:
    """A tokenizer that knows SPECIAL as a Hugging Face folder; it puts <bos> first."""
    from tokenizers import processors

    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))]
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "unk_token": "<unk>",
        "model_max_length": 512,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def main() -> None:
    """The command line: problems to a file, or the tokenizer to a folder."""
    parser = argparse.ArgumentParser(description="The bundled model's task.")
    parser.add_argument("--rows", type=int, default=8000, help="problems")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--split", choices=("train", "test"), default="train")
    parser.add_argument("--most", type=int, default=7, help="most definitions in a problem")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--out", type=pathlib.Path, help="jsonl or jsonl.gz file")
    parser.add_argument("--tokenizer", type=pathlib.Path, help="folder for the tokenizer")
    options = parser.parse_args()
    if options.tokenizer:
        write_tokenizer(options.tokenizer)
    if options.out:
        if options.rows < 1:
            raise UserError(f"--rows {options.rows}: expected at least 1")
        write_problems(
            options.out,
            options.rows,
            options.seed,
            options.split,
            options.processes,
            options.most,
        )


if __name__ == "__main__":
    main()

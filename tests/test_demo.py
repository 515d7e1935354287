"""The bundled task: its solutions recomputed from the prompts, splits apart, all tokenisable."""

import dataclasses
import gzip
import json
import operator
import pathlib
import re
import statistics

import numpy as np
import pytest

import e3jax.demo
from e3jax import configure, job
from e3jax.demo import generate
from e3jax.evaluate.exact import solve

DEMO = pathlib.Path(e3jax.demo.__file__).parent
MODULUS = 19


def rows_of(rows, seed=3, split="train", processes=1):
    blocks = generate.problems(rows, seed, split, processes)
    return [json.loads(line) for block in blocks for line in block.splitlines()]


@pytest.fixture(scope="module")
def bundled():
    """Both bundled files, by split."""
    with gzip.open(DEMO / "train.jsonl.gz", "rt") as file:
        train = [json.loads(line) for line in file]
    with (DEMO / "test.jsonl").open() as file:
        return {"train": train, "test": [json.loads(line) for line in file]}


def worked_out(prompt):
    """(values of the variables needed, all definitions, the variable asked): lazily, by recursion.

    Shares no code with the generator, which builds definitions forward and never reads a prompt.
    """
    *lines, question = prompt.split(" ; ")
    definitions = dict(line.split(" = ") for line in lines)
    assert len(definitions) == len(lines), "a variable is defined twice"
    asked = re.fullmatch(r"(\w+) \?", question)[1]
    values = {}

    def value(term):
        if term.isdigit():
            return int(term)
        if term not in values:
            words = definitions[term].split()
            result = value(words[0])
            if len(words) == 3:
                apply = {"+": operator.add, "-": operator.sub, "*": operator.mul}[words[1]]
                result = apply(result, value(words[2]))
            values[term] = result % MODULUS
        return values[term]

    value(asked)
    return values, definitions, asked


def check(problem):
    """Asserts that a completion is the whole solution of its prompt, and nothing but it."""
    values, definitions, asked = worked_out(problem["prompt"])
    *steps, last = problem["completion"].split(" ; ")
    assert problem["answer"] == str(values[asked])
    assert last == f"answer : {problem['answer']}"
    done = {}
    for step in steps:
        name, *terms = step.split(" = ")
        assert terms[-1] == str(values[name])
        words = definitions[name].split()
        # The definition, its variables as their values (which stand further up), the result.
        assert all(word in done for word in words if word.isalpha())
        expected = " ".join(done.get(word, word) for word in words)
        constant = len(words) == 1
        assert terms == ([expected] if constant else [definitions[name], expected, terms[-1]])
        done[name] = terms[-1]
    assert done.keys() == values.keys(), "a step is missing or not needed"
    assert step.startswith(f"{asked} = ")


@pytest.mark.parametrize("split", ["train", "test"])
def test_solutions_are_right(bundled, split):
    for problem in [*bundled[split], *rows_of(500, split=split)]:
        check(problem)


def test_check_can_fail(bundled):
    problem = next(p for p in bundled["train"] if p["completion"].count(";") > 2)
    for completion in (
        re.sub(
            r"= (\d+) ; answer",
            lambda m: f"= {(int(m[1]) + 1) % 19} ; answer",
            problem["completion"],
        ),
        problem["completion"].partition(" ; ")[2],  # the first step is missing
    ):
        with pytest.raises(AssertionError):
            check(problem | {"completion": completion})


def test_bundled_files_are_what_the_generator_writes(bundled):
    assert rows_of(len(bundled["test"]), seed=1, split="test") == bundled["test"]
    assert rows_of(len(bundled["train"]), seed=1) == bundled["train"]


def test_train_and_test_are_apart(bundled):
    prompts = {split: {p["prompt"] for p in rows} for split, rows in bundled.items()}
    assert len(prompts["test"]) >= 300 and len(prompts["train"]) >= 6000
    assert not prompts["train"] & prompts["test"]
    # By construction, so that any number of training problems stays apart from any test file.
    for seed in range(3):
        assert not any(generate.is_test(p["prompt"]) for p in rows_of(300, seed))
        assert all(generate.is_test(p["prompt"]) for p in rows_of(20, seed, "test"))


def test_the_seed_decides_everything(tmp_path, monkeypatch):
    monkeypatch.setattr(generate, "BLOCK", 40)  # several blocks
    assert rows_of(100) == rows_of(100)
    assert rows_of(40) == rows_of(100)[:40]
    assert not {p["prompt"] for p in rows_of(100)} & {p["prompt"] for p in rows_of(100, seed=4)}
    for name in ("a.jsonl.gz", "b.jsonl.gz"):
        generate.write_problems(tmp_path / name, 50, 3, "train")
    assert (tmp_path / "a.jsonl.gz").read_bytes() == (tmp_path / "b.jsonl.gz").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"a.jsonl.gz", "b.jsonl.gz"}


def test_processes_change_nothing():
    rows = generate.BLOCK + 10  # two blocks
    assert rows_of(rows, processes=2) == rows_of(rows)


def test_difficulty(bundled):
    """What a model of a few million parameters learns, and a guess does not pass."""
    rows = bundled["train"]
    lengths = [len(f"{p['prompt']} {p['completion']}".split()) + 2 for p in rows]  # <bos>, <eos>
    steps = [len(p["completion"].split(" ; ")) - 1 for p in rows]
    distractors = [len(p["prompt"].split(" ; ")) - 1 - n for p, n in zip(rows, steps, strict=True)]
    assert statistics.mean(lengths) >= 60 and max(lengths) <= 128  # the window of configs/demo.yaml
    assert statistics.mean(steps) > 3 and max(steps) == 7
    assert statistics.mean(d > 0 for d in distractors) > 0.9
    counts = np.bincount([int(p["answer"]) for p in rows], minlength=MODULUS)
    assert counts.min() > 0 and counts.max() / len(rows) < 0.2


def test_tokenizer(bundled, tmp_path):
    from transformers import AutoTokenizer

    generate.write_tokenizer(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (DEMO / "model" / name).read_bytes()
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "model")
    assert tokenizer.get_vocab() == {token: i for i, token in enumerate(generate.TOKENS)}
    assert len(generate.TOKENS) <= 96  # the vocabulary of the bundled model, padded
    texts = [f"{p['prompt']} {p['completion']}" for rows in bundled.values() for p in rows]
    encoded = tokenizer(texts)["input_ids"]
    used = {token for ids in encoded for token in ids}
    assert tokenizer.unk_token_id not in used
    assert used == set(range(len(generate.TOKENS))) - set(
        tokenizer.convert_tokens_to_ids(["<pad>", "<eos>", "<unk>"])
    )
    for text, ids in zip(texts[:50], encoded[:50], strict=True):
        assert ids[0] == tokenizer.bos_token_id and tokenizer.bos_token_id not in ids[1:]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_bundled_model():
    """At least 12 layers and at most 8 MB."""
    assert json.loads((DEMO / "model" / "config.json").read_text())["num_hidden_layers"] >= 12
    assert sum(f.stat().st_size for f in (DEMO / "model").iterdir()) <= 8_000_000


def test_bundled_model_solves_its_problems(one_device, tmp_path):
    """At least 97 % exact: of 100 problems that it was not trained on."""
    run = configure.load_run("demo", ["evaluate.rows=100"])
    job_ = job.open_job(run)
    spec = dataclasses.replace(run.evaluate, batch=100)
    right = solve(
        job_.params,
        job_.cfg,
        job_.problems,
        job_.tokenizer,
        spec,
        eos=job_.eos,
        dtype=job_.dtype,
        path=tmp_path / "answers.jsonl",
        inputs={},
    )
    assert len(right) == 100 and sum(right) >= 97


def test_command_line(tmp_path, monkeypatch):
    out, folder = tmp_path / "few.jsonl.gz", tmp_path / "tokenizer"
    arguments = f"--rows 30 --seed 5 --split test --out {out} --tokenizer {folder}"
    monkeypatch.setattr("sys.argv", ["generate", *arguments.split()])
    generate.main()
    with gzip.open(out, "rt") as file:
        assert [json.loads(line) for line in file] == rows_of(30, 5, "test")
    assert (folder / "tokenizer.json").is_file()
